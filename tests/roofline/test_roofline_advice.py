"""Advice: what it says of layers whose answer is known."""

import dataclasses
import itertools
import math

import pytest
from blrlab_ops import cost, devices, shapes
from blrlab_ops.devices import Device
from blrlab_ops.shapes import Layer
from hypothesis import given
from hypothesis import strategies as st

from blrlab.roofline import advice, predict, sentences
from blrlab.roofline.predict import Factored

A40 = devices.get("a40")
QKVO = shapes.layers("llama7b")[0]
SMALL = Layer("own", "64x96", 64, 96, 16, 0, 1, 0, 1)
layers = st.builds(
    lambda i, o: Layer("own", "any", 16 * i, 16 * o, 1, 0, 1, 0, 1), st.integers(1, 80), st.integers(1, 80)
)


def _us(device: Device, layer: Layer, op: str, blocks: int, rank: int, tokens: int) -> float:
    return predict.fastest(device, layer, Factored(op, blocks, rank), tokens, "bfloat16")[1].us


def test_candidates_have_blocks_that_divide_both_sides() -> None:
    assert advice.candidates(Layer("own", "c_fc", 768, 2304, 1, 0, 1, 0, 1)) == [
        ("low_rank", 1),
        *(("monarch", b) for b in (2, 3, 4, 6, 8, 12, 16, 24, 32, 64)),
        *(("blast", b) for b in (2, 3, 4, 6, 8, 12, 16, 24, 32, 64)),
    ]
    assert advice.candidates(QKVO, ["dense", "blast"]) == [("blast", b) for b in (2, 4, 8, 16, 32, 64)]
    assert advice.candidates(Layer("own", "tiny", 16, 16, 1, 0, 1, 0, 1)) == [], "rank 16 is as large as dense"


@given(layers, st.sampled_from(["low_rank", "monarch", "blast"]), st.sampled_from([1, 2, 4, 8, 16]))
def test_ranks_are_all_that_are_smaller_than_dense(layer: Layer, op: str, blocks: int) -> None:
    blocks = 1 if op == "low_rank" else blocks
    unit = math.lcm(16, blocks) if op == "monarch" else 16
    dense = layer.in_features * layer.out_features
    every = itertools.takewhile(
        lambda rank: advice.params(layer, Factored(op, blocks, rank)) < dense, itertools.count(unit, unit)
    )
    assert list(advice.ranks(layer, op, blocks)) == list(every)


@given(layers, st.integers(1, 20))
def test_a_grid_is_even_and_no_longer_than_asked(layer: Layer, most: int) -> None:
    every, grid = advice.ranks(layer, "low_rank", 1), advice.ranks(layer, "low_rank", 1, most)
    assert set(grid) <= set(every)
    assert len(grid) <= most
    assert bool(grid) == bool(every)
    assert not grid or grid[0] == grid.step


@pytest.mark.parametrize("name", list(devices.DEVICES))
@given(
    st.sampled_from([layer for layer in shapes.LAYERS if layer.name in ("qkvo", "c_fc", "adaln", "gate_up")]),
    st.sampled_from(advice.TOKENS),
    st.data(),
)
def test_speed_ups_fall_with_the_rank(name: str, layer: Layer, tokens: int, data: st.DataObject) -> None:
    device = devices.get(name)
    op, blocks = data.draw(st.sampled_from(advice.candidates(layer)))
    every = advice.ranks(layer, op, blocks)
    some = sorted(data.draw(st.lists(st.sampled_from(every), min_size=2, max_size=6)))
    times = [_us(device, layer, op, blocks, rank, tokens) for rank in some]
    assert times == sorted(times)
    least = [predict.bound(device, layer, Factored(op, blocks, rank), tokens, "bfloat16").us for rank in some]
    assert least == sorted(least)


@pytest.mark.parametrize("tokens", [1, 128, 4096])
def test_the_widest_rank_is_the_last_that_beats_dense(tokens: int) -> None:
    layer = shapes.layers("gpt2s")[1]
    dense = predict.dense_us(A40, layer, tokens, "bfloat16")
    for each in advice.advise(A40, layer, tokens, "bfloat16"):
        every = advice.ranks(layer, each.op, each.blocks)
        known = [rank for rank in every if _us(A40, layer, each.op, each.blocks, rank, tokens) < dense]
        assert each.algorithm.widest == max(known, default=None)
        assert each.bound.widest is not None
        assert each.bound.widest >= (each.algorithm.widest or 0)
        halves = [rank for rank in every if advice.layer_factor(layer, Factored(each.op, each.blocks, rank)) >= 2]
        at_half = dense / _us(A40, layer, each.op, each.blocks, max(halves), tokens)
        assert each.algorithm.at[2] == pytest.approx(at_half)
        assert (each.algorithm.at[4] or 0) >= at_half


