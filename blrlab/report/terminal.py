"""The closing tables in a terminal: losses, compression, times. No meaning hangs on colour."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from blrlab.report.groups import Record, Run, bench_by_device, labels, sections, split_runs
from blrlab.report.sentences import NO_RECORDS, headlines, latency_sentences, prediction_sentences
from blrlab.report.summary.advice import advices
from blrlab.report.summary.bounds import predictions
from blrlab.report.tables.budget import budget_tables, extrapolation_tables
from blrlab.report.tables.compression import compression_table
from blrlab.report.tables.counters import counters_table
from blrlab.report.tables.latency import latency_table
from blrlab.report.tables.predictions import advice_table, prediction_table
from blrlab.report.tables.quality import quality_tables
from blrlab.report.tables.speed import means_table
from blrlab.report.tables.table import Table

# Past so many, a terminal shows the fastest prediction of every op.
MOST_PREDICTIONS = 60


def print_report(records: Sequence[Record], console: Console | None = None) -> None:
    """Print the tables of quality, compression, budgets, latency and predictions, each with its answer in words.

    Runs share a table only where data hash and device agree. What the records lack is said in a short
    sentence.
    """
    console = console or Console()
    if not records:
        _say(console, NO_RECORDS)
        return
    runs = split_runs(records)
    _print_quality(runs, console)
    _print_latency(runs, console)
    _print_predictions(runs, console)


def print_table(table: Table, console: Console) -> None:
    """Print a table, leaving out the columns that may go until it fits the console's width."""
    _say(console, table.title, "bold")
    table = fitted(table, console.width)
    if table.rows:
        console.print(_rich(table))
    for note in table.told():
        console.print(Text(note), highlight=False)


def _print_quality(runs: list[Run], console: Console) -> None:
    quality = sections(runs)
    for (data_hash, device), members in quality.items():
        tables = [*quality_tables(data_hash, device, members), compression_table(members)]
        for table in filter(None, tables):
            print_table(table, console)
        for label, run in zip(labels(members), members, strict=True):
            for line in headlines(run):
                _say(console, f"{label}: {line}" if len(members) > 1 else line)
    others = [*budget_tables(runs), *extrapolation_tables(runs)]
    for table in others:
        print_table(table, console)
    if not (quality or others):
        _say(console, "Nothing was trained, compressed or evaluated in these records.")


def _print_latency(runs: list[Run], console: Console) -> None:
    timings = bench_by_device(runs)
    for device, rows in timings.items():
        print_table(latency_table(device, rows), console)
        means = means_table(device, rows)
        if means:
            print_table(means, console)
        for line in latency_sentences(device, rows):
            _say(console, line)
    counted = bench_by_device(runs, "counters")
    for device, rows in counted.items():
        print_table(counters_table(device, rows), console)
    if not (timings or counted):
        _say(console, "No layer was timed in these records.")


def _print_predictions(runs: list[Run], console: Console) -> None:
    for device, rows in predictions(runs).items():
        print_table(prediction_table(device, rows, MOST_PREDICTIONS), console)
        for line in prediction_sentences(device, rows):
            _say(console, line)
    for device, found in advices(runs).items():
        print_table(advice_table(device, found, one_each=True), console)


def _say(console: Console, line: str, style: str = "") -> None:
    console.print()
    console.print(Text(line, style=style), highlight=False)


def fitted(table: Table, width: int) -> Table:
    """Leave out the columns that may go, those of the highest `drop` first, until the table fits a width."""
    loose = sorted((column for column in table.columns if column.drop), key=lambda column: column.drop)
    while loose and _wide(table) > width:
        table = table.without([loose.pop().title])
    return table


def _wide(table: Table) -> int:
    """Return the width of a table whose cells are not wrapped; two spaces part its columns."""
    lines = [tuple(column.title for column in table.columns), *table.rows]
    widths = [max(cell_len(part) for cell in cells for part in cell.split("\n")) for cells in zip(*lines, strict=True)]
    return sum(widths) + 2 * (len(widths) - 1)


def _rich(table: Table) -> RichTable:
    drawn = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="")
    for column in table.columns:
        justify = "right" if column.number else "left"
        drawn.add_column(Text(column.title), justify=justify, overflow="fold")
    for index, row in enumerate(table.shown()):
        if index and index in table.breaks:
            drawn.add_section()
        drawn.add_row(*(Text(cell) for cell in row))
    return drawn
