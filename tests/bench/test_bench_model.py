"""Whole models: the same function in PyTorch and JAX, a gate that no wrong program passes, complete rows, resuming."""

import dataclasses
import json
import subprocess
from pathlib import Path

import jax
import pytest
from flax.core import FrozenDict

from blrlab import compress, train
from blrlab.bench import model as command
from blrlab.bench.results import Results
from blrlab.models import gpt2
from blrlab.records import read

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from blrlab.bench import card, end_to_end, gpt2_torch, gpt2_xla, model_gate, model_rows, nets, runner  # noqa: E402
from blrlab.bench.end_to_end import bench_model  # noqa: E402
from blrlab.bench.model_rows import PHASES, Group, Net  # noqa: E402

SIZES = gpt2.Config(vocab_size=61, context=16, layers=2, heads=2, width=24, dropout=0.1)
RULES = (("*/attn/c_attn", {}), ("*/mlp/*", {"rank": 8}))
FORMATS = ("dense", "low_rank", "monarch", "blast")
IMPLS = ("torch_eager", "torch_bmm", "xla")
CONFIG = "configs/gpt2_monarch.py:small"
TINY = [
    f"--config={CONFIG}", "--config.model.layers=1", "--config.model.width=48", "--config.model.vocab_size=61",
    "--config.model.context=16", "--seconds=0.001",
]  # fmt: skip
FIELDS = {
    "kind", "op", "impl", "net", "layer", "phase", "in_features", "out_features", "blocks", "rank", "block_rank",
    "batch", "tokens", "dtype", "unit", "p20", "p50", "p80", "samples", "method", "launch_us", "tokens_per_s",
    "bound_us", "sheet_bound_us", "weight_bytes", "peak_bytes", "sm_mhz", "temperature_c", "error", "error_max",
    "error_budget", "error_max_budget", "passed", "device", "torch", "triton", "jax", "driver", "commit", "time",
}  # fmt: skip


def plan(op: str) -> dict:
    defaults = {"format": op, "rank": 12, "blocks": 2 if op in ("monarch", "blast") else 0}
    return {} if op == "dense" else compress.plan(gpt2_torch.linears(SIZES), RULES, defaults)


def trainer(model, params):
    optimizer = train.make_optimizer(lambda step: 1e-3, 0.1, 1.0)
    return train.init_state(params, optimizer, jax.random.key(0)), train.make_step(model, optimizer)


@pytest.fixture(scope="module")
def net() -> Net:
    return Net("tiny", SIZES, {op: plan(op) for op in FORMATS}, trainer)


@pytest.fixture(scope="module")
def settings():
    return runner.settings(IMPLS, 1e-4, card.here("float32", "cpu"))


def ref_too(settings):
    return dataclasses.replace(settings, impls=("ref", "torch_bmm"))


def only(net: Net, *ops: str) -> Net:
    return dataclasses.replace(net, plans={op: net.plans[op] for op in ops})


def weights_of(net: Net, op: str, dtype=torch.float32) -> gpt2_torch.Weights:
    return gpt2_torch.draw(net.sizes, net.plans[op], 0).map(lambda leaf: leaf.to(dtype))


def ids_of(length: int, batch: int = 2):
    return torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("op", FORMATS)
def test_both_models_and_all_phases_are_one_function(net, op):
    weights, ids = weights_of(net, op, torch.float64), ids_of(9)
    with torch.no_grad():
        dense = gpt2_torch.call(gpt2_torch.build(net.sizes, weights.dense()), "forward", ids)()
        model = gpt2_torch.build(net.sizes, weights, None if op == "dense" else "torch_bmm")
        torch.testing.assert_close(gpt2_torch.call(model, "forward", ids)(), dense)
        for phase in ("prefill", "decode"):
            call = gpt2_torch.call(model, phase, ids)
            for _ in range(3):  # every call finds the same cache
                torch.testing.assert_close(call(), dense[:, -1:])
    narrow = weights.map(lambda leaf: leaf.float())
    logits = torch.from_dlpack(gpt2_xla.forward(net.sizes, net.plans[op], narrow, ids).call())
    torch.testing.assert_close(logits.double(), dense, atol=1e-5, rtol=1e-4)