def test_the_best_at_half_the_size_comes_first() -> None:
    found = advice.advise(A40, QKVO, 1024, "bfloat16")
    at_half = [round(each.algorithm.at[2] or 0, 2) for each in found]
    assert at_half == sorted(at_half, reverse=True)
    assert len(found) == len(advice.candidates(QKVO))


def test_decode_is_as_much_faster_as_there_are_fewer_bytes() -> None:
    for each in advice.advise(A40, QKVO, 1, "bfloat16", ["low_rank", "monarch"]):
        parameters = 4096 * 4096 // 2
        bytes_ratio = (4096 * 4096 + 2 * 4096) / (parameters + 2 * 4096)
        assert each.bound.at[2] == pytest.approx(bytes_ratio, rel=1e-5)  # dense reads its 8 KB of x again
    best = advice.advise(A40, QKVO, 1, "bfloat16", ["low_rank"])[0]
    assert best.algorithm.at[2] == pytest.approx(2, rel=2e-3)


def test_many_tokens_are_as_much_faster_as_there_are_fewer_parameters() -> None:
    plain = dataclasses.replace(A40, l2_bytes_per_s=None, dram_bytes_per_s=1e15)
    for each in advice.advise(plain, QKVO, 4096, "bfloat16", ["low_rank", "monarch"]):
        assert each.bound.at == {2: pytest.approx(2), 4: pytest.approx(4)}
        assert each.algorithm.at == pytest.approx(each.bound.at)


def test_records_have_a_grid_of_tokens_and_ranks() -> None:
    found = advice.records(A40, QKVO, "bfloat16", ["monarch"])
    assert [row["blocks"] for row in found] == [[b, b] for b in (2, 4, 8, 16, 32, 64)]
    row = found[3]
    assert list(row) == [
        *("kind", "device", "device_name", "op", "net", "layer", "in_features", "out_features", "blocks", "dtype"),
        *("tokens", "ranks", "layer_factor", "speedup", "bound_speedup", "algorithm", "widest_rank"),
    ]
    assert (row["kind"], row["device"], row["op"]) == ("advice", "a40", "monarch")
    assert row["tokens"] == [2**power for power in range(15)]
    assert len(row["ranks"]) <= advice.MOST_RANKS
    for name in ("speedup", "bound_speedup", "algorithm"):
        assert [len(line) for line in row[name]] == [len(row["ranks"])] * len(row["tokens"])
    assert len(row["layer_factor"]) == len(row["ranks"])
    assert len(row["widest_rank"]) == len(row["tokens"])
    half = row["ranks"].index(1024)
    assert row["layer_factor"][half] == 2
    n = row["tokens"].index(1024)
    known = {each.blocks: each for each in advice.advise(A40, QKVO, 1024, "bfloat16", ["monarch"])}[16]
    assert row["speedup"][n][half] == pytest.approx(known.algorithm.at[2], rel=1e-3)
    assert row["bound_speedup"][n][half] == pytest.approx(known.bound.at[2], rel=1e-3)
    assert row["widest_rank"][n] == known.algorithm.widest
    assert row["algorithm"][n][half] == "fused"


def test_no_algorithm_beats_its_bound() -> None:
    for row in advice.records(A40, SMALL, "bfloat16"):
        for known, least in zip(row["speedup"], row["bound_speedup"], strict=True):
            assert all(k <= b * 1.001 for k, b in zip(known, least, strict=True))


def test_sentences_say_what_can_and_what_cannot() -> None:
    found = advice.advise(A40, QKVO, 1024, "bfloat16")
    low_rank, monarch, blast, estimates = sorted(sentences.advice(A40, QKVO, 1024, found), key=_order)
    assert "NVIDIA A40, 1024 tokens, 4096 x 4096: low rank is predicted to be faster than dense up to rank" in low_rank
    assert "at half the size" in monarch
    assert "Monarch with" in monarch
    assert "BLAST with" in blast
    assert estimates == sentences.ESTIMATES


def _order(line: str) -> int:
    return [name in line for name in ("low rank", "Monarch", "BLAST", "Estimates")].index(True)


def test_a_hopeless_layer_is_told_so() -> None:
    found = advice.advise(A40, QKVO, 1024, "bfloat16", ["blast"])
    never = found[0]._replace(algorithm=advice.Reading(None, {2: 0.5, 4: 0.9}, 0.99), factor=None)
    line = sentences.advice(A40, QKVO, 1024, [never])[0]
    assert line.endswith(
        "would not beat dense by any known algorithm even if both ran at their least times, "
        f"though by its bound it would up to rank {never.bound.widest}."
    )
    nothing = sentences.advice(A40, SMALL, 1, [])
    assert nothing == [
        "NVIDIA A40, 1 token, 64 x 96: "
        "no format has a rank, a multiple of 16, that makes this layer smaller than dense."
    ]


def test_params_are_the_cost_models() -> None:
    assert advice.params(QKVO, Factored("monarch", 16, 1024)) == cost.params("monarch", 4096, 4096, (16, 16), 64)
    assert advice.layer_factor(QKVO, Factored("low_rank", 1, 1024)) == 2
