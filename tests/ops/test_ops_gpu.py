"""The same contract on a real GPU, bfloat16 included: `pytest -m gpu tests/ops`."""

import importlib
import json

import blrlab_ops
import pytest
import torch
from blrlab_ops import batched, budgets, configs, dispatch, int8, joined, launching, testing, tuning, verify
from blrlab_ops.epilogue import Epilogue
from blrlab_ops.testing import Case
from blrlab_ops.tuning import search

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MODEL_LAYERS = (
    Case("low_rank", 1024, 4096, 4096, (1, 1), 1024),
    Case("low_rank", 1, 4096, 11008, (1, 1), 1488),
    Case("low_rank", 16, 768, 2304, (1, 1), 192),
    Case("monarch", 1024, 4096, 4096, (16, 16), 64),
    Case("monarch", 384, 768, 2304, (4, 4), 48),
    Case("monarch", 16384, 1152, 3456, (8, 8), 48),
    Case("monarch", 1, 4096, 11008, (16, 16), 96),
    Case("monarch", 16, 768, 2304, (4, 4), 48),
    Case("blast", 1024, 4096, 4096, (16, 16), 1024),
    Case("blast", 197, 768, 2304, (3, 3), 128),
    Case("blast", 16384, 1152, 3456, (9, 9), 384),
    Case("blast", 1, 4096, 11008, (16, 16), 1488),
    Case("blast", 16, 768, 2304, (6, 6), 192),
)
SMALL = tuple(layer for layer in testing.AWKWARD if layer.tokens in (0, 63))
SQUARE = {
    "low_rank": Case("low_rank", 63, 96, 96, (1, 1), 24),
    "monarch": Case("monarch", 63, 96, 96, (2, 3), 24),
    "blast": Case("blast", 63, 96, 96, (2, 3), 40),
}
FEW_TOKENS = {
    "low_rank": Case("low_rank", 1, 320, 330, (1, 1), 72),
    "monarch": Case("monarch", 1, 320, 330, (4, 6), 24),
    "blast": Case("blast", 1, 320, 330, (4, 6), 72),
}
KERNELS = [(format, impl) for format in dispatch.IMPLS for impl in dispatch.impls(format) if dispatch.is_triton(impl)]
PORTABLE = [(format, impl) for format, impl in KERNELS if dispatch.is_portable(impl)]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device"),
]


def _named(value) -> str | None:
    if isinstance(value, Case):
        return "-".join(map(str, value))
    return str(value) if isinstance(value, torch.dtype) else None


def _with(layers, impls=dispatch.impls, suited: bool = False):
    """Parametrise over layers and the implementations of their formats."""
    pairs = [(layer, impl) for layer in layers for impl in impls(layer.format)]
    if suited:
        pairs = [each for each in pairs if dispatch.unsuited(each[1], dispatch.Layer(*each[0][1:])) is None]
    return pytest.mark.parametrize(("layer", "impl"), pairs, ids=_named)


def _triton(format: str) -> list[str]:
    return [impl for impl in dispatch.impls(format) if dispatch.is_triton(impl)]


def _all_but_ref(format: str) -> list[str]:
    return [impl for impl in dispatch.impls(format) if impl != "ref"]


each_small_layer = _with(SMALL, _triton)
each_kernel = pytest.mark.parametrize(("format", "impl"), KERNELS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=_named)


@pytest.fixture(autouse=True)
def _nothing_tuned(tmp_path, monkeypatch):
    """Keep what this machine's user has tuned away from the tests."""
    monkeypatch.setenv("BLRLAB_OPS_CACHE", str(tmp_path))
    tuning.refresh()
    yield
    tuning.refresh()


