"""Predictions and advice in a terminal, readable at 80 and at 120 columns. No meaning hangs on colour."""

from collections.abc import Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from blrlab.records import Record
from blrlab.roofline.advice import FACTORS, Advice, Reading

MISSING = "-"
TERM_NAMES = {"tensor": "tensor", "cuda": "CUDA", "dram": "DRAM", "l2": "L2", "launch": "launch"}


class Column(NamedTuple):
    """A heading, its cells, and when the column may go: 0 never, else those of the highest number first."""

    title: str
    cells: list[str]
    drop: int = 0
    number: bool = True


def print_rows(rows: Sequence[Record], console: Console) -> None:
    """Print the "bound" records of one device, grouped by layer and tokens."""
    groups = [(row["layer"], row["tokens"]) for row in rows]
    breaks = {index for index, group in enumerate(groups) if index == 0 or group != groups[index - 1]}
    title = f"{rows[0]['device_name']}, {rows[0]['net']}, {rows[0]['dtype']}: predictions, not measurements"
    _say(console, title, "bold")
    _print_fitted(_row_columns(rows, breaks), breaks, console)


def print_advice(device: str, layer: str, tokens: int, found: Sequence[Advice], console: Console) -> None:
    """Print what each format and block count is predicted to win over dense for a layer at a token count."""
    rows = "1 token" if tokens == 1 else f"{tokens} tokens"
    _say(console, f"{device}, {layer}, {rows}: what is predicted to beat dense", "bold")
    _print_fitted(_advice_columns(found), set(), console)


def say(console: Console, line: str) -> None:
    """Print a line of text as it is."""
    console.print(Text(line), highlight=False)


def plain(console: Console, text: str) -> None:
    """Print text that another program may read: no wrapping."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def number(value: float | None, unit: str = "") -> str:
    """Write a number in three digits or so.

    >>> number(0.004), number(3.14159), number(57.36), number(123.4), number(None)
    ('<0.01', '3.14', '57.4', '123', '-')
    """
    if value is None:
        return MISSING
    if value == 0:
        return f"0{unit}"
    if value < 0.01:
        return f"<0.01{unit}"
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}{unit}"


def _row_columns(rows: Sequence[Record], breaks: set[int]) -> list[Column]:
    def once(key: str) -> list[str]:
        return [str(row[key]) if index in breaks else "" for index, row in enumerate(rows)]

    def amount(key: str, unit: float) -> list[str]:
        return [number(row[key] / unit) for row in rows]

    def term(name: str) -> list[str]:
        return [number(row["terms"][name]) for row in rows]

    return [
        Column("layer", once("layer"), number=False),
        Column("tokens", once("tokens")),
        Column("op", [row["op"] for row in rows], number=False),
        Column("algorithm", [row["algorithm"] for row in rows], number=False),
        Column("GFLOP\ntensor", amount("tensor_flops", 1e9), 6),
        Column("GFLOP\nCUDA", amount("cuda_flops", 1e9), 8),
        Column("MB\nDRAM", amount("dram_bytes", 1e6), 5),
        Column("MB\nL2", amount("l2_bytes", 1e6), 7),
        *(Column(f"us\n{TERM_NAMES[name]}", term(name), 4) for name in ("tensor", "cuda", "dram", "l2")),
        Column("us\nlaunch", term("launch"), 9),
        Column("us", [number(row["us"]) for row in rows]),
        Column("binds", [TERM_NAMES[row["term"]] for row in rows], number=False),
        Column("x\ndense", [number(row["speedup"], "x") for row in rows]),
        Column("bound\nus", [number(row["bound_us"]) for row in rows]),
    ]


def _advice_columns(found: Sequence[Advice]) -> list[Column]:
    known = _reading_columns("known", [each.algorithm for each in found], 0)
    return [
        Column("op", [each.op for each in found], number=False),
        Column("blocks", [str(each.blocks) for each in found]),
        known[0],
        Column("times\nsmaller", [number(each.factor, "x") for each in found], 1),
        *known[1:],
        *_reading_columns("bound", [each.bound for each in found], 2),
    ]


def _reading_columns(name: str, found: Sequence[Reading], drop: int) -> list[Column]:
    """Return the columns of one reading, the widest rank first; `known` is of the known algorithms."""
    return [
        Column(f"{name}:\nup to rank", [MISSING if each.widest is None else str(each.widest) for each in found], drop),
        *(Column(f"{name}:\nat {size}x", [number(each.at[size], "x") for each in found], drop) for size in FACTORS),
        Column(f"{name}:\nhighest", [number(each.most, "x") for each in found], max(drop, 1)),
    ]


def _print_fitted(columns: list[Column], breaks: set[int], console: Console) -> None:
    """Print a table with as many of the columns that may go as fit the console's width, and none that is empty."""
    columns = [column for column in columns if set(column.cells) != {MISSING} or not column.drop]
    kept, roomy = {0}, console.options.update(width=10_000)
    for drop in sorted({column.drop for column in columns}):
        tried = _drawn([column for column in columns if column.drop in kept | {drop}], breaks)
        if Measurement.get(console, roomy, tried).maximum <= console.width:
            kept.add(drop)
    console.print(_drawn([column for column in columns if column.drop in kept], breaks))


def _drawn(columns: list[Column], breaks: set[int]) -> Table:
    drawn = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="")
    for column in columns:
        justify = "right" if column.number else "left"
        drawn.add_column(Text(column.title), justify=justify, overflow="fold", vertical="bottom")
    for index, cells in enumerate(zip(*(column.cells for column in columns), strict=True)):
        if index and index in breaks:
            drawn.add_section()
        drawn.add_row(*(Text(cell) for cell in cells))
    return drawn


def _say(console: Console, line: str, style: str = "") -> None:
    console.print()
    console.print(Text(line, style=style), highlight=False)
