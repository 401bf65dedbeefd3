"""The single-peak model against its formulas written out, and what sets the two models apart."""

import dataclasses
from pathlib import Path

import pytest
from blrlab_ops import devices, shapes
from blrlab_ops.shapes import Layer

from blrlab import records
from blrlab.records import Record
from blrlab.roofline import predict, single_peak

A40 = devices.get("a40")
QKVO, GATE_UP, DOWN = shapes.layers("llama7b")
N, PEAK, RATE = 1024, 149.7e12, 696e9


def _rows(layer: Layer, tokens: int = N) -> dict[tuple[str, str], Record]:
    return {(row["op"], row["variant"]): row for row in single_peak.compare(A40, layer, tokens, "bfloat16")}


def _by_hand(layer: Layer, rate: float) -> dict[tuple[str, str], float]:
    """us of every variant: operations over the peak, or bytes over the rate."""
    n, i, o = N, layer.in_features, layer.out_features
    r, b = layer.rank, layer.blast_blocks
    m, c = layer.monarch_rank, layer.monarch_blocks
    low_rank, monarch, blast = (r * (i + o), m * (i + o), r * (i + o + b * b))
    elements = {
        ("dense", "matmul"): (i * o, 0),
        ("low_rank", "plain"): (low_rank, 2 * n * r),
        ("low_rank", "fused"): (low_rank, 0),
        ("monarch", "plain"): (monarch, 4 * c * n * m + 2 * n * o),
        ("monarch", "right"): (monarch, 2 * c * n * m + 2 * n * o),
        ("monarch", "right_left"): (monarch, 2 * c * n * m),
        ("blast", "plain"): (blast, 4 * b * n * r + 4 * b * n * r),
        ("blast", "three_stage"): (blast, 2 * b * n * r + 2 * b * n * r),
        ("blast", "partial"): (blast, 2 * b * n * r),
        ("blast", "full"): (blast, 0),
    }
    found = {}
    for name, (parameters, traffic) in elements.items():
        flops, moved = 2 * n * parameters, 2 * (n * i + parameters + n * o + traffic)
        intensity = flops / moved
        found[name] = 1e6 * flops / min(PEAK, intensity * rate)
    return found


@pytest.mark.parametrize("layer", [QKVO, GATE_UP, DOWN], ids=lambda layer: layer.name)
def test_every_variant_by_hand(layer: Layer) -> None:
    rows = _rows(layer)
    assert {name: row["single_peak_us"] for name, row in rows.items()} == pytest.approx(_by_hand(layer, RATE))
    binary = {name: row["single_peak_binary_us"] for name, row in rows.items()}
    assert binary == pytest.approx(_by_hand(layer, 696 * 2**30))


def test_one_number_by_hand() -> None:
    # BLAST in three products: x, y 2 x 4.19 M, V, U 2 x 4.19 M, S 0.26 M and 4 x 16.8 M elements of Z and W.
    row = _rows(QKVO)["blast", "three_stage"]
    assert row["single_peak_bytes"] == 2 * (4 * 4194304 + 262144 + 4 * 16777216) == 168296448
    assert row["single_peak_us"] == pytest.approx(168.296448 / 0.696)
    assert row["single_peak_term"] == "dram"


def test_rows_are_records_with_the_fields_of_both_models() -> None:
    rows = _rows(QKVO)
    assert list(rows) == [(variant.op, variant.name) for variant in single_peak.VARIANTS]
    plain = next(row for row in predict.rows(A40, QKVO, "blast", N, "bfloat16") if row["algorithm"] == "plain")
    assert {name: rows["blast", "plain"][name] for name in plain} == plain
    assert rows["dense", "matmul"]["single_peak_speedup"] == 1
    right, whole = rows["monarch", "right"], rows["monarch", "plain"]
    assert (right["launches"], whole["launches"]) == (3, 4)
    assert whole["dram_bytes"] - right["dram_bytes"] == 2 * 2 * N * 16 * 1024, "T is not permuted"


def test_measured_facts_belong_to_one_card_net_and_size() -> None:
    assert _rows(QKVO)["monarch", "plain"]["measured_relative"] == [1.14, 1.68]
    assert _rows(QKVO)["monarch", "right"]["measured_relative"] is None
    assert _rows(QKVO, 512)["monarch", "plain"]["measured_relative"] is None
    h100 = single_peak.compare(devices.get("h100"), QKVO, N, "bfloat16")
    assert all(row["measured_relative"] is None for row in h100)


