"""Benchmark a whole model, dense and factored: verify what every program computes, then time what passed.

One row a phase, format and implementation, all of a phase timed in turn in one process (on a GPU, where the command
has JAX's programs follow in a process of their own, all of PyTorch's and then all of JAX's):

- forward: the logits of all tokens, without a key-value cache.
- prefill: the logits of the last token, keys and values written to a cache. PyTorch only: `blrlab.models.gpt2` keeps
  no cache.
- decode: one token more, the cache holding `tokens` before it. PyTorch only.
- train_step: one optimiser step on windows of `tokens`, forward, backward and update, without dropout. JAX only, where
  models are trained.

On a GPU PyTorch's programs run as CUDA graphs, JAX's under its profiler. There is one copy of the weights: they come
from memory as far as they exceed the L2, which the method states.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from blrlab_ops import dispatch
from torch import Tensor

from blrlab.bench import gpt2_torch, timing
from blrlab.bench.card import clocks_read_meanwhile
from blrlab.bench.gate import poison
from blrlab.bench.gpt2_torch import Weights
from blrlab.bench.model_gate import Judge, Verdict
from blrlab.bench.model_rows import BEST, COMPILED, DENSE_IMPL, JOINED, XLA, Group, Net, Specs, planned, start
from blrlab.bench.rows import ERRORS, Row, Settings, first_line, guarded
from blrlab.bench.timing import Contender

if TYPE_CHECKING:
    from blrlab.bench.gpt2_xla import Ready

OVER = "its error is over its budget, so it has no speed"
XLA_CALLS = 10  # in one profile


@dataclasses.dataclass
class Entry:
    """A row on its way, with the call that fills it."""

    row: Row
    call: timing.Call | None = None

    @property
    def is_xla(self) -> bool:
        return self.row["impl"] == XLA


def bench_model(net: Net, groups: Sequence[Group], settings: Settings) -> Iterator[list[Row]]:
    """Benchmark a model; yield the rows of one group after another.

    `settings.impls` are torch_eager (the dense model in PyTorch), best (what `impl=None` takes), torch_compile (either
    of them under it), xla, and implementations of `blrlab_ops`.
    """
    models: dict[tuple[str, str | None, str], Any] = {}
    for group in groups:
        entries = [
            Entry(start(net, group, op, impl, settings)) for op, impl in planned(net, group.phase, settings.impls)
        ]
        for op in net.plans:
            _verify(net, group, [entry for entry in entries if entry.row["op"] == op], settings, models)
        take_times([entry for entry in entries if entry.call], settings)
        rows = [entry.row for entry in entries]
        del entries
        if COMPILED in settings.impls:
            torch.compiler.reset()  # PyTorch limits how often it compiles one function anew
        if settings.card.is_gpu:
            torch.cuda.empty_cache()
        yield rows


def why_not(net: Net, group: Group, op: str, impl: str, settings: Settings) -> str | None:
    """Say in one sentence why a program cannot run or be timed here; None where it can."""
    device = settings.card.device
    if reason := net.family.why_not(net.sizes, group):
        return reason
    if impl == XLA:
        from blrlab.bench import xla

        if group.phase == "train_step" and net.trainer is None:
            return "no optimiser was given"
        if (device.type, group.dtype) == ("cpu", "float16"):
            return "JAX's attention has no float16 on a CPU: use bfloat16 or float32"
        return xla.why_not(device.type)
    return why_no_kernels(net.plans[op], impl, device, group.dtype)


def why_no_kernels(specs: Specs, impl: str, device: torch.device, dtype: str) -> str | None:
    """Say in one sentence why a named implementation cannot run all of a plan; None where it can."""
    if impl in (DENSE_IMPL, BEST, JOINED, COMPILED):
        return None
    for format in dict.fromkeys(spec.format for spec in specs.values() if spec.format != "dense"):
        if impl not in dispatch.impls(format):
            return f"{impl} is no implementation of {format}, which the plan has too"
        reason = dispatch.why_not(format, impl, device, dtype)
        if reason:
            return reason
    return None


def _verify(net: Net, group: Group, entries: Sequence[Entry], settings: Settings, models: dict) -> None:
    """Judge the programs of one format, and keep the calls of those that passed."""
    ready = []
    for entry in entries:
        reason = why_not(net, group, entry.row["op"], entry.row["impl"], settings)
        if reason:
            entry.row["reason"] = reason
        else:
            ready.append(entry)
    if not ready:
        return
    op, device, dtype = ready[0].row["op"], settings.card.device, getattr(torch, group.dtype)
    weights = gpt2_torch.draw(net.sizes, net.plans[op], net.seed).map(lambda leaf: leaf.to(device, dtype))
    ids, judge = _ids(net, group, device), None
    for entry in ready:
        entry.row["weight_bytes"] = weights.nbytes
        try:
            judge = judge or Judge(net.sizes, weights, ids[:, :-1] if group.phase == "train_step" else ids)
            program = _xla_program if entry.is_xla else _torch_program
            verdict, call = program(net, group, entry.row, weights, ids, judge, models)
        except Exception as error:  # whatever a library raises belongs into its row
            entry.row |= {"passed": None if is_no_fault(error) else False, "reason": first_line(error)}
            continue
        finite = (value if math.isfinite(value) else None for value in verdict)
        entry.row |= {**dict(zip(ERRORS, finite, strict=True)), "passed": verdict.passed}
        if verdict.passed:
            entry.call = call
        else:
            entry.row["reason"] = OVER


def is_no_fault(error: Exception) -> bool:
    """Say whether an error tells of a full memory or a missing library, and nothing of the program."""
    if isinstance(error, ImportError | MemoryError | torch.OutOfMemoryError):
        return True
    signs = ("out of memory", "resource_exhausted", "can't allocate memory", "cannot open shared object")
    return isinstance(error, RuntimeError | OSError) and any(sign in str(error).lower() for sign in signs)


def _ids(net: Net, group: Group, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(net.seed)
    return torch.randint(net.sizes.vocab_size, (group.batch, group.length), generator=generator).to(device)


def _torch_program(
    net: Net, group: Group, row: Row, weights: Weights, ids: Tensor, judge: Judge, models: dict
) -> tuple[Verdict, timing.Call]:
    """Judge a phase of the PyTorch model; models are built once for all groups."""
    op, impl = row["op"], kernels(row["impl"])
    if (op, impl, group.dtype) not in models:
        models[op, impl, group.dtype] = gpt2_torch.build(net.sizes, weights, impl)
    call = gpt2_torch.call(models[op, impl, group.dtype], group.phase, ids)
    call = compiled(call) if row["impl"] == COMPILED else call
    with torch.no_grad():
        call()  # compiles and tunes
        poison(_sizes(net, group), getattr(torch, group.dtype), ids.device)
        verdict = judge.judge(call(), is_yardstick=op == "dense")
        row["peak_bytes"] = peak_bytes(call) if ids.is_cuda else None
    return verdict, call


def kernels(impl: str) -> str | None:
    """Return the `impl` of a model's factored layers by a row's."""
    return None if impl in (DENSE_IMPL, BEST, COMPILED) else impl


def compiled(call: timing.Call) -> timing.Call:
    """Put a call of a model under `torch.compile`; where it breaks the graph, the parts are compiled."""
    return torch.compile(lambda: call(), dynamic=False)


def _sizes(net: Net, group: Group) -> list[int]:
    """Return the numbers of elements of what a call is likely to allocate: logits, and what is between the layers."""
    scored = group.batch if group.phase in ("prefill", "decode") else group.rows
    return [*[scored * net.sizes.vocab_size] * 2, *[group.rows * net.sizes.width * times for times in (1, 1, 3, 4, 4)]]


def peak_bytes(call: timing.Call) -> int:
    """Return the most memory a call holds beside what is there before it: activations and logits, in bytes."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _xla_program(
    net: Net, group: Group, row: Row, weights: Weights, ids: Tensor, judge: Judge, models: dict
) -> tuple[Verdict, timing.Call]:
    """Compile and judge a phase of the Flax model."""
    from blrlab.bench import gpt2_xla, xla

    specs = net.plans[row["op"]]
    if group.phase == "train_step":
        assert net.trainer is not None
        ready: Ready = gpt2_xla.train_step(net.sizes, specs, weights, ids, group.dtype, net.trainer)
        verdict = judge.judge_step(gpt2_xla.finite(ready.call()), ids)
        row["weight_bytes"] = 4 * weights.nbytes // getattr(torch, group.dtype).itemsize
    else:
        ready = gpt2_xla.forward(net.sizes, specs, weights, ids)
        gpt2_xla.poison(_sizes(net, group), group.dtype)
        verdict = judge.judge(xla.to_torch(ready.call()))
    row["peak_bytes"] = ready.peak_bytes
    return verdict, ready.call