def test_a_model_is_the_one_of_transformers_with_all_its_parameters(net):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=61, n_positions=16, n_embd=24, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
    )
    weights = weights_of(net, "dense")
    model, ids = gpt2_torch.build(net.sizes, weights), ids_of(9)
    plain = GPT2LMHeadModel(config).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(gpt2_torch.call(model, "forward", ids)(), plain(ids).logits)
    named = {gpt2_torch.torch_name(path) for path in weights.others}
    named |= {f"{gpt2_torch.torch_name(path)}.weight" for path in weights.kernels}
    assert named == {name for name, _ in plain.named_parameters()}
    assert weights.nbytes == 4 * sum(parameter.numel() for parameter in plain.parameters())


def test_the_linear_layers_are_those_of_the_flax_model(net):
    assert gpt2_torch.linears(SIZES) == compress.linears(gpt2.parameter_shapes(SIZES))
    shapes = gpt2.parameter_shapes(SIZES, FrozenDict(net.plans["blast"]))
    given = jax.tree.map(lambda leaf: leaf.shape, gpt2_xla.parameters(weights_of(net, "blast")))
    assert given == jax.tree.map(lambda leaf: leaf.shape, shapes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("phase", PHASES)
def test_rows_are_complete_verified_and_timed(net, settings, phase, dtype):
    formats = FORMATS if dtype == "float32" and phase != "train_step" else ("dense", "blast")
    (rows,) = bench_model(only(net, *formats), [Group(phase, 2, 8, dtype)], settings)
    json.dumps(rows, allow_nan=False)
    torch_impls = set() if phase == "train_step" else {"torch_bmm"}
    compiled = set() if phase in ("prefill", "decode") else {"xla"}
    assert {row["impl"] for row in rows if row["op"] == "blast"} == torch_impls | compiled
    assert {row["op"] for row in rows} == set(formats)
    for row in rows:
        # a clock that is read once may beat the bound of so small a net, which a note then says
        assert set(row) - {"note"} == FIELDS, row.get("reason")
        assert row["passed"] is True
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        assert 0 <= row["error"] <= row["error_budget"] < 0.2
        assert row["error_max"] <= row["error_max_budget"]
        assert (row["layer"], row["phase"], row["batch"], row["tokens"]) == ("*", phase, 2, 8)
        assert row["tokens_per_s"] == pytest.approx(1e6 * (2 if phase == "decode" else 16) / row["p50"])
        assert row["bound_us"] > 0
        assert "host clock" in row["method"]
        assert model_rows.line(row)
    sizes = {row["op"]: row["weight_bytes"] for row in rows}
    assert sizes["blast"] < sizes["dense"]
    itemsize = 4 if phase == "train_step" or dtype == "float32" else 2
    assert sizes["dense"] == itemsize * compress.parameter_count(gpt2.parameter_shapes(SIZES))


def test_a_row_says_its_plan_where_all_layers_agree(net):
    group = Group("forward", 1, 8, "float32")
    mixed = model_rows.identity(net, group, "monarch", "xla")
    assert (mixed["blocks"], mixed["rank"], mixed["block_rank"]) == ([2, 2], None, None)
    specs = compress.plan(gpt2_torch.linears(SIZES), RULES[:1], {"format": "monarch", "rank": 12, "blocks": 2})
    alike = model_rows.identity(dataclasses.replace(net, plans={"monarch": specs}), group, "monarch", "xla")
    assert (alike["blocks"], alike["rank"], alike["block_rank"]) == ([2, 2], 12, 6)


def test_the_bound_is_that_of_all_linear_layers(net):
    here = card.here("float32", "cpu").measured
    slow = dataclasses.replace(here, tensor_flops=1e9, cuda_flops=1e9, dram_bytes_per_s=1e15)
    bound = {phase: model_rows.bound_us(net, Group(phase, 1, 8, "float32"), "dense", slow) for phase in PHASES}
    layers, output = 2 * 12 * 24 * 24, 24 * 61
    assert bound["forward"] == pytest.approx(2 * 8 * (layers + output) / 1e3)
    assert bound["prefill"] == pytest.approx(2 * (8 * layers + output) / 1e3)
    assert bound["decode"] == pytest.approx(2 * (layers + output) / 1e3)
    assert bound["train_step"] == pytest.approx(3 * bound["forward"])
    narrow = dataclasses.replace(here, tensor_flops=1e18, cuda_flops=1e18, dram_bytes_per_s=1e9)
    assert model_rows.bound_us(net, Group("decode", 1, 8, "float32"), "dense", narrow) == pytest.approx(
        4 * (layers + output + 61) / 1e3
    )


def test_the_bound_takes_no_more_than_the_l2_off_and_keeps_the_operations(net):
    here = card.here("float32", "cpu").measured
    moved, group = 4 * (2 * 12 * 24 * 24 + 24 * 61 + 61), Group("decode", 1, 8, "float32")
    cases = ((0, moved), (1000, moved - 1000), (moved, 0), (10 * moved, 0))
    for l2_bytes, left in cases:
        device = dataclasses.replace(here, tensor_flops=1e18, cuda_flops=1e18, dram_bytes_per_s=1e9, l2_bytes=l2_bytes)
        assert model_rows.bound_us(net, group, "dense", device) == pytest.approx(left / 1e3, abs=1e-6)
    slow = dataclasses.replace(here, tensor_flops=1e9, cuda_flops=1e9, dram_bytes_per_s=1e12, l2_bytes=10 * moved)
    assert model_rows.bound_us(net, group, "dense", slow) == pytest.approx(2 * (moved / 4 - 61) / 1e3)


def without_bias(model):
    model.transformer.h[0].mlp.c_fc.bias.zero_()


def other_layer(model):
    layer = model.transformer.h[0].mlp.c_fc
    layer.U = torch.nn.Parameter(1.5 * layer.U)  # its memory is that of the weights that the others run


def not_a_number(model):
    layer = model.transformer.h[1].attn.c_attn
    layer.U = torch.nn.Parameter(torch.nan * layer.U)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spoil", [without_bias, other_layer, not_a_number])
def test_a_wrong_model_has_no_speed(net, settings, monkeypatch, spoil, dtype):
    build = end_to_end.gpt2_torch.build

    def spoilt(sizes, weights, impl=None):
        model = build(sizes, weights, impl)
        if impl == "torch_bmm":
            spoil(model)
        return model

    monkeypatch.setattr(end_to_end.gpt2_torch, "build", spoilt)
    (rows,) = bench_model(only(net, "monarch"), [Group("forward", 2, 8, dtype)], ref_too(settings))
    for row in rows:
        assert row["passed"] is (row["impl"] != "torch_bmm")
        if not row["passed"]:
            assert (row["p50"], row["tokens_per_s"], row["method"]) == (None,) * 3
            assert "over its budget" in row["reason"]


def test_tf32_does_not_pass_as_float32(net):
    weights, ids = weights_of(net, "monarch"), ids_of(8)
    judge = model_gate.Judge(net.sizes, weights, ids)
    rounded = weights.map(lambda leaf: (leaf.view(torch.int32) & ~0x1FFF).view(torch.float32))
    with torch.no_grad():
        right, wrong = (
            gpt2_torch.call(gpt2_torch.build(net.sizes, each, "torch_bmm"), "forward", ids)()
            for each in (weights, rounded)
        )
    assert judge.judge(right).passed
    assert not judge.judge(wrong).passed


def test_one_spoilt_token_of_many_does_not_pass(net):
    weights, ids = weights_of(net, "monarch", torch.bfloat16), ids_of(16, batch=16)
    judge = model_gate.Judge(net.sizes, weights, ids)
    logits = judge.truth.clone()
    assert judge.judge(logits).passed
    logits[3, 5] *= 1.2
    verdict = judge.judge(logits)
    assert verdict.error < verdict.error_budget
    assert not verdict.passed


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_wrong_step_does_not_pass(net, name):
    weights, windows = weights_of(net, "blast"), ids_of(9)
    judge = model_gate.Judge(net.sizes, weights, windows[:, :-1])
    truth = model_gate.step_truth(net.sizes, weights, windows)
    assert judge.judge_step(truth, windows).passed
    for wrong in (truth[name] * 1.01, float("nan"), float("inf")):
        assert not judge.judge_step({**truth, name: wrong}, windows).passed


@pytest.mark.parametrize(("phase", "tokens"), [("forward", 17), ("decode", 16)])
def test_a_phase_that_does_not_fit_the_context_says_so(net, settings, phase, tokens):
    (rows,) = bench_model(net, [Group(phase, 1, tokens, "float32")], settings)
    for row in rows:
        assert row["p50"] is None
        assert row["passed"] is None
        assert row["reason"] == "the phase needs 17 tokens and the model's context is 16: give fewer --tokens"


def test_a_phase_that_fills_the_context_runs(net, settings):
    for phase, tokens in (("decode", 15), ("train_step", 16)):
        (rows,) = bench_model(only(net, "low_rank"), [Group(phase, 1, tokens, "float32")], settings)
        assert all(row["passed"] for row in rows), rows


@pytest.mark.parametrize(
    ("error", "passed", "said"),
    [
        (RuntimeError("no such shape\nand more"), False, "RuntimeError: no such shape"),
        (RuntimeError("CUDA out of memory"), None, "RuntimeError: CUDA out of memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 GiB"), None, "RuntimeError: RESOURCE_EXHAUSTED: 9 GiB"),
        (torch.OutOfMemoryError("full"), None, "OutOfMemoryError: full"),
        (ModuleNotFoundError("no triton"), None, "ModuleNotFoundError: no triton"),
    ],
)
def test_a_program_that_raises_or_cannot_run_keeps_its_row(net, settings, monkeypatch, error, passed, said):
    def fail(*_):
        raise error

    monkeypatch.setattr(gpt2_xla, "forward", fail)
    asked = dataclasses.replace(settings, impls=("torch_bmm", "triton_two_stage", "xla"))
    (rows,) = bench_model(only(net, "monarch"), [Group("forward", 1, 8, "float32")], asked)
    good, unable, failed = rows
    assert good["passed"] is True
    assert (unable["passed"], unable["p50"]) == (None, None)
    assert unable["reason"]
    assert (failed["passed"], failed["reason"], failed["p50"]) == (passed, said, None)


