"""Benchmark one layer over backends: verify, then time what passed, then write a row for each."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from blrlab import roofline
from blrlab.bench import gate, interpreted
from blrlab.bench.backends import BACKENDS, Contender, why_not
from blrlab.bench.problem import Problem
from blrlab.bench.timing import Times, time_contenders
from blrlab.roofline import Peaks

Row = dict[str, Any]
L2_BYTES = 64 * 2**20  # the largest among the GPUs of the device table; a smaller one only gets more copies
MOST_COPIES = 1024  # reached by layers under a quarter of a megabyte
OWN_KERNELS = ("triton",)
ERRORS = ("error", "error_max", "error_budget", "error_max_budget")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to benchmark.

    Attributes:
      backends: in the order of the table.
      seconds: of measuring for each contender.
      peaks: the machine's ceilings, for the bounds.
      machine: the fields every row carries: device, versions, driver, commit, time.
    """

    backends: Sequence[str]
    seconds: float
    peaks: Peaks
    machine: Row


def bench_layers(
    problems: Sequence[Problem], settings: Settings, say: Callable[[str], None] = print
) -> Iterator[list[Row]]:
    """Benchmark factored layers, each with its dense counterpart; yield the rows of one layer after another.

    Without a GPU the Triton kernels are verified in their interpreter, all layers in one child process.
    """
    interpret = "triton" in settings.backends and jax.default_backend() == "cpu"
    found = interpreted.verify(problems) if interpret else [None] * len(problems)
    for problem, verdict in zip(problems, found, strict=True):
        rows = _bench_layer(problem, settings)
        if verdict is not None:
            _interpret(problem, rows, verdict)
        for row in rows:
            say(_line(row))
        yield rows


def _bench_layer(problem: Problem, settings: Settings) -> list[Row]:
    rows: list[Row] = []
    ready: list[tuple[Row, Contender]] = []
    for each in (problem.dense(), problem):
        for impl in settings.backends:
            if impl in OWN_KERNELS and each.spec.format == "dense":
                continue
            row, contender = _verified(each, impl, settings)
            rows.append(row)
            if contender:
                ready.append((row, contender))
    _time(ready, settings.seconds)
    return rows


def _verified(problem: Problem, impl: str, settings: Settings) -> tuple[Row, Contender | None]:
    """Set a contender up and judge it; return its row, and itself if it passed."""
    row = _row(problem, impl, settings)
    reason = why_not(impl, problem)
    if reason:
        return row | {"reason": reason}, None
    try:
        contender = BACKENDS[impl](problem, _copies(problem))
        output = contender.output()
        if output.shape != problem.reference.shape:
            raise ValueError(f"its output is {output.shape}, not {problem.reference.shape}")
        contender.run()
        yardstick = _yardstick(problem) if impl in OWN_KERNELS else None
    except Exception as error:  # whatever a third-party backend raises belongs into its row
        return row | {"passed": False, "reason": _first_line(error)}, None
    verdict = gate.judge(problem, output, yardstick)
    row |= {
        "error": _finite(verdict.error),
        "error_max": _finite(verdict.error_max),
        "error_budget": verdict.budget,
        "error_max_budget": verdict.budget_max,
        "passed": verdict.passed,
    }
    if not verdict.passed:
        return row | {"reason": "its error is over its budget, so it has no speed"}, None
    return row | {"method": contender.method}, contender


def _yardstick(problem: Problem) -> tuple[float, float]:
    """Return the errors of PyTorch's batched products, from which the budgets of own kernels are drawn."""
    return gate.errors(BACKENDS["torch"](problem, 1).output(), problem.reference)


def _time(ready: Sequence[tuple[Row, Contender]], seconds: float) -> None:
    """Time verified contenders in turn and fill their rows in."""
    renamed = [dataclasses.replace(contender, impl=str(place)) for place, (_, contender) in enumerate(ready)]
    for place, times in time_contenders(renamed, seconds).items():
        row = ready[int(place)][0]
        row.update(Times._asdict(times))
        if times.p50 < row["bound_us"]:
            row["note"] = "faster than its bound: the bound or the clock is wrong"


def _interpret(problem: Problem, rows: Sequence[Row], found: interpreted.Row | str) -> None:
    """Fill in what the interpreter found of the Triton kernels of a layer, in the row that could not be timed."""
    for row in rows:
        if row["impl"] == "triton" and row["op"] == problem.spec.format and row["passed"] is None:
            if isinstance(found, str):
                row["reason"] = f"no GPU; {found}"
                continue
            row.update({name: _finite(found[name]) for name in ERRORS}, passed=found["passed"])
            row["reason"] = "no GPU: verified in the interpreter (float32, random factors), not timed"


def _row(problem: Problem, impl: str, settings: Settings) -> Row:
    spec, itemsize = problem.spec, problem.x.dtype.itemsize
    flops, moved = roofline.work(spec, problem.tokens, itemsize)
    return {
        "kind": "bench",
        "op": spec.format,
        "impl": impl,
        "net": problem.net,
        "layer": problem.layer,
        "in_features": spec.in_features,
        "out_features": spec.out_features,
        "blocks": list(spec.blocks),
        "rank": spec.total_rank,
        "block_rank": spec.rank if spec.format == "monarch" else None,
        "tokens": problem.tokens,
        "dtype": problem.dtype,
        "unit": "us",
        **dict.fromkeys(("p20", "p50", "p80", "method")),
        "bound_us": roofline.bound_us(spec, problem.tokens, itemsize, settings.peaks),
        "flops": flops,
        "bytes": moved,
        **dict.fromkeys((*ERRORS, "passed")),
        **settings.machine,
    }


def _copies(problem: Problem) -> int:
    """Return how many copies of the weights make them cold on a GPU: 4x the L2's size; 1 on a CPU."""
    if jax.default_backend() == "cpu":
        return 1
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(problem.kernel))
    return min(max(math.ceil(4 * L2_BYTES / size), 2), MOST_COPIES)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else ''}"


def _line(row: Row) -> str:
    name = f"bench: {row['net']:<5} {row['layer']:<7} {row['op']:<9} {row['impl']:<14}"
    if row["p50"] is None:
        return f"{name} {row.get('reason')}"
    return (
        f"{name} {row['p50']:9.1f} us  (bound {row['bound_us']:.1f})  error {row['error']:.1e}  {row.get('note', '')}"
    )
