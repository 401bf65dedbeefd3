"""The table of layer times: a row per net, layer, op and backend, and why times are missing beneath."""

from __future__ import annotations

from blrlab.report import words
from blrlab.report.groups import Record, finite, text
from blrlab.report.summary.latency import Timing, by_layer, layer_title, op_names, profiled, why_no_time
from blrlab.report.tables.table import Column, Table

OF_FEW = "blocks verified: so many of the model's first blocks are held to float64, all of them to plain PyTorch."
COLUMNS = (
    Column("layer", 0, False, group=True),
    Column("in x out", 5, False, group=True),
    Column("tokens", 0, group=True),
    Column("dtype", 8, False, group=True),
    Column("op", 0, False),
    Column("backend", 0, False),
    Column("blocks", 9, False),
    Column("rank", 9),
    Column("p50\nus"),
    Column("p20-p80\nus", 2),
    Column("warm\nus", 6, note="warm: the same weights every call, in the cache."),
    Column("launched\nus", 7, note="launched: called from Python, without a graph."),
    Column("bound\nus", 1),
    Column("bound\nby", 11, False),
    Column("sheet\nbound", 12, note="sheet bound: the bound, in us, with the rates of the data sheet."),
    Column("x dense\nfastest"),
    Column("x dense\nsame", 4),
    Column("tokens\na second", 10),
    Column("images\na second", 10),
    Column("error /\nbudget"),
    Column("tuning\ns", 13),
    Column("blocks\nverified", 17, note=OF_FEW),
    Column("weights\nMB", 13),
    Column("kept\nMB", 15, note="kept: keys and values of the tokens before."),
    Column("peak\nMB", 14),
    Column("clock\nMHz", 15),
    Column("degrees\nC", 16),
)
# A column with nothing in it is left out, but for these.
ALWAYS = ("layer", "op", "backend", "p50\nus", "x dense\nfastest", "error /\nbudget")
HOW_TO_READ = (
    "x dense: how many times as fast as dense at its fastest, and as dense on the same backend; ~ is within the "
    "spread of the two times, within this run.",
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
    whole = {record.get("layer") == "*" for record in records}
    what = " and ".join(name for is_whole, name in ((False, "layers"), (True, "whole models")) if is_whole in whole)
    table = Table(f"Latency of {what or 'layers'} on {device}", COLUMNS, tuple(rows), frozenset(breaks))
    table = table.without_empty(ALWAYS).say_once(["tokens", "dtype", "clock\nMHz", "degrees\nC"])
    return table.noted(*notes, *HOW_TO_READ, *([words.PROFILED] if any(map(profiled, records)) else []))


def _cells(timing: Timing, op: str, reasons: dict[str, int]) -> tuple[str, ...]:
    record = timing.record
    return (
        layer_title(record) + (f" batch {batch:g}" if (batch := finite(record.get("batch"))) else ""),
        words.shape(record),
        _whole(record, "tokens"),
        text(record.get("dtype"), words.MISSING),
        op,
        words.backend(record.get("impl")),
        words.blocks(record.get("blocks")),
        _whole(record, "rank"),
        _time(timing, reasons),
        _spread(timing),
        *(words.microseconds(_if_timed(timing, key)) for key in ("warm_us", "launch_us")),
        words.microseconds(finite(record.get("bound_us"))),
        words.name(words.TERMS, record.get("bound_term")),
        words.microseconds(finite(record.get("sheet_bound_us"))),
        words.factor(timing.over_fastest_dense) + ("~" if timing.wins and timing.clear is False else ""),
        words.factor(timing.over_same_backend),
        _rate(timing, "tokens_per_s"),
        _rate(timing, "images_per_s"),
        verdict(record),
        _seconds(record),
        _whole(record, "verified_layers"),
        _megabytes(record, "weight_bytes") if record.get("layer") == "*" else words.MISSING,
        *(_megabytes(record, key) for key in ("cache_bytes", "peak_bytes")),
        _whole(record, "sm_mhz"),
        _whole(record, "temperature_c"),
    )


def verdict(record: Record) -> str:
    """Write a gate's outcome: the error as a share of its budget, and FAIL where it failed."""
    error, budget = finite(record.get("error")), finite(record.get("error_budget"))
    share = error / budget if error is not None and budget else None
    if record.get("passed") is False:
        # The gate may fail on its other measure, and then a share below 1 would read as a pass.
        return f"{share:.2f} FAIL" if share and share > 1 else "FAIL"
    return f"{share:.2f}" if share is not None else "pass" if record.get("passed") else words.MISSING


def _whole(record: Record, key: str) -> str:
    return words.span([value for value in [finite(record.get(key))] if value is not None])


def _if_timed(timing: Timing, key: str) -> float | None:
    # What failed its gate has no speed, however it was called.
    return finite(timing.record.get(key)) if timing.p50 is not None else None


def _megabytes(record: Record, key: str) -> str:
    count = finite(record.get(key))
    return words.MISSING if count is None else f"{count / 1e6:,.1f}"


def _rate(timing: Timing, key: str) -> str:
    rate = _if_timed(timing, key)
    return words.MISSING if rate is None else words.rate(rate, "").strip()


def _seconds(record: Record) -> str:
    seconds = finite(record.get("tuning_s"))
    return words.MISSING if seconds is None else f"{seconds:.1f}"


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
