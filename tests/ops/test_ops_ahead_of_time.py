"""Every Triton kernel compiles without a GPU for the chips it is meant for, and fits their shared memory."""

import json

import pytest

# Largest shared memory of one program, by compute capability.
LIMITS = {80: 163 * 1024, 86: 99 * 1024, 87: 163 * 1024, 90: 227 * 1024}


@pytest.fixture(scope="module")
def compiled(run_child, needs_triton):
    return [json.loads(line) for line in run_child("compiled_kernels.py").splitlines()]


@pytest.mark.parametrize("capability", LIMITS)
def test_kernels_fit(compiled, capability):
    rows = [row for row in compiled if row["capability"] == capability]
    assert {row["kernel"] for row in rows} == {"product_kernel", "mix_kernel"}
    assert {row["dtype"] for row in rows} == {"torch.bfloat16", "torch.float16", "torch.float32"}
    assert {row["format"] for row in rows} == {"low_rank", "monarch", "blast"}
    too_large = [row for row in rows if not 0 < row["shared"] <= LIMITS[capability]]
    assert not too_large
