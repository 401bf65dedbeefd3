"""Benchmark groups of layers over backends: verify, then time what passed, then write a row for each."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from blrlab_ops import dispatch
from blrlab_ops.testing import Case

from blrlab.bench import backends, beside, interpreted, timing
from blrlab.bench.backends import Backend
from blrlab.bench.card import clocks_read_meanwhile
from blrlab.bench.gate import Errors, Judge, poison
from blrlab.bench.problem import Group, Problem, map_leaves
from blrlab.bench.rows import ERRORS, Row, Settings, finite, first_line, guarded, out_of_memory, start
from blrlab.bench.timing import Contender

MOST_COPIES = 2**16
XLA_CALLS = 100  # under the profiler, or one on every copy of the weights
XLA_WARM = 20  # and on one copy


@dataclasses.dataclass
class _Entry:
    """A row on its way, with what it takes to time it once it is verified."""

    row: Row
    problem: Problem
    backend: Backend
    verified: bool = False


def bench_layers(groups: Sequence[Group], settings: Settings) -> Iterator[list[Row]]:
    """Benchmark groups; yield the rows of one after another.

    Without a GPU the Triton kernels are verified in their interpreter, all groups in one child process. On one XLA
    runs in a process of its own.
    """
    found = _interpreted(groups, settings)
    aside = beside.Beside(settings) if beside.needed(settings) else None
    try:
        for number, group in enumerate(groups):
            try:
                rows = _bench_group(group, settings, aside)
            except Exception as error:  # no room for the tensors, say
                _forget(settings)
                rows = [
                    start(group, case, impl, settings) | {"reason": first_line(error)}
                    for case, impl in _cases(group, settings)
                ]
            for row in rows:
                verdict = found.get((number, row["op"], row["impl"]))
                if verdict is not None and row["passed"] is None:
                    _interpret(row, verdict)
            yield rows
    finally:
        if aside:
            aside.close()


def _bench_group(group: Group, settings: Settings, aside: beside.Beside | None) -> list[Row]:
    entries = _entries(group, settings)
    here = [entry for entry in entries if not (aside and entry.backend.name == beside.XLA)]
    compiled = _compiled_by_xla(here, settings)
    for entry in here:
        _verified(entry, settings)
        if entry.backend.name == beside.XLA and entry.row["tuning_s"] is not None:
            entry.row["tuning_s"] += compiled.get(entry.row["op"], 0.0)
    _time([entry for entry in here if entry.verified], settings)
    rows = [entry.row for entry in entries]
    del entries, here
    _forget(settings)
    if aside:
        _take_over(rows, aside.rows(group))
    return rows


def _compiled_by_xla(entries: Sequence[_Entry], settings: Settings) -> dict[str, float]:
    """Compile XLA's layers of a group at the same time on a GPU, where it takes long: {op: seconds}."""
    found = [entry.problem for entry in entries if entry.backend.name == beside.XLA]
    if not (settings.card.is_gpu and found) or any(backends.why_not(beside.XLA, each) for each in found):
        return {}
    from blrlab.bench import xla

    try:
        return xla.compile_together(found)
    except Exception:  # what fails here fails again, and is told, where it is verified
        return {}


def _take_over(rows: Sequence[Row], found: Sequence[Row] | str) -> None:
    """Fill XLA's rows with what the process beside found, or with why it found nothing."""
    measured = {} if isinstance(found, str) else {row["op"]: row for row in found}
    for row in rows:
        if row["impl"] == beside.XLA:
            row |= measured.get(row["op"], {"reason": found if isinstance(found, str) else "XLA gave no such row"})


def planned(group: Group, settings: Settings) -> list[tuple[str, str]]:
    """Return the (op, impl) of every row that a group gives."""
    return [(case.format, impl) for case, impl in _cases(group, settings)]


def _cases(group: Group, settings: Settings) -> list[tuple[Case, str]]:
    found = [(name, backends.backend(name, settings.clone).ops) for name in settings.impls]
    return [(case, name) for case in group.cases for name, ops in found if case.format in ops]


def _entries(group: Group, settings: Settings) -> list[_Entry]:
    made = {each.op: each for each in group.problems(settings.card.device)}
    return [
        _Entry(start(group, case, impl, settings), made[case.format], backends.backend(impl, settings.clone))
        for case, impl in _cases(group, settings)
    ]


