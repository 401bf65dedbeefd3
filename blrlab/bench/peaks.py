"""The ceilings of the machine at hand: its matrix rate and its copy bandwidth, measured by XLA."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from blrlab.roofline import Peaks

# On a CPU a layer's weights stay in cache between calls, so the ceiling of memory is that of a cached copy.
SIZES = {"cpu": (1024, 2**20), "gpu": (8192, 2**30)}


def measure_peaks(device: str, dtype: str, seconds: float = 0.5) -> Peaks:
    """Measure a square matrix product and a copy; the best of the samples is a ceiling.

    Args:
      device: its name, for the record.
      dtype: of the product.
      seconds: of measuring, for each of the two.
    """
    side, size = SIZES.get(jax.default_backend(), SIZES["gpu"])
    matrix = jax.random.normal(jax.random.key(0), (side, side), dtype)
    product = jax.jit(jax.default_matmul_precision("highest")(jnp.matmul))  # as the contenders: no tf32
    block = jax.random.normal(jax.random.key(1), (size // 4,), jnp.float32)
    negate = jax.jit(jnp.negative)
    rate = 2 * side**3 / _best(lambda: product(matrix, matrix), seconds)
    bandwidth = 2 * block.nbytes / _best(lambda: negate(block), seconds)
    return Peaks(device, rate, bandwidth, dtype, "measured here")


def _best(call: Callable[[], jax.Array], seconds: float) -> float:
    """Return the shortest time of one call, in s, calls being queued ten at a time."""
    call().block_until_ready()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        for _ in range(10):
            last = call()
        last.block_until_ready()
        best = min(best, (time.perf_counter() - started) / 10)
    return best
