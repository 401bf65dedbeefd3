"""Rows of a benchmark: complete, JSON, in order; and no speed for what is wrong or cannot run."""

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable

import pytest
import torch
from blrlab_ops import cost

from blrlab.bench import backends, suite, timing
from blrlab.bench import rows as rows_of
from blrlab.bench.backends import BACKENDS, Backend
from blrlab.bench.problem import leaves
from blrlab.bench.suite import bench_layers

FIELDS = {
    "kind", "impl", "op", "net", "layer", "in_features", "out_features", "blocks", "rank", "block_rank", "tokens",
    "dtype", "unit", "p20", "p50", "p80", "samples", "method", "warm_us", "launch_us", "copies", "bound_us",
    "bound_term", "sheet_bound_us", "flops", "tensor_flops", "cuda_flops", "bytes", "weight_bytes", "peak_bytes",
    "tuning_s", "sm_mhz", "temperature_c", "error", "error_max", "error_budget", "error_max_budget", "passed",
    "device", "torch", "triton", "jax", "driver", "commit", "time",
}  # fmt: skip
FORMATS = ("dense", "low_rank", "monarch", "blast")
PLAIN = BACKENDS["torch_eager"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    """Compile nothing: what is compiled is the tests of the backends' concern."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    backends._compile.cache_clear()
    monkeypatch.setattr(backends, "forget_compiled", backends._compile.cache_clear)


def bench(groups, settings) -> list[list[dict]]:
    found = list(bench_layers(groups, settings))
    json.dumps(found, allow_nan=False)
    for row in itertools.chain(*found):
        assert "\n" not in rows_of.line(row)
    return found


def assert_timed(row: dict) -> None:
    assert row["passed"] is True
    assert 0 < row["p20"] <= row["p50"] <= row["p80"]
    assert row["samples"] >= timing.LEAST
    assert 0 <= row["error"] <= row["error_budget"]
    assert 0 <= row["error_max"] <= row["error_max_budget"]
    assert row["tuning_s"] > 0
    assert row["method"]
    assert "reason" not in row
    assert f"{row['p50']:.1f} us" in rows_of.line(row)


def assert_no_speed(row: dict) -> None:
    times = ("p20", "p50", "p80", "samples", "method", "warm_us", "launch_us")
    assert [row[name] for name in times] == [None] * len(times)
    assert row["reason"]
    assert "\n" not in row["reason"]
    assert row["reason"] in rows_of.line(row)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_complete_and_in_the_order_asked_for(group, settings, device, dtype: str) -> None:
    asked = settings("xla", "torch_eager", sheet=device(name="a sheet", tensor_flops=2e12, cuda_flops=2e12))
    found = bench([group("dense", "monarch", dtype=dtype), group("dense", "blast", dtype=dtype)], asked)
    wanted = [[(op, impl) for op in ("dense", format) for impl in ("xla", "torch_eager")] for format in FORMATS[2:]]
    assert [[(row["op"], row["impl"]) for row in rows] for rows in found] == wanted
    for row in itertools.chain(*found):
        assert set(row) == FIELDS
        assert_timed(row)
        assert (row["kind"], row["unit"], row["dtype"], row["tokens"]) == ("bench", "us", dtype, 7)
        assert (row["net"], row["layer"], row["method"]) == ("own", "c_fc", "host clock, warm weights")
        assert {name: row[name] for name in asked.machine} == asked.machine
        assert [row[name] for name in ("peak_bytes", "sm_mhz", "temperature_c")] == [None] * 3, "a GPU's"
        assert (row["warm_us"], row["launch_us"], row["copies"]) == (None, None, 1)
    monarch, blast = found[0][-1], found[1][-1]
    assert (monarch["blocks"], monarch["rank"], monarch["block_rank"]) == ([3, 2], None, 4)
    assert (blast["blocks"], blast["rank"], blast["block_rank"]) == ([2, 3], 5, None)


def test_bounds_are_those_of_the_cost_model_on_the_measured_ceilings(group, settings, device) -> None:
    sheet = device(name="a sheet", tensor_flops=4e12, cuda_flops=4e12, dram_bytes_per_s=4e11)
    slow_memory = settings("torch_eager", sheet=sheet, dram_bytes_per_s=1e9)
    (rows,) = bench([group(*FORMATS)], slow_memory)
    for row, case in zip(rows, group(*FORMATS).cases, strict=True):
        found = cost.cost(case.format, 7, 24, 36, case.blocks, case.rank, itemsize=4)
        assert (row["tensor_flops"], row["cuda_flops"]) == (found.tensor_flops, found.cuda_flops)
        assert row["flops"] == found.tensor_flops + found.cuda_flops
        assert row["bytes"] == 4 * (7 * 24 + 7 * 36) + row["weight_bytes"]
        assert row["bound_us"] == pytest.approx(row["bytes"] / 1e3)
        assert row["bound_term"] == "dram"
        assert row["sheet_bound_us"] == cost.bound_us(found, sheet, "float32").us
    (rows,) = bench([group("dense")], settings("torch_eager", dram_bytes_per_s=1e15))
    assert (rows[0]["bound_term"], rows[0]["sheet_bound_us"]) == ("tensor", None)
    assert rows[0]["bound_us"] == pytest.approx(2 * 7 * 24 * 36 / 1e6)


def test_weights_are_counted_as_they_are_stored(group, settings) -> None:
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        impls = ("torch_eager", "torch_linear", "int8_weight_only")
        ((plain, linear, int8),) = bench([group("dense", dtype=dtype)], settings(*impls))
        assert plain["weight_bytes"] == linear["weight_bytes"] == size * 24 * 36
        assert int8["weight_bytes"] == 24 * 36 + size * 36, "a byte an element, and a scale a column"
        activations = size * 7 * (24 + 36)
        assert [row["bytes"] - row["weight_bytes"] for row in (plain, linear, int8)] == [activations] * 3
        assert int8["flops"] == plain["flops"]


def test_a_time_below_its_bound_is_noted_and_others_are_not(group, settings) -> None:
    ((row,),) = bench([group("dense")], settings("torch_eager", tensor_flops=1.0, cuda_flops=1.0))
    assert_timed(row)
    assert row["note"] == "faster than its bound: the bound or the clock is wrong"
    assert row["note"] in rows_of.line(row)
    ((row,),) = bench([group("dense")], settings("torch_eager"))
    assert "note" not in row


def test_a_yielded_layer_has_all_its_rows_and_the_next_has_not_run(group, settings, monkeypatch) -> None:
    made: list[str] = []
    monkeypatch.setitem(BACKENDS, "torch_eager", counted(made))
    rows = bench_layers([group("dense", "low_rank"), group("dense", "monarch")], settings("torch_eager"))
    assert made == []
    assert [row["op"] for row in next(rows)] == ["dense", "low_rank"]
    assert "monarch" not in made
    assert [row["op"] for row in next(rows)] == ["dense", "monarch"]
    assert next(rows, None) is None


def counted(made: list[str]) -> Backend:
    """Make a backend that notes the format of every call it makes."""

    def make(problem, kernel):
        made.append(problem.op)
        return PLAIN.make(problem, kernel)

    return dataclasses.replace(PLAIN, make=make)


def test_every_contender_of_a_layer_is_timed_in_the_same_rounds(group, settings, monkeypatch) -> None:
    seen: list[int] = []
    timed = timing.time_contenders

    def watched(contenders, seconds):
        assert len({each.name for each in contenders}) == len(contenders)
        seen.append(len(contenders))
        return timed(contenders, seconds)

    monkeypatch.setattr(timing, "time_contenders", watched)
    bench([group("dense", "monarch", "blast")], settings("torch_eager", "torch_bmm", "torch_linear"))
    assert seen == [6]


def changed(output: Callable[[torch.Tensor], torch.Tensor]) -> Backend:
    """Make a backend whose output goes through a function."""
    return dataclasses.replace(PLAIN, to_rows=lambda problem, y: output(y))


WRONG = {
    "zeros": torch.zeros_like,
    "NaN": lambda y: torch.full_like(y, math.nan),
    "infinity": lambda y: torch.full_like(y, math.inf),
    "a percent more": lambda y: y * 1.01,
}


@pytest.mark.parametrize("what", WRONG)
def test_a_backend_that_is_wrong_has_no_speed(group, settings, what: str, monkeypatch) -> None:
    monkeypatch.setitem(BACKENDS, "torch_eager", changed(WRONG[what]))
    (rows,) = bench([group("low_rank", "monarch")], settings("torch_eager", "torch_bmm"))
    for row in rows:
        if row["impl"] == "torch_bmm":
            assert_timed(row)
            continue
        assert row["passed"] is False
        assert_no_speed(row)
        assert row["reason"] == "its error is over its budget, so it has no speed"
        if what in ("NaN", "infinity"):
            assert (row["error"], row["error_max"]) == (None, None)
            assert row["error_budget"] > 0
        else:
            assert row["error"] > row["error_budget"]


def test_an_own_kernel_is_held_to_twice_the_errors_of_torch_bmm(group, settings, monkeypatch) -> None:
    """A library's product may be off by what its arithmetic allows, an own kernel by less."""
    off = changed(lambda y: y * (1 + 5e-7))
    monkeypatch.setitem(BACKENDS, "torch_eager", off)
    ((library,),) = bench([group("monarch")], settings("torch_eager"))
    monkeypatch.setitem(BACKENDS, "torch_eager", dataclasses.replace(off, own=True))
    ((own,),) = bench([group("monarch")], settings("torch_eager"))
    assert own["error"] == library["error"]
    assert own["error_budget"] < own["error"] < library["error_budget"]
    assert_timed(library)
    assert_no_speed(own)
    ((bmm,),) = bench([group("monarch")], settings("torch_bmm"))
    assert own["error_budget"] == pytest.approx(2 * bmm["error"] + 2.0**-23)


def fail(*_: object) -> None:
    raise RuntimeError("out of memory\nwith a second line")


def failing_after(calls: int) -> Backend:
    """Make a backend whose calls work so often, and then fail."""

    def make(problem, kernel):
        left = itertools.count(calls, -1)
        call = PLAIN.make(problem, kernel)
        return lambda: call() if next(left) > 0 else fail()

    return dataclasses.replace(PLAIN, make=make)


FAILING = {
    "setting up": dataclasses.replace(PLAIN, make=fail),
    "computing": dataclasses.replace(PLAIN, make=lambda problem, kernel: fail),
    "putting its columns in order": dataclasses.replace(PLAIN, to_rows=fail),
    "another shape": changed(lambda y: y[:, :-1]),
    "the other way round": changed(lambda y: y.T),
    "no rows": changed(lambda y: y.flatten()),
}


@pytest.mark.parametrize("where", FAILING)
def test_a_backend_that_fails_has_its_reason_in_its_row(group, settings, where: str, monkeypatch) -> None:
    monkeypatch.setitem(BACKENDS, "torch_eager", FAILING[where])
    ((failed, other),) = bench([group("monarch")], settings("torch_eager", "torch_bmm"))
    assert failed["passed"] is False
    assert_no_speed(failed)
    shaped = "ValueError: its output is "
    assert failed["reason"].startswith("RuntimeError: out of memory" if where in list(FAILING)[:3] else shaped)
    assert_timed(other)


@pytest.mark.parametrize("calls", [3, 7], ids=["at once", "half way"])
def test_a_backend_that_fails_while_it_is_timed_has_no_speed_and_stops_no_other(
    group, settings, calls: int, monkeypatch
) -> None:
    monkeypatch.setitem(BACKENDS, "torch_eager", failing_after(calls))
    ((failed, other),) = bench([group("monarch")], settings("torch_eager", "torch_bmm"))
    assert failed["passed"] is True, "it computes the layer"
    assert_no_speed(failed)
    assert failed["reason"] == "it cannot be timed: RuntimeError: out of memory"
    assert_timed(other)


def test_a_time_outlives_the_failure_of_what_is_measured_beside_it(group, settings, monkeypatch) -> None:
    monkeypatch.setattr(suite, "_extra_columns", fail)
    for speed, start in ((1e12, ""), (1.0, "faster than its bound: the bound or the clock is wrong; ")):
        ((row,),) = bench([group("dense")], settings("torch_eager", tensor_flops=speed, cuda_flops=speed))
        assert_timed(row)
        assert row["note"] == f"{start}no warm or launch time: RuntimeError: out of memory"


def test_a_backend_whose_copies_do_not_fit_is_verified_and_has_no_speed(group, settings, monkeypatch) -> None:
    made = itertools.count()

    def make(problem, kernel):
        return PLAIN.make(problem, kernel) if next(made) == 0 else fail()

    monkeypatch.setitem(BACKENDS, "torch_eager", dataclasses.replace(PLAIN, make=make))
    ((failed, other),) = bench([group("monarch")], settings("torch_eager", "torch_bmm"))
    assert_no_speed(failed)
    assert (failed["passed"], failed["reason"]) == (True, "it cannot be timed: RuntimeError: out of memory")
    assert_timed(other)


def test_a_layer_of_zeros_is_benchmarked_and_no_crash(group, settings, problem) -> None:
    zeros = {name: torch.zeros_like(factor) for name, factor in problem("monarch").kernel.items()}
    (rows,) = bench([group("monarch", kernels={"monarch": zeros})], settings("xla", "torch_eager", "torch_bmm"))
    for row in rows:
        assert_timed(row)
        assert row["error"] == 0


def test_every_backend_of_a_given_layer_runs_on_its_own_numbers(group, settings, problem, monkeypatch) -> None:
    given, seen = problem("blast").kernel, []

    def make(problem, kernel):
        seen.append(kernel)
        return PLAIN.make(problem, kernel)

    monkeypatch.setitem(BACKENDS, "torch_eager", dataclasses.replace(PLAIN, make=make))
    ((row,),) = bench([group("blast", kernels={"blast": given}, seed=9)], settings("torch_eager"))
    assert_timed(row)
    assert len(seen) >= 2, "to be verified, and to be timed"
    assert all(torch.equal(kernel[name], leaf) for kernel in seen for name, leaf in given.items())


def test_timing_does_not_touch_the_weights_that_were_verified(group, settings, monkeypatch) -> None:
    """A backend that spoils what it is given spoils a copy of its own, and no other's result."""
    made: list = []

    def make(problem, kernel):
        made.append(kernel)
        if len(made) > 1:
            for leaf in leaves(kernel):
                leaf.fill_(math.nan)
        return PLAIN.make(problem, kernel)

    monkeypatch.setitem(BACKENDS, "torch_eager", dataclasses.replace(PLAIN, make=make))
    ((_, other),) = bench([group("monarch")], settings("torch_eager", "torch_bmm"))
    assert_timed(other)
    assert not any(leaf.isnan().any() for leaf in leaves(made[0]))


def test_the_first_call_is_tuning_and_no_part_of_the_times(group, settings, monkeypatch) -> None:
    def make(problem, kernel):
        calls = itertools.count()

        def call():
            time.sleep(0.5 if next(calls) == 0 and not tuned else 0.0)
            tuned.append(True)
            return PLAIN.make(problem, kernel)()

        return call

    tuned: list[bool] = []
    monkeypatch.setitem(BACKENDS, "torch_eager", dataclasses.replace(PLAIN, make=make))
    ((row,),) = bench([group("dense")], settings("torch_eager"))
    assert 0.5 <= row["tuning_s"] < 20
    assert row["p50"] < 4e5


def test_a_declined_backend_keeps_its_row_with_the_reason(group, settings, monkeypatch) -> None:
    monkeypatch.setattr(backends, "_compiler", lambda: None)
    (rows,) = bench([group("dense", "monarch")], settings("torch_compile", "torch_eager"))
    assert [row["impl"] for row in rows] == ["torch_compile", "torch_eager"] * 2
    for row in rows[::2]:
        assert set(row) == FIELDS | {"reason"}
        assert (row["passed"], row["error"], row["tuning_s"]) == (None, None, None)
        assert_no_speed(row)
        assert "C++ compiler" in row["reason"]
        assert row["bound_us"] > 0, "a bound needs no backend"


def test_xla_is_declined_and_not_a_crash_where_there_is_no_jax(group, settings, monkeypatch) -> None:
    monkeypatch.setattr(backends, "has_jax", lambda: False)
    ((declined, other),) = bench([group("dense")], settings("xla", "torch_eager"))
    assert_no_speed(declined)
    assert (declined["passed"], declined["reason"]) == (None, "JAX is not installed: pip install jax")
    assert_timed(other)


def test_int8_is_judged_by_its_quantised_weights_and_says_what_quantising_lost(group, settings) -> None:
    ((plain, int8),) = bench([group("dense")], settings("torch_eager", "int8_weight_only"))
    assert_timed(int8)
    assert "quantisation_error" not in plain
    assert int8["quantisation_error"] > 1e-3 > int8["error_budget"] >= int8["error"]


def test_int8_that_returns_the_product_of_the_weights_before_quantising_is_wrong(group, settings, monkeypatch) -> None:
    unquantised = dataclasses.replace(BACKENDS["int8_weight_only"], make=PLAIN.make)
    monkeypatch.setitem(BACKENDS, "int8_weight_only", unquantised)
    ((row,),) = bench([group("dense")], settings("int8_weight_only"))
    assert row["passed"] is False
    assert_no_speed(row)
    assert row["error"] == pytest.approx(row["quantisation_error"], rel=0.5)


FOUND = {"error": 1e-7, "error_max": 4e-7, "error_budget": 5e-7, "error_max_budget": 9e-7}


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch):
    """Answer for Triton's interpreter by format; return what was asked for and a dict of answers."""
    asked: list[list[tuple]] = []
    answers: dict[str, dict | str] = {}

    def verify(wanted, timeout=600.0):
        asked.append([(case.format, case.tokens, impl) for case, impl in wanted])
        return [answers[case.format] for case, _ in wanted]

    monkeypatch.setattr("blrlab.bench.suite.interpreted.verify", verify)
    return asked, answers


