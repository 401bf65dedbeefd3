"""Rows of predictions: fields, units, and that nothing measured lies below them."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from blrlab_ops import devices, shapes
from blrlab_ops.shapes import Layer

from blrlab import records
from blrlab.errors import InputError
from blrlab.roofline import predict
from blrlab.roofline.predict import Factored

ROOT = Path(__file__).parents[2]
A40 = devices.get("a40")
QKVO = shapes.layers("llama7b")[0]


def _row(op: str, algorithm: str, tokens: int = 1024, **options: str) -> records.Record:
    dtype = options.get("dtype", "bfloat16")
    return next(row for row in predict.rows(A40, QKVO, op, tokens, dtype) if row["algorithm"] == algorithm)


def test_a_row_has_the_fields_of_a_record_and_says_which_layer_where() -> None:
    row = _row("monarch", "two_stage")
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    told = ("kind", "device", "device_name", "op", "algorithm", "net", "layer", "in_features", "out_features", "blocks")
    assert [row[name] for name in told] == [
        *("bound", "a40", "NVIDIA A40", "monarch", "two_stage", "llama7b", "qkvo", 4096, 4096, [16, 16]),
    ]
    assert [row[name] for name in ("rank", "block_rank", "tokens", "dtype", "launches", "source")] == [
        *(1024, 64, 1024, "bfloat16", 2, "prediction"),
    ]
    assert [_row(op, name)["block_rank"] for op, name in (("dense", "matmul"), ("blast", "fused"))] == [None, None]


def test_a_row_by_hand() -> None:
    n, i, r, b = 1024, 4096, 1024, 16
    x, T, V = n * i, n * b * r, i * r
    row = _row("monarch", "two_stage")
    assert row["tensor_flops"] == 2 * n * r * (i + i)
    assert row["cuda_flops"] == 0
    assert row["dram_bytes"] == 2 * (2 * x + 2 * V + 2 * T), "33.5 MB of T do not stay in 6 MB"
    first = x * r // 256 + V * n // 128 + T  # 128 x 256 tiles: 4 across, 8 down
    second = T * 1 + V * n // 128 + x
    assert row["l2_bytes"] == 2 * (first + second)
    one_dram = 2 * (x + V + T) / 696e9
    assert row["us"] == pytest.approx(2e6 * one_dram)
    assert (row["term"], row["terms"]["dram"]) == ("dram", pytest.approx(row["us"]))
    assert row["terms"]["tensor"] == pytest.approx(1e6 * row["tensor_flops"] / 149.7e12)
    assert row["bound_us"] == pytest.approx(row["terms"]["tensor"])
    assert row["speedup"] == pytest.approx(2e6 * n * i * i / 149.7e12 / row["us"])


def test_dense_is_as_fast_as_itself() -> None:
    assert _row("dense", "matmul")["speedup"] == 1


def test_a_term_without_a_rate_is_none() -> None:
    assert _row("dense", "matmul")["terms"]["launch"] is None
    assert _row("dense", "matmul")["terms"]["l2"] > 0
    unknown = predict.rows(dataclasses.replace(A40, l2_bytes_per_s=None, launch_us=2.0), QKVO, "dense", 1, "bfloat16")
    assert unknown[0]["terms"]["l2"] is None
    assert unknown[0]["terms"]["launch"] == 2


def test_float32_has_bytes_of_four_and_the_rate_of_cuda_cores() -> None:
    half, full = _row("dense", "matmul"), _row("dense", "matmul", dtype="float32")
    assert full["dram_bytes"] == 2 * half["dram_bytes"]
    assert full["terms"]["tensor"] == pytest.approx(half["terms"]["tensor"] * 149.7 / 37.4)


def test_monarch_blocks_must_share_the_rank() -> None:
    layer = Layer("own", "8x8", 8, 8, 1, 6, 4, 6, 4)
    assert predict.chosen(layer, "blast") == Factored("blast", 4, 6)
    with pytest.raises(InputError, match="4 Monarch blocks"):
        predict.chosen(layer, "monarch")


def test_short_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    mine = dataclasses.replace(A40, name="a card of the lab")
    assert predict.short_name(devices.get("h100")) == "h100_sxm"
    devices.save(mine, name="lab")
    assert predict.short_name(mine) == "lab_measured"
    assert predict.short_name(dataclasses.replace(A40, name="of nobody")) == "of nobody"


STUDY = ROOT / "experiments/2026-11_gpt2_first_run/records/h100_full_monarch.jsonl"


def test_no_verified_time_lies_below_its_prediction() -> None:
    rows = [row for row in records.read(STUDY) if row["kind"] == "bench" and row["passed"]]
    assert rows
    for row in rows:
        device = devices.match(row["device"])
        assert device
        layer = Layer(row["net"], row["layer"], row["in_features"], row["out_features"], row["tokens"], 0, 1, 0, 1)
        factored = Factored(row["op"], row["blocks"][0], row["rank"])
        assert factored.block_rank == row["block_rank"]
        _, found = predict.fastest(device, layer, factored, row["tokens"], row["dtype"])
        assert found.us <= row["p50"], row


def test_the_package_loads_neither_jax_nor_torch() -> None:
    code = (
        "import sys, blrlab.roofline.__main__\n"
        "blrlab.roofline.__main__.main(['--layer=qkvo', '--advice', '--tokens=16'])\n"
        "blrlab.roofline.__main__.main(['--layer=qkvo', '--compare-single-peak'])\n"
        "print(sorted({'jax', 'jaxlib', 'flax', 'torch', 'triton', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "[]\n"