@pytest.mark.parametrize("lies", ["unwritten", "stale"])
@pytest.mark.parametrize("phase", PHASES[:3])
def test_memory_that_holds_the_right_answer_does_not_pass(net, settings, monkeypatch, phase, lies):
    honest, poison, memory = gpt2_torch.call, end_to_end.poison, []

    def call(model, phase, ids):
        run, shape = honest(model, phase, ids), (ids.shape[0], ids.shape[1] if phase == "forward" else 1, 61)
        if getattr(model.transformer.h[0].attn.c_attn, "impl", None) != "torch_bmm":
            return run

        def stale():
            memory[:] = memory or [run()]
            return memory[0]

        return stale if lies == "stale" else lambda: torch.empty(shape)

    def watched(sizes, dtype, device):
        poison(sizes, dtype, device)
        for block in memory:  # as an allocator would give it out again
            if block.numel() in sizes:
                block.fill_(torch.nan)

    monkeypatch.setattr(end_to_end.gpt2_torch, "call", call)
    monkeypatch.setattr(end_to_end, "poison", watched)
    (rows,) = bench_model(only(net, "monarch"), [Group(phase, 2, 8, "float32")], ref_too(settings))
    assert {row["impl"]: row["passed"] for row in rows} == {"ref": True, "torch_bmm": False}
    assert bool(memory) is (lies == "stale")