def _verified(entry: _Entry, settings: Settings) -> _Entry:
    """Judge a backend's output, and note what its first call took in time and memory."""
    row, each = entry.row, entry.problem
    reason = backends.why_not(entry.backend.name, each)
    if reason:
        row["reason"] = reason
        return entry
    try:
        started = time.perf_counter()
        if entry.backend.tunes and settings.card.is_gpu:
            _tuned(entry, settings, *entry.backend.tunes)
        call = entry.backend.make(each, each.kernel)
        with torch.no_grad():
            call()
            _wait(settings)
            row["tuning_s"] = time.perf_counter() - started
            call()  # own kernels have a plan after two calls: what is judged is what is timed
            poison(_sizes(each), each.x.dtype, each.x.device)
            raw = call()
        judge, output = _judge(each), entry.backend.to_rows(each, raw)
        truth = entry.backend.truth(each.kernel) if entry.backend.truth else None
        verdict = judge.judge(output, _yardstick(each) if entry.backend.own else None, truth)
        del raw, output
        row["peak_bytes"] = _peak_bytes(call, settings) if entry.backend.name != "xla" else None
    except Exception as error:  # whatever a third-party backend raises belongs into its row
        row |= {"passed": None if out_of_memory(error) else False, "reason": first_line(error)}
        return entry
    row |= dict(zip(ERRORS, map(finite, verdict), strict=True))
    row["passed"] = entry.verified = verdict.passed
    if not verdict.passed:
        row["reason"] = "its error is over its budget, so it has no speed"
    if entry.backend.quantisation_error:
        row["quantisation_error"] = entry.backend.quantisation_error(each.kernel)
    return entry


def _tuned(entry: _Entry, settings: Settings, impl: str, dtype: str | None) -> None:
    """Tune an own kernel where that is asked for, or note that it runs with tile sizes by rule."""
    from blrlab_ops import tune, tuning
    from blrlab_ops.tuning import search

    each, kind = entry.problem, dtype or entry.problem.dtype
    name = torch.cuda.get_device_name(settings.card.device)
    if impl in tuning.lookup(name, tune.key(each.case, kind)):
        return
    if settings.tune:
        search.tune(each.case, getattr(torch, kind), str(settings.card.device), [impl])
    else:
        entry.row["note"] = "tile sizes by rule, not tuned"


def _sizes(each: Problem) -> list[int]:
    """Return the numbers of elements of what a call is likely to allocate: output, input, intermediates."""
    n, (b1, b2), rank = each.case.tokens, each.case.blocks, max(each.case.rank, 1)
    return [n * size for size in (each.case.out_features, each.case.in_features, rank * b1, rank * b2, rank * b1 * b2)]


@functools.lru_cache(maxsize=1)
def _judge(each: Problem) -> Judge:
    return Judge(each)


@functools.lru_cache(maxsize=1)
def _yardstick(each: Problem) -> Errors:
    """Return the errors of PyTorch's products, batched for factors, from which the budgets of own kernels are drawn."""
    plain = backends.backend("torch_eager" if each.op == "dense" else "torch_bmm")
    with torch.no_grad():
        return _judge(each).errors(plain.make(each, each.kernel)())


def _time(entries: Sequence[_Entry], settings: Settings) -> None:
    """Time verified contenders in turn and fill their rows in; those that a profiler times come last."""
    profiled = [entry for entry in entries if settings.card.is_gpu and entry.backend.name == beside.XLA]
    with torch.no_grad():
        _time_in_turn([entry for entry in entries if entry not in profiled], settings)
        if profiled:
            _profile(profiled, settings)


def _time_in_turn(entries: Sequence[_Entry], settings: Settings) -> None:
    ready = []
    for entry in entries:
        try:
            contender, calls = _contender(entry, settings)
            contender.sample()
            ready.append((entry, contender, calls))
        except Exception as error:
            entry.row["reason"] = f"it cannot be timed: {first_line(error)}"
    contenders = [
        dataclasses.replace(each, name=str(place), sample=guarded(entry.row, each))
        for place, (entry, each, _) in enumerate(ready)
    ]
    if not contenders:
        return
    with clocks_read_meanwhile(settings.card) as clocks:
        found = timing.time_contenders(contenders, settings.seconds)
    for place, times in found.items():
        entry, contender, calls = ready[int(place)]
        if "reason" in entry.row:
            continue
        _fill(entry, times, contender.method, clocks)
        try:
            _extra_columns(entry, calls, settings)
        except Exception as error:
            _note(entry.row, f"no warm or launch time: {first_line(error)}")


def _extra_columns(entry: _Entry, calls: list[timing.Call], settings: Settings) -> None:
    """Note the warm-cache time and the time of a call from Python, on a GPU."""
    if settings.card.is_gpu:
        entry.row["warm_us"] = timing.warm_us(calls[0], entry.row["p50"])
        entry.row["launch_us"] = timing.launch_us(calls, torch.cuda.synchronize, entry.row["p50"])


