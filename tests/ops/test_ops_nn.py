"""Factored linear layers as modules: what they compute, keep, print and refuse, and how they come into a model."""

import copy
import io
import pickle

import blrlab_ops
import pytest
import torch
from blrlab_ops import testing
from blrlab_ops.nn import BlastLinear, FactoredLinear, LowRankLinear, MonarchLinear, layer, replace_linears
from blrlab_ops.testing import Case
from torch import nn

CASES = (
    Case("low_rank", 7, 24, 36, (1, 1), 5),
    Case("monarch", 7, 24, 36, (3, 2), 4),
    Case("blast", 7, 24, 36, (2, 3), 5),
)
ids = [case.format for case in CASES]
CLASSES = {"low_rank": LowRankLinear, "monarch": MonarchLinear, "blast": BlastLinear}


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


def fresh(case: Case, bias=True, **options):
    """Make a layer of the class of its format from sizes."""
    blocks = () if case.format == "low_rank" else (case.blocks,)
    return CLASSES[case.format](case.in_features, case.out_features, *blocks, case.rank, bias, **options)


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


@pytest.mark.parametrize("impl", [None, "ref", "torch_bmm"])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_layers_are_made_from_sizes(case, impl):
    made = fresh(case, impl=impl, dtype=torch.float64)
    like = FactoredLinear(factors_of(case, torch.float64), torch.zeros(36, dtype=torch.float64), impl)
    assert type(made) is CLASSES[case.format]
    assert isinstance(made, FactoredLinear)
    assert repr(made) == repr(like).replace("FactoredLinear", type(made).__name__)
    for name, parameter in like.named_parameters():
        assert (getattr(made, name).shape, getattr(made, name).stride()) == (parameter.shape, parameter.stride())
        assert getattr(made, name).dtype == torch.float64
    assert not made.bias.any()
    x = torch.randn(7, 24, dtype=torch.float64)
    torch.testing.assert_close(made(x), x @ blrlab_ops.to_dense(made.factors))
    assert fresh(case, bias=False).bias is None


@pytest.mark.parametrize(
    "case",
    [
        Case("low_rank", 0, 256, 384, (1, 1), 40),
        Case("monarch", 0, 256, 384, (4, 3), 10),
        Case("blast", 0, 256, 384, (4, 3), 40),
        Case("monarch", 0, 512, 128, (2, 2), 90),
    ],
    ids=lambda case: f"{case.format} {case.in_features} {case.rank}",
)
def test_fresh_weights_have_entries_of_variance_one_over_in_features(case):
    torch.manual_seed(0)
    dense = blrlab_ops.to_dense(fresh(case).factors).detach()
    assert float(dense.square().mean()) * case.in_features == pytest.approx(1, rel=0.15)
    assert abs(float(dense.mean())) < 0.05 / case.in_features**0.5


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_a_seed_gives_the_same_layer_for_every_implementation(case):
    made = []
    for impl in ("ref", "torch_bmm"):
        torch.manual_seed(3)
        made.append(fresh(case, impl=impl))
    other = copy.deepcopy(made[0])
    torch.manual_seed(3)
    other.reset_parameters()
    for name, factor in made[0].factors.items():
        assert torch.equal(made[1].factors[name], factor)
        assert torch.equal(other.factors[name], factor)
        assert set(factor.flatten().tolist()) == {-1, 1} or name != "S"


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_on_meta_nothing_is_drawn_and_the_layer_is_filled_later(case):
    state = torch.get_rng_state()
    made = fresh(case, device="meta")
    with torch.device("meta"):
        assert fresh(case).V.is_meta
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.is_meta for parameter in made.parameters())
    real = fresh(case)
    made.to_empty(device="cpu").load_state_dict(real.state_dict())
    for name, factor in real.factors.items():
        assert made.factors[name].stride() == factor.stride()
    x = torch.randn(7, 24)
    assert torch.equal(made(x), real(x))
    blocks = {} if case.format == "low_rank" else {"blocks": case.blocks}
    skipped = nn.utils.skip_init(type(made), 24, 36, **blocks, rank=case.rank)
    assert not skipped.V.is_meta


