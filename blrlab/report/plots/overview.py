"""The whole of a device at a glance: the geometric mean of the speed over dense, by op and backend and tokens."""

from __future__ import annotations

from collections.abc import Sequence

from blrlab.report import words
from blrlab.report.plots.axes import Box
from blrlab.report.plots.canvas import Canvas, cut, text_width
from blrlab.report.plots.heat import CELL, draw_cells
from blrlab.report.plots.style import WIDE
from blrlab.report.summary.speed import Speed


def overview_figure(found: Sequence[Speed], width: float = WIDE) -> Canvas | None:
    """Draw a cell per contender and number of tokens; None where a bar chart says it all."""
    rows = overview_rows(found)
    counts = sorted({s.tokens for s in found if s.tokens is not None})
    if len(rows) < 2 or len(counts) < 2:
        return None
    by_place = {(s.op, s.impl, s.dtype, s.tokens): s for s in found}
    names = list(rows.values())
    left = min(10 + max(map(text_width, names)), max(0.38 * width, width - 4 - 28 * len(counts)))
    canvas = Canvas(width, 6 + CELL * len(rows) + 38)
    box = Box(left, 6, min(width - 4, left + 84.0 * len(counts)), 6 + CELL * len(rows))
    places = list(rows)
    cells = [[s.mean if (s := by_place.get((*row, n))) else None for n in counts] for row in places]

    def describe(row: int, column: int) -> str:
        speed = by_place.get((*places[row], counts[column]))
        about = f"{names[row]}, {words.tokens(counts[column])}: "
        if speed is None:
            return about + "no verified time"
        wins = f"{speed.wins} faster, {speed.clear} clearly" if speed.counted else "not counted as wins"
        return f"{about}{words.factor(speed.mean)} dense over {_layers(speed)}, {wins}"

    draw_cells(canvas, box, cells, describe)
    for place, name in enumerate(names):
        height = box.top + CELL * (place + 0.5) + 4
        canvas.text((left - 8, height), cut(name, left - 10), anchor="end")
    for place, tokens in enumerate(counts):
        middle = box.left + (place + 0.5) * box.width / len(counts)
        canvas.text((middle, box.bottom + 15), f"{tokens:,.0f}", anchor="middle", colour="muted", size=10)
    canvas.text(((box.left + box.right) / 2, box.bottom + 31), "tokens", anchor="middle", colour="muted")
    return canvas


def overview_rows(found: Sequence[Speed]) -> dict[tuple[str, str, str], str]:
    """Return op, backend and dtype of every row with its name, which has the dtype where there are several."""
    dtypes = {s.dtype for s in found}
    names = {(s.op, s.impl, s.dtype): words.contender({"op": s.op, "impl": s.impl}) for s in found}
    return {row: f"{name}, {row[2] or 'no dtype'}" if len(dtypes) > 1 else name for row, name in names.items()}


def _layers(speed: Speed) -> str:
    count = len(speed.timings)
    return f"{count} {'layer' if count == 1 else 'layers'}"
