"""Benchmark whole models of any size: Llama, ViT and DiT as users of PyTorch run them, dense and factored.

Weights are drawn on the device in the dtype that is measured, one model after another, so that the largest alone must
fit, beside its first two blocks and its embeddings in float64; what runs the same weights, with and without a compiler,
is timed in turn. A row has `verified_layers`: the number of blocks that were held to float64
(`blrlab.bench.depth_gate`), and `depth_error`: how far all of them are from plain PyTorch. `cache_bytes` are kept keys
and values, which neither the weights' nor the peak's bytes hold. Whatever goes wrong with a program is the reason in
its row, and the others go on.
"""

import gc
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from blrlab_ops import loading
from torch import Tensor

from blrlab.bench import joining, random_models, timing
from blrlab.bench.depth_gate import Judge, wrong_layer
from blrlab.bench.end_to_end import OVER, Entry, compiled, is_no_fault, kernels, peak_bytes, take_times, why_no_kernels
from blrlab.bench.gate import poison
from blrlab.bench.model_gate import errors
from blrlab.bench.model_rows import COMPILED, DENSE_IMPL, JOINED, Group, Net, planned, start
from blrlab.bench.nets import Inputs, Model, Running
from blrlab.bench.rows import ERRORS, Row, Settings, first_line

PLAIN = "torch_bmm"


def bench_full_size(
    net: Net, groups: Sequence[Group], settings: Settings, is_there: Callable[[Group, str, str], bool]
) -> Iterator[list[Row]]:
    """Benchmark a model; yield the rows of one model and group after another.

    Args:
      net: of a family that has `running`.
      groups: phases at batches and numbers of tokens.
      settings: its `impls` are those of `blrlab.bench.end_to_end.bench_model`, without xla.
      is_there: (group, format, implementation) -> whether a row need not be measured.
    """
    for op in net.plans:
        named = [impl for group in groups for at, impl in planned(net, group.phase, settings.impls) if at == op]
        for own in dict.fromkeys(map(kernels, named)):
            held = _Held(net, op, own, settings)
            for group in groups:
                beside = [impl for at, impl in planned(net, group.phase, settings.impls) if at == op]
                beside = [impl for impl in beside if kernels(impl) == own and not is_there(group, op, impl)]
                if beside:
                    yield _measure(held, group, [Entry(start(net, group, op, impl, settings)) for impl in beside])
            held.forget()


class _Held:
    """The model of one format and implementation, made when it is first needed."""

    def __init__(self, net: Net, op: str, impl: str | None, settings: Settings):
        assert net.family.running is not None
        self.net, self.op, self.impl, self.settings = net, op, impl, settings
        self.running: Running = net.family.running
        self._made: tuple[Any, Model] | None = None

    def model(self, sizes: Any, dtype: torch.dtype) -> Model:
        """Return the model of some sizes."""
        if self._made is None or self._made[0] != (sizes, dtype):
            self.forget()
            generator = torch.Generator(self.settings.card.device).manual_seed(self.net.seed)
            specs, impl = self.net.plans[self.op], None if self.impl == JOINED else self.impl
            made = random_models.draw(self.running, sizes, specs, impl, generator, dtype)
            if self.impl == JOINED:
                places = self.running.places(made, sizes, specs)
                for paths in joining.groups(specs, self.running.sharing):
                    joining.join([made.get_submodule(places[path]) for path in paths])
            self._made = (sizes, dtype), made
        return self._made[1]

    def inputs(self, sizes: Any, group: Group) -> Inputs:
        """Draw what a phase takes."""
        generator = torch.Generator(self.settings.card.device).manual_seed(self.net.seed + 1)
        drawn, dtype = self.running.inputs(sizes, group, generator), getattr(torch, group.dtype)
        return tuple(each.to(dtype) if each.is_floating_point() else each for each in drawn)

    def forget(self) -> None:
        """Free the memory of the model."""
        self._made = None
        free(self.settings)


def free(settings: Settings) -> None:
    """Give memory that nothing holds any more back to the device."""
    if COMPILED in settings.impls:
        torch.compiler.reset()  # what is compiled keeps models
    gc.collect()
    if settings.card.is_gpu:
        torch.cuda.empty_cache()


def why_not(net: Net, group: Group, row: Row, settings: Settings) -> str | None:
    """Say in one sentence why a program cannot run or be timed here; None where it can."""
    family = net.family
    if family.running and importlib.util.find_spec(family.running.library) is None:
        return f"needs {family.running.library}: pip install {family.running.library}"
    specs = net.plans[row["op"]]
    if family.running and row["impl"] == JOINED and not joining.groups(specs, family.running.sharing):
        return "no layers that share their input have the same format, shape and rank"
    if family.running and (reason := _too_old(family.running)):
        return reason
    reason = family.why_not(net.sizes, group)
    return reason or why_no_kernels(specs, row["impl"], settings.card.device, group.dtype)


