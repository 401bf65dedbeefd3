"""The gate: what rounds passes, what is wrong does not."""

import jax.numpy as jnp
import numpy as np
import pytest

from blrlab import factors
from blrlab.bench import gate
from blrlab.bench.gate import Verdict

DTYPES = ("float32", "bfloat16", "float16")
FORMATS = ("dense", "low_rank", "monarch", "blast")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_a_product_in_its_own_dtype_passes_as_a_library(problem, format: str, dtype: str) -> None:
    layer = problem(format, dtype)
    verdict = gate.judge(layer, np.asarray(factors.apply(layer.kernel, layer.x)), None)
    assert verdict.passed
    assert 0 < verdict.error <= verdict.budget
    assert verdict.error < verdict.error_max <= verdict.budget_max


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_rounded_once_passes_in_whatever_array_it_comes(problem, dtype: str) -> None:
    layer = problem("monarch", dtype)
    rounded = layer.reference.astype(jnp.dtype(dtype))
    for output in (rounded, rounded.astype(np.float32), rounded.astype(np.float64)):
        assert gate.judge(layer, output, None).passed
        assert gate.judge(layer, output, (0.0, 0.5 * float(jnp.finfo(dtype).eps))).passed


def spoil(output: np.ndarray, value: float) -> np.ndarray:
    output = output.copy()
    output[3, 11] = value
    return output


WRONG = {
    "zeros": lambda y: np.zeros_like(y),
    "one NaN": lambda y: spoil(y, np.nan),
    "one infinity": lambda y: spoil(y, np.inf),
    "all NaN": lambda y: np.full_like(y, np.nan),
    "one zero": lambda y: spoil(y, 0.0),
    "columns swapped": lambda y: np.roll(y, 1, axis=1),
    "tokens swapped": lambda y: y[::-1],
    "the sign": lambda y: -y,
    "a bias": lambda y: y + 0.2 * np.abs(y).mean(),
    "a scale": lambda y: y * 1.05,
}


@pytest.mark.parametrize("yardstick", [None, (2e-3, 4e-3)], ids=["library", "own kernel"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_output_does_not_pass(problem, what: str, dtype: str, yardstick) -> None:
    layer = problem("monarch", dtype)
    verdict = gate.judge(layer, WRONG[what](layer.reference), yardstick)
    assert not verdict.passed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epsilons", [0.5, 30.0])
def test_errors_of_the_size_of_rounding_pass_and_larger_ones_do_not(problem, dtype: str, epsilons: float) -> None:
    layer = problem("blast", dtype)
    noise = np.random.default_rng(0).uniform(-1, 1, layer.reference.shape)
    output = layer.reference * (1 + epsilons * float(jnp.finfo(dtype).eps) * noise)
    assert gate.judge(layer, output, None).passed == (epsilons < 1)


def test_one_element_that_is_off_shows_where_the_norm_does_not(problem) -> None:
    layer = problem("monarch")
    _, _, budget, budget_max = gate.judge(layer, layer.reference, None)
    rms = float(np.sqrt(np.mean(layer.reference**2)))
    verdict = gate.judge(layer, spoil(layer.reference, layer.reference[3, 11] + 1.2 * budget_max * rms), None)
    assert verdict.error_max == pytest.approx(1.2 * budget_max, rel=1e-6)
    assert verdict.error < budget
    assert not verdict.passed


@pytest.mark.parametrize(("times", "passed"), [(1.9, True), (2.5, False)])
def test_an_own_kernel_is_held_to_twice_the_errors_of_the_library(problem, times: float, passed: bool) -> None:
    layer = problem("monarch")
    noise = np.random.default_rng(0).normal(size=layer.reference.shape)
    yardstick = gate.errors(layer.reference + 1e-4 * noise, layer.reference)
    output = layer.reference + times * 1e-4 * noise
    assert gate.judge(layer, output, yardstick).passed == passed


@pytest.mark.parametrize("yardstick", [(np.nan, 1.0), (1.0, np.nan)])
def test_a_yardstick_of_nan_lets_nothing_pass(problem, yardstick: tuple[float, float]) -> None:
    layer = problem("monarch")
    assert not gate.judge(layer, layer.reference, yardstick).passed


def test_errors_are_what_a_count_by_hand_gives() -> None:
    reference = np.array([[3.0, 4.0], [0.0, 0.0]])  # norm 5, RMS 2.5
    output = np.array([[3.0, 4.0], [0.3, -0.4]], np.float32)
    assert gate.errors(output, reference) == pytest.approx((0.5 / 5, 0.4 / 2.5))
    assert gate.errors(reference.astype(np.float32), reference) == (0.0, 0.0)


def test_errors_of_a_layer_of_zeros_are_no_crash() -> None:
    """A layer may be all zeros, such as a residual projection that starts there."""
    zeros = np.zeros((2, 3))
    assert gate.errors(zeros.astype(np.float32), zeros) == (0.0, 0.0)
    assert not Verdict(*gate.errors(np.ones((2, 3)), zeros), 0.1, 0.1).passed


@pytest.mark.parametrize(
    ("error", "error_max", "passed"),
    [(1.0, 2.0, True), (1.1, 2.0, False), (1.0, 2.1, False), (np.nan, 0.0, False), (0.0, np.nan, False)],
)
def test_both_errors_count(error: float, error_max: float, passed: bool) -> None:
    assert Verdict(error, error_max, budget=1.0, budget_max=2.0).passed == passed
