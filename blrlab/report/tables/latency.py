"""The table of layer times: a row per net, layer, op and backend, and why times are missing beneath."""

from __future__ import annotations

from blrlab.report import words
from blrlab.report.groups import Record, finite
from blrlab.report.summary.latency import Timing, by_layer, layer_title, op_names, why_no_time
from blrlab.report.tables.table import Column, Table

COLUMNS = (
    Column("layer", 0, False, group=True),
    Column("in x out", 5, False, group=True),
    Column("tokens", 3, group=True),
    Column("dtype", 6, False, group=True),
    Column("op", 0, False),
    Column("backend", 0, False),
    Column("p50\nus"),
    Column("p20-p80\nus", 2),
    Column("bound\nus", 1),
    Column("x dense\nfastest"),
    Column("x dense\nsame", 4),
    Column("error /\nbudget"),
)
HOW_TO_READ = (
    "x dense: how many times as fast as dense at its fastest, and as dense on the same backend.",
    "error / budget: the accuracy gate; 1 is the most that passes. bound: the time the roofline allows.",
)


def latency_table(device: str, records: list[Record]) -> Table:
    """Return the timings of one device; every reason for a missing time is numbered and said once."""
    rows: list[tuple[str, ...]] = []
    breaks: set[int] = set()
    reasons: dict[str, int] = {}
    for timings in by_layer(records).values():
        breaks.add(len(rows))
        rows += [_cells(t, op, reasons) for t, op in zip(timings, op_names(timings), strict=True)]
    notes = [f"[{number}] {words.sentence(reason)}" for reason, number in reasons.items()]
    table = Table(f"Latency of layers on {device}", COLUMNS, tuple(rows), frozenset(breaks), (*notes, *HOW_TO_READ))
    return table.say_once(["tokens", "dtype"])


def _cells(timing: Timing, op: str, reasons: dict[str, int]) -> tuple[str, ...]:
    record = timing.record
    return (
        layer_title(record),
        words.shape(record),
        words.span([v for v in [finite(record.get("tokens"))] if v is not None]),
        str(record.get("dtype") or words.MISSING),
        op,
        words.name(words.BACKENDS, record.get("impl")),
        _time(timing, reasons),
        _spread(timing),
        words.microseconds(finite(record.get("bound_us"))),
        words.factor(timing.over_fastest_dense),
        words.factor(timing.over_same_backend),
        verdict(record),
    )


def verdict(record: Record) -> str:
    """Write a gate's outcome: the error as a share of its budget, and FAIL where it failed."""
    error, budget = finite(record.get("error")), finite(record.get("error_budget"))
    share = error / budget if error is not None and budget else None
    if record.get("passed") is False:
        # The gate may fail on its other measure, and then a share below 1 would read as a pass.
        return f"{share:.2f} FAIL" if share and share > 1 else "FAIL"
    return f"{share:.2f}" if share is not None else "pass" if record.get("passed") else words.MISSING


def _time(timing: Timing, reasons: dict[str, int]) -> str:
    reason = why_no_time(timing.record)
    if reason is not None:
        return f"none [{reasons.setdefault(reason, len(reasons) + 1)}]"
    return words.microseconds(timing.p50)


def _spread(timing: Timing) -> str:
    low, high = (finite(timing.record.get(key)) for key in ("p20", "p80"))
    if timing.p50 is None or low is None or high is None:
        return words.MISSING
    return f"{words.microseconds(low)}-{words.microseconds(high)}"
