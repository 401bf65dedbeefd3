"""Layers small enough to benchmark in no time."""

from collections.abc import Callable

import jax
import numpy as np
import pytest

from blrlab import factors
from blrlab.bench import Problem, Settings
from blrlab.factors import Spec
from blrlab.roofline import Peaks

SPECS = {
    "dense": Spec("dense", 24, 36),
    "low_rank": Spec("low_rank", 24, 36, rank=5),
    "monarch": Spec("monarch", 24, 36, (3, 2), 4),
    "blast": Spec("blast", 24, 36, (2, 3), 5),
}
MACHINE = {
    "device": "a test",
    "torch": "2",
    "triton": None,
    "jax": "0",
    "driver": None,
    "commit": "c0",
    "time": "now",
}


@pytest.fixture(scope="session")
def problem() -> Callable[..., Problem]:
    """Make a layer of 7 tokens in a format and a dtype."""

    def make(format: str, dtype: str = "float32") -> Problem:
        spec, draw = SPECS[format], np.random.default_rng(1)
        sizes = factors.shapes(spec)
        leaves = {"": sizes} if format == "dense" else sizes
        kernel = {name: jax.numpy.asarray(draw.normal(size=size), dtype) for name, size in leaves.items()}
        x = jax.numpy.asarray(draw.normal(size=(7, 24)), dtype)
        return Problem("own", "c_fc", spec, kernel[""] if format == "dense" else kernel, x)

    return make


@pytest.fixture
def settings() -> Callable[..., Settings]:
    def make(*backends: str, seconds: float = 1e-4) -> Settings:
        return Settings(backends, seconds, Peaks("a test", 1e11, 1e10, "float32", "made up"), MACHINE)

    return make