@pytest.fixture(autouse=True)
def _only_what_runs(request):
    """Skip what a Hopper kernel does not take: another chip, float32."""
    given = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    impl = given.get("impl", "")
    if dispatch.is_hopper(impl):
        format = given.get("format") or (given["layer"].format if "layer" in given else "monarch")
        if reason := dispatch.why_not(format, impl, "cuda", given.get("dtype", torch.bfloat16)):
            pytest.skip(reason)


def _usual(impl: str) -> torch.dtype:
    """Return the widest dtype that an implementation takes."""
    return torch.float16 if dispatch.is_hopper(impl) else torch.float32


def _judge(y, x, *rest, **more) -> None:
    """Hold an output to the budget of a kernel."""
    verdict = testing.judge(y, x, *rest, **more)
    assert y.dtype == x.dtype
    assert verdict.passed, verdict


def _operands(layer: Case, dtype: torch.dtype = torch.bfloat16):
    """Draw (x, factors, bias, {"multiply": ..., "residual": ...}) on the GPU."""
    drawn = torch.randn(2, layer.tokens, layer.out_features, generator=torch.Generator().manual_seed(5))
    follows = dict(zip(("multiply", "residual"), drawn.to("cuda", dtype), strict=True))
    return *testing.random_operands(layer, dtype=dtype, device="cuda"), follows


def _run(layer: Case, impl: str, config, dtype: torch.dtype, epilogue: Epilogue | None = None):
    """Run an implementation with the tiles of a configuration, every result full of NaN beforehand."""
    module = importlib.import_module(f"blrlab_ops.{layer.format}.{impl}")
    x, factors, bias = testing.random_operands(layer, dtype=dtype, device="cuda")
    y = torch.full((layer.tokens, layer.out_features), float("nan"), dtype=dtype, device="cuda")
    with testing.poisoned():
        launches = module.launches(x, *module.pack(*factors.values()), bias, y, epilogue or Epilogue(), config)
    launching.run(launches, x.device)
    return y


@_with(testing.AWKWARD)
@each_dtype
def test_awkward_layers_are_within_their_budgets(layer, impl, dtype):
    verdict = testing.check(impl, *testing.random_operands(layer, dtype=dtype, device="cuda"))
    assert verdict.passed, verdict


@_with(MODEL_LAYERS, _all_but_ref, suited=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=_named)
def test_layers_of_models_are_within_their_budgets(layer, impl, dtype):
    verdict = testing.check(impl, *testing.random_operands(layer, dtype=dtype, device="cuda"))
    assert verdict.passed, verdict


@each_kernel
@each_dtype
@pytest.mark.parametrize("tokens", [1, 2, 16, 17])
def test_few_tokens_are_within_their_budgets(format, impl, dtype, tokens):
    layer = FEW_TOKENS[format]._replace(tokens=tokens)
    verdict = testing.check(impl, *testing.random_operands(layer, dtype=dtype, device="cuda"))
    assert verdict.passed, verdict


@_with(SMALL, _all_but_ref)
@each_dtype
def test_gradients_are_within_their_budgets(layer, impl, dtype):
    verdicts = testing.check_gradients(impl, *testing.random_operands(layer, dtype=dtype, device="cuda"))
    assert all(verdict.passed for verdict in verdicts.values()), verdicts


def _check_epilogue(layer: Case, impl: str, dtype: torch.dtype, activation: str | None, names, with_bias=True) -> None:
    """An activation takes several roundings, and the fast exponential of a GPU."""
    x, factors, bias, drawn = _operands(layer, dtype)
    follows = {"activation": activation, **{name: drawn[name] for name in names}}
    given = bias if with_bias else None
    with testing.poisoned():
        y = blrlab_ops.linear(x, factors, given, **follows, impl=impl)
    _judge(y, x, factors, given, follows, times=4 if activation else 2)


@each_kernel
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "silu"])
def test_epilogues_alone_and_together(format, impl, activation):
    for names in ((), ("multiply",), ("residual",), ("multiply", "residual")):
        _check_epilogue(SQUARE[format], impl, torch.bfloat16, activation, names, with_bias=len(names) != 1)


