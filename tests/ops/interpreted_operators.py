"""Tests of the Triton operators that test_ops_interpreter.py runs under TRITON_INTERPRET=1."""

import importlib

import blrlab_ops
import pytest
import torch
from blrlab_ops import dispatch, testing
from blrlab_ops.testing import Case

IMPL = "triton_two_stage"
LAYERS = (
    Case("low_rank", 63, 30, 42, (1, 1), 5),
    Case("monarch", 63, 30, 42, (3, 2), 5),
    Case("blast", 63, 30, 42, (3, 2), 7),
)
each_layer = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.format)


def _operator(format: str):
    return importlib.import_module(f"blrlab_ops.{format}.{IMPL}")._two_stage


@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradients_are_within_their_budgets(layer, dtype):
    x, factors, bias = testing.random_operands(layer, dtype=dtype)
    verdicts = testing.check_gradients(IMPL, x, factors, bias)
    assert all(verdict.passed for verdict in verdicts.values()), verdicts


@each_layer
def test_without_tokens_gradients_are_zero(layer):
    x, factors, bias = testing.random_operands(layer._replace(tokens=0))
    verdicts = testing.check_gradients(IMPL, x, factors, bias)
    assert all(verdict.passed for verdict in verdicts.values()), verdicts


@each_layer
@pytest.mark.parametrize("with_bias", [True, False])
def test_opcheck(layer, with_bias):
    x, factors, bias = testing.random_operands(layer)
    tensors = [tensor.requires_grad_() for tensor in (x, *factors.values(), bias)]
    torch.library.opcheck(_operator(layer.format), (*tensors[:-1], tensors[-1] if with_bias else None))


@each_layer
def test_compiles_as_one_graph(layer):
    x, factors, bias = testing.random_operands(layer)
    operands = [tensor.requires_grad_() for tensor in (x, *factors.values(), bias)]
    torch.compiler.reset()
    compiled = torch.compile(blrlab_ops.linear, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x, factors, bias, impl=IMPL), blrlab_ops.linear(x, factors, bias, impl="ref")
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    for ours, theirs in zip(*(torch.autograd.grad(out, operands, grad) for out in (y, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@each_layer
def test_any_strides_leading_shape_and_no_bias(layer):
    x, factors, bias = testing.random_operands(layer)
    expected = blrlab_ops.linear(x, factors, impl="ref")
    turned = {name: factor.mT.contiguous().mT for name, factor in factors.items()}
    spread = torch.stack([x, x], dim=-1)[..., 0]  # [n, i] of column stride 2
    sparse_bias = torch.stack([bias, bias], dim=-1)[:, 0]
    for strided in (spread, x.mT.contiguous().mT):
        torch.testing.assert_close(blrlab_ops.linear(strided, turned, impl=IMPL), expected)
        biased = blrlab_ops.linear(strided.reshape(7, 9, 30), turned, sparse_bias, impl=IMPL)
        torch.testing.assert_close(biased, (expected + bias).reshape(7, 9, 42))
    torch.testing.assert_close(blrlab_ops.linear(x[0], factors, impl=IMPL), expected[0])
    assert blrlab_ops.linear(x[:0].reshape(2, 0, 30), factors, impl=IMPL).shape == (2, 0, 42)


@each_layer
def test_packed_factors_give_the_same(layer):
    x, factors, bias = testing.random_operands(layer)
    for impl in (IMPL, "torch_bmm"):
        packed = blrlab_ops.pack(factors, impl=impl)
        y = blrlab_ops.linear(x, packed, bias, impl=IMPL)
        torch.testing.assert_close(y, blrlab_ops.linear(x, factors, bias, impl="ref"))


@pytest.mark.parametrize(
    "layer",
    [
        Case("low_rank", 70, 70, 150, (1, 1), 65),
        Case("monarch", 70, 140, 300, (2, 2), 70),
        Case("blast", 70, 140, 300, (2, 2), 70),
        Case("blast", 40, 35, 36, (5, 18), 33),
    ],
    ids=lambda layer: f"{layer.format}-{layer.blocks[1]}",
)
def test_the_tiles_of_a_gpu(layer, monkeypatch):
    for name in ("blrlab_ops.triton_product", f"blrlab_ops.blast.{IMPL}"):
        monkeypatch.setattr(importlib.import_module(name), "INTERPRETED", False)
    x, factors, bias = testing.random_operands(layer)
    verdict = testing.check(IMPL, x, factors, bias)
    assert verdict.passed, verdict


@each_layer
def test_rows_beyond_2_to_the_31_elements(layer):
    x, factors, bias = testing.random_operands(layer._replace(tokens=3), dtype=torch.float16)
    far = torch.empty(2**31 + 30, dtype=torch.float16).as_strided((3, 30), (2**30, 1))  # untouched pages cost nothing
    far.copy_(x)
    y = blrlab_ops.linear(far, factors, bias, impl=IMPL)
    assert torch.equal(y, blrlab_ops.linear(x, factors, bias, impl=IMPL))


def test_the_interpreter_is_never_chosen_and_refuses_bfloat16():
    for format in ("low_rank", "monarch", "blast"):
        for device in ("cpu", "cuda"):
            assert dispatch.choose(format, None, device, torch.float32) == "torch_bmm"
        assert blrlab_ops.why_not(format, IMPL, "cpu", torch.float16) is None
        assert "bfloat16" in blrlab_ops.why_not(format, IMPL, "cpu", torch.bfloat16)