def _too_old(running: Running) -> str | None:
    found = importlib.metadata.version(running.library)
    if int(found.partition(".")[0]) >= running.since:
        return None
    return f"needs {running.library} {running.since} or newer, and here is {found}"


def _measure(held: _Held, group: Group, entries: list[Entry]) -> list[Row]:
    """Verify what runs one model, then time what passed."""
    net, settings = held.net, held.settings
    for entry in entries:
        if reason := why_not(net, group, entry.row, settings):
            entry.row["reason"] = reason
    ready = [entry for entry in entries if "reason" not in entry.row]
    with torch.no_grad():
        _verify(held, group, ready)
        take_times([entry for entry in ready if entry.call], settings)
    rows = [entry.row for entry in entries]
    entries.clear()
    ready.clear()
    free(settings)
    return rows


def _verify(held: _Held, group: Group, entries: Sequence[Entry]) -> None:
    """Judge programs on one model, and keep the calls of those that passed."""
    family, dtype = held.net.family, getattr(torch, group.dtype)
    judge = None
    for entry in entries:
        row = entry.row
        try:
            sizes = family.sized(held.net.sizes, group.tokens)
            model, inputs = held.model(sizes, dtype), held.inputs(sizes, group)
            row["weight_bytes"] = loading.weight_bytes(model)
            row["cache_bytes"] = held.running.kept(sizes, group) * dtype.itemsize or None
            judge = judge or Judge(family, sizes, model, group.phase, inputs, dtype)
            entry.call = _judged(held, model, inputs, judge, row, _sizes(held.net, group))
        except Exception as error:  # whatever a library raises belongs into its row
            row |= {"passed": None if is_no_fault(error) else False, "reason": first_line(error)}
            error.__traceback__ = None  # which holds the tensors of the call
            free(held.settings)


def _judged(
    held: _Held, model: Model, inputs: Inputs, judge: Judge, row: Row, likely: Sequence[int]
) -> timing.Call | None:
    """Judge a program at its first blocks, then whole; return its call where it passed both."""
    running, phase, put = held.running, row["phase"], compiled if row["impl"] == COMPILED else _as_it_is
    is_yardstick = row["op"] == "dense"
    with judge.first_blocks():
        states = put(running.call(model, phase, inputs, True))
        verdict = judge.judge(_poisoned(states, likely, inputs[0].device, row), is_yardstick)
        del states
    row |= {**dict(zip(ERRORS, map(_finite, verdict), strict=True)), "passed": verdict.passed}
    row["verified_layers"] = judge.layers
    if not verdict.passed:
        row["reason"] = OVER
        return None
    plain = running.call(model, phase, inputs, False)
    call = put(plain)
    output = _poisoned(call, likely, inputs[0].device, row)
    if reason := _wrong_at_depth(output, plain, model, judge, row):
        row |= {"passed": False, "reason": reason}
        return None
    row["peak_bytes"] = peak_bytes(call) if inputs[0].is_cuda else None
    return call


def _poisoned(call: timing.Call, likely: Sequence[int], device: torch.device, row: Row) -> Tensor:
    """Call twice, the second time among memory that is full of NaN: the first compiles and tunes."""
    call()
    poison(likely, getattr(torch, row["dtype"]), device)
    return call()


def _wrong_at_depth(output: Tensor, plain: timing.Call, model: Model, judge: Judge, row: Row) -> str | None:
    """Say what is wrong with what the whole model gives; note how far it is from plain PyTorch."""
    if not output.isfinite().all():
        return "what the whole model gives is not finite"
    if row["impl"] in (DENSE_IMPL, PLAIN):
        return None
    if reason := wrong_layer(model, plain, PLAIN):
        return reason
    with random_models.run_by(model, PLAIN):
        found = errors(output, plain().double()).error
    row |= {"depth_error": _finite(found), "depth_error_budget": judge.depth_budget(row["op"] == "dense")}
    if found <= row["depth_error_budget"]:
        return None
    return f"the whole model is farther from that of {PLAIN} than its budget, so it has no speed"


def _sizes(net: Net, group: Group) -> list[int]:
    """Return the numbers of elements of what a call is likely to allocate: linear layers' inputs and outputs."""
    products = net.family.products(net.family.sized(net.sizes, group.tokens), group)
    return sorted({rows * size for _, i, o, rows, _ in products for size in (i, o)}) * 2


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _as_it_is(call: timing.Call) -> timing.Call:
    return call