@each_kernel
@each_dtype
@pytest.mark.parametrize("tokens", [63, 1])
def test_epilogues_in_every_dtype(format, impl, dtype, tokens):
    layer = SQUARE[format]._replace(tokens=tokens)
    for activation in ("gelu", "silu"):
        _check_epilogue(layer, impl, dtype, activation, ("multiply", "residual"))


@each_kernel
def test_leading_shapes_and_strides_of_what_follows(format, impl):
    x, factors, bias, drawn = _operands(SQUARE[format])
    expected = blrlab_ops.linear(x, factors, bias, activation="silu", **drawn, impl=impl)
    sparse = torch.stack([drawn["multiply"]] * 2, dim=-1)[..., 0].unflatten(0, (7, 9))
    turned = drawn["residual"].mT.contiguous().mT.unflatten(0, (7, 9))
    follows = {"activation": "silu", "multiply": sparse, "residual": turned}
    y = blrlab_ops.linear(x.unflatten(0, (7, 9)), factors, bias, **follows, impl=impl)
    assert torch.equal(y, expected.unflatten(0, (7, 9)))


@pytest.mark.parametrize(("format", "impl"), PORTABLE)
def test_gradients_with_an_epilogue_equal_those_of_torch(format, impl):
    x, factors, bias, drawn = _operands(SQUARE[format], torch.float32)
    leaves = [each.requires_grad_() for each in (x, *factors.values(), bias, *drawn.values())]
    found, expected = (
        torch.autograd.grad(
            blrlab_ops.linear(x, factors, bias, activation="gelu", **drawn, impl=each).square().sum(), leaves
        )
        for each in (impl, "torch_bmm")
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@each_small_layer
def test_opcheck(layer, impl):
    operator = importlib.import_module(f"blrlab_ops.{layer.format}.{impl}").linear.operator
    x, factors, bias, drawn = _operands(layer)
    tensors = tuple(tensor.requires_grad_() for tensor in (x, *factors.values(), bias))
    torch.library.opcheck(operator, (*tensors, None, None, ""))
    with torch.no_grad():
        plain = tuple(tensor.detach() for tensor in tensors)
    torch.library.opcheck(operator, (*plain, *drawn.values(), "silu"), test_utils=("test_schema", "test_faketensor"))


@each_small_layer
def test_compiles_as_one_graph(layer, impl):
    x, factors, bias, drawn = _operands(layer)
    follows = {"activation": "gelu", **drawn}
    torch.compiler.reset()
    compiled = torch.compile(blrlab_ops.linear, fullgraph=True, backend="aot_eager")
    for given in ({}, follows):
        expected = blrlab_ops.linear(x, factors, bias, **given, impl=impl)
        assert torch.equal(compiled(x, factors, bias, **given, impl=impl), expected)


@pytest.mark.parametrize("layer", SMALL, ids=_named)
@each_dtype
def test_impl_none_takes_triton(layer, dtype):
    x, factors, bias = testing.random_operands(layer, dtype=dtype, device="cuda")
    sizes = dispatch.layer(layer.format, layer.tokens, list(factors.values()))
    assert sizes == dispatch.Layer(*layer[1:])
    best = dispatch.best(layer.format, x.device, dtype, sizes)
    assert dispatch.is_triton(best.impl), best
    assert blrlab_ops.why_not(layer.format, best.impl, x.device, dtype) is None
    expected = blrlab_ops.linear(x, factors, bias, impl=best.impl)
    assert torch.equal(blrlab_ops.linear(x, factors, bias), expected)
    torch.compiler.reset()
    compiled = torch.compile(blrlab_ops.linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, factors, bias), expected)


def test_float64_goes_to_torch_bmm():
    assert dispatch.choose("monarch", None, "cuda", torch.float64) == "torch_bmm"