def test_a_sample_that_fails_costs_its_row_its_speed_and_no_other(net, settings, monkeypatch):
    on_host, made = end_to_end.timing.on_host, []

    def flaky(call):
        sample, taken, place = on_host(call), [], len(made)
        made.append(call)

        def failing():
            taken.append(0)
            if place == 0 and len(taken) > 3:
                raise RuntimeError("lost")
            return sample()

        return failing

    monkeypatch.setattr(end_to_end.timing, "on_host", flaky)
    (rows,) = bench_model(only(net, "monarch"), [Group("decode", 1, 8, "float32")], ref_too(settings))
    failed, good = rows
    assert failed["reason"] == "it cannot be timed: RuntimeError: lost"
    assert (failed["passed"], failed["p50"], failed["tokens_per_s"], failed["method"]) == (True, None, None, None)
    assert good["p50"] > 0


def test_a_launch_time_that_fails_is_a_note(net, settings, monkeypatch):
    def fail(*_):
        raise RuntimeError("lost")

    monkeypatch.setattr(end_to_end, "_launch_us", fail)
    group = Group("decode", 1, 8, "float32")
    row = model_rows.start(net, group, "dense", "torch_eager", settings) | {"bound_us": 0.0}
    asked = dataclasses.replace(settings, card=dataclasses.replace(settings.card, device=torch.device("cuda")))
    contender = end_to_end.Contender("0", tuple, "some")
    end_to_end._fill_in(end_to_end.Entry(row), contender, end_to_end.timing.Times(1.0, 2.0, 3.0, 11), asked)
    assert (row["p50"], row["launch_us"], row["note"]) == (2.0, None, "no launch time: RuntimeError: lost")


