"""Every Triton kernel compiles without a GPU for the chips it is meant for, and fits their shared memory."""

import json

import pytest
from blrlab_ops import dispatch
from blrlab_ops.tuning import from_json, store

CAPABILITIES = (80, 86, 87, 90)
KERNELS = {
    "product_kernel",
    "stream_kernel",
    "sum_kernel",
    "chain_kernel",
    "mix_kernel",
    "rank_mix_kernel",
    "core_mix_kernel",
    "token_mix_kernel",
}
HOPPER_KERNELS = {"hopper_chain_kernel"}


@pytest.fixture(scope="module")
def compiled(run_child, needs_triton):
    return [json.loads(line) for line in run_child("compiled_kernels.py").splitlines()]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_is_compiled(compiled, capability):
    rows = [row for row in compiled if row["capability"] == capability]
    hopper = capability == 90 and not dispatch.gluon_problem()
    assert {row["kernel"] for row in rows} == KERNELS | (HOPPER_KERNELS if hopper else set())
    implementations = {(format, impl) for format in dispatch.IMPLS for impl in dispatch.impls(format)}
    triton = {(format, impl) for format, impl in implementations if dispatch.needs_triton(impl)}
    if not hopper:
        triton = {(format, impl) for format, impl in triton if not dispatch.is_hopper(impl)}
    assert {(row["format"], row["impl"]) for row in rows} == triton


def test_every_dtype_is_compiled(compiled):
    assert {row["dtype"] for row in compiled} >= {"torch.bfloat16", "torch.float16", "torch.float32"}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_fit(compiled, capability):
    rows = [row for row in compiled if row["capability"] == capability]
    too_large = [row for row in rows if not 0 <= row["shared"] <= row["limit"]]
    assert not too_large
    assert any(row["shared"] for row in rows)


def test_committed_configurations_are_compiled(compiled):
    tables = [from_json(file.read_text(encoding="utf-8")) for file in store.DEFAULTS.glob("*.json")]
    committed = {
        (device, str(key), impl)
        for device, table in tables
        for key, entries in table.items()
        for impl in filter(dispatch.is_triton, entries)
    }
    rows = [row for row in compiled if row["committed"]]
    assert committed
    assert {(*row["committed"], row["impl"]) for row in rows} == committed
    assert not [row for row in rows if row["shared"] > row["limit"]]
    assert {row["capability"] for row in rows if "H100" in row["committed"][0]} == {90}


def test_launches_overlap_where_the_chip_can(compiled):
    for row in compiled:
        follows = row["kernel"] not in {"chain_kernel", "mix_kernel", *HOPPER_KERNELS} and row["place"] > 0
        expected = row["capability"] >= 90 and follows
        assert row["early"] == expected, row
    signalling = {row["kernel"] for row in compiled if row["signals"]}
    assert signalling == KERNELS - {"chain_kernel", "token_mix_kernel"}
    assert {row["capability"] for row in compiled if row["signals"]} == {90}


def test_a_part_of_the_grid_compiles(run_child, needs_triton):
    part = ("--arch=86", "--format=low_rank", "--net=gpt2s", "--layer=c_proj", "--limit=1", "--jobs=1")
    header, *lines = run_child("../compile_all.py", *part).splitlines()
    assert "launches in 1 processes" in header
    assert len(lines) == 2
    assert all(line.endswith("0 fail") and "sm_86" in line for line in lines)
