"""The gate: what rounds passes, what is wrong does not."""

import math

import pytest
import torch
from torch import Tensor

from blrlab.bench import backends, gate
from blrlab.bench.gate import Errors, Judge, Verdict
from blrlab.bench.problem import Problem, dense_weight

DTYPES = ("float32", "bfloat16", "float16")
FORMATS = ("dense", "low_rank", "monarch", "blast")


def reference(layer: Problem) -> Tensor:
    return layer.x.double() @ dense_weight(layer.kernel)


def epsilon(dtype: str) -> float:
    return torch.finfo(getattr(torch, dtype)).eps


def noise(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_a_product_in_its_own_dtype_passes_as_a_library(problem, format: str, dtype: str) -> None:
    layer = problem(format, dtype)
    verdict = Judge(layer).judge(backends.plain(layer.x, layer.kernel), None)
    assert verdict.passed
    assert 0 < verdict.error <= verdict.budget
    assert verdict.error < verdict.error_max <= verdict.budget_max


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_rounded_once_passes_in_whatever_dtype_it_comes(problem, dtype: str) -> None:
    layer = problem("monarch", dtype)
    rounded = reference(layer).to(layer.x.dtype)
    for output in (rounded, rounded.float(), rounded.double()):
        assert Judge(layer).judge(output, None).passed
        assert Judge(layer).judge(output, Errors(0.0, 0.0, 1.0)).passed


def spoil(output: Tensor, value: float) -> Tensor:
    output = output.clone()
    output[3, 11] = value
    return output


WRONG = {
    "zeros": torch.zeros_like,
    "one NaN": lambda y: spoil(y, math.nan),
    "one infinity": lambda y: spoil(y, math.inf),
    "all NaN": lambda y: torch.full_like(y, math.nan),
    "its largest element a zero": lambda y: torch.where(y.abs() == y.abs().max(), 0.0, y),
    "columns swapped": lambda y: y.roll(1, 1),
    "tokens swapped": lambda y: y.flip(0),
    "the sign": torch.neg,
    "a bias": lambda y: y + 0.2 * y.abs().mean(),
    "a scale": lambda y: y * 1.05,
}


@pytest.mark.parametrize("yardstick", [None, Errors(2e-3, 4e-3, 3.0)], ids=["library", "own kernel"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_output_does_not_pass(problem, what: str, dtype: str, yardstick: Errors | None) -> None:
    layer = problem("monarch", dtype)
    assert not Judge(layer).judge(WRONG[what](reference(layer)), yardstick).passed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epsilons", [0.5, 30.0])
def test_errors_of_the_size_of_rounding_pass_and_larger_ones_do_not(problem, dtype: str, epsilons: float) -> None:
    layer = problem("blast", dtype)
    off = 1 + epsilons * epsilon(dtype) * noise(reference(layer)).clamp(-1, 1)
    assert Judge(layer).judge(reference(layer) * off, None).passed == (epsilons < 1)


def test_one_element_that_is_off_shows_where_the_norm_does_not(problem) -> None:
    layer = problem("monarch")
    wanted = reference(layer)
    _, _, budget, budget_max = Judge(layer).judge(wanted, None)
    rms = float(wanted.square().mean().sqrt())
    verdict = Judge(layer).judge(spoil(wanted, float(wanted[3, 11]) + 1.2 * budget_max * rms), None)
    assert verdict.error_max == pytest.approx(1.2 * budget_max, rel=1e-6)
    assert verdict.error < budget
    assert not verdict.passed


@pytest.mark.parametrize(("times", "passed"), [(1.9, True), (2.5, False)])
def test_an_own_kernel_is_held_to_twice_the_errors_of_the_library(problem, times: float, passed: bool) -> None:
    layer = problem("monarch")
    judge, wanted = Judge(layer), reference(layer)
    yardstick = judge.errors(wanted + 1e-4 * noise(wanted))
    assert judge.judge(wanted + times * 1e-4 * noise(wanted), yardstick).passed == passed


@pytest.mark.parametrize("yardstick", [Errors(math.nan, 1.0, 1.0), Errors(1.0, math.nan, 1.0)], ids=str)
def test_a_yardstick_of_nan_lets_nothing_pass(problem, yardstick: Errors) -> None:
    layer = problem("monarch")
    assert not Judge(layer).judge(reference(layer), yardstick).passed


def test_weights_of_nan_let_nothing_pass(problem) -> None:
    layer = problem("dense")
    layer.kernel[5, 5] = math.nan
    for output in (backends.plain(layer.x, layer.kernel), torch.zeros(7, 36)):
        assert not Judge(layer).judge(output, None).passed


def test_errors_are_what_a_count_by_hand_gives(problem) -> None:
    layer = problem("dense")
    layer.x.zero_()
    layer.kernel.zero_()
    layer.x[0, 0], layer.kernel[0, 0], layer.kernel[0, 1] = 1.0, 3.0, 4.0  # norm 5, RMS 5 / sqrt(7 x 36)
    output = torch.zeros(7, 36)
    output[0, 0], output[0, 1], output[1, 0], output[1, 1] = 3.0, 4.0, 0.3, -0.4
    rms = 5 / (7 * 36) ** 0.5
    assert Judge(layer).errors(output) == pytest.approx((0.5 / 5, 0.4 / rms, 4 / rms))
    assert Judge(layer).errors(reference(layer)) == pytest.approx((0.0, 0.0, 4 / rms))


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_errors_do_not_depend_on_how_many_tokens_are_held_at_once(problem, rows: int, monkeypatch) -> None:
    layer = problem("blast")
    output = reference(layer) + 1e-3 * noise(reference(layer))
    whole = Judge(layer).errors(output)
    monkeypatch.setattr(gate, "CHUNK_BYTES", rows * 8 * (24 + 2 * 36))
    assert Judge(layer).errors(output) == pytest.approx(whole, rel=1e-12)
    spoiled = Judge(layer).errors(spoil(output, math.nan))
    assert math.isnan(spoiled.error), "tokens after it do not hide a NaN"
    assert math.isnan(spoiled.error_max)


def test_errors_of_a_layer_of_zeros_are_no_crash(problem) -> None:
    """A layer may be all zeros, such as a residual projection that starts there."""
    layer = problem("dense")
    layer.kernel.zero_()
    assert Judge(layer).errors(torch.zeros(7, 36)) == (0.0, 0.0, 1.0)
    assert Judge(layer).judge(torch.zeros(7, 36), None).passed
    assert not Judge(layer).judge(torch.ones(7, 36), None).passed
    assert not Judge(layer).judge(torch.full((7, 36), math.nan), None).passed


@pytest.mark.parametrize("shape", [(7, 35), (36, 7), (252,), (1, 7, 36)], ids=str)
def test_an_output_of_another_shape_is_said_to_be_one(problem, shape) -> None:
    with pytest.raises(ValueError, match=r"its output is \[.*\], not \[7, 36\]"):
        Judge(problem("dense")).errors(torch.zeros(shape))


def test_a_backend_of_other_weights_is_judged_against_those(problem) -> None:
    layer = problem("dense")
    judge, other = Judge(layer), layer.kernel * 1.5
    output = layer.x @ other
    assert judge.judge(output, None, other).passed
    assert not judge.judge(output, None).passed
    assert judge.judge(reference(layer), None).passed, "and the layer's own are still there"


@pytest.mark.parametrize(
    ("error", "error_max", "passed"),
    [(1.0, 2.0, True), (1.1, 2.0, False), (1.0, 2.1, False), (math.nan, 0.0, False), (0.0, math.nan, False)],
)
def test_both_errors_count(error: float, error_max: float, passed: bool) -> None:
    assert Verdict(error, error_max, budget=1.0, budget_max=2.0).passed == passed
