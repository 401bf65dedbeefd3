"""The tables of what was decided and foretold of a compression: who gets how much of a budget, how long a net takes."""

from __future__ import annotations

from blrlab.report import words
from blrlab.report.groups import Record, Run, bench_by_device, finite, labels, latest, mapping, text
from blrlab.report.tables.table import Column, Table

SHARES = (
    Column("layer", 0, False),
    Column("format", 0, False),
    Column("in x out", 4, False),
    Column("blocks", 2, False),
    Column("rank", 1),
    Column("kept"),
    Column(
        "lost", 0, note="lost: the share of the layer's energy (on inputs: of its output's) that is expected to go."
    ),
    Column(
        "loss of\nthe model",
        3,
        note="loss of the model: what that is expected to raise its loss by, as measured by leaving more away.",
    ),
)
TIMES = (
    Column("net", 0, False, group=True),
    Column("format", 0, False, group=True),
    Column("algorithm", 4, False, group=True),
    Column("layer", 0, False),
    Column("matrices"),
    Column("measured", 2),
    Column("s each"),
    Column("s in all"),
)
TARGETS = {"layer_factor": "layers {} smaller", "model_factor": "a model {} smaller"}


def budget_tables(runs: list[Run]) -> list[Table]:
    """Return a table for every run that gave out a budget: its layers, and what equal shares would have lost."""
    return [_budget(label, run) for label, run in zip(labels(runs), runs, strict=True) if run.of("allocate")]


def _budget(label: str, run: Run) -> Table:
    rows = latest(run.of("allocate"), lambda r: (r.get("path"), r.get("plan")))
    layers = [r for r in rows if r.get("path") != "*"]
    plans = [r for r in rows if r.get("path") == "*"]
    title = ", ".join(part for part in (f"Budget: {_target(plans)}", label) if part)
    table = Table(title, SHARES, tuple(_share(record) for record in layers), notes=_expected(plans))
    weighed = any(finite(r.get("weight")) not in (None, 1.0) for r in layers)
    table = table if weighed else table.without([SHARES[-1].title])
    return table.without_empty(keep=["layer", "format", "lost"])


def _target(plans: list[Record]) -> str:
    known = next((r for r in plans if finite(r.get("value")) is not None), {})
    value, kind = finite(known.get("value")), text(known.get("target"), "")
    if value is None:
        return "target unknown"
    if kind in TARGETS:
        return TARGETS[kind].format(words.factor(value))
    if kind == "microseconds":
        return f"{words.microseconds(value)} us"
    return words.byte_count(value) if kind == "bytes" else f"{value:g} {kind or 'of an unknown kind'}"


def _share(record: Record) -> tuple[str, ...]:
    before, after = finite(record.get("params_before")), finite(record.get("params_after"))
    lost, weight = finite(record.get("lost")), finite(record.get("weight"))
    rank, own = (words.span([n]) if (n := finite(record.get(name))) else "" for name in ("rank", "block_rank"))
    dense = record.get("format") == "dense"
    return (
        text(record.get("path")),
        words.name(words.FORMATS, record.get("format")),
        words.shape(record),
        words.MISSING if dense or record.get("format") == "low_rank" else words.blocks(record.get("blocks")),
        f"{rank or words.MISSING} ({own} a block)" if own else rank or words.MISSING,
        words.percent(after / before) if before and after else words.MISSING,
        words.MISSING if lost is None else f"{lost:.4f}",
        words.MISSING if lost is None or weight is None else f"{lost * weight:.4f}",
    )


def _expected(plans: list[Record]) -> tuple[str, ...]:
    totals = [(text(r.get("plan")), finite(r.get("total"))) for r in plans]
    own = next((total for plan, total in totals if plan == "budget" and total is not None), None)
    others = sorted((total, plan) for plan, total in totals if plan != "budget" and total is not None)
    if own is None:
        return ()
    shares = ", ".join(f"{plan.replace('_', ' ')} {total:.4f}" for total, plan in others)
    return (f"Expected to lose {own:.4f} in all; in equal shares: {shares or 'none fits'}.",)


def budget_sentences(runs: list[Run]) -> list[str]:
    """Return what every budget is expected to lose."""
    return [f"{table.title}. {table.notes[0]}" for table in budget_tables(runs) if table.notes]


def extrapolation_tables(runs: list[Run]) -> list[Table]:
    """Return a table for every device that whole nets were extrapolated for."""
    return [_extrapolation(device, rows) for device, rows in bench_by_device(runs, "extrapolation").items()]


def extrapolation_sentences(runs: list[Run]) -> list[str]:
    """Return what whole nets would take."""
    return [f"{table.title}: {note}" for table in extrapolation_tables(runs) for note in table.notes]


def _extrapolation(device: str, records: list[Record]) -> Table:
    """Return what compressing whole nets would take on one device, from the few matrices that were timed."""
    rows: list[tuple[str, ...]] = []
    breaks: set[int] = set()
    notes: list[str] = []
    for record in latest(records, lambda r: (r.get("net"), r.get("format"), r.get("algorithm"))):
        who = text(record.get("net")), words.name(words.FORMATS, record.get("format")), text(record.get("algorithm"))
        breaks.add(len(rows))
        for layer, told in (mapping(record.get("layers")) or {words.MISSING: {}}).items():
            each, count = finite(mapping(told).get("seconds_each")), finite(mapping(told).get("matrices"))
            measured = finite(mapping(told).get("measured"))
            whole = each * count if each is not None and count is not None else None
            rows.append((*who, layer, *(_number(n, 0) for n in (count, measured)), _number(each, 2), _number(whole, 0)))
        notes.append(_whole(record, f"{who[0]} as {who[1]} ({who[2]})"))
    title = f"Extrapolated, not measured: compressing all matrices of a net on {device}"
    return Table(title, TIMES, tuple(rows), frozenset(breaks), tuple(filter(None, notes)))


def _whole(record: Record, who: str) -> str:
    seconds, compiling = finite(record.get("seconds")), finite(record.get("compile_seconds"))
    host, on_device = finite(record.get("host_peak_bytes")), finite(record.get("device_peak_bytes"))
    if seconds is None:
        return ""
    parts = [
        f"{who}: {seconds:,.0f} s" + (f", {compiling:,.0f} s of them for compilation" if compiling else ""),
        f"{words.byte_count(host)} on the host at most" if host else "",
        f"{words.byte_count(on_device)} on the device at most" if on_device else "",
        f"{text(record.get('weights'))} weights" if record.get("weights") else "",
    ]
    return ", ".join(part for part in parts if part) + "."


def _number(value: float | None, digits: int) -> str:
    return words.MISSING if value is None else f"{value:,.{digits}f}"
