"""Factored linear layers as modules: what they compute, keep, print and refuse, and how they come into a model."""

import copy
import io

import blrlab_ops
import pytest
import torch
from blrlab_ops import testing
from blrlab_ops.nn import FactoredLinear, replace_linears
from blrlab_ops.testing import Case
from torch import nn

CASES = (
    Case("low_rank", 7, 24, 36, (1, 1), 5),
    Case("monarch", 7, 24, 36, (3, 2), 4),
    Case("blast", 7, 24, 36, (2, 3), 5),
)
ids = [case.format for case in CASES]


class Conv1D(nn.Module):
    """What Hugging Face's GPT-2 has for linear layers: weight [i, o]."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 24)
        self.mlp = nn.Sequential(nn.Linear(24, 36), nn.GELU(), Conv1D(24, 36))

    def forward(self, tokens):
        return self.mlp(self.embed(tokens))


def factors_of(case: Case, dtype=torch.float32):
    return testing.random_factors(case.format, *case[2:], dtype=dtype)


@pytest.mark.parametrize("impl", [None, "ref", "torch_bmm"])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_a_layer_multiplies_by_its_factors_and_adds_its_bias(case, impl):
    x, factors, bias = testing.random_operands(case)
    layer = FactoredLinear(factors, bias, impl)
    expected = x @ blrlab_ops.to_dense(factors) + bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x.unflatten(0, (1, 7))), expected[None])
    torch.testing.assert_close(FactoredLinear(factors, None, impl)(x), expected - bias, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_factors_are_parameters_with_gradients(case):
    x, factors, bias = testing.random_operands(case, dtype=torch.float64)
    layer = FactoredLinear(factors, bias)
    assert [name for name, _ in layer.named_parameters()] == [*factors, "bias"]
    layer(x).square().sum().backward()
    for name, factor in factors.items():
        leaf = factor.clone().requires_grad_()
        y = blrlab_ops.linear(x, {**factors, name: leaf}, bias, impl="ref")
        (wanted,) = torch.autograd.grad(y.square().sum(), leaf)
        torch.testing.assert_close(getattr(layer, name).grad, wanted)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_factors_are_packed_once_and_stay_so(case):
    factors = factors_of(case)
    packed = blrlab_ops.pack(factors)
    layer = FactoredLinear(factors)
    layers = [layer, copy.deepcopy(layer), FactoredLinear(factors).double().float()]
    layers[0].load_state_dict(FactoredLinear(factors_of(case)).state_dict())
    for each in layers:
        for name, factor in each.factors.items():
            assert factor.stride() == packed[name].stride()
            assert torch.equal(factor, factors[name])


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_state_dicts_round_trip(case):
    x, factors, bias = testing.random_operands(case)
    layer = FactoredLinear(factors, bias)
    other = FactoredLinear({name: torch.zeros_like(factor) for name, factor in factors.items()}, torch.zeros(36))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert set(state) == {*factors, "bias"}
    other.load_state_dict(state)
    assert torch.equal(other(x), layer(x))


def test_a_layer_prints_what_it_is():
    assert repr(FactoredLinear(factors_of(CASES[1]), impl="torch_bmm")) == (
        "FactoredLinear(format=monarch, in_features=24, out_features=36, blocks=(3, 2), rank=4, bias=False, "
        "impl=torch_bmm)"
    )


def test_a_layer_compiles_without_graph_breaks():
    x, factors, bias = testing.random_operands(CASES[1])
    layer = FactoredLinear(factors, bias)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"V": torch.zeros(2)}, "no known format"),
        ({"U": torch.zeros(3, 3, 4, 18)}, "same blocks and rank"),
        ({"U": torch.zeros(3, 2, 4, 18, dtype=torch.float64)}, "float64"),
        ({"U": torch.zeros(3, 2, 4, 18, device="meta")}, "meta"),
    ],
    ids=["format", "shape", "dtype", "device"],
)
def test_factors_that_do_not_fit_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        FactoredLinear({**factors_of(CASES[1]), **change})


def test_a_bias_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"bias must be \[36\]"):
        FactoredLinear(factors_of(CASES[1]), torch.zeros(35))


def test_an_unknown_or_unable_impl_is_refused():
    with pytest.raises(ValueError, match="did you mean 'torch_bmm'"):
        FactoredLinear(factors_of(CASES[1]), impl="torch_bm")
    with pytest.raises(blrlab_ops.CannotRun, match="triton_two_stage"):
        FactoredLinear(factors_of(CASES[1], torch.float64), impl="triton_two_stage")


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_replaced_layers_compute_what_their_factors_multiply_out_to(case):
    model, tokens = Model(), torch.arange(11)[None]
    into = factors_of(case)
    back = testing.random_factors(case.format, 36, 24, case.blocks[::-1], case.rank, seed=1)
    dense = copy.deepcopy(model)
    with torch.no_grad():
        dense.mlp[0].weight.copy_(blrlab_ops.to_dense(into).T)
        dense.mlp[2].weight.copy_(blrlab_ops.to_dense(back))
    bias = model.mlp[2].bias
    assert replace_linears(model, {"mlp.0": into, "mlp.2": back}, impl="torch_bmm") is model
    assert isinstance(model.mlp[0], FactoredLinear)
    assert model.mlp[2].bias is bias
    assert model.mlp[0].impl == "torch_bmm"
    torch.testing.assert_close(model(tokens), dense(tokens), atol=1e-5, rtol=1e-4)
    assert "mlp.2.U" in model.state_dict()


def test_a_module_is_taken_as_it_is_and_may_be_replaced_again():
    model, layer = Model(), FactoredLinear(factors_of(CASES[0]), torch.zeros(36))
    assert replace_linears(model, {"mlp.0": layer}).mlp[0] is layer
    replace_linears(model, {"mlp.0": factors_of(CASES[2])})
    assert model.mlp[0].format == "blast"
    assert model.mlp[0].bias is layer.bias
    replace_linears(model, {"mlp.0": nn.Linear(24, 36)})


def test_replacing_keeps_evaluation_mode():
    assert not replace_linears(Model().eval(), {"mlp.0": factors_of(CASES[0])}).mlp[0].training


@pytest.mark.parametrize(
    ("path", "new", "said"),
    [
        ("mlp.1", factors_of(CASES[0]), "did you mean 'mlp."),
        ("embed", factors_of(CASES[0]), "no linear layer 'embed'"),
        ("", factors_of(CASES[0]), "it has mlp.0, mlp.2"),
        ("mlp.2", factors_of(CASES[0]), "mlp.2: it is 36 x 24, and what is to replace it is 24 x 36"),
        ("mlp.0", nn.GELU(), "mlp.0: it is 24 x 36, and what is to replace it is no linear layer"),
        ("mlp.0", factors_of(CASES[0], torch.float64), "mlp.0: .*float64"),
        ("mlp.0", {"V": torch.zeros(3)}, "mlp.0: .*no known format"),
    ],
    ids=["near", "embedding", "root", "sizes", "no linear", "dtype", "format"],
)
def test_what_does_not_fit_is_refused_by_path_and_nothing_changes(path, new, said):
    model = Model()
    before = list(model.mlp)
    with pytest.raises(ValueError, match=said):
        replace_linears(model, {"mlp.0": factors_of(CASES[0]), path: new})
    assert list(model.mlp) == before


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": torch.bfloat16}, "0: its weight is torch.float32 and V is torch.bfloat16"),
        ({"device": "meta"}, "0: its weight is on cpu and V on meta"),
    ],
    ids=["dtype", "device"],
)
@pytest.mark.parametrize("is_factored", [False, True])
def test_factors_unlike_the_layer_they_replace_are_refused(change, said, bias, is_factored):
    model = nn.Sequential(nn.Linear(24, 36, bias=bias))
    if is_factored:
        replace_linears(model, {"0": factors_of(CASES[0])})
    before, new = model[0], {name: factor.to(**change) for name, factor in factors_of(CASES[1]).items()}
    with pytest.raises(ValueError, match=said):
        replace_linears(model, {"0": new})
    assert model[0] is before


def test_the_module_loads_neither_jax_nor_transformers(run_child):
    run_child("-c", "import sys, blrlab_ops.nn; sys.exit(any(name in sys.modules for name in ('jax', 'transformers')))")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")
@pytest.mark.parametrize("impl", [None, "torch_bmm", "triton_two_stage"])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_on_a_gpu_a_layer_is_what_its_implementation_computes(case, impl):
    x, factors, bias = testing.random_operands(case, dtype=torch.bfloat16, device="cuda")
    assert torch.equal(FactoredLinear(factors, bias, impl)(x), blrlab_ops.linear(x, factors, bias, impl=impl))
