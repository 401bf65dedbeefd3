"""Advice as heat maps: the number of tokens against the rank, coloured by the predicted speed over dense."""

from __future__ import annotations

from collections.abc import Sequence

from blrlab.report import words
from blrlab.report.groups import text
from blrlab.report.plots.axes import Box, Key, legend, panels
from blrlab.report.plots.canvas import Canvas, cut
from blrlab.report.plots.heat import CELL, draw_cells
from blrlab.report.plots.style import WIDE
from blrlab.report.summary.advice import Advice, thinned

MOST = 6


def advice_figure(found: Sequence[Advice], width: float = WIDE) -> Canvas | None:
    """Draw a heat map per layer, op and blocks; None without advice."""
    if not found:
        return None
    # A phone has room for some of many ranks only; the data has all.
    found = found if width > 600 else [thinned(advice, 10, 9) for advice in found]
    columns = min(len(found), 1 if width < 600 else 2 if max(len(a.ranks) for a in found) > 8 else 3)
    left = 48.0
    places = panels(width, len(found), columns, left, left, 6)
    canvas, top = Canvas(width), 34.0
    for first in range(0, len(found), columns):
        line = found[first : first + columns]
        high = CELL * max(len(a.tokens) for a in line)
        for (start, end), advice in zip(places, line, strict=False):
            _panel(canvas, Box(start, top, end, top + CELL * len(advice.tokens)), advice)
        top += high + 92
    canvas.height = top - 30 + legend(canvas, [Key("widest rank that beats dense", "vermilion")], 4, top - 34)
    return canvas


def _panel(canvas: Canvas, box: Box, advice: Advice) -> None:
    room = box.width + 40
    canvas.text((box.left - 40, box.top - 20), cut(advice.layer, room, 12, bold=True), bold=True, size=12)
    shape = words.shape(advice.record)
    canvas.text((box.left - 40, box.top - 7), cut(f"{advice.op}, {shape}", room), colour="muted")

    def describe(row: int, column: int) -> str:
        value, bound = advice.speedup[row][column], advice.bound_speedup[row][column]
        name = advice.algorithms[row][column] if _has(advice.algorithms, row, column) else ""
        return (
            f"{words.tokens(advice.tokens[row])}, rank {advice.ranks[column]:g}: {words.factor(value)} dense"
            + (f" ({name.replace('_', ' ')})" if name else "")
            + f", bound {words.factor(bound)}"
        )

    draw_cells(canvas, box, advice.speedup, describe)
    _axes(canvas, box, advice)
    _widest(canvas, box, advice)


def _has(rows: Sequence[Sequence[str]], row: int, column: int) -> bool:
    return row < len(rows) and column < len(rows[row])


def _axes(canvas: Canvas, box: Box, advice: Advice) -> None:
    wide = box.width / len(advice.ranks)
    for row, tokens in enumerate(advice.tokens):
        at = (box.left - 6, box.top + CELL * (row + 0.5) + 3.5)
        canvas.text(at, f"{tokens:,.0f}", anchor="end", colour="muted", size=10)
    size = 10 if wide > 28 else 8
    for column, rank in enumerate(advice.ranks):
        middle = box.left + wide * (column + 0.5)
        canvas.text((middle, box.bottom + 13), f"{rank:g}", anchor="middle", colour="muted", size=size)
        factor = advice.factors[column]
        if factor:
            canvas.text((middle, box.bottom + 26), f"{factor:.1f}x", anchor="middle", colour="muted", size=8)
    known = any(advice.factors)
    name = "rank r, and times smaller" if known else "rank r"
    canvas.text(((box.left + box.right) / 2, box.bottom + (40 if known else 28)), name, anchor="middle", colour="muted")
    canvas.text((box.left - 40, (box.top + box.bottom) / 2), "tokens", anchor="middle", colour="muted", turn=-90)


def _widest(canvas: Canvas, box: Box, advice: Advice) -> None:
    """Step through the right edge of the widest rank that beats dense, row by row."""
    wide, points = box.width / len(advice.ranks), []
    for row, rank in enumerate(advice.widest):
        edge = 0.0 if rank is None else _edge(advice.ranks, rank)
        points += [(box.left + wide * edge, box.top + CELL * (row + k)) for k in (0, 1)]
    if any(rank is not None for rank in advice.widest):
        canvas.line(points, "vermilion", 5, opacity=0.5)


def _edge(ranks: Sequence[float], rank: float) -> float:
    """Return how many columns lie left of a rank's right edge; between two ranks, between their edges."""
    order = list(ranks)
    if rank in order:
        return order.index(rank) + 1.0
    below = [r for r in order if r < rank]
    above = [r for r in order if r > rank]
    if not below or not above:
        return float(len(below))
    return len(below) + (rank - max(below)) / (min(above) - max(below))


def left_out(found: Sequence[Advice]) -> str:
    """Name the layers, ops and blocks that have no picture."""
    return words.listed([f"{a.layer} {a.op}{_dtype(a)}" for a in found])


def _dtype(advice: Advice) -> str:
    dtype = text(advice.record.get("dtype"), "")
    return "" if dtype in ("", "bfloat16") else f" {dtype}"
