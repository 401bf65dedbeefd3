"""Whole models of every family: the libraries' own function, a gate that no wrong model passes, complete rows."""

import dataclasses
import importlib.util
import json

import pytest

from blrlab import compress
from blrlab.bench import model as command
from blrlab.models import dit, gpt2, llama, vit
from blrlab.records import read

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from blrlab_ops import joined  # noqa: E402
from blrlab_ops.loading import factored_layers, weight_bytes  # noqa: E402
from blrlab_ops.nn import FactoredLinear  # noqa: E402

from blrlab.bench import (  # noqa: E402
    card,
    depth_gate,
    full_size,
    joining,
    model_rows,
    nets,
    random_models,
    results,
    runner,
)
from blrlab.bench.model_rows import Group, Net  # noqa: E402

SIZES = {
    "llama": llama.Config(vocab_size=61, context=16, layers=3, heads=4, kv_heads=2, width=32, inner=48),
    "tied": llama.Config(vocab_size=61, context=16, layers=3, heads=4, kv_heads=4, width=32, inner=48, tied=True),
    "vit": vit.Config(image_size=12, patch=4, channels=2, classes=5, layers=3, heads=4, width=32, inner=48),
    "apart": vit.Config(
        image_size=12, patch=4, channels=2, classes=5, layers=1, heads=4, width=32, inner=48, fused=False
    ),
    "dit": dit.Config(
        size=8, channels=3, out_channels=6, classes=5, layers=3, heads=4, width=32, inner=128, frequency_shift=1
    ),
}
RULES = {
    "llama": (("*/self_attn/[qo]_proj", {}), ("*/mlp/*", {"rank": 8})),
    "vit": (("*/fc?", {}), ("*/attention/*", {})),
    "dit": (("*/attn/qkv", {}), ("*/fc1", {}), ("*/adaln", {})),
}
TOKENS = {"llama": 9, "tied": 9, "vit": 10, "apart": 10, "dit": 16}
FORMATS = ("dense", "low_rank", "monarch", "blast")
IMPLS = ("torch_eager", "best")
FIELDS = {
    "kind", "op", "impl", "net", "layer", "phase", "in_features", "out_features", "blocks", "rank", "block_rank",
    "batch", "tokens", "dtype", "unit", "p20", "p50", "p80", "samples", "method", "launch_us", "tokens_per_s",
    "bound_us", "sheet_bound_us", "weight_bytes", "peak_bytes", "sm_mhz", "temperature_c", "error", "error_max",
    "error_budget", "error_max_budget", "passed", "device", "torch", "triton", "jax", "driver", "commit", "time",
    "verified_layers", "depth_error", "depth_error_budget", "cache_bytes",
}  # fmt: skip


def net_of(name: str, *ops: str) -> Net:
    if name == "dit":
        pytest.importorskip("diffusers", reason="diffusers is not installed")
    family = nets.of(SIZES[name])

    def plan(op):
        defaults = {"format": op, "rank": 16, "blocks": 2 if op in ("monarch", "blast") else 0}
        return {} if op == "dense" else compress.plan(family.linears(SIZES[name]), RULES[family.name], defaults)

    return Net(name, SIZES[name], {op: plan(op) for op in ops or FORMATS})


def drawn(net: Net, op: str, dtype=torch.float32, impl: str | None = None):
    generator = torch.Generator().manual_seed(0)
    return random_models.draw(net.family.running, net.sizes, net.plans[op], impl, generator, dtype)


def inputs_of(net: Net, phase: str, dtype=torch.float32, batch: int = 2):
    group = Group(phase, batch, TOKENS[net.name], "float32")
    found = net.family.running.inputs(net.sizes, group, torch.Generator().manual_seed(1))
    return tuple(each.to(dtype) if each.is_floating_point() else each for each in found)


def bench(net: Net, groups, settings, is_there=lambda *_: False):
    return [row for rows in full_size.bench_full_size(net, groups, settings, is_there) for row in rows]


@pytest.fixture(scope="module")
def settings():
    return runner.settings(IMPLS, 1e-4, card.here("float32", "cpu"))


