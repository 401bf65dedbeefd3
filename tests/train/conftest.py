"""A language model small enough to train in no time: one embedding, dropout and one Monarch layer."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blrlab import train
from blrlab.data import Batches
from blrlab.factors import Spec
from blrlab.layers import FactoredDense

VOCABULARY, WIDTH, CONTEXT, BATCH = 16, 8, 6, 4


class Bigram(nn.Module):
    """Tokens [B, T] -> logits [B, T, N]; each position sees itself alone."""

    dropout: float = 0.5

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Embed(VOCABULARY, WIDTH, name="wte")(tokens)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return FactoredDense(VOCABULARY, spec=Spec("monarch", WIDTH, VOCABULARY, (2, 2), 3), name="head")(x)


class Setting:
    """A model with its optimiser and its text; the jitted step is shared, so that it compiles once."""

    def __init__(self, dropout: float):
        self.model = Bigram(dropout)
        self.schedule = train.make_schedule(0.05, steps=20, warmup=3, final_fraction=0.1)
        self.optimizer = train.make_optimizer(self.schedule, weight_decay=0.1, clip_norm=1.0)
        self.step = train.make_step(self.model, self.optimizer)
        self._init = jax.jit(lambda key: self.model.init(key, jnp.zeros((1, 1), jnp.int32))["params"])
        self._start = jax.jit(lambda params, key: train.init_state(params, self.optimizer, key))
        # Each token mostly follows its predecessor, so there is something to learn.
        jumps = np.random.default_rng(0).integers(1, 3, 400)
        self.tokens = (np.cumsum(jumps) % VOCABULARY).astype(np.uint8)

    def params(self) -> dict[str, Any]:
        """The same parameters at every call, as arrays of their own: a step donates them."""
        return self._init(jax.random.key(0))

    def state(self, seed: int = 1) -> train.State:
        return self._start(self.params(), jax.random.key(seed))

    def batches(self) -> Batches:
        return Batches(self.tokens, CONTEXT, BATCH, seed=7)

    def plan(self, **changes: Any) -> train.Plan:
        fields = {"phase": "dense", "steps": 20, "batch": BATCH, "log_every": 1, "checkpoint_every": 5}
        return train.Plan(**(fields | {"data_hash": "abc"} | changes))

    def windows(self, count: int) -> np.ndarray:
        return np.lib.stride_tricks.sliding_window_view(self.tokens, CONTEXT + 1)[:count].astype(np.int32)


@pytest.fixture(scope="session")
def setting() -> Setting:
    return Setting(dropout=0.5)


@pytest.fixture(scope="session")
def still() -> Setting:
    """The same without dropout."""
    return Setting(dropout=0.0)


@pytest.fixture(scope="session")
def child() -> Callable[..., subprocess.CompletedProcess]:
    """Run a Python program in another process, with the import path of this one."""

    def run(program: str, *arguments: object, devices: int = 1) -> subprocess.CompletedProcess:
        flags = f"--xla_force_host_platform_device_count={devices}"
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{flags} --xla_backend_optimization_level=0",  # compiling takes longer than running
        }
        command = [sys.executable, "-c", program, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)

    return run