def test_all_programs_of_a_phase_are_timed_in_the_same_rounds(net, settings, monkeypatch):
    seen, timed = [], end_to_end.timing.time_contenders

    def watched(contenders, seconds):
        seen.append(len(contenders))
        return timed(contenders, seconds)

    monkeypatch.setattr(end_to_end.timing, "time_contenders", watched)
    list(bench_model(only(net, "dense", "monarch"), [Group("forward", 1, 8, "float32")], settings))
    assert seen == [4]


def test_the_command_writes_rows_and_goes_on_where_it_was_stopped(tmp_path, capsys, monkeypatch):
    out = tmp_path / "records.jsonl"
    arguments = [*TINY, f"--out={out}", "--impl=torch_bmm", "--phases=prefill,train_step"]

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model_gate, "step_truth", stop)  # the last phase
        assert command.main(arguments) == 130
    before = [record for record in read(out) if record["kind"] == "bench"]
    assert {row["phase"] for row in before} == {"prefill"}
    capsys.readouterr()
    assert command.main(arguments) == 0
    assert "1 of 2 phases are in" in capsys.readouterr().out
    rows = [record for record in read(out) if record["kind"] == "bench"]
    assert rows[: len(before)] == before
    assert {row["phase"] for row in rows} == {"prefill", "train_step"}
    assert {row["net"] for row in rows} == {"gpt2_1x48"}
    assert {(row["op"], row["impl"]) for row in rows} == {
        ("dense", "torch_eager"), ("dense", "xla"), ("monarch", "torch_bmm"), ("monarch", "xla"),
    }  # fmt: skip
    assert command.main([*arguments, "--fresh", "--phases=forward", "--backends=xla"]) == 0
    assert len([record for record in read(out) if record["kind"] == "bench"]) == 2


def test_the_best_kernels_and_a_compiler_have_rows_of_their_own(net, settings):
    asked = dataclasses.replace(settings, impls=("torch_eager", "best", "torch_compile"))
    (rows,) = bench_model(only(net, "dense", "low_rank"), [Group("decode", 1, 8, "float32")], asked)
    assert [(row["op"], row["impl"]) for row in rows] == [
        ("dense", "torch_eager"), ("dense", "torch_compile"), ("low_rank", "best"), ("low_rank", "torch_compile"),
    ]  # fmt: skip
    for row in rows:
        assert row["passed"] is True, row["reason"]
        assert ("under torch.compile" in row["method"]) is (row["impl"] == "torch_compile")
        assert set(row) - {"note"} == FIELDS


