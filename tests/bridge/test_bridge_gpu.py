"""The bridge on a CUDA device: run with `JAX_PLATFORMS=cuda pytest -m gpu tests/bridge`."""

import jax
import numpy as np
import pytest

from blrlab import factors
from blrlab.bridge import to_torch
from blrlab.factors import Spec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="JAX has no GPU here"),
]

SPECS = (
    Spec("low_rank", 768, 2304, rank=192),
    Spec("monarch", 768, 2304, (4, 4), 48),
    Spec("blast", 768, 2304, (6, 6), 192),
)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.format)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_memory_and_same_product(spec, dtype):
    blrlab_ops = pytest.importorskip("blrlab_ops")
    kernel = factors.init(jax.random.key(0), spec, dtype)
    x = jax.random.normal(jax.random.key(1), (384, 768), dtype)
    bridged = to_torch(kernel)
    assert all(bridged[name].data_ptr() == kernel[name].unsafe_buffer_pointer() for name in kernel)
    assert {tensor.device.type for tensor in bridged.values()} == {"cuda"}
    with jax.default_matmul_precision("highest"):
        wanted = np.asarray(factors.apply(kernel, x)).astype(np.float64)
    for impl in ("torch_bmm", "triton_two_stage"):
        found = blrlab_ops.linear(to_torch(x), bridged, impl=impl).double().cpu().numpy()
        error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert error < {"float32": 1e-5, "bfloat16": 1.5e-2}[dtype], impl


def test_torch_waits_for_unfinished_work():
    """A long computation is handed over at once; torch must see its end, not its middle."""
    matrix = jax.random.normal(jax.random.key(0), (4096, 4096)) / 64

    @jax.jit
    def power(matrix):
        return jax.lax.fori_loop(0, 50, lambda _, product: product @ matrix, matrix)

    expected = np.asarray(power(matrix))
    np.testing.assert_array_equal(to_torch(power(matrix)).cpu().numpy(), expected)
