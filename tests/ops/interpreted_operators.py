"""Tests of the Triton operators that test_ops_interpreter.py runs under TRITON_INTERPRET=1."""

import importlib

import blrlab_ops
import pytest
import torch
from blrlab_ops import batched, dispatch, joined, testing
from blrlab_ops.testing import Case

LAYERS = {
    "low_rank": Case("low_rank", 21, 30, 42, (1, 1), 5),
    "monarch": Case("monarch", 21, 30, 42, (3, 2), 5),
    "blast": Case("blast", 21, 30, 42, (3, 2), 7),
}
KERNELS = [
    (format, impl)
    for format in LAYERS
    for impl in dispatch.impls(format)
    if dispatch.needs_triton(impl) and not dispatch.is_hopper(impl)
]
FAR = ((2**30, 1), (1, 2**27))  # strides of x [3, 30] that lead beyond 2^31 elements, inside one tile
each_kernel = pytest.mark.parametrize(("format", "impl"), KERNELS)


def _operator(format: str, impl: str):
    return importlib.import_module(f"blrlab_ops.{format}.{impl}").linear.operator


@each_kernel
@pytest.mark.parametrize("tokens", [21, 1, 0])
def test_gradients_are_within_their_budgets(format, impl, tokens):
    x, factors, bias = testing.random_operands(LAYERS[format]._replace(tokens=tokens))
    verdicts = testing.check_gradients(impl, x, factors, bias)
    assert all(verdict.passed for verdict in verdicts.values()), verdicts


@each_kernel
def test_gradients_in_float16_are_within_their_budgets(format, impl):
    verdicts = testing.check_gradients(impl, *testing.random_operands(LAYERS[format], dtype=torch.float16))
    assert all(verdict.passed for verdict in verdicts.values()), verdicts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_bias_can_be_a_part_of_the_product_after_mixing(dtype, monkeypatch):
    monkeypatch.setattr(batched, "_pays", lambda *_: True)
    for layer in (LAYERS["blast"], LAYERS["blast"]._replace(tokens=1, blocks=(2, 3))):
        operands = testing.random_operands(layer, dtype=dtype)
        with testing.poisoned():
            verdict = testing.check("bmm_mixing", *operands)
        assert verdict.passed, verdict


@each_kernel
def test_opcheck(format, impl):
    x, factors, bias = testing.random_operands(LAYERS[format])
    tensors = [tensor.requires_grad_() for tensor in (x, *factors.values())]
    torch.library.opcheck(_operator(format, impl), (*tensors, bias.requires_grad_(), None, None, ""))


@each_kernel
def test_opcheck_of_an_epilogue(format, impl):
    """Without gradients, which a fused epilogue has none of, and without a bias."""
    x, factors, _ = testing.random_operands(LAYERS[format])
    multiply, residual = torch.randn(2, 21, 42)
    arguments = (x, *factors.values(), None, multiply, residual, "gelu")
    torch.library.opcheck(_operator(format, impl), arguments, test_utils=("test_schema", "test_faketensor"))


