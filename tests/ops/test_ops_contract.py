"""Every format and implementation that a CPU runs: right in every dtype, at every shape, for any strides."""

from unittest import mock

import blrlab_ops
import pytest
import torch
from blrlab_ops import batched, testing
from blrlab_ops.testing import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

CPU_IMPLS = ("ref", "torch_bmm")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALL = (
    Case("low_rank", 12, 30, 42, (1, 1), 5),
    Case("monarch", 12, 30, 42, (3, 2), 5),
    Case("blast", 12, 30, 42, (3, 2), 5),
)


def _name(value) -> str:
    return "-".join(map(str, value)) if isinstance(value, Case) else str(value)


def _by_hand(x, factors):
    """Multiply block by block, straight from the definition of each format."""
    if set(factors) == {"V", "U"} and factors["V"].ndim == 2:
        return x @ factors["V"] @ factors["U"]
    V, U, S = factors["V"], factors["U"], factors.get("S")
    b1, b2 = (V.shape[0], U.shape[0]) if S is not None else V.shape[:2]
    x_blocks = x.chunk(b1, dim=-1)

    def block(l: int, k: int):
        if S is None:
            return x_blocks[l] @ V[l, k] @ U[l, k]
        return x_blocks[l] @ V[l] @ torch.diag(S[l, k]) @ U[k]

    return torch.cat([sum(block(l, k) for l in range(b1)) for k in range(b2)], dim=-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("layer", testing.AWKWARD, ids=_name)
def test_output_is_within_its_error_budget(layer, impl, dtype):
    x, factors, bias = testing.random_operands(layer, dtype=dtype)
    y = blrlab_ops.linear(x, factors, bias, impl=impl)
    assert y.shape == (layer.tokens, layer.out_features)
    assert y.dtype == dtype
    verdict = testing.check(impl, x, factors, bias)
    assert verdict.passed, verdict


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("layer", SMALL, ids=_name)
def test_output_follows_the_definition_of_the_format(layer, impl):
    x, factors, bias = testing.random_operands(layer, dtype=torch.float64)
    expected = _by_hand(x, factors)
    torch.testing.assert_close(blrlab_ops.linear(x, factors, impl=impl), expected)
    torch.testing.assert_close(blrlab_ops.linear(x, factors, bias, impl=impl), expected + bias)
    torch.testing.assert_close(x @ blrlab_ops.to_dense(factors), expected)


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("layer", SMALL, ids=_name)
@pytest.mark.parametrize("shape", [(), (12,), (3, 4), (2, 3, 2), (0,), (2, 0, 3)], ids=str)
def test_any_leading_shape(layer, impl, shape):
    x, factors, bias = testing.random_operands(layer, dtype=torch.float64)
    rows = x[: max(1, torch.Size(shape).numel())] if torch.Size(shape).numel() else x[:0]
    y = blrlab_ops.linear(rows.reshape(*shape, 30), factors, bias, impl=impl)
    assert y.shape == (*shape, 42)
    torch.testing.assert_close(y, (_by_hand(rows, factors) + bias).reshape(*shape, 42))


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("layer", SMALL, ids=_name)
def test_any_strides(layer, impl):
    x, factors, bias = testing.random_operands(layer, dtype=torch.float64)
    expected = _by_hand(x, factors) + bias
    spread = torch.stack([x, x], dim=-1)[..., 0]  # [n, i] of column stride 2
    turned = {name: factor.mT.contiguous().mT for name, factor in factors.items()}
    sparse_bias = torch.stack([bias, bias], dim=-1)[:, 0]
    for strided in (spread, x.mT.contiguous().mT, x.reshape(3, 4, 30).transpose(0, 1)):
        y = blrlab_ops.linear(strided, turned, sparse_bias, impl=impl)
        wanted = expected if strided.ndim == 2 else expected.reshape(3, 4, 42).transpose(0, 1)
        torch.testing.assert_close(y, wanted)


@given(
    format=st.sampled_from(("low_rank", "monarch", "blast")),
    sizes=st.tuples(*[st.integers(1, 5)] * 6),
    seed=st.integers(0, 2**31),
    joins=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_torch_bmm_is_a_product_with_the_dense_weight(format, sizes, seed, joins):
    """Whether the bias is added or a part of the product."""
    tokens, b1, b2, p, q, rank = sizes
    layer = Case(format, tokens, b1 * p, b2 * q, (b1, b2) if format != "low_rank" else (1, 1), rank)
    x, factors, bias = testing.random_operands(layer, seed=seed, dtype=torch.float64)
    expected = x @ blrlab_ops.to_dense(factors) + bias
    packed = blrlab_ops.pack(factors, impl="torch_bmm")
    with mock.patch.object(batched, "_pays", return_value=joins):
        for weights in (factors, packed):
            torch.testing.assert_close(blrlab_ops.linear(x, weights, bias, impl="torch_bmm"), expected)


def test_blast_contains_low_rank_and_monarch():
    V, U = (testing.random_factors("low_rank", 12, 20, rank=6, dtype=torch.float64)[name] for name in "VU")
    ones = torch.ones(3, 2, 6, dtype=torch.float64)
    same = blrlab_ops.blast.to_dense(V.reshape(3, 4, 6), ones, U.reshape(6, 2, 10).transpose(0, 1))
    torch.testing.assert_close(same, V @ U)

    monarch = testing.random_factors("monarch", 12, 20, (2, 2), 3, dtype=torch.float64)
    V, S, U = torch.zeros(2, 6, 6).double(), torch.zeros(2, 2, 6).double(), torch.zeros(2, 6, 10).double()
    for l in range(2):
        for k in range(2):
            group = slice(3 * ((l + k) % 2), 3 * ((l + k) % 2) + 3)
            V[l, :, group], S[l, k, group], U[k, group] = monarch["V"][l, k], 1.0, monarch["U"][l, k]
    torch.testing.assert_close(blrlab_ops.blast.to_dense(V, S, U), blrlab_ops.to_dense(monarch))


class _Operations(TorchDispatchMode):
    """Note the names of all operations that PyTorch dispatches."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layer", SMALL, ids=_name)
def test_torch_bmm_copies_nothing_when_factors_are_packed(layer):
    x, factors, bias = testing.random_operands(layer)
    packed = blrlab_ops.pack(factors, impl="torch_bmm")
    for name, factor in factors.items():
        torch.testing.assert_close(packed[name], factor, rtol=0, atol=0)
    with _Operations() as seen:
        blrlab_ops.linear(x, packed, bias, impl="torch_bmm")
    assert not seen.names & {"clone", "copy_", "_to_copy", "contiguous", "cat"}, seen.names
    assert seen.names & {"bmm", "mm"}


@pytest.mark.parametrize("layer", SMALL[1:], ids=_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
def test_a_bias_can_be_a_part_of_the_product(layer, dtype, monkeypatch):
    """Nothing of y's size is written but the product; where autograd records, the bias is added as ever."""
    x, factors, bias = testing.random_operands(layer, dtype=dtype)
    exact = x.double() @ blrlab_ops.to_dense({name: each.double() for name, each in factors.items()}) + bias
    lost = {}
    for pays in (True, False):
        monkeypatch.setattr(batched, "_pays", lambda *_, found=pays: found)
        with _Operations() as seen, testing.poisoned():
            y = blrlab_ops.linear(x, factors, bias, impl="torch_bmm")
        assert ("baddbmm" in seen.names) != pays
        lost[pays] = testing.errors(y, exact)[0]
    assert lost[True] <= 1.1 * lost[False] + torch.finfo(torch.float32).eps
    monkeypatch.setattr(batched, "_pays", lambda *_: True)
    with _Operations() as seen:
        blrlab_ops.linear(x, factors, bias.requires_grad_(), impl="torch_bmm").sum().backward()
    assert "baddbmm" in seen.names
    torch.testing.assert_close(bias.grad.float(), torch.full((layer.out_features,), float(layer.tokens)))


def test_a_bias_is_a_part_of_the_product_where_that_pays():
    """On a GPU, of 16-bit numbers, where y is large and no smaller than the factor that is copied."""

    class OnGpu:
        is_cuda = True

        def __init__(self, dtype):
            self.element_size = lambda: dtype.itemsize

    half = OnGpu(torch.bfloat16)
    assert batched._pays(half, 4096, 2048, 256)
    assert not batched._pays(half, 4096, 2047, 256)
    assert not batched._pays(half, 1024, 16384, 1025)
    assert not batched._pays(OnGpu(torch.float32), 4096, 2048, 256)
    assert not batched._pays(torch.empty(0, dtype=torch.bfloat16), 4096, 2048, 256)
