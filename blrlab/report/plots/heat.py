"""Speed over dense as coloured cells with their numbers: blue is faster, orange slower, a line runs where it is 1.

The tint deepens with the distance from 1 and lies over the card, so it holds in light and in dark; the numbers and
the line carry the same on paper without colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from blrlab.report.plots.axes import Box
from blrlab.report.plots.canvas import Canvas

CELL = 21.0

Cells = Sequence[Sequence[float | None]]


def draw_cells(canvas: Canvas, box: Box, cells: Cells, describe: Callable[[int, int], str]) -> None:
    """Fill `box` with rows of cells, first on top: a number in each, and on hovering `describe(row, column)`."""
    if not cells or not cells[0]:
        return
    wide, high = box.width / len(cells[0]), box.height / len(cells)
    size = 10 if wide > 30 else 9 if wide > 24 else 8
    for row, values in enumerate(cells):
        for column, value in enumerate(values):
            x, y = box.left + column * wide, box.top + row * high
            with canvas.titled(describe(row, column)):
                canvas.rectangle((x, y), (wide, high), *tint(value), border="card")
                canvas.text((x + wide / 2, y + high / 2 + 3.5), number(value), anchor="middle", size=size)
    for ends in contour(cells):
        canvas.line([(box.left + x * wide, box.top + y * high) for x, y in ends], "ink", 1.6)


def tint(value: float | None) -> tuple[str, float]:
    """Return a cell's colour and how much of it: nothing at 1, all that leaves its number readable at 4x."""
    if not value or value <= 0:
        return "rule", 0.3
    return "blue" if value > 1 else "orange", min(0.62, 0.05 + 0.29 * abs(math.log2(value)))


def number(value: float | None) -> str:
    """Write a cell's number in up to four letters.

    >>> number(0.954), number(0.998), number(12.3)
    ('0.95', '1.00', '12')
    """
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 9.95 else f"{value:.0f}"


def contour(cells: Cells) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Return the edges (in cells, from the upper left) between a cell above 1 and one that is not."""
    edges = []
    for row, values in enumerate(cells):
        for column, value in enumerate(values):
            right = values[column + 1] if column + 1 < len(values) else None
            below = cells[row + 1][column] if row + 1 < len(cells) else None
            if value is not None and right is not None and (value > 1) != (right > 1):
                edges.append(((column + 1.0, float(row)), (column + 1.0, row + 1.0)))
            if value is not None and below is not None and (value > 1) != (below > 1):
                edges.append(((float(column), row + 1.0), (column + 1.0, row + 1.0)))
    return edges