def take_times(entries: Sequence[Entry], settings: Settings) -> None:
    """Time verified programs in turn and fill their rows in."""
    with torch.no_grad():
        ready = []
        for entry in entries:
            try:
                contender = _contender(entry, str(len(ready)), settings)
                contender.sample()  # a profile may fail
                ready.append((entry, contender))
            except Exception as error:
                entry.row["reason"] = f"it cannot be timed: {first_line(error)}"
        contenders = [dataclasses.replace(each, sample=guarded(entry.row, each)) for entry, each in ready]
        with clocks_read_meanwhile(settings.card) as clocks:
            found = timing.time_contenders(contenders, settings.seconds) if ready else {}
        for entry, contender in ready:
            entry.row |= clocks
            if "reason" not in entry.row:
                _fill_in(entry, contender, found[contender.name], settings)


def _fill_in(entry: Entry, contender: Contender, times: timing.Times, settings: Settings) -> None:
    """Note the times of a program, and on a GPU that of a call from Python."""
    row, notes = entry.row, []
    new, calls = 1 if row["phase"] == "decode" else row["tokens"], 1e6 / times.p50
    row |= {**times._asdict(), "method": contender.method, "tokens_per_s": calls * row["batch"] * new}
    row |= {"images_per_s": calls * row["batch"]} if "images_per_s" in row else {}
    if times.p50 < row["bound_us"]:
        notes.append("faster than its bound: the bound or the clock is wrong")
    try:
        row["launch_us"] = _launch_us(entry) if settings.card.is_gpu else None
    except Exception as error:
        notes.append(f"no launch time: {first_line(error)}")
    if notes:
        row["note"] = "; ".join(notes)