@each_small_layer
def test_any_strides_on_another_stream(layer, impl):
    x, factors, bias = testing.random_operands(layer, dtype=_usual(impl), device="cuda")
    turned = {name: factor.mT.contiguous().mT for name, factor in factors.items()}
    hopper = dispatch.is_hopper(impl)
    expected = blrlab_ops.linear(x, factors, bias, impl=impl if hopper else "torch_bmm")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = blrlab_ops.linear(x.mT.contiguous().mT, turned, bias, impl=impl)
    stream.synchronize()
    if hopper:  # which rounds to 16 bits in between
        assert torch.equal(y, expected)
        _judge(y, x, factors, bias)
    else:
        torch.testing.assert_close(y, expected)


@each_kernel
def test_calls_by_plan_agree_with_the_first(format, impl, monkeypatch):
    """The third call describes no launches any more, whatever tensors it is given."""
    x, factors, bias, follows = _operands(SQUARE[format])
    factors, run, described = blrlab_ops.pack(factors, impl=impl), launching.run, []
    monkeypatch.setattr(launching, "run", lambda launches, device: described.append(1) or run(launches, device))
    drawn = [torch.randn_like(x) for _ in range(4)]
    found = [blrlab_ops.linear(each, factors, bias, activation="silu", **follows, impl=impl) for each in drawn]
    assert len(described) == 2
    for each, y in zip(drawn, found, strict=True):
        _judge(y, each, factors, bias, {"activation": "silu", **follows})
    assert torch.equal(blrlab_ops.linear(drawn[0], factors, bias, activation="silu", **follows, impl=impl), found[0])


@each_kernel
def test_a_residual_may_be_the_input(format, impl):
    """It may be another tensor in the next call, which is otherwise alike."""
    x, factors, bias, _ = _operands(SQUARE[format])
    for residual in (x, x, x, torch.randn_like(x), x):
        y = blrlab_ops.linear(x, factors, bias, residual=residual, impl=impl)
        _judge(y, x, factors, bias, {"residual": residual})


@each_kernel
@pytest.mark.parametrize("tokens", [63, 16, 1])
def test_can_be_captured_in_a_cuda_graph(format, impl, tokens):
    """Three calls, each on the result of the one before, as in a model."""
    x, factors, bias, drawn = _operands(SQUARE[format]._replace(tokens=tokens))

    def model():
        y = blrlab_ops.linear(x, factors, bias, impl=impl)
        y = blrlab_ops.linear(y, factors, activation="silu", multiply=drawn["multiply"], impl=impl)
        return blrlab_ops.linear(y, factors, bias, residual=x, impl=impl)

    expected = model()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model()
    for _ in range(3):
        y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected)
    x.neg_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, model())


@each_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=_named)
@pytest.mark.parametrize("tokens", [63, 1])
def test_repeated_calls_agree_bit_for_bit(format, impl, dtype, tokens):
    """One after the other without waiting, so that whatever overlaps does."""
    x, factors, bias, drawn = _operands(SQUARE[format]._replace(tokens=tokens), dtype)
    follows = {"activation": "silu", **drawn}
    results = [blrlab_ops.linear(x, factors, bias, **follows, impl=impl) for _ in range(50)]
    assert all(torch.equal(each, results[0]) for each in results[1:])


@each_kernel
@pytest.mark.parametrize("tokens", [63, 1])
def test_calls_in_a_row_see_what_the_last_one_wrote(format, impl, tokens):
    """As with a pause between any two calls: no launch starts on what is not there yet."""
    layer = SQUARE[format]._replace(tokens=tokens)
    x, factors, bias = testing.random_operands(layer, dtype=_usual(impl), device="cuda")
    hurried, slow = x, x
    for _ in range(20):
        hurried = blrlab_ops.linear(hurried, factors, bias, impl=impl)
    for _ in range(20):
        torch.cuda.synchronize()
        slow = blrlab_ops.linear(slow, factors, bias, impl=impl)
    assert torch.isfinite(slow).all()
    assert torch.equal(hurried, slow)


