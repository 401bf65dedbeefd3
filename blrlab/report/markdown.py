"""GitHub Markdown tables out of records, for the READMEs of studies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from blrlab.errors import one_of
from blrlab.report import words
from blrlab.report.groups import Record, Run, bench_by_device, finite, grouped, sections, split_runs, text
from blrlab.report.summary.advice import advices
from blrlab.report.summary.bounds import predictions
from blrlab.report.summary.latency import Timing, by_layer, profiled
from blrlab.report.summary.speed import Speed, mean_words, speeds
from blrlab.report.tables.budget import budget_tables, extrapolation_tables
from blrlab.report.tables.counters import counters_table
from blrlab.report.tables.predictions import advice_table, prediction_table
from blrlab.report.tables.quality import quality_tables
from blrlab.report.tables.speed import Times, means_table, side_by_side
from blrlab.report.tables.table import Table


def markdown(records: Sequence[Record], what: str = "latency") -> str:
    """Return the tables of one kind, or a sentence where the records hold none.

    Raises InputError where `what` is none of `KINDS`.
    """
    parts = KINDS[one_of(what, KINDS, "kind of Markdown table")](split_runs(records))
    return "\n\n".join(parts) if parts else f"These records hold nothing for a table of {what}."


def from_table(table: Table) -> str:
    """Return a table of the report in Markdown: its title in bold, its rows, its notes."""
    heads = [column.title.replace("\n", " ") for column in table.columns]
    numbers = [column.number for column in table.columns]
    return "\n\n".join([f"**{_cell(table.title)}**", grid(heads, table.shown(), numbers), *map(_cell, table.told())])


def grid(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[bool]) -> str:
    """Return the lines of a Markdown table, columns of numbers to the right."""
    rule = ["---:" if number else "---" for number in numbers]
    lines = [[_cell(head) for head in heads], rule, *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(content: str) -> str:
    # A bar would end the cell, and a tag would be one; bold, which is meant, stays.
    return " ".join(content.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())


def _latency(runs: list[Run]) -> list[str]:
    return [
        f"**{_cell(', '.join([device, *_about(chosen)]))}: p50 in us**\n\n{_side_by_side(found, means)}"
        + (f"\n\n{words.PROFILED}" if any(profiled(t.record) for timings in chosen for t in timings if t.p50) else "")
        for device, rows in bench_by_device(runs).items()
        for chosen, means in _by_tokens_and_dtype(rows)
        if (found := side_by_side(chosen, with_tokens=False)).contenders
    ]


def _by_tokens_and_dtype(rows: list[Record]) -> list[tuple[list[list[Timing]], list[Speed]]]:
    layers = by_layer(rows)
    groups = grouped(layers.values(), lambda timings: _tokens_and_dtype(timings[0].record))
    means = grouped(speeds(layers), lambda s: (s.tokens, s.dtype))
    return [(groups[key], means.get(key, [])) for key in sorted(groups, key=lambda key: (key[0] or 0, key[1]))]


def _tokens_and_dtype(record: Record) -> tuple[float | None, str]:
    return finite(record.get("tokens")), text(record.get("dtype"), "")


def _about(layers: list[list[Timing]]) -> list[str]:
    rows = [t.record for timings in layers for t in timings]
    told = [words.tokens(r.get("tokens")) for r in rows] + [words.name({}, r.get("dtype")) for r in rows]
    return [word for word in dict.fromkeys(told) if word != words.MISSING]


def _side_by_side(found: Times, means: list[Speed]) -> str:
    rows = []
    for name, times, bounds, best in found.rows:
        cells = zip(found.heads, found.cells(times, bounds), strict=True)
        rows.append([name, *(f"**{cell}**" if head == best else cell for head, cell in cells)])
    by_name = {words.contender({"op": s.op, "impl": s.impl}): told for s, told in mean_words(means).items()}
    if by_name:
        counted = " (layers)" if any("(" in told for told in by_name.values()) else ""
        rows.append(
            [f"geometric mean of layers, x dense{counted}", *(by_name.get(h, words.MISSING) for h in found.heads)]
        )
    return grid(["layer", *found.heads], rows, [False] + [True] * len(found.heads))


def _speedup(runs: list[Run]) -> list[str]:
    tables = [means_table(device, rows) for device, rows in bench_by_device(runs).items()]
    return [from_table(table) for table in tables if table]


def _quality(runs: list[Run]) -> list[str]:
    found = sections(runs).items()
    return [from_table(t) for (data_hash, device), members in found for t in quality_tables(data_hash, device, members)]


def _budget(runs: list[Run]) -> list[str]:
    return [from_table(table) for table in budget_tables(runs)]


def _extrapolation(runs: list[Run]) -> list[str]:
    return [from_table(table) for table in extrapolation_tables(runs)]


def _bounds(runs: list[Run]) -> list[str]:
    return [from_table(prediction_table(device, rows)) for device, rows in predictions(runs).items()]


def _counters(runs: list[Run]) -> list[str]:
    return [from_table(counters_table(device, rows)) for device, rows in bench_by_device(runs, "counters").items()]


def _advice(runs: list[Run]) -> list[str]:
    return [from_table(advice_table(device, found)) for device, found in advices(runs).items()]


KINDS: dict[str, Callable[[list[Run]], list[str]]] = {
    "latency": _latency,
    "speedup": _speedup,
    "quality": _quality,
    "budget": _budget,
    "extrapolation": _extrapolation,
    "bounds": _bounds,
    "advice": _advice,
    "counters": _counters,
}