def test_blocks_may_be_one_number():
    assert MonarchLinear(24, 36, 3, 4).blocks == BlastLinear(24, 36, 3, 4).blocks == (3, 3)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LowRankLinear(24, 36, 0), "rank must be whole and at least 1, not 0"),
        (lambda: LowRankLinear(24, 36, 2.0), "rank must be whole and at least 1, not 2.0"),
        (lambda: LowRankLinear(0, 36, 1), "in_features must be whole and at least 1, not 0"),
        (lambda: LowRankLinear(24, -36, 1), "out_features must be whole and at least 1, not -36"),
        (lambda: MonarchLinear(24, 36, 0, 2), r"blocks must be .* one number or \(b1, b2\), not 0"),
        (lambda: BlastLinear(24, 36, (2, 3, 4), 2), r"blocks must be .*not \(2, 3, 4\)"),
        (lambda: MonarchLinear(24, 36, (5, 2), 2), r"blocks \(5, 2\) do not divide 24 x 36 features"),
        (lambda: BlastLinear(24, 36, (2, 5), 2), "b2 out_features"),
        (lambda: BlastLinear(24, 36, 2, 2, impl="torch_bm"), "did you mean 'torch_bmm'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_dtype_that_nothing_takes_is_refused():
    with pytest.raises(blrlab_ops.CannotRun, match="int32"):
        LowRankLinear(24, 36, 2, dtype=torch.int32)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_factors_make_the_layer_of_their_format_and_no_other(case):
    x, factors, bias = testing.random_operands(case)
    expected = FactoredLinear(factors, bias, "ref")(x)
    for made in (layer(factors, bias, "ref"), CLASSES[case.format].from_factors(factors, bias, "ref")):
        assert type(made) is CLASSES[case.format]
        assert made.impl == "ref"
        assert torch.equal(made(x), expected)
    assert layer(factors).bias is None
    for other in CLASSES.keys() - {case.format}:
        with pytest.raises(ValueError, match=f"{case.format}, not {other}: use {CLASSES[case.format].__name__}"):
            CLASSES[other].from_factors(factors)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_layers_are_modules_like_any_other(case):
    made = fresh(case, impl="torch_bmm").eval()
    x = torch.randn(7, 24)
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert repr(copied) == repr(made)
        assert not copied.training
        assert copied.V is not made.V
        assert torch.equal(copied(x), made(x))
        assert [each.stride() for each in copied.parameters()] == [each.stride() for each in made.parameters()]
    with pytest.raises(RuntimeError, match=r"Missing key.*bias"):
        made.load_state_dict(fresh(case, bias=False).state_dict())
    assert made.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert made.to("meta").V.is_meta


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


class Tied(nn.Module):
    """One layer under two names, and a block that holds another twice over."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(24, 36)
        self.again = self.first
        block = nn.Sequential(nn.Linear(24, 36), nn.GELU())
        self.blocks = nn.ModuleList([block, block])


@pytest.mark.parametrize(("one", "other"), [("first", "again"), ("blocks.0.0", "blocks.1.0")])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_layer_at_several_paths_is_replaced_at_all_of_them(one, other, swapped):
    model = Tied()
    before = set(model.state_dict())
    replace_linears(model, {other if swapped else one: factors_of(CASES[0])})
    assert model.get_submodule(one) is model.get_submodule(other)
    assert isinstance(model.get_submodule(one), LowRankLinear)
    assert {name for name in before if name.endswith("bias")} <= set(model.state_dict())
    assert f"{one}.weight" not in model.state_dict()
    assert {f"{one}.V", f"{other}.V"} <= set(model.state_dict())


def test_paths_of_one_layer_take_one_replacement():
    model, factors = Tied(), factors_of(CASES[0])
    before = model.first
    with pytest.raises(ValueError, match="again: it is the same layer as first, whose replacement is another"):
        replace_linears(model, {"first": factors, "again": dict(factors)})
    assert model.first is model.again is before
    replace_linears(model, {"first": factors, "again": factors})
    assert model.first is model.again is not before


def test_an_implementation_that_cannot_run_is_refused_by_path_and_nothing_changes():
    model = nn.Sequential(nn.Linear(24, 36), nn.Linear(36, 24)).double()
    before = list(model)
    back = testing.random_factors("blast", 36, 24, (2, 2), 3, dtype=torch.float64)
    with pytest.raises(blrlab_ops.CannotRun, match=r"^1: .*triton_two_stage"):
        replace_linears(model, {"0": fresh(CASES[0]), "1": back}, impl="triton_two_stage")
    assert list(model) == before


def gpt2():
    """Make a tiny GPT-2 of transformers with random weights."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"vocab_size": 31, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 3}
    config = transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None, initializer_range=0.2)
    return transformers.GPT2LMHeadModel(config).eval()


def test_all_layers_of_gpt2_are_replaced():
    model, tokens = gpt2(), torch.arange(14).reshape(2, 7)
    formats = {"attn.c_attn": "monarch", "attn.c_proj": "low_rank", "mlp.c_fc": "blast", "mlp.c_proj": "monarch"}
    dense, factors = copy.deepcopy(model), {}
    for block in range(2):
        for name, format in formats.items():
            path = f"transformer.h.{block}.{name}"
            i, o = model.get_submodule(path).weight.shape
            factors[path] = testing.random_factors(format, i, o, (4, 2), 5, seed=block)
            dense.get_submodule(path).weight.data.copy_(blrlab_ops.to_dense(factors[path]))
    names = set(model.state_dict())
    assert replace_linears(model, factors) is model
    assert not any(type(module).__name__ == "Conv1D" for module in model.modules())
    replaced = {f"{path}.{name}" for path, tensors in factors.items() for name in tensors}
    assert set(model.state_dict()) == names - {f"{path}.weight" for path in factors} | replaced
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, atol=1e-5, rtol=1e-4)
        other = replace_linears(gpt2(), factors)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(tokens).logits, model(tokens).logits)
    assert torch.equal(copy.deepcopy(model)(tokens).logits, model(tokens).logits)


def test_the_output_layer_of_gpt2_is_replaced_and_its_embedding_stays():
    model, factors = gpt2(), testing.random_factors("low_rank", 24, 31, (1, 1), 5)
    embedding = model.transformer.wte.weight
    replace_linears(model, {"lm_head": factors})
    assert model.transformer.wte.weight is embedding
    assert model(torch.arange(7)[None]).logits.shape == (1, 7, 31)
    with pytest.raises(ValueError, match=r"no linear layer 'transformer.h.0.mlp.fc'; did you mean .*mlp"):
        replace_linears(model, {"transformer.h.0.mlp.fc": factors})
    with pytest.raises(ValueError, match=r"transformer.h.1.mlp.c_fc: it is 24 x 96, .* is 24 x 31"):
        replace_linears(model, {"transformer.h.1.mlp.c_fc": factors})


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
