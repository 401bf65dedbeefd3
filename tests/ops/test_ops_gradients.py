"""Gradients on the CPU: of torch_bmm by autograd, and the written-out ones that the Triton operators use."""

import importlib

import blrlab_ops
import pytest
import torch
from blrlab_ops import testing
from blrlab_ops.testing import Case

LAYERS = (
    Case("low_rank", 63, 30, 42, (1, 1), 5),
    Case("low_rank", 0, 30, 42, (1, 1), 5),
    Case("monarch", 63, 30, 42, (3, 2), 5),
    Case("monarch", 0, 30, 42, (3, 2), 5),
    Case("blast", 63, 30, 42, (3, 2), 7),
    Case("blast", 0, 30, 42, (3, 2), 7),
)
each_layer = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{layer.format}-{layer.tokens}")


@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_bmm_gradients_are_within_their_budgets(layer, dtype):
    x, factors, bias = testing.random_operands(layer, dtype=dtype)
    verdicts = testing.check_gradients("torch_bmm", x, factors, bias)
    assert set(verdicts) == {"x", "bias", *factors}
    assert all(verdict.passed for verdict in verdicts.values()), verdicts


@each_layer
def test_written_out_gradients_equal_those_of_autograd(layer):
    module = importlib.import_module(f"blrlab_ops.{layer.format}.torch_bmm")
    x, factors, _ = testing.random_operands(layer, dtype=torch.float64)
    operands = [operand.requires_grad_() for operand in (x, *factors.values())]
    grad = torch.randn(layer.tokens, layer.out_features, dtype=torch.float64)
    expected = torch.autograd.grad(blrlab_ops.linear(x, factors, impl="ref"), operands, grad)
    with torch.no_grad():
        found = module.gradients(grad, *operands, needs=[True] * len(operands))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@each_layer
def test_only_needed_gradients_are_computed(layer):
    module = importlib.import_module(f"blrlab_ops.{layer.format}.torch_bmm")
    x, factors, _ = testing.random_operands(layer, dtype=torch.float64)
    grad = torch.randn(layer.tokens, layer.out_features, dtype=torch.float64)
    count = 1 + len(factors)
    full = module.gradients(grad, x, *factors.values(), needs=[True] * count)
    for wanted in range(count):
        some = module.gradients(grad, x, *factors.values(), needs=[place == wanted for place in range(count)])
        assert [gradient is not None for gradient in some] == [place == wanted for place in range(count)]
        torch.testing.assert_close(some[wanted], full[wanted])


@pytest.mark.parametrize("format", ["low_rank", "monarch", "blast"])
def test_second_derivatives_of_torch_bmm(format):
    layer = Case(format, 2, 4, 6, (1, 1) if format == "low_rank" else (2, 3), 2)
    x, factors, bias = testing.random_operands(layer, dtype=torch.float64)
    operands = [operand.requires_grad_() for operand in (x, *factors.values(), bias)]
    linear = getattr(blrlab_ops, format).linear
    assert torch.autograd.gradgradcheck(lambda *tensors: linear(*tensors, impl="torch_bmm"), operands)


@pytest.mark.parametrize("impl", ["ref", "torch_bmm"])
@pytest.mark.parametrize("format", ["low_rank", "monarch", "blast"])
def test_compiles_as_one_graph(format, impl):
    layer = Case(format, 12, 30, 42, (1, 1) if format == "low_rank" else (3, 2), 5)
    x, factors, bias = testing.random_operands(layer, dtype=torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(blrlab_ops.linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, factors, bias, impl=impl), x @ blrlab_ops.to_dense(factors) + bias)
