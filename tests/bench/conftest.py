"""Layers small enough to benchmark in no time, and a device whose ceilings are made up."""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["test_bench_*.py"]  # PyTorch is an extra

# i, o, blocks, and the rank r, for monarch r' of one block
SIZES = {
    "dense": (24, 36, (1, 1), 0),
    "low_rank": (24, 36, (1, 1), 5),
    "monarch": (24, 36, (3, 2), 4),
    "blast": (24, 36, (2, 3), 5),
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
def group() -> Callable[..., Any]:
    """Make a layer in some formats, at 7 tokens unless told otherwise."""
    from blrlab_ops.testing import Case

    from blrlab.bench.problem import Group

    def make(*formats: str, dtype: str = "float32", tokens: int = 7, **fields: Any) -> Group:
        cases = tuple(Case(format, tokens, *SIZES[format]) for format in formats)
        return Group("own", "c_fc", dtype, cases, **fields)

    return make


@pytest.fixture(scope="session")
def problem(group: Callable[..., Any]) -> Callable[..., Any]:
    """Make the tensors of a layer in one format."""
    import torch

    def make(format: str, dtype: str = "float32", tokens: int = 7) -> Any:
        (made,) = group(format, dtype=dtype, tokens=tokens).problems(torch.device("cpu"))
        return made

    return make


@pytest.fixture(scope="session")
def device() -> Callable[..., Any]:
    """Make the ceilings of a device: 1e12 operations and 1e11 bytes a second unless told otherwise."""
    from blrlab_ops.devices import Device

    def make(**fields: Any) -> Device:
        made_up: dict[str, Any] = {
            "name": "a test",
            "tensor_flops": 1e12,
            "cuda_flops": 1e12,
            "dram_bytes_per_s": 1e11,
            "l2_bytes": 0,
            "shared_bytes_per_sm": 0,
            "sms": 1,
            "compute_capability": None,
            "source": "made up",
        }
        return Device(**made_up | fields)

    return make


@pytest.fixture(scope="session")
def settings(device: Callable[..., Any]) -> Callable[..., Any]:
    """Make the settings of a benchmark on the processor, or for looks on a GPU."""
    import torch

    from blrlab.bench.card import Card
    from blrlab.bench.rows import Settings

    def make(*impls: str, where: str = "cpu", sheet: Any = None, **ceilings: Any) -> Settings:
        card = Card(torch.device(where), device(**ceilings), sheet, "float32")
        return Settings(impls, 1e-4, card, MACHINE)

    return make