def _product(**more) -> dict:
    return {"rows": 32, "columns": 64, "depth": 32, "warps": 4, "stages": 2, **more}


def _stream(**more) -> dict:
    return {"columns": 32, "depth": 64, "rows": 16, "warps": 4, "stages": 3, **more}


def _configs() -> list:
    asking, held = _product(prefetch=True), _product(rows=16, columns=32, held=True)
    vector, tensor = _stream(rows=1, vector=True, prefetch=True), _stream(prefetch=True)
    once = _stream(depth=128)
    mixes = [{"rows": rows, "ranks": 8, "warps": 4, "tensor": tensor} for rows, tensor in ((16, True), (4, False))]
    rows = []
    for format, tokens in (("low_rank", 63), ("monarch", 63), ("monarch", 16), ("low_rank", 1)):
        layer = FEW_TOKENS[format]._replace(tokens=tokens)
        rows += [(layer, "triton_two_stage", {"first": held, "second": each}) for each in (held, asking)]
    for format, tokens in (("low_rank", 1), ("monarch", 1), ("blast", 1)):
        layer = FEW_TOKENS[format]._replace(tokens=tokens)
        rows += [(layer, "triton_streaming", {"first": each, "second": each}) for each in (vector, tensor, once)]
    for format in ("low_rank", "monarch", "blast"):
        layer = FEW_TOKENS[format]._replace(tokens=17)
        rows += [(layer, "triton_streaming", {"first": each, "second": each}) for each in (tensor, once)]
    blast = FEW_TOKENS["blast"]._replace(tokens=63)
    rows += [(blast, "triton_three_stage", {"first": held, "middle": mix, "second": held}) for mix in mixes]
    rows += [(blast, "triton_three_stage", {"first": asking, "middle": mix, "second": asking}) for mix in mixes]
    rows += [(blast, "triton_two_stage", {"second": each}) for each in (held, asking)]
    rows += [(blast, "triton_late_mixing", {"first": held, "second": each}) for each in (tensor, once)]
    fused = {"rows": 16, "columns": 32, "depth": 32, "warps": 4, "stages": 2}
    rows += [
        (FEW_TOKENS["monarch"]._replace(tokens=63, rank=rank), "triton_fused", {"only": fused}) for rank in (48, 130)
    ]
    chained = {"columns": 128, "ranks": 32, "depth": 32, "slots": 3, "U_slots": 2}
    for tokens, rank in ((63, 24), (1500, 72)):
        layer = FEW_TOKENS["monarch"]._replace(tokens=tokens, rank=rank)
        rows.append((layer, "hopper_chained", {"only": chained}))
    return rows