@pytest.mark.parametrize("op", FORMATS)
@pytest.mark.parametrize("name", SIZES)
def test_a_copy_of_the_first_blocks_is_the_models_function(name, op):
    net = net_of(name, op)
    model, running = drawn(net, op, torch.float64), net.family.running
    few = dataclasses.replace(net.sizes, layers=min(2, net.sizes.layers))
    dense = random_models.dense_copy(running, few, model, torch.float64)
    assert not factored_layers(dense)
    assert bool(factored_layers(model)) is (op != "dense")
    for phase in net.family.phases:
        inputs = inputs_of(net, phase, torch.float64)
        with torch.no_grad():
            wanted = running.call(dense, phase, inputs, True)()
            with random_models.few_blocks(running, model, few.layers):
                call = running.call(model, phase, inputs, True)
                for _ in range(3):  # every call finds the same cache
                    # norms and rotary angles are float32 in the libraries
                    torch.testing.assert_close(call(), wanted, atol=2e-5, rtol=1e-5)
    assert len(model.get_submodule(running.blocks)) == net.sizes.layers


@pytest.mark.parametrize("name", SIZES)
def test_a_models_parameters_are_those_of_the_flax_model(name):
    net = net_of(name, "dense", "blast")
    shapes = net.family.running.checkpoints.shapes(net.sizes)
    assert weight_bytes(drawn(net, "dense")) == 4 * compress.parameter_count(shapes)
    factored = compress.shapes_of(shapes, net.plans["blast"])
    model = drawn(net, "blast")
    assert weight_bytes(model) == 4 * compress.parameter_count(factored)
    assert len(factored_layers(model)) == len(net.plans["blast"])
    assert all(not parameter.is_meta and not parameter.isnan().any() for parameter in model.parameters())


def test_decode_continues_what_prefill_gives():
    net = net_of("llama", "monarch")
    model, (ids,) = drawn(net, "monarch"), inputs_of(net, "decode")
    call = net.family.running.call
    with torch.no_grad():
        whole = call(model, "prefill", (ids,), False)()
        torch.testing.assert_close(call(model, "decode", (ids,), False)(), whole, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(whole[:, 0], model(ids).logits[:, -1], atol=1e-5, rtol=1e-4)


def test_a_seed_draws_the_same_weights_for_every_implementation():
    net = net_of("llama", "blast")
    best, named = drawn(net, "blast"), drawn(net, "blast", impl="torch_bmm")
    assert all(layer.impl == "torch_bmm" for layer in factored_layers(named).values())
    for (path, one), (other, two) in zip(best.named_parameters(), named.named_parameters(), strict=True):
        assert path == other
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "vit", "dit"])
def test_rows_are_complete_verified_and_timed(name, settings, dtype):
    net = net_of(name, *(FORMATS if dtype == "float32" else ("dense", "blast")))
    tokens, itemsize = TOKENS[name], getattr(torch, dtype).itemsize
    rows = bench(net, [Group(phase, 2, tokens, dtype) for phase in net.family.phases], settings)
    json.dumps(rows, allow_nan=False)
    assert len(rows) == len(net.plans) * len(net.family.phases)
    for row in rows:
        shown = {"images_per_s"} if name == "vit" else set()
        planned = set() if row["op"] == "dense" else {"plan_hash"}
        assert set(row) - {"note"} == FIELDS | shown | planned, row.get("reason")
        assert row["passed"] is True
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        assert 0 <= row["error"] <= row["error_budget"] < 0.2
        assert row["error_max"] <= row["error_max_budget"]
        assert (row["layer"], row["batch"], row["tokens"], row["verified_layers"]) == ("*", 2, tokens, 2)
        assert (row["depth_error"] is None) is (row["op"] == "dense")
        new = 1 if row["phase"] == "decode" else tokens
        assert row["tokens_per_s"] == pytest.approx(2e6 * new / row["p50"])
        assert row.get("images_per_s", 0) == pytest.approx(2e6 / row["p50"] if shown else 0)
        kept = {"prefill": 9, "decode": 10}.get(row["phase"])
        assert row["cache_bytes"] == (kept and 2 * 3 * 2 * kept * 2 * 8 * itemsize)
        assert row["bound_us"] > 0
        assert model_rows.line(row)
    sizes = {row["op"]: row["weight_bytes"] for row in rows}
    assert sizes["blast"] < sizes["dense"]


