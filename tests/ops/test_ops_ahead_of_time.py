"""Every Triton kernel compiles without a GPU for the chips it is meant for, and fits their shared memory."""

import json

import pytest
from blrlab_ops import dispatch

# Largest shared memory of one program, by compute capability.
LIMITS = {80: 163 * 1024, 86: 99 * 1024, 87: 163 * 1024, 90: 227 * 1024}
KERNELS = {
    "product_kernel",
    "stream_kernel",
    "sum_kernel",
    "chain_kernel",
    "mix_kernel",
    "rank_mix_kernel",
    "core_mix_kernel",
}


@pytest.fixture(scope="module")
def compiled(run_child, needs_triton):
    return [json.loads(line) for line in run_child("compiled_kernels.py").splitlines()]


@pytest.mark.parametrize("capability", LIMITS)
def test_every_kernel_is_compiled(compiled, capability):
    rows = [row for row in compiled if row["capability"] == capability]
    assert {row["kernel"] for row in rows} == KERNELS
    implementations = {(format, impl) for format in dispatch.IMPLS for impl in dispatch.impls(format)}
    triton = {(format, impl) for format, impl in implementations if dispatch.is_triton(impl)}
    assert {(row["format"], row["impl"]) for row in rows} == triton


def test_every_dtype_is_compiled(compiled):
    assert {row["dtype"] for row in compiled} == {"torch.bfloat16", "torch.float16", "torch.float32"}


@pytest.mark.parametrize("capability", LIMITS)
def test_kernels_fit(compiled, capability):
    rows = [row for row in compiled if row["capability"] == capability and not row["again"]]
    too_large = [row for row in rows if not 0 <= row["shared"] <= LIMITS[capability]]
    assert not too_large
    assert any(row["shared"] for row in rows)


def test_launches_overlap_where_the_chip_can(compiled):
    for row in compiled:
        expected = row["capability"] >= 90 and row["kernel"] not in ("chain_kernel", "mix_kernel") and row["place"] > 0
        assert row["early"] == expected, row
    signalling = {row["kernel"] for row in compiled if row["signals"]}
    assert signalling == KERNELS - {"chain_kernel"}
    assert {row["capability"] for row in compiled if row["signals"]} == {90}