def test_triton_is_verified_without_a_gpu_in_one_go_and_never_timed(group, settings, interpreter) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    asked, answers = interpreter
    answers |= {
        "monarch": FOUND | {"passed": True},
        "blast": "Triton's interpreter took longer than 600 s",
    }
    groups = [group("dense", "monarch"), group("dense", "blast", tokens=3), group("monarch", tokens=2)]
    found = bench(groups, settings("torch_eager", "triton_two_stage"))
    impl = "triton_two_stage"
    assert asked == [[("monarch", 7, impl), ("blast", 3, impl), ("monarch", 2, impl)]]
    assert [[(row["op"], row["impl"], row["tokens"]) for row in rows if row["impl"] == impl] for rows in found] == [
        [("monarch", impl, 7)],
        [("blast", impl, 3)],
        [("monarch", impl, 2)],
    ]
    for rows in found:
        assert_timed(rows[0])
        assert_no_speed(rows[-1])
    passed, late = found[0][-1], found[1][-1]
    assert {name: passed[name] for name in FOUND} == FOUND
    assert passed["passed"] is True
    assert passed["reason"] == "no GPU: verified in the interpreter (float32, random factors, 7 tokens), not timed"
    assert (late["passed"], late["error"]) == (None, None)
    assert late["reason"] == "no GPU; Triton's interpreter took longer than 600 s"