@pytest.mark.parametrize(
    ("format", "impl"), [("monarch", "torch_bmm"), ("blast", "torch_bmm"), ("blast", "bmm_mixing")]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_bias_of_a_large_result_is_a_part_of_the_product(format, impl, dtype):
    """So it rounds once less than where it is added."""
    layer = Case(format, 4096, 1152, 2304, (8, 8), 48)
    x, factors, bias = testing.random_operands(layer, dtype=dtype, device="cuda")
    bias = 3 * bias
    exact = x.double() @ blrlab_ops.to_dense({name: each.double() for name, each in factors.items()}) + bias
    assert batched.spare(x, bias, *factors.values(), tokens=4096, columns=2304, depth=384)
    y = blrlab_ops.linear(x, factors, bias, impl=impl)
    added = blrlab_ops.linear(x, factors, impl=impl) + bias
    assert testing.errors(y, exact)[0] <= 1.1 * testing.errors(added, exact)[0]
    assert all(torch.equal(blrlab_ops.linear(x, factors, bias, impl=impl), y) for _ in range(5))


HOPPER = [(format, impl) for format in dispatch.IMPLS for impl in filter(dispatch.is_hopper, dispatch.impls(format))]


@pytest.mark.parametrize(("format", "impl"), HOPPER)
@pytest.mark.parametrize("busy", [False, True])
def test_hopper_kernels_agree_bit_for_bit(format, impl, busy):
    """Over many tiles, alone and beside another stream's work."""
    layer, more = Case(format, 16384, 1152, 3456, (8, 8), 48), torch.randn(4096, 4096, device="cuda")
    x, factors, bias = testing.random_operands(layer, dtype=torch.bfloat16, device="cuda")
    stream, expected = torch.cuda.Stream(), blrlab_ops.linear(x, factors, bias, impl=impl)
    _judge(expected, x, factors, bias)
    for _ in range(200):
        if busy:
            with torch.cuda.stream(stream):
                more @ more
        assert torch.equal(blrlab_ops.linear(x, factors, bias, impl=impl), expected)


@pytest.mark.parametrize(("format", "impl"), HOPPER)
def test_hopper_kernels_are_tuned(format, impl):
    layer = Case(format, 256, 512, 512, (4, 4), 40)
    assert list(search.tune(layer, torch.bfloat16, impls=[impl], measured=3)) == [impl]  # which was right


@pytest.mark.parametrize(("layer", "impl", "config"), _configs(), ids=_named)
@each_dtype
def test_explicit_tiles_are_within_their_budgets(layer, impl, config, dtype):
    y = _run(layer, impl, config, dtype)
    _judge(y, *testing.random_operands(layer, dtype=dtype, device="cuda"))
    assert all(torch.equal(_run(layer, impl, config, dtype), y) for _ in range(5))


@each_kernel
def test_outputs_beyond_2_to_the_31_elements(format, impl):
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    layer = Case(format, 66_000, 64, 32_768, (1, 1) if format == "low_rank" else (2, 2), 16)
    x, factors, bias = testing.random_operands(layer, dtype=torch.bfloat16, device="cuda")
    y = blrlab_ops.linear(x, factors, bias, impl=impl)
    tail = blrlab_ops.linear(x[-200:], factors, bias, impl=impl)
    assert testing.errors(y[-200:], tail)[0] < 1e-2


FAR = """
import sys, torch, blrlab_ops
from blrlab_ops import testing
x, factors, bias = testing.random_operands(testing.Case("monarch", 140_000, 64, 64, (16, 16), 64), device="cuda")
half = {name: factor.bfloat16() for name, factor in factors.items()}
y = blrlab_ops.linear(x.bfloat16(), half, impl=sys.argv[1])
few = torch.cat([blrlab_ops.linear(part.bfloat16(), half, impl=sys.argv[1]) for part in x.split(20_000)])
assert testing.errors(y, few)[0] < 1e-2
"""


@pytest.mark.parametrize("impl", _triton("monarch"))
def test_intermediates_beyond_2_to_the_31_elements(run_child, impl):
    """In a process of its own: where an address is wrong, no later test of a process can run."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    run_child("-c", FAR, impl)


TUNED = Case("monarch", 12, 640, 1280, (4, 4), 40)
READ = f"""
import json, sys, torch
from blrlab_ops import configs, testing
layer = testing.{TUNED!r}
sizes, rest = layer[2:4], (*layer[4:], torch.bfloat16, torch.device("cuda"))
for impl in sys.argv[1:]:
    found = [configs.tuned("monarch", impl, tokens, sizes, *rest) for tokens in (2, 17)]
    verdict = testing.check(impl, *testing.random_operands(layer, dtype=torch.bfloat16, device="cuda"))
    assert "blrlab_ops.tuning.search" not in sys.modules
    print(json.dumps([impl, *found, verdict.passed]))
"""


def test_what_is_tuned_is_found_again_by_another_process(run_child):
    impls, said = ["triton_fused", "triton_streaming", "triton_two_stage"], []
    entries = search.tune(TUNED, torch.bfloat16, "cuda", impls, measured=2, say=said.append)
    assert list(entries) == impls
    assert len(said) == len(impls)
    assert all(0 < entry.us < 1e5 for entry in entries.values())
    rows = [json.loads(line) for line in run_child("-c", READ, *impls).splitlines()]
    assert rows == [[impl, entries[impl].config, {}, True] for impl in impls]
    x, factors, bias = testing.random_operands(TUNED, dtype=torch.bfloat16, device="cuda")
    for impl in impls:
        config = configs.tuned(
            "monarch", impl, 12, (640, 1280), TUNED.blocks, TUNED.rank, torch.bfloat16, torch.device("cuda")
        )
        assert config == entries[impl].config
        _judge(blrlab_ops.linear(x, factors, bias, impl=impl), x, factors, bias)
    best = dispatch.best("monarch", x.device, torch.bfloat16, dispatch.Layer(*TUNED[1:]))
    assert best.impl == min(entries.values(), key=lambda entry: entry.us).impl
    assert torch.equal(blrlab_ops.linear(x, factors, bias), blrlab_ops.linear(x, factors, bias, impl=best.impl))


@pytest.mark.parametrize("impl", ["triton_two_stage", "triton_streaming"])
def test_the_command_verifies_on_the_gpu(capsys, impl):
    assert verify.main(["--device=cuda", "--dtype=bfloat16", f"--impl={impl}", "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(testing.AWKWARD)


@pytest.mark.parametrize("format", FEW_TOKENS)
@each_dtype
@pytest.mark.parametrize("tokens", [1, 16, 63])
def test_joined_layers_are_within_their_budgets(format, dtype, tokens):
    layer = FEW_TOKENS[format]._replace(tokens=tokens)
    x, first, bias = testing.random_operands(layer, dtype=dtype, device="cuda")
    second = {name: factor.flip(-1).contiguous() for name, factor in first.items()}
    together = joined.join([first, second])
    for impl in (None, *(joined.JOINED_BLAST if format == "blast" else _triton("monarch"))):
        if impl and dispatch.is_hopper(impl) and dispatch.why_not("monarch", impl, "cuda", dtype):
            continue
        found = joined.linear(x, together, torch.cat([bias, bias]), impl=impl)
        for y, factors in zip(found, (first, second), strict=True):
            _judge(y, x, factors, bias)


@pytest.mark.parametrize("format", FEW_TOKENS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=_named)
@pytest.mark.parametrize("tokens", [1, 16, 17])
def test_int8_factors_are_within_the_budget_of_what_they_stand_for(format, dtype, tokens):
    layer = FEW_TOKENS[format]._replace(tokens=tokens)
    x, factors, bias = testing.random_operands(layer, dtype=dtype, device="cuda")
    small = int8.quantise(factors)
    with testing.poisoned():
        y = int8.linear(x, small, bias, impl="triton_streaming")
    exact = int8.dequantise(small, torch.float64)
    truth = blrlab_ops.linear(x.double(), exact, bias.double(), impl="ref")
    yardstick = testing.errors(blrlab_ops.linear(x, int8.dequantise(small, dtype), bias, impl="torch_bmm"), truth)
    allowed = budgets.of_kernel(yardstick, torch.finfo(dtype).eps, testing.peak(truth))
    assert testing.Verdict(*testing.errors(y, truth), *allowed).passed


@pytest.mark.parametrize("format", FEW_TOKENS)
def test_int8_factors_are_tuned(format):
    layer = FEW_TOKENS[format]
    kept = search.tune(layer, torch.int8, measured=2)
    assert set(kept) == {"triton_streaming"}
    key = tuning.Key(format, tuning.bucket(layer.tokens), *layer[2:], "int8")
    assert tuning.lookup(torch.cuda.get_device_name(0), key) == kept