def test_the_bound_counts_rows_layer_by_layer():
    here = card.here("float32", "cpu").measured
    slow = dataclasses.replace(here, tensor_flops=1e9, cuda_flops=1e9, dram_bytes_per_s=1e15)

    def bound(name: str, phase: str, tokens: int) -> float:
        return model_rows.bound_us(net_of(name, "dense"), Group(phase, 2, tokens, "float32"), "dense", slow)

    block = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    assert bound("llama", "prefill", 9) == pytest.approx(2 * (18 * 3 * block + 2 * 32 * 61) / 1e3)
    assert bound("llama", "decode", 9) == pytest.approx(2 * 2 * (3 * block + 32 * 61) / 1e3)
    block = 4 * 32 * 32 + 2 * 32 * 48
    assert bound("vit", "forward", 10) == pytest.approx(2 * (20 * 3 * block + 2 * 32 * 5) / 1e3)
    tokens, image = 3 * (4 * 32 * 32 + 2 * 32 * 128) + 32 * 24, 3 * 6 * 32 * 32 + 256 * 32 + 3 * 32 * 32
    assert bound("dit", "forward", 64) == pytest.approx(2 * (128 * tokens + 2 * image) / 1e3)


def test_a_number_of_tokens_makes_the_latents_of_a_dit():
    net = net_of("dit", "dense")
    group = Group("forward", 1, 64, "float32")
    assert net.family.sized(net.sizes, 64).size == 16
    assert net.family.running.inputs(net.sizes, group, torch.Generator())[0].shape == (1, 3, 16, 16)
    assert net.family.tokens(net.sizes) == 16


def test_what_a_dit_predicts_is_judged_patch_by_patch():
    net = net_of("dit", "dense")
    model, inputs = drawn(net, "dense"), inputs_of(net, "forward")
    with torch.no_grad():
        found, image = net.family.running.call(model, "forward", inputs, True)(), model(*inputs).sample
    assert found.shape == (2, 16, 2 * 2 * 6)
    places = [image[1, :, 4 + row, 2 + column] for row in range(2) for column in range(2)]
    assert torch.equal(found[1, 2 * 4 + 1], torch.cat(places))  # the second patch of the third row


def without_bias(model):
    model.get_submodule("vit.layers.0.mlp.fc1").bias.zero_()


def deep_layer(model):
    layer = model.get_submodule("vit.layers.2.mlp.fc2")  # beyond the blocks that are held to float64
    layer.forward = lambda x: (
        1.5 * FactoredLinear.forward(layer, x) if layer.impl is None else layer.bias + 0 * x[..., :32]
    )


def deep_nan(model):
    model.get_submodule("vit.layers.2.mlp.fc2").bias.fill_(torch.nan)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [(deep_layer, "vit.layers.2.mlp.fc2 is off by"), (deep_nan, "not finite"), (without_bias, "over its budget")],
)
def test_a_wrong_model_has_no_speed(settings, monkeypatch, spoil, said, dtype):
    net, states = net_of("vit", "monarch"), depth_gate.Judge._states

    def spoilt(judge, few, wanted):
        found = states(judge, few, wanted)
        if wanted != torch.float64:
            spoil(judge._model)  # the truth is known by now
        return found

    monkeypatch.setattr(depth_gate.Judge, "_states", spoilt)
    (row,) = bench(net, [Group("forward", 2, 10, dtype)], settings)
    assert row["passed"] is False
    assert (row["p50"], row["tokens_per_s"], row["method"]) == (None,) * 3
    assert said in row["reason"]


