"""Tests of what follows a product in a Triton kernel, run by test_ops_interpreter.py under TRITON_INTERPRET=1."""

import importlib
import itertools

import blrlab_ops
import pytest
import torch
from blrlab_ops import budgets, dispatch, launching, testing
from blrlab_ops.testing import Case

LAYERS = {
    "low_rank": Case("low_rank", 21, 30, 42, (1, 1), 5),
    "monarch": Case("monarch", 21, 30, 42, (3, 2), 5),
    "blast": Case("blast", 21, 30, 42, (3, 2), 7),
}
KERNELS = [(format, impl) for format in LAYERS for impl in dispatch.impls(format) if dispatch.is_portable(impl)]
ACTIVATIONS = (None, "gelu", "gelu_tanh", "silu")
OPERANDS = [names for count in range(3) for names in itertools.combinations(("multiply", "residual"), count)]
each_kernel = pytest.mark.parametrize(("format", "impl"), KERNELS)


def _operands(format: str, tokens: int = 21, dtype: torch.dtype = torch.float32):
    """Draw (x, factors, bias, {"multiply": ..., "residual": ...})."""
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randn(2, tokens, 42, generator=generator, dtype=torch.float64).to(dtype)
    layer = testing.random_operands(LAYERS[format]._replace(tokens=tokens), dtype=dtype)
    return *layer, dict(zip(("multiply", "residual"), drawn, strict=True))


def _wide(given):
    """Turn every tensor into float64."""
    if isinstance(given, dict):
        return {name: _wide(each) for name, each in given.items()}
    return given.double() if isinstance(given, torch.Tensor) else given


def _check(impl: str, x, factors, bias, follows) -> None:
    """Hold the output to the budget of a kernel, its memory full of NaN beforehand."""
    truth = blrlab_ops.linear(_wide(x), _wide(factors), _wide(bias), **_wide(follows), impl="ref")
    yardstick = blrlab_ops.linear(x, factors, bias, **follows, impl="torch_bmm")
    with testing.poisoned():
        y = blrlab_ops.linear(x, factors, bias, **follows, impl=impl)
    assert y.shape == truth.shape
    assert y.dtype == x.dtype
    found = testing.errors(y, truth)
    times = 3 if follows.get("activation") else 2  # one activation takes several roundings, PyTorch takes others
    epsilon, peak = torch.finfo(x.dtype).eps, testing.peak(truth)
    allowed = budgets.of_kernel(testing.errors(yardstick, truth), epsilon, peak, times)
    assert found[0] <= allowed.error, (found, allowed)
    assert found[1] <= allowed.error_max, (found, allowed)


@each_kernel
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_alone_and_together_with_and_without_a_bias(format, impl, activation):
    x, factors, bias, drawn = _operands(format)
    for names in OPERANDS if activation is None else OPERANDS[::3]:
        follows = {"activation": activation, **{name: drawn[name] for name in names}}
        _check(impl, x, factors, bias, follows)
    _check(impl, x, factors, None, {"activation": activation, **drawn})