@each_kernel
@pytest.mark.parametrize("records", [False, True])
def test_compiles_as_one_graph(format, impl, records):
    """With an epilogue, which is fused unless autograd records."""
    x, factors, bias = testing.random_operands(LAYERS[format])
    operands = [tensor.requires_grad_(records) for tensor in (x, *factors.values(), bias)]
    multiply, residual = torch.randn(2, 21, 42)
    follows = {"activation": "silu", "multiply": multiply, "residual": residual}
    torch.compiler.reset()
    compiled = torch.compile(blrlab_ops.linear, fullgraph=True, backend="aot_eager")
    y = compiled(x, factors, bias, **follows, impl=impl)
    expected = blrlab_ops.linear(x, factors, bias, **follows, impl="ref")
    torch.testing.assert_close(y, expected)
    assert y.requires_grad == records
    if records:
        grad = torch.randn_like(y)
        for ours, theirs in zip(*(torch.autograd.grad(out, operands, grad) for out in (y, expected)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@each_kernel
def test_any_strides_leading_shape_and_no_bias(format, impl):
    x, factors, bias = testing.random_operands(LAYERS[format])
    expected = blrlab_ops.linear(x, factors, impl="ref")
    turned = {name: factor.mT.contiguous().mT for name, factor in factors.items()}
    spread = torch.stack([x, x], dim=-1)[..., 0]  # [n, i] of column stride 2
    sparse_bias = torch.stack([bias, bias], dim=-1)[:, 0]
    for strided in (spread, x.mT.contiguous().mT):
        torch.testing.assert_close(blrlab_ops.linear(strided, turned, impl=impl), expected)
        biased = blrlab_ops.linear(strided.reshape(3, 7, 30), turned, sparse_bias, impl=impl)
        torch.testing.assert_close(biased, (expected + bias).reshape(3, 7, 42))
    torch.testing.assert_close(blrlab_ops.linear(x[0], factors, impl=impl), expected[0])
    torch.testing.assert_close(blrlab_ops.linear(spread[0], turned, sparse_bias, impl=impl), expected[0] + bias)
    assert blrlab_ops.linear(x[:0].reshape(2, 0, 30), factors, impl=impl).shape == (2, 0, 42)


@each_kernel
def test_packed_factors_give_the_same(format, impl):
    x, factors, bias = testing.random_operands(LAYERS[format])
    expected = blrlab_ops.linear(x, factors, bias, impl="ref")
    for packer in (impl, "torch_bmm"):
        packed = blrlab_ops.pack(factors, impl=packer)
        torch.testing.assert_close(blrlab_ops.linear(x, packed, bias, impl=impl), expected)


@pytest.mark.parametrize(
    "layer",
    [
        Case("low_rank", 70, 70, 150, (1, 1), 65),
        Case("monarch", 70, 140, 300, (2, 2), 70),
        Case("blast", 70, 140, 300, (2, 2), 70),
        Case("blast", 40, 65, 90, (13, 18), 33),
    ],
    ids=lambda layer: f"{layer.format}-{layer.blocks[1]}",
)
def test_the_tiles_of_a_gpu(layer, monkeypatch):
    """Of the implementations whose own rules ask for other tiles when they are interpreted."""
    for name in ("triton_product", "blast.triton_two_stage", "blast.triton_three_stage"):
        monkeypatch.setattr(importlib.import_module(f"blrlab_ops.{name}"), "INTERPRETED", False)
    x, factors, bias = testing.random_operands(layer)
    for impl in dispatch.impls(layer.format):
        if impl in ("triton_two_stage", "triton_three_stage"):
            verdict = testing.check(impl, x, factors, bias)
            assert verdict.passed, (impl, verdict)


@each_kernel
@pytest.mark.parametrize("strides", FAR)
def test_an_input_beyond_2_to_the_31_elements(format, impl, strides):
    x, factors, bias = testing.random_operands(LAYERS[format]._replace(tokens=3), dtype=torch.float16)
    span = 2 * strides[0] + 29 * strides[1] + 1
    assert span > 2**31
    far = torch.empty(span, dtype=torch.float16).as_strided((3, 30), strides)  # untouched pages cost nothing
    far.copy_(x)
    y = blrlab_ops.linear(far, factors, bias, impl=impl)
    assert torch.equal(y, blrlab_ops.linear(x, factors, bias, impl=impl))


@each_kernel
@pytest.mark.parametrize("tokens", [21, 1])
def test_two_runs_agree_bit_for_bit(format, impl, tokens):
    x, factors, bias = testing.random_operands(LAYERS[format]._replace(tokens=tokens))
    first = blrlab_ops.linear(x, factors, bias, impl=impl)
    assert torch.equal(blrlab_ops.linear(x, factors, bias, impl=impl), first)


@pytest.mark.parametrize("format", LAYERS)
def test_the_interpreter_is_never_chosen_and_refuses_bfloat16(format):
    for device in ("cpu", "cuda"):
        assert dispatch.choose(format, None, device, torch.float32) == "torch_bmm"
    for impl in filter(dispatch.is_portable, dispatch.impls(format)):
        assert blrlab_ops.why_not(format, impl, "cpu", torch.float16) is None
        assert "bfloat16" in blrlab_ops.why_not(format, impl, "cpu", torch.bfloat16)


@pytest.mark.parametrize(
    ("format", "impl"),
    [
        *((format, impl) for format, impl in KERNELS if format == "monarch"),
        ("low_rank", "triton_streaming"),
        *(("blast", impl) for impl in joined.JOINED_BLAST),
    ],
)
@pytest.mark.parametrize("tokens", [21, 1])
def test_joined_layers_give_what_each_gives_alone(format, impl, tokens):
    each = [testing.random_factors(format, *LAYERS[format][2:]) for _ in range(3)]
    x, bias, residual = torch.randn(tokens, 30), torch.randn(126), torch.randn(tokens, 126)
    found = joined.linear(x, joined.join(each), bias, activation="silu", residual=residual, impl=impl)
    for y, factors, b, r in zip(found, each, bias.chunk(3), residual.chunk(3, -1), strict=True):
        expected = blrlab_ops.linear(x, factors, b, activation="silu", residual=r, impl="ref")
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", joined.JOINED_BLAST)
def test_joined_blast_layers_in_a_compiled_graph(impl):
    together = joined.join([testing.random_factors("blast", *LAYERS["blast"][2:]) for _ in range(2)])
    x = torch.randn(5, 30)
    compiled = torch.compile(lambda x: joined.linear(x, together, impl=impl), fullgraph=True, backend="eager")
    for y, expected in zip(compiled(x), joined.linear(x, together, impl=impl), strict=True):
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("impl", ["triton_streaming", "triton_two_stage"])
@pytest.mark.parametrize("far", ["V", "U"])
def test_columns_of_a_factor_beyond_2_to_the_31_elements(impl, far):
    x, factors, bias = testing.random_operands(LAYERS["low_rank"], dtype=torch.float16)
    columns = factors[far].shape[1]
    stride = 2**31 // (columns - 1) + 1
    memory = torch.empty(
        stride * (columns - 1) + factors[far].shape[0], dtype=torch.float16
    )  # untouched pages are free
    wide = memory.as_strided(factors[far].shape, (1, stride))
    wide.copy_(factors[far])
    y = blrlab_ops.linear(x, {**factors, far: wide}, bias, impl=impl)
    assert torch.equal(y, blrlab_ops.linear(x, factors, bias, impl=impl))
