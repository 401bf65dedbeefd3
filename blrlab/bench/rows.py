"""The rows of a benchmark: what stands in one before anything is timed, and what becomes of failures."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from blrlab_ops import cost
from blrlab_ops.devices import Device
from blrlab_ops.testing import Case

from blrlab.bench import problem
from blrlab.bench.card import Card
from blrlab.bench.problem import Group
from blrlab.bench.timing import Contender

Row = dict[str, Any]
ERRORS = ("error", "error_max", "error_budget", "error_max_budget")
TIMES = ("p20", "p50", "p80", "samples", "method", "warm_us", "launch_us", "copies")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to benchmark.

    Attributes:
      impls: the backends, in the order of the table.
      seconds: of measuring for each contender.
      card: the device at hand and its ceilings.
      machine: the fields every row carries: device, versions, driver, commit, time.
      clone: of the source paper's repository, or None.
      tune: whether own kernels that are not tuned for a layer on this GPU are, before they are timed.
    """

    impls: Sequence[str]
    seconds: float
    card: Card
    machine: Row
    clone: Path | None = None
    tune: bool = False


def start(group: Group, case: Case, impl: str, settings: Settings) -> Row:
    """Return the row of a backend before it is verified or timed: what it is, what it costs, what bounds it."""
    itemsize, card = getattr(torch, group.dtype).itemsize, settings.card
    sizes = (case.in_features, case.out_features, case.blocks, case.rank)
    found = cost.cost(case.format, case.tokens, *sizes, itemsize=itemsize)
    weight_bytes = itemsize * cost.params(case.format, *sizes)
    if impl.startswith("int8"):
        saved = _saved_by_int8(case, itemsize)
        weight_bytes -= saved
        found = found._replace(bytes_compulsory=found.bytes_compulsory - saved)
    bound = _bound(found, weight_bytes, card.measured, group.dtype)
    return {
        "kind": "bench",
        "impl": impl,
        **problem.fields(group.net, group.layer, case, group.dtype),
        "unit": "us",
        **dict.fromkeys(TIMES),
        "bound_us": bound.us,
        "bound_term": bound.term,
        "sheet_bound_us": _bound(found, weight_bytes, card.sheet, group.dtype).us if card.sheet else None,
        "flops": found.tensor_flops + found.cuda_flops,
        "tensor_flops": found.tensor_flops,
        "cuda_flops": found.cuda_flops,
        "bytes": found.bytes_compulsory,
        "weight_bytes": weight_bytes,
        **dict.fromkeys(("peak_bytes", "tuning_s", "sm_mhz", "temperature_c", *ERRORS, "passed")),
        **settings.machine,
    }


def _bound(found: cost.Cost, weight_bytes: int, device: Device, dtype: str) -> cost.Bound:
    """Return the least time of a call as it is measured: weights cold, x and y in the L2 as far as they fit."""
    beyond = max(0, found.bytes_compulsory - weight_bytes - device.l2_bytes)
    return cost.bound_us(found._replace(bytes_compulsory=weight_bytes + beyond), device, dtype)


def guarded(row: Row, contender: Contender) -> Callable[[], Sequence[float]]:
    """Sample a contender until it fails: then its row has the reason, and the others go on."""

    def sample() -> Sequence[float]:
        if "reason" in row:
            return ()
        try:
            return contender.sample()
        except Exception as error:
            row["reason"] = f"it cannot be timed: {first_line(error)}"
            return ()

    return sample


def out_of_memory(error: Exception) -> bool:
    """Say whether an error only says that the memory is full, which is no fault of a backend."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def finite(value: float) -> float | None:
    """Return a number that JSON can hold, and None for infinity and NaN."""
    return value if math.isfinite(value) else None


def first_line(error: Exception) -> str:
    """Return an error's type and the first line of its text."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else ''}"


def line(row: Row) -> str:
    """Write a row for the terminal."""
    name = f"{row['net']:<8} {row['layer']:<7} n={row['tokens']:<5} {row['op']:<8} {row['impl']:<17}"
    if row["p50"] is None:
        return f"{name} {row.get('reason')}"
    return (
        f"{name} {row['p50']:9.1f} us  (bound {row['bound_us']:.1f})  error {row['error']:.1e}  {row.get('note', '')}"
    )


def _saved_by_int8(case: Case, itemsize: int) -> int:
    """Return the bytes that int8 weights with a scale a column save; S of blast keeps its type."""
    (b1, b2), rank, out_features = case.blocks, case.rank, case.out_features
    numbers = cost.params(case.format, case.in_features, out_features, case.blocks, rank)
    columns_of_first = {"dense": 0, "low_rank": rank, "monarch": b1 * b2 * rank, "blast": b1 * rank}[case.format]
    kept = b1 * b2 * rank if case.format == "blast" else 0
    return (numbers - kept) * (itemsize - 1) - (columns_of_first + out_features) * itemsize
