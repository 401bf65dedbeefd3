"""The gate itself, and the command that applies it."""

import doctest
import json

import blrlab_ops
import pytest
import torch
from blrlab_ops import budgets, testing, verify


def test_errors_are_relative_to_the_reference():
    ref = torch.tensor([3.0, 4.0, 0.0, 0.0])  # norm 5, RMS 2.5
    assert testing.errors(ref + torch.tensor([0.0, 0.0, 0.5, 0.0]), ref) == pytest.approx((0.1, 0.2))
    assert testing.errors(torch.zeros(0, 3), torch.zeros(0, 3)) == (0.0, 0.0)
    assert testing.errors(torch.zeros(3), torch.zeros(3)) == (0.0, 0.0)
    assert testing.errors(torch.ones(3), torch.zeros(3)) == (float("inf"), float("inf"))


@pytest.mark.parametrize("impl", ["torch_bmm", "triton_two_stage"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1.0])
def test_the_gate_fails_on_one_wrong_element(impl, wrong, monkeypatch):
    x, factors, _ = testing.random_operands(testing.Case("monarch", 50, 64, 96, (4, 4), 8))
    linear = testing.factored.linear

    def damaged(x, factors, bias=None, *, impl=None):
        y = linear(x, factors, bias, impl="torch_bmm" if impl != "ref" else "ref")
        if impl == damaged.target:
            y[7, 7] += wrong
        return y

    damaged.target = None
    monkeypatch.setattr(testing.factored, "linear", damaged)
    assert testing.check(impl, x, factors).passed
    damaged.target = impl
    assert not testing.check(impl, x, factors).passed


def test_budgets_against_hand_counts():
    assert budgets.of_kernel((0.25, 2.0), 0.01, peak=1) == pytest.approx((0.51, 4.01))
    assert budgets.of_kernel((0.25, 2.0), 0.01, peak=5, times=3) == pytest.approx((0.76, 6.025))
    assert budgets.of_library(0.01, 0) == pytest.approx((0.02, 0.16))
    assert budgets.of_library(0.0, 400).error == pytest.approx(20 * torch.finfo(torch.float32).eps)


def test_poison_fills_new_memory_and_is_lifted():
    with testing.poisoned():
        assert torch.empty(1000).isnan().all()
        assert torch.ones(3).new_empty(3, 3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_factors_are_seeded_and_scaled():
    for format, blocks in (("low_rank", (1, 1)), ("monarch", (4, 2)), ("blast", (4, 2))):
        first, same, other = (testing.random_factors(format, 256, 512, blocks, 64, seed=s) for s in (1, 1, 2))
        assert all(torch.equal(first[name], same[name]) for name in first)
        assert not any(torch.equal(first[name], other[name]) for name in first)
        assert blrlab_ops.to_dense(first).std().item() == pytest.approx(1 / 16, rel=0.1)


def test_shapes_are_parsed_or_refused():
    assert verify.parse_shape("low_rank:0x30x42:r5") == ("low_rank", 0, 30, 42, (1, 1), 5)
    assert verify.parse_shape("blast:7x30x42:b3x2:r5") == ("blast", 7, 30, 42, (3, 2), 5)
    for text in (
        "monarch:1x30x42",
        "monarch:1x30x42:b4x2:r5",
        "monrach:1x30x42:b3x2:r5",
        "blast:1x30x42:b0x2:r5",
    ):
        with pytest.raises(ValueError):
            verify.parse_shape(text)


def test_examples():
    assert tuple(doctest.testmod(verify)) == (0, 1)


def test_the_command_prints_rows(capsys):
    assert verify.main(["--format=blast", "--dtype=bfloat16", "--device=cpu", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    wanted = [layer for layer in testing.AWKWARD if layer.format == "blast"]
    assert len(rows) == 2 * len(wanted)
    assert {"op", "impl", "in_features", "out_features", "blocks", "rank", "tokens", "dtype"} < set(rows[0])
    assert all(row["passed"] and row["error"] <= row["error_budget"] for row in rows)
    assert verify.main(["--shape=monarch:5x30x42:b3x2:r5", "--impl=ref", "--device=cpu"]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["op", "impl"],
        ["monarch", "ref"],
    ]


def test_the_command_fails_on_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(testing, "check", lambda *_: testing.Verdict(1.0, 1.0, 0.1, 0.1))
    assert verify.main(["--shape=monarch:5x30x42:b3x2:r5", "--impl=ref"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argument",
    ["--impl=torch_bm", "--impl=triton_two_stage", "--format=monrach", "--shape=monarch:5x30x42:b3x4:r5"],
)
def test_the_command_refuses_what_makes_no_sense(argument, capsys):
    assert verify.main([argument, "--device=cpu"]) == 2
    assert capsys.readouterr().err.startswith("verify: ")