def test_a_failed_gate_is_exit_status_one(net, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(model_gate.Verdict, "passed", property(lambda self: False))
    results = Results(tmp_path / "records.jsonl")
    assert command.measure(only(net, "dense"), [Group("decode", 1, 8, "float32")], settings, results) == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "no config"),
        (["--config=configs/gpt2_monarc.py"], "Did you mean configs/gpt2_monarch.py?"),
        ([f"--config={CONFIG}", "--fases=decode"], 'Did you mean "--phases"?'),
        ([f"--config={CONFIG}", "--config.factors.rnk=1"], 'Did you mean "factors.rank"?'),
        ([f"--config={CONFIG}", "--config.factors.rank"], "needs a value"),
        ([f"--config={CONFIG}", "--config.factors.rank=7"], "h_0/attn/c_attn (192 x 576): monarch's rank 7"),
        ([f"--config={CONFIG}", "--phases=decod"], 'Did you mean "decode"?'),
        ([f"--config={CONFIG}", "--formats=monach"], 'Did you mean "monarch"?'),
        ([f"--config={CONFIG}", "--backends=tourch"], 'Did you mean "torch"?'),
        ([f"--config={CONFIG}", "--backends="], "no backend is named"),
        ([f"--config={CONFIG}", "--impl=torch_bm"], 'Did you mean "torch_bmm"?'),
        ([f"--config={CONFIG}", "--dtype=bfloat"], 'Did you mean "bfloat16"?'),
        ([f"--config={CONFIG}", "--tokens=0"], "whole numbers from 1 on"),
        ([f"--config={CONFIG}", "--batch=two"], "whole numbers from 1 on"),
        ([f"--config={CONFIG}", "--seconds=nan"], "positive number"),
        ([f"--config={CONFIG}", "--backends=torch", "--phases=train_step"], "train_step is xla's"),
        ([f"--config={CONFIG}", "--device=cuda:99"], 'no device "cuda:99"'),
        ([f"--config={CONFIG}", "--device=cpu:"], 'no device "cpu:"'),
        ([f"--config={CONFIG}", "--device=gpu"], 'device "gpu"'),
        ([*TINY, "--device=cpu", "--ceilings=[]"], "--ceilings is no device's"),
    ],
)
def test_wrong_input_is_one_sentence(flags, said, capsys):
    assert command.main(flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


def test_ceilings_go_to_another_process_and_back():
    here = card.here("float32", "cpu")
    given = dataclasses.replace(here, measured=dataclasses.replace(here.measured, compute_capability=(9, 0)))
    words = command._aside(["--fresh", "--phases", "all"], ["forward", "forward"], Path("x.jsonl"), given)
    assert "--fresh" not in words
    options, _ = command._parser().parse_known_args(words[3:])
    assert (options.phases, options.backends, options.out) == ("forward", "xla", Path("x.jsonl"))
    assert command.card_from(options.ceilings, "float32", "cpu") == given


@pytest.mark.parametrize(
    ("phases", "backends", "in_child"),
    [
        ("prefill,decode", "torch,xla", None),
        ("forward,prefill", "torch,xla", "forward"),
        ("all", "torch,xla", "forward,train_step"),
        ("forward", "xla", "forward"),
        ("all", "torch", None),
    ],
)
def test_on_a_gpu_a_child_measures_what_xla_has(tmp_path, monkeypatch, phases, backends, in_child):
    here, commands, measured = card.here("float32", "cpu"), [], []

    class Gpu(card.Card):
        is_gpu = property(lambda self: True)

    def run(words, check):
        commands.append(words)
        return subprocess.CompletedProcess(words, 0)

    gpu = Gpu(here.device, here.measured, None, "float32")
    monkeypatch.setattr(card, "here", lambda *_: gpu)
    monkeypatch.setattr(command.subprocess, "run", run)
    monkeypatch.setattr(command, "measure", lambda net, groups, settings, _: measured.append(settings.impls) or 0)
    arguments = [*TINY, f"--out={tmp_path / 'x.jsonl'}", f"--phases={phases}", f"--backends={backends}"]
    assert command.main([*arguments, "--device=cpu"]) == 0
    assert bool(measured) is ("torch" in backends)
    assert all("xla" not in impls for impls in measured)
    assert [command._parser().parse_known_args(words[3:])[0].phases for words in commands] == [in_child] * bool(
        in_child
    )


def test_a_child_that_crashes_is_said_and_fails(capsys):
    assert [command._status(code) for code in (0, 1, 130, -11)] == [0, 1, 130, 1]
    assert "ended by signal 11" in capsys.readouterr().err


def test_only_gpt2s_has_its_name():
    assert nets.name(gpt2.Config()) == "gpt2s"
    assert nets.name(dataclasses.replace(gpt2.Config(), vocab_size=8192)) == "gpt2_12x768"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("phase", PHASES[:3])
def test_on_a_gpu_programs_of_pytorch_become_cuda_graphs(net, phase, dtype):
    asked = runner.settings(("torch_eager", "torch_bmm", "triton_two_stage"), 1e-3, card.here(dtype))
    (rows,) = bench_model(net, [Group(phase, 2, 8, dtype)], asked)
    for row in rows:
        assert row["passed"] is True, row
        assert "CUDA graph of calls" in row["method"]
        assert row["launch_us"] > 0
        assert row["peak_bytes"] > 0