@pytest.mark.parametrize("error", [0.3, math.nan, math.inf])
def test_a_kernel_that_is_wrong_in_the_interpreter_did_not_pass(group, settings, interpreter, error: float) -> None:
    interpreter[1]["monarch"] = FOUND | {"error": error, "error_max": error, "passed": False}
    ((row,),) = bench([group("monarch")], settings("triton_two_stage"))
    assert row["passed"] is False
    assert row["error"] == (error if math.isfinite(error) else None)
    assert_no_speed(row)


def test_only_triton_is_sent_to_its_interpreter(group, settings, interpreter) -> None:
    bench([group(*FORMATS)], settings("torch_eager", "torch_bmm"))
    assert interpreter[0] in ([], [[]])


@pytest.mark.parametrize(("l2_bytes", "copies"), [(3 * 24 * 36, 3), (24 * 36 * 40, 40), (1, 2)])
@pytest.mark.parametrize("impl", ["torch_eager", "int8_weight_only"])
def test_on_a_gpu_a_contender_goes_round_through_copies_of_its_own_weights(
    group, settings, impl: str, l2_bytes: int, copies: int, monkeypatch
) -> None:
    """Four times the L2 of the weights as they are stored; float32 has four bytes where int8 has one and a scale."""
    given: list = []
    run = backends.backend(impl)

    def make(problem, kernel):
        given.append(kernel)
        return run.make(problem, kernel)

    monkeypatch.setattr(timing, "in_graphs", lambda calls: lambda: [1.0 for call in calls if call() is not None])
    how = settings(impl, where="cuda", l2_bytes=l2_bytes)
    (each,) = group("dense").problems(torch.device("cpu"))
    row = rows_of.start(group("dense"), each.case, impl, how)
    entry = suite._Entry(row, each, dataclasses.replace(run, make=make), verified=True)
    contender, calls = suite._contender(entry, how)
    if impl == "int8_weight_only":
        copies = max(2, math.ceil(4 * l2_bytes / (24 * 36 + 4 * 36)))
    assert len(calls) == len(given) == row["copies"] == copies
    assert len(contender.sample()) == copies
    assert contender.method == f"CUDA graph of calls on {copies} weight copies; CUDA events"
    places = {kernel.data_ptr() for kernel in (*given, each.kernel)}
    assert len(places) == copies + 1, "each has weights of its own"
    assert all(torch.equal(kernel, each.kernel) for kernel in given)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_that_still_holds_the_right_answer_does_not_pass_for_one(
    group, settings, dtype: str, monkeypatch
) -> None:
    """A backend that writes nothing gets the block that the call before it freed."""

    def make(problem, kernel):
        right = problem.x @ kernel
        shape = right.shape
        del right
        return lambda: torch.empty(shape, dtype=problem.x.dtype)

    monkeypatch.setitem(BACKENDS, "torch_linear", dataclasses.replace(BACKENDS["torch_linear"], make=make))
    ((good, bad),) = bench([group("dense", dtype=dtype, tokens=64)], settings("torch_eager", "torch_linear"))
    assert_timed(good)
    assert bad["passed"] is False
    assert_no_speed(bad)


