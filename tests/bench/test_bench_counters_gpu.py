"""The cost model against what a GPU counts."""

import shutil

import pytest

from blrlab.bench import counters


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("ncu") is None, reason="ncu is not on the path")
def test_operations_and_bytes_are_those_that_the_profiler_counts() -> None:
    rows = list(counters.count("llama7b", "qkvo", "1024,16384"))
    assert {(row["op"], row["impl"]) for row in rows} == set(counters.ALGORITHM)
    for row in rows:
        assert row["counted_tensor_flops"] == pytest.approx(row["tensor_flops"], rel=0.02)
        if row["cuda_flops"]:
            assert row["counted_cuda_flops"] == pytest.approx(row["cuda_flops"], rel=0.02)
        if row["dram_bytes"] > 2 * row["l2_size"]:
            assert row["counted_dram_bytes"] == pytest.approx(row["dram_bytes"], rel=0.1)