def _profile(entries: Sequence[_Entry], settings: Settings) -> None:
    """Time XLA's layers of a group under one trace of its profiler, which takes long to start and to end."""
    from blrlab.bench import xla

    try:
        made = [_calls(entry, settings) for entry in entries]
        rotations = [list(itertools.islice(itertools.cycle(calls), max(len(calls), XLA_CALLS))) for calls in made]
        with clocks_read_meanwhile(settings.card) as clocks:
            taken = xla.profile([*rotations, *([calls[0]] * XLA_WARM for calls in made)])
        for entry, calls, cold, warm in zip(entries, made, taken, taken[len(entries) :], strict=False):
            _fill(entry, timing.summary(cold), xla.METHOD.format(copies=len(calls)), clocks)
            entry.row["warm_us"] = timing.summary(warm).p50
            entry.row["launch_us"] = xla.launch_us(calls, entry.row["p50"])
    except Exception as error:
        for entry in entries:
            if entry.row["p50"] is None:
                entry.row["reason"] = f"it cannot be timed: {first_line(error)}"


def _fill(entry: _Entry, times: timing.Times, method: str, clocks: Mapping[str, float | None]) -> None:
    entry.row |= {**times._asdict(), "method": method, **clocks}
    if times.p50 < entry.row["bound_us"]:
        _note(entry.row, "faster than its bound: the bound or the clock is wrong")


def _note(row: Row, said: str) -> None:
    row["note"] = "; ".join(filter(None, (row.get("note"), said)))


def _calls(entry: _Entry, settings: Settings) -> list[timing.Call]:
    """Make the calls that are timed, each on weights of its own."""
    each, copies = entry.problem, 1
    if settings.card.is_gpu:
        copies = timing.copies_to_be_cold(entry.row["weight_bytes"], settings.card.measured.l2_bytes)
    if copies > MOST_COPIES:
        raise ValueError(f"it would take {copies:,} copies of so small a layer to keep its weights cold")
    entry.row["copies"] = copies
    return [entry.backend.make(each, map_leaves(torch.clone, each.kernel)) for _ in range(copies)]


def _contender(entry: _Entry, settings: Settings) -> tuple[Contender, list[timing.Call]]:
    """Set up what is timed in turn with others: a contender and its calls."""
    calls, name = _calls(entry, settings), entry.backend.name
    if not settings.card.is_gpu:
        wait = _waiting(calls[0]) if name == beside.XLA else calls[0]
        return Contender(name, timing.on_host(wait), "host clock, warm weights"), calls
    method = f"CUDA graph of calls on {len(calls)} weight copies; CUDA events"
    return Contender(name, timing.in_graphs(calls), method), calls


def _waiting(call: timing.Call) -> timing.Call:
    return lambda: call().block_until_ready()


def _peak_bytes(call: timing.Call, settings: Settings) -> int | None:
    """Return the most memory a call holds beyond its weights and its input: output and intermediates, in bytes."""
    if not settings.card.is_gpu:
        return None
    torch.cuda.reset_peak_memory_stats(settings.card.device)
    before = torch.cuda.memory_allocated(settings.card.device)
    with torch.no_grad():
        call()
    return torch.cuda.max_memory_allocated(settings.card.device) - before


def _wait(settings: Settings) -> None:
    if settings.card.is_gpu:
        torch.cuda.synchronize(settings.card.device)


def _forget(settings: Settings) -> None:
    """Free what a group held."""
    _judge.cache_clear()
    _yardstick.cache_clear()
    backends.forget_compiled()
    if "xla" in settings.impls and backends.has_jax():
        from blrlab.bench import xla

        xla.forget()
    if settings.card.is_gpu:
        torch.cuda.empty_cache()


def _interpreted(groups: Sequence[Group], settings: Settings) -> Mapping[tuple[int, str, str], interpreted.Verdict]:
    """Verify the Triton kernels in their interpreter where there is no GPU: {(group, op, impl): what was found}."""
    if settings.card.is_gpu:
        return {}
    wanted = [
        (number, case, impl)
        for number, group in enumerate(groups)
        for case in group.cases
        for impl in settings.impls
        if (case.format, impl) in planned(group, settings) and case.format != "dense" and dispatch.needs_triton(impl)
    ]
    verdicts = interpreted.verify([(case, impl) for _, case, impl in wanted])
    return {(number, case.format, impl): found for (number, case, impl), found in zip(wanted, verdicts, strict=True)}


def _interpret(row: Row, found: interpreted.Verdict) -> None:
    """Fill in what the interpreter found, in the row that could not be timed."""
    if isinstance(found, str):
        row["reason"] = f"no GPU; {found}"
        return
    row |= {name: finite(found[name]) for name in ERRORS}
    row["passed"] = found["passed"]
    few = min(row["tokens"], interpreted.MOST_TOKENS)
    row["reason"] = f"no GPU: verified in the interpreter (float32, random factors, {few} tokens), not timed"