def _contender(entry: Entry, name: str, settings: Settings) -> Contender:
    assert entry.call is not None
    call, weights = entry.call, _coldness(entry.row, settings)
    weights += "; the model under torch.compile" if entry.row["impl"] == COMPILED else ""
    if entry.is_xla:
        from blrlab.bench import gpt2_xla, xla

        if settings.card.is_gpu:
            method = f"{weights}; JAX's profiler, the kernels' time on the device"
            return Contender(name, lambda: xla.profile([[call] * XLA_CALLS])[0], method, every=5)
        call = gpt2_xla.wait(call)
    if not settings.card.is_gpu:
        return Contender(name, timing.on_host(call), f"{weights}; host clock")
    try:
        return Contender(name, timing.in_graphs([call]), f"{weights}; CUDA graph of calls, CUDA events")
    except RuntimeError as error:
        torch.cuda.synchronize()
        call()
        method = f"{weights}; called from Python, CUDA events, since no CUDA graph can be made: {first_line(error)}"
        return Contender(name, _by_events(call), method)


def _coldness(row: Row, settings: Settings) -> str:
    l2_bytes = settings.card.measured.l2_bytes
    share = f", {row['weight_bytes'] / l2_bytes:.1f} times the L2" if settings.card.is_gpu and l2_bytes else ""
    return f"one copy of the weights{share}"


def _by_events(call: timing.Call) -> Callable[[], Sequence[float]]:
    def sample() -> Sequence[float]:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return (1e3 * begin.elapsed_time(end),)

    return sample


def _launch_us(entry: Entry) -> float:
    """Time calls from Python, in us."""
    assert entry.call is not None
    if not entry.is_xla:
        return timing.launch_us([entry.call], torch.cuda.synchronize, entry.row["p50"])
    from blrlab.bench import gpt2_xla

    return timing.launch_us([gpt2_xla.wait(entry.call)], lambda: None, entry.row["p50"])
