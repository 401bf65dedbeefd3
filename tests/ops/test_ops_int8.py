"""int8 factors: what they stand for, how far off, and in which words they are refused."""

import blrlab_ops
import pytest
import torch
from blrlab_ops import int8, testing
from blrlab_ops.testing import Case
from hypothesis import given, settings
from hypothesis import strategies as st

CASES = (
    Case("low_rank", 3, 64, 96, (1, 1), 24),
    Case("monarch", 3, 64, 96, (4, 2), 12),
    Case("blast", 3, 64, 96, (4, 2), 24),
)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.format)


@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_weight_is_kept_within_a_percent(case, dtype):
    _, factors, _ = testing.random_operands(case, dtype=dtype)
    small = int8.quantise(factors)
    assert int8.error(factors, small) < 0.012
    assert {name: small[name].dtype for name in "VU"} == {"V": torch.int8, "U": torch.int8}
    assert {small[name].dtype for name in int8.SCALES} == {dtype}
    assert all(small[name].shape == factors[name].shape for name in factors)
    assert all(small[name].abs().max() <= 127 for name in "VU")


@each_case
def test_rows_of_different_size_cost_nothing(case):
    """Without balancing, the small rows of U would round to nothing beside the large ones."""
    _, factors, _ = testing.random_operands(case)
    spread = torch.logspace(0, -4, case.rank)
    skewed = factors | {"U": factors["U"] * spread[:, None]}
    small = int8.quantise(skewed)
    assert int8.error(skewed, small) < 0.012
    kept = {name: each for name, each in small.items() if name not in int8.SCALES}
    assert (kept["U"].abs().float().amax(-1) > 30).all()


@each_case
def test_calibrated_scales_beat_the_largest_number(case, monkeypatch):
    _, factors, _ = testing.random_operands(case._replace(in_features=512))
    calibrated = int8.error(factors, int8.quantise(factors))
    monkeypatch.setattr(int8, "CLIPS", (1.0,))
    assert calibrated <= int8.error(factors, int8.quantise(factors)) * 1.001


@given(format=st.sampled_from(("low_rank", "monarch", "blast")), power=st.integers(-20, 20), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_scaling_the_factors_scales_what_they_stand_for(format, power, seed):
    case = Case(format, 1, 24, 36, (1, 1) if format == "low_rank" else (2, 3), 6)
    factors = testing.random_factors(format, *case[2:], seed=seed)
    scaled = factors | {"V": factors["V"] * 2.0**power}
    ours, theirs = (int8.dequantise(int8.quantise(each)) for each in (factors, scaled))
    torch.testing.assert_close(
        blrlab_ops.to_dense(theirs), blrlab_ops.to_dense(ours) * 2.0**power, rtol=1e-4, atol=1e-4 * 2.0**power
    )


@each_case
def test_zeros_stay_zeros(case):
    _, factors, _ = testing.random_operands(case)
    small = int8.quantise(factors | {"U": torch.zeros_like(factors["U"])})
    assert not blrlab_ops.to_dense(int8.dequantise(small)).any()


@each_case
def test_on_a_cpu_the_factors_are_widened(case):
    x, factors, bias = testing.random_operands(case)
    small, residual = int8.quantise(factors), torch.randn(case.tokens, case.out_features)
    y = int8.linear(x, small, bias, activation="silu", residual=residual)
    wide = int8.dequantise(small)
    torch.testing.assert_close(y, blrlab_ops.linear(x, wide, bias, activation="silu", residual=residual))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(int8.linear(x, small).sum(), [x])
    torch.testing.assert_close(gradient[0], blrlab_ops.to_dense(wide).sum(1))


@each_case
def test_what_does_not_fit_is_refused(case, needs_triton):
    x, factors, _ = testing.random_operands(case)
    small = int8.quantise(factors)
    with pytest.raises(ValueError, match="U_scale"):
        int8.linear(x, {name: each for name, each in small.items() if name != "U_scale"})
    with pytest.raises(ValueError, match=r"x must be \[..., 64\]"):
        int8.linear(x[:, :-1], small)
    with pytest.raises(ValueError, match="'triton_fused' of int8 factors is not one of"):
        int8.linear(x, small, impl="triton_fused")
    with pytest.raises(ValueError, match="activation 'relu'"):
        int8.linear(x, small, activation="relu")
    with pytest.raises(blrlab_ops.CannotRun, match="not a CUDA device"):
        int8.linear(x, small, impl="triton_streaming")
    with pytest.raises(ValueError, match="no known format"):
        int8.quantise({"V": factors["V"]})


def test_the_kernels_in_the_interpreter(run_child, needs_triton):
    run_child("-m", "pytest", "-q", "-p", "no:cacheprovider", "interpreted_int8.py", interpret=True)