@pytest.mark.parametrize("name", ["q_proj", "down_proj"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_one_dead_layer_of_a_deep_model_is_found(settings, monkeypatch, phase, name):
    """Of 24 blocks in bfloat16 the output alone would not show it."""
    net = dataclasses.replace(net_of("llama", "blast"), sizes=dataclasses.replace(SIZES["llama"], layers=24))
    rules = (("*/self_attn/[qo]_proj", {}), ("*/mlp/*", {"rank": 8}))
    plan = compress.plan(net.family.linears(net.sizes), rules, {"format": "blast", "rank": 16, "blocks": 2})
    net, draw = dataclasses.replace(net, plans={"blast": plan}), random_models.draw

    def dead(*given):
        model = draw(*given)
        part = "self_attn" if name == "q_proj" else "mlp"
        layer = model.get_submodule(f"model.layers.20.{part}.{name}")
        layer.forward = lambda x: FactoredLinear.forward(layer, x) * (layer.impl is not None)
        return model

    group = [Group(phase, 1, 9, "bfloat16")]
    assert bench(net, group, settings)[0]["passed"] is True
    monkeypatch.setattr(random_models, "draw", dead)
    (row,) = bench(net, group, settings)
    assert row["passed"] is False
    assert f"{name} is off by 1.0e+00" in row["reason"]


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_memory_that_holds_the_right_answer_does_not_pass(settings, monkeypatch, phase):
    net, memory = net_of("llama", "monarch"), []
    running, poison = net.family.running, full_size.poison

    def call(model, phase, inputs, states):
        run = running.call(model, phase, inputs, states)

        def stale():
            memory[:] = memory or [run()]
            return memory[0]

        return stale if states and factored_layers(model) else run

    def watched(sizes, dtype, device):
        poison(sizes, dtype, device)
        for block in memory:  # as an allocator would give it out again
            if block.numel() in sizes:
                block.fill_(torch.nan)

    family = dataclasses.replace(net.family, running=dataclasses.replace(running, call=call))
    monkeypatch.setattr(Net, "family", property(lambda self: family))
    monkeypatch.setattr(full_size, "poison", watched)
    (row,) = bench(net, [Group(phase, 2, 9, "float32")], settings)
    assert row["passed"] is False
    assert memory


def test_one_spoilt_token_of_many_does_not_pass():
    net = net_of("vit", "blast")
    model = drawn(net, "blast", torch.bfloat16)
    inputs = inputs_of(net, "forward", torch.bfloat16, batch=16)
    judge = depth_gate.Judge(net.family, net.sizes, model, "forward", inputs, torch.bfloat16)
    states = judge.truth.clone()
    assert judge.judge(states, False).passed
    states[3, 5] *= 1.2
    verdict = judge.judge(states, False)
    assert verdict.error < verdict.error_budget
    assert not verdict.passed


def test_heads_one_by_one_attend_as_all_at_once():
    q, k, v = (torch.randn(2, heads, 5, 4, dtype=torch.float64) for heads in (6, 3, 3))
    attend = torch.nn.functional.scaled_dot_product_attention
    mask = torch.tril(torch.ones(5, 5, dtype=torch.bool))[None, None]
    for kwargs in ({"is_causal": True}, {"attn_mask": mask, "scale": 0.3}, {"attn_mask": None}):
        wanted = attend(q, k, v, enable_gqa=True, **kwargs)
        with depth_gate._HeadByHead():
            torch.testing.assert_close(attend(q, k, value=v, enable_gqa=True, **kwargs), wanted)


@pytest.mark.parametrize("op", FORMATS[1:])
def test_layers_that_share_their_input_are_one_and_the_models_function_stays(settings, monkeypatch, op):
    rules, calls = (("*/self_attn/?_proj", {}), ("*/mlp/*", {"rank": 8})), []
    sizes = dataclasses.replace(SIZES["llama"], kv_heads=4)
    plan = compress.plan(
        nets.of(sizes).linears(sizes), rules, {"format": op, "rank": 16, "blocks": 2 * (op != "low_rank")}
    )
    net, linear = Net("llama", sizes, {op: plan}), joined.linear

    def counted(x, together):
        calls.append(together.count)
        return linear(x, together)

    monkeypatch.setattr(joined, "linear", counted)
    asked = dataclasses.replace(settings, impls=("joined",))
    (row,) = bench(net, [Group("decode", 2, 9, "float32")], asked)
    assert row["passed"] is True, row["reason"]
    assert calls[:4] == [3, 2, 3, 2]  # of the first blocks
    assert 0 <= row["depth_error"] <= row["depth_error_budget"]
    alone = Net("llama", SIZES["llama"], net_of("llama", op).plans)  # keys and values stay dense, gate and up are alike
    assert joining.groups(alone.plans[op], alone.family.running.sharing) == [
        (f"layers_{number}/mlp/gate_proj", f"layers_{number}/mlp/up_proj") for number in range(3)
    ]


def test_layers_of_other_ranks_cannot_be_joined(settings):
    net = net_of("llama", "low_rank")
    rules = (("*/gate_proj", {"rank": 4}), ("*/up_proj", {"rank": 8}))
    plan = compress.plan(net.family.linears(net.sizes), rules, {"format": "low_rank"})
    asked = dataclasses.replace(settings, impls=("joined",))
    (row,) = bench(Net("llama", net.sizes, {"low_rank": plan}), [Group("decode", 1, 9, "float32")], asked)
    assert (row["passed"], row["p50"]) == (None, None)
    assert "share their input" in row["reason"]


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_models_under_a_compiler_are_judged_and_timed_beside_their_own(name, settings):
    net = net_of(name, "dense", "low_rank")
    asked = dataclasses.replace(settings, impls=("torch_eager", "best", "ref", "torch_compile"))
    phase = net.family.phases[-1]
    rows = bench(net, [Group(phase, 1, TOKENS[name], "float32")], asked)
    assert [(row["op"], row["impl"]) for row in rows] == [
        ("dense", "torch_eager"), ("dense", "torch_compile"),
        ("low_rank", "best"), ("low_rank", "torch_compile"), ("low_rank", "ref"),
    ]  # fmt: skip
    for row in rows:
        assert row["passed"] is True, row["reason"]
        assert ("under torch.compile" in row["method"]) is (row["impl"] == "torch_compile")
        assert (row["depth_error"] is None) is (row["impl"] == "torch_eager")


def test_a_program_that_fails_keeps_its_row_and_the_others_go_on(settings, monkeypatch):
    net, made = net_of("llama", "low_rank", "monarch"), random_models.draw

    def draw(running, sizes, specs, *rest):
        if any(spec.format == "low_rank" for spec in specs.values()):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return made(running, sizes, specs, *rest)

    monkeypatch.setattr(random_models, "draw", draw)
    asked = dataclasses.replace(settings, impls=("best", "triton_two_stage"))
    rows = {(row["op"], row["impl"]): row for row in bench(net, [Group("decode", 1, 9, "float32")], asked)}
    full, good, unable = (
        rows[each] for each in (("low_rank", "best"), ("monarch", "best"), ("monarch", "triton_two_stage"))
    )
    assert (full["passed"], full["reason"]) == (None, "OutOfMemoryError: CUDA out of memory")
    assert good["passed"] is True
    assert (unable["passed"], unable["p50"]) == (None, None)
    assert unable["reason"]


@pytest.mark.parametrize(
    ("name", "tokens", "said"),
    [
        ("llama", 16, "context is 16"),
        ("vit", 9, "an image has 10 tokens here, not 9"),
        ("dit", 15, "latents are square"),
    ],
)
def test_what_does_not_fit_a_model_says_so(settings, name, tokens, said):
    net = net_of(name, "dense")
    (row,) = bench(net, [Group(net.family.phases[-1], 1, tokens, "float32")], settings)
    assert (row["passed"], row["p50"]) == (None, None)
    assert said in row["reason"]


def test_a_library_that_is_too_old_is_a_reason(settings, monkeypatch):
    monkeypatch.setattr(full_size.importlib.metadata, "version", lambda name: "4.57.1")
    (row,) = bench(net_of("vit", "dense"), [Group("forward", 1, 10, "float32")], settings)
    assert (row["passed"], row["reason"]) == (None, "needs transformers 5 or newer, and here is 4.57.1")


def test_rows_of_other_plans_are_other_rows():
    net, group = net_of("llama", "blast"), Group("decode", 1, 9, "float32")
    (path, spec), *_ = net.plans["blast"].items()
    other = dataclasses.replace(net, plans={"blast": {**net.plans["blast"], path: dataclasses.replace(spec, rank=4)}})
    one, two = (model_rows.identity(each, group, "blast", "best") for each in (net, other))
    assert one["plan_hash"] != two["plan_hash"]
    assert "plan_hash" in results.IDENTITY


def test_a_library_that_is_missing_is_a_reason(settings, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "diffusers" else find(name, *rest)
    )
    net = Net("dit", SIZES["dit"], {"dense": {}})
    (row,) = bench(net, [Group("forward", 1, 16, "float32")], settings)
    assert (row["passed"], row["reason"]) == (None, "needs diffusers: pip install diffusers")


def test_what_is_there_is_not_measured_again(settings):
    net = net_of("llama", "dense", "low_rank")
    groups = [Group(phase, 1, 9, "float32") for phase in ("prefill", "decode")]
    there = lambda group, op, impl: (group.phase, op) != ("decode", "low_rank")  # noqa: E731
    assert [(row["phase"], row["op"]) for row in bench(net, groups, settings, there)] == [("decode", "low_rank")]


def test_nets_have_the_names_of_the_shapes():
    known = {"gpt2s": gpt2.Config(), "llama7b": llama.Config(), "vit_b": vit.Config(), "dit_xl": dit.Config()}
    assert {name: nets.name(sizes) for name, sizes in known.items()} == {name: name for name in known}
    assert nets.name(dataclasses.replace(llama.LLAMA_1B, rope_scaling=None, context=2048)) == "llama1b"
    assert nets.name(dataclasses.replace(llama.Config(), layers=2)) == "llama_2x4096"
    assert nets.name(vit.Config(fused=False)) == "vit_b_apart"


@pytest.mark.parametrize("format", FORMATS[1:])
def test_the_configs_of_llama1b_have_its_sizes_and_published_ranks(format):
    options, rest = command._parser().parse_known_args([f"--config=configs/llama1b_{format}.py:full"])
    net = command._net(options, rest)
    assert net.name == "llama1b"
    assert dataclasses.replace(net.sizes, context=131072, rope_scaling=llama.RopeScaling(32.0), dtype="float32") == (
        dataclasses.replace(llama.LLAMA_1B, remat=True)
    )
    ranks = {path.removeprefix("layers_7/"): spec.total_rank for path, spec in net.plans[format].items()}
    own = {path: rank for path, rank in ranks.items() if not path.startswith("layers_")}
    names = {f"self_attn/{name}_proj": 256 for name in "qo"} | {"mlp/gate_proj": 512}
    assert own == names | dict.fromkeys(("mlp/up_proj", "mlp/down_proj"), 768)
    assert net.family.tokens(net.sizes) == 1024


TINY = [
    "--config=configs/llama1b_blast.py:small", "--config.model.layers=1", "--config.model.width=64",
    "--config.model.inner=256", "--config.model.vocab_size=61", "--config.model.context=16", "--seconds=0.001",
]  # fmt: skip


def test_the_command_measures_a_llama_and_goes_on(tmp_path, capsys):
    out = tmp_path / "records.jsonl"
    arguments = [*TINY, f"--out={out}", "--device=cpu", "--batch=1,2"]
    assert command.main([*arguments, "--phases=decode"]) == 0
    before = read(out)
    assert command.main(arguments) == 0
    said = capsys.readouterr().out
    assert "2 of 4 phases are in" in said
    assert "weights" in said
    rows = [record for record in read(out) if record["kind"] == "bench"]
    assert rows[:4] == before[1:]
    assert len(rows) == 8
    assert {row["net"] for row in rows} == {"llama_1x64"}
    assert {(row["op"], row["impl"]) for row in rows} == {("dense", "torch_eager"), ("blast", "best")}
    assert {row["verified_layers"] for row in rows} == {1}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--phases=forward"], "llama_1x64 has no forward: its phases are prefill, decode."),
        (["--phases=train_step"], "llama_1x64 has no train_step"),
        (["--phases=decode", "--backends=xla"], "nothing named runs decode"),
        (["--impl=bst"], 'Did you mean "best"?'),
        (["--compil"], 'Did you mean "--compile"?'),
        (["--config.rules_file=nowhere.json"], "nowhere.json"),
    ],
)
def test_wrong_input_is_one_sentence(flags, said, capsys):
    assert command.main([*TINY, *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")
@pytest.mark.parametrize("name", ["llama", "vit", "dit"])
def test_on_a_gpu_every_phase_becomes_a_cuda_graph(name):
    net = net_of(name)
    asked = runner.settings((*IMPLS, "torch_compile"), 1e-3, card.here("bfloat16"))
    for row in bench(net, [Group(phase, 2, TOKENS[name], "bfloat16") for phase in net.family.phases], asked):
        assert row["passed"] is True, row
        assert "CUDA graph of calls" in row["method"]
        assert row["peak_bytes"] > 0