def test_a_full_memory_is_no_failed_gate(group, settings, monkeypatch) -> None:
    def make(problem, kernel):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(BACKENDS, "torch_linear", dataclasses.replace(BACKENDS["torch_linear"], make=make))
    ((row,),) = bench([group("dense")], settings("torch_linear"))
    assert (row["passed"], row["reason"]) == (None, "OutOfMemoryError: CUDA out of memory")


def test_a_group_without_room_for_its_tensors_leaves_rows_that_say_so(group, settings, monkeypatch) -> None:
    def fail(self, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    one = group("dense", "monarch")
    monkeypatch.setattr(type(one), "problems", fail)
    (rows,) = bench([one], settings("torch_eager"))
    assert [(row["op"], row["reason"]) for row in rows] == [
        (op, "OutOfMemoryError: CUDA out of memory") for op in ("dense", "monarch")
    ]


def test_activations_bind_only_beyond_the_l2(group, settings) -> None:
    """x and y stay in the L2 between calls as far as they fit; weights do not."""
    tokens, i, o = 64, 24, 36
    for l2_bytes, activations in ((0, 4 * tokens * (i + o)), (10_000, 4 * tokens * (i + o) - 10_000), (10**9, 0)):
        how = settings("torch_eager", l2_bytes=l2_bytes, tensor_flops=1e30, cuda_flops=1e30, dram_bytes_per_s=1e6)
        row = rows_of.start(group("dense", tokens=tokens), group("dense", tokens=tokens).cases[0], "torch_eager", how)
        assert row["bound_us"] == pytest.approx(4 * i * o + activations)
        assert row["bytes"] == 4 * (i * o + tokens * (i + o))