def test_variants_of_some_formats() -> None:
    rows = single_peak.compare(A40, QKVO, N, "bfloat16", ["blast"])
    assert {row["op"] for row in rows} == {"blast"}
    assert [row["single_peak_speedup"] for row in rows] == [
        row["single_peak_speedup"] for row in _rows(QKVO).values() if row["op"] == "blast"
    ]


@pytest.mark.parametrize("layer", [QKVO, GATE_UP, DOWN], ids=lambda layer: layer.name)
def test_the_two_models_order_partial_fusion_and_three_products_differently(layer: Layer) -> None:
    rows = _rows(layer)
    partial, three = rows["blast", "partial"], rows["blast", "three_stage"]
    assert partial["single_peak_us"] < three["single_peak_us"]
    assert partial["us"] > three["us"]
    assert partial["term"] == "l2"
    assert partial["terms"]["cuda"] < 0.1 * partial["us"], "not the rate of CUDA cores"
    full = rows["blast", "full"]
    assert full["single_peak_us"] == min(row["single_peak_us"] for row in rows.values() if row["op"] == "blast")
    assert full["us"] == max(row["us"] for row in rows.values())


@pytest.mark.parametrize("layer", [QKVO, GATE_UP, DOWN], ids=lambda layer: layer.name)
def test_only_the_tile_that_does_not_fit_would_make_partial_fusion_win(layer: Layer) -> None:
    registers = 2**18  # bytes of a multiprocessor
    for row in single_peak.mixing(A40, layer, N, "bfloat16"):
        tokens, ranks = row["mixing_tile"]
        x, V, S, W = N * layer.in_features, layer.in_features * layer.rank, 256 * layer.rank, N * 16 * layer.rank
        assert row["accumulator_bytes"] == 4 * 16 * tokens * ranks
        assert row["mixing_l2_bytes"] == 2 * (x * -(-layer.rank // ranks) + (V + S) * (N // tokens) + W)
        assert (row["us"] < row["three_stage_us"]) == (row["accumulator_bytes"] > registers)
        rate = row["break_even_l2_bytes_per_s"]
        assert (rate < A40.l2_bytes_per_s) == (row["us"] < row["three_stage_us"])


def test_break_even_is_where_both_take_as_long() -> None:
    row = single_peak.mixing(A40, QKVO, N, "bfloat16")[2]
    rate = row["break_even_l2_bytes_per_s"]
    at = single_peak.mixing(dataclasses.replace(A40, l2_bytes_per_s=rate), QKVO, N, "bfloat16")[2]
    assert at["us"] == pytest.approx(at["three_stage_us"], rel=1e-4)
    few = single_peak.mixing(A40, QKVO, 1, "bfloat16")[0]
    assert few["break_even_l2_bytes_per_s"] is None or few["break_even_l2_bytes_per_s"] >= 0


def test_break_even_knows_always_and_never() -> None:
    fast = predict.stages(A40, QKVO, predict.Factored("low_rank", 1, 16), "two_stage", N, "bfloat16")
    slow = predict.stages(A40, QKVO, predict.Factored("dense"), "matmul", N, "bfloat16")
    assert single_peak.break_even(fast, slow, A40, "bfloat16") == 0.0
    assert single_peak.break_even(slow, fast, A40, "bfloat16") is None


def test_the_studys_tables_are_its_records() -> None:
    study = Path(__file__).parents[2] / "experiments/2026-11_roofline_of_the_paper"
    told, found = (
        (study / "README.md").read_text(encoding="utf-8"),
        records.read(study / "records/a40_single_peak.jsonl"),
    )
    assert single_peak.markdown([row for row in found if "variant" in row]) in told
    assert single_peak.mixing_markdown([row for row in found if "mixing_tile" in row]) in told
    steps = records.read(study / "records/mixing_step.jsonl")
    assert all(f" {row['instructions']:.1f} | {row['us']:.0f} |" in told for row in steps)


def test_markdown_has_a_line_a_row_and_no_ragged_ones() -> None:
    rows, tiles = single_peak.compare(A40, QKVO, N, "bfloat16"), single_peak.mixing(A40, QKVO, N, "bfloat16")
    for text, found in ((single_peak.markdown(rows), rows), (single_peak.mixing_markdown(tiles), tiles)):
        lines = text.splitlines()
        assert len(lines) == 2 + len(found)
        assert len({line.count("|") for line in lines}) == 1
    assert "| qkvo | blast | three_stage | 225 | 242 | dram | 0.95 | 242 | dram | 0.95 | 1.05 |  |" in (
        single_peak.markdown(rows)
    )
    unknown = single_peak.mixing(dataclasses.replace(A40, l2_bytes_per_s=None), QKVO, N, "bfloat16")
    assert "57, 14, 73, ?" in single_peak.mixing_markdown(unknown)
