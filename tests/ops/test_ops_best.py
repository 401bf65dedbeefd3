"""The operator behind `impl=None` in a compiled graph: one graph, whose implementation is chosen when it runs."""

import importlib

import blrlab_ops
import pytest
import torch
from blrlab_ops import dispatch, testing, tracing
from blrlab_ops.testing import Case

LAYERS = (
    Case("low_rank", 12, 30, 42, (1, 1), 5),
    Case("monarch", 12, 30, 42, (3, 2), 5),
    Case("blast", 12, 30, 42, (3, 2), 7),
)
each_layer = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.format)


@pytest.fixture
def linears():
    return importlib.import_module("blrlab_ops.best").LINEARS


@each_layer
def test_it_is_a_whole_operator(layer, linears):
    x, factors, bias = testing.random_operands(layer)
    operands = tuple(tensor.requires_grad_() for tensor in (x, *factors.values(), bias))
    torch.library.opcheck(linears[layer.format].operator, (*operands, None, None, ""))


@each_layer
def test_it_computes_and_differentiates_the_layer(layer, linears):
    x, factors, bias = testing.random_operands(layer)
    residual = torch.randn(12, 42)
    with torch.no_grad():
        y = linears[layer.format](
            x, *factors.values(), bias, epilogue=blrlab_ops.epilogue.Epilogue("silu", None, residual)
        )
    torch.testing.assert_close(y, blrlab_ops.linear(x, factors, bias, activation="silu", residual=residual))
    operands = [tensor.requires_grad_() for tensor in (x, *factors.values(), bias)]
    both = linears[layer.format](*operands), blrlab_ops.linear(x, factors, bias, impl="ref")
    for ours, theirs in zip(*(torch.autograd.grad(each.square().sum(), operands) for each in both), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@each_layer
def test_one_graph_serves_every_number_of_tokens(layer, linears, monkeypatch):
    """As on a GPU, where the tracer is told of a Triton kernel; what runs is looked up in every call."""
    chosen = torch.compiler.assume_constant_result(lambda *_: "triton_two_stage")
    monkeypatch.setattr(tracing, "choose_as_constant", chosen)
    looked_up, choose = [], dispatch.choose

    def noted(*given):
        looked_up.append(given[-1])
        return choose(*given)

    monkeypatch.setattr(dispatch, "choose", noted)
    x, factors, bias = testing.random_operands(layer)
    torch.compiler.reset()
    compiled = torch.compile(blrlab_ops.linear, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (12, 5, 3):
        y = compiled(x[:tokens], factors, bias)
        torch.testing.assert_close(y, blrlab_ops.linear(x[:tokens], factors, bias, impl="ref"))
    assert [sizes.tokens for sizes in looked_up if sizes] == [12, 5, 3]