@pytest.mark.parametrize("format", LAYERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_of_one_token_on_cuda_cores(format, activation):
    x, factors, bias, drawn = _operands(format, tokens=1)
    _check("triton_streaming", x, factors, bias, {"activation": activation, **drawn})
    _check("triton_streaming", x, factors, None, {"activation": activation})


@each_kernel
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_in_float16(format, impl, activation):
    x, factors, bias, drawn = _operands(format, dtype=torch.float16)
    _check(impl, x, factors, bias, {"activation": activation, **drawn})


@each_kernel
def test_nothing_is_rounded_before_the_residual(format, impl):
    """In float16, a residual that takes the product away leaves what PyTorch, which rounds in between, has lost."""
    x, factors, bias, _ = _operands(format, dtype=torch.float16)
    residual = -blrlab_ops.linear(x, factors, bias, impl=impl)
    assert blrlab_ops.linear(x, factors, bias, residual=residual, impl=impl).any()
    assert not blrlab_ops.linear(x, factors, bias, residual=residual.clone().requires_grad_(), impl=impl).any()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # 1 / (1 + inf) is 0, as it should be
@each_kernel
def test_large_numbers_do_not_overflow(format, impl):
    x, factors, bias, _ = _operands(format)
    bias = 1e4 * torch.sign(bias)
    for activation in ACTIVATIONS[1:]:
        y = blrlab_ops.linear(x, factors, bias, activation=activation, impl=impl)
        expected = torch.where(bias > 0, blrlab_ops.linear(x, factors, bias, impl="ref"), 0.0)
        torch.testing.assert_close(y, expected)


@each_kernel
def test_leading_shapes_and_strides_of_the_operands(format, impl):
    x, factors, bias, drawn = _operands(format)
    shape = (3, 1, 7, 42)
    sparse = torch.stack([drawn["multiply"]] * 2, dim=-1)[..., 0].unflatten(0, shape[:3])  # of column stride 2
    turned = drawn["residual"].mT.contiguous().mT.unflatten(0, shape[:3])
    assert not sparse.is_contiguous()
    assert not turned.is_contiguous()
    _check(impl, x.unflatten(0, shape[:3]), factors, bias, {"multiply": sparse, "residual": turned})
    row = {"activation": "silu", "multiply": sparse[0, 0, 0], "residual": turned[0, 0, 0]}
    _check(impl, x[0], factors, bias, row)
    expanded = {"multiply": torch.full((), 2.0).expand(shape), "residual": bias.expand(shape)}
    _check(impl, x.unflatten(0, shape[:3]), factors, bias, expanded)


@each_kernel
def test_without_tokens(format, impl):
    x, factors, bias, drawn = _operands(format, tokens=0)
    assert blrlab_ops.linear(x, factors, bias, activation="gelu", **drawn, impl=impl).shape == (0, 42)


@each_kernel
def test_the_input_as_residual_is_not_written(format, impl):
    """A square layer whose residual is its own input, as in a transformer."""
    layer = LAYERS[format]._replace(out_features=30)
    x, factors, bias = testing.random_operands(layer)
    before = x.clone()
    _check(impl, x, factors, bias, {"residual": x, "multiply": x})
    assert torch.equal(x, before)


@each_kernel
def test_gradients_equal_those_of_torch(format, impl):
    x, factors, bias, drawn = _operands(format)
    leaves = [each.requires_grad_() for each in (x, *factors.values(), bias, *drawn.values())]
    found, expected = (
        torch.autograd.grad(
            blrlab_ops.linear(x, factors, bias, activation="gelu_tanh", **drawn, impl=each).square().sum(), leaves
        )
        for each in (impl, "torch_bmm")
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@each_kernel
@pytest.mark.parametrize("wanted", ["x", "bias", "multiply", "residual"])
def test_gradients_of_one_operand_alone(format, impl, wanted):
    x, factors, bias, drawn = _operands(format)
    leaf = {"x": x, "bias": bias, **drawn}[wanted].requires_grad_()
    found, expected = (
        torch.autograd.grad(blrlab_ops.linear(x, factors, bias, activation="silu", **drawn, impl=each).sum(), leaf)
        for each in (impl, "torch_bmm")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@each_kernel
def test_it_is_fused_unless_autograd_records(format, impl, monkeypatch):
    module = importlib.import_module(f"blrlab_ops.{format}.{impl}")
    seen = []

    def spied(launches):
        seen.extend(launch.constants.get("ACTIVATION") for launch in launches)
        return run(launches, x.device)

    run = launching.run
    monkeypatch.setattr(launching, "run", lambda launches, device: spied(launches))
    x, factors, bias, drawn = _operands(format)
    blrlab_ops.linear(x, factors, bias, activation="silu", **drawn, impl=impl)
    assert seen[-1] == "silu"
    x.requires_grad_()
    with torch.no_grad():
        blrlab_ops.linear(x, factors, bias, activation="silu", **drawn, impl=impl)
    assert seen[-1] == "silu"
    blrlab_ops.linear(x, factors, bias, activation="silu", **drawn, impl=impl)
    assert seen[-1] is None
    y = module.linear.operator(x, *factors.values(), bias, *drawn.values(), "silu")
    with pytest.raises(RuntimeError, match="fused epilogue has no gradient"):
        y.sum().backward()
