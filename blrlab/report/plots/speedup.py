"""Speed over dense: a row per op and backend, in it a bar per layer from 1 outwards, and their geometric mean.

The scale is logarithmic, so twice as fast reaches as far right as half as fast reaches left. Thin lines are the
ratio's spread.
"""

from __future__ import annotations

from collections.abc import Sequence

from blrlab.report import words
from blrlab.report.groups import finite, grouped, text
from blrlab.report.plots.axes import Box, Scale, around, panels, x_axis
from blrlab.report.plots.canvas import Canvas, cut, text_width
from blrlab.report.plots.style import WIDE, backend_colours
from blrlab.report.summary.latency import Timing, layer_title
from blrlab.report.summary.speed import Contender, Place, Speed, evenly, places

MOST_PANELS = 6
BAR = 6.5
HEAD = 15.0


def speedup_figure(found: Sequence[Speed], width: float = WIDE) -> Canvas | None:
    """Draw the speeds of one net, a panel per number of tokens, dtype and batch; None where there is none."""
    heads = panel_names(found)
    chosen = evenly(list(heads), MOST_PANELS)
    if not chosen:
        return None
    shown = [s for s in found if s.place in chosen]
    rows = list(dict.fromkeys((s.op, s.impl) for s in shown))
    wide = width > 600
    names = {row: words.contender({"op": row[0], "impl": row[1]}) for row in rows}
    left = 10 + max(text_width(name) for name in names.values()) if wide else 6.0
    columns = min(len(chosen), 3 if wide else 1)
    spans = panels(width, len(chosen), columns, left, 56, 48)
    limits = _limits(shown)
    colours = backend_colours(impl for _, impl in rows)
    canvas, top = Canvas(width), 28.0
    for first in range(0, len(chosen), columns):
        line = chosen[first : first + columns]
        members = [s for s in shown if s.place in line]
        heights = {row: _height([s for s in members if (s.op, s.impl) == row], wide) for row in rows}
        bottom = top + sum(heights.values()) + 4
        for (start, end), place in zip(spans, line, strict=False):
            box = Box(start, top, end, bottom)
            _panel(canvas, box, [s for s in members if s.place == place], heights, limits, colours)
            canvas.text((start, top - 12), cut(heads[place], end - start + 40, 12, bold=True), bold=True, size=12)
            if not wide or start == spans[0][0]:
                _names(canvas, box, heights, names, wide)
        top = bottom + 72
    canvas.height = top - 34
    return canvas


def panel_names(found: Sequence[Speed]) -> dict[Place, str]:
    """Return the panels there could be, with their heads; speeds of unknown tokens have none."""
    return {place: name for place, name in places(found).items() if place[0] is not None}


def bar_name(timing: Timing) -> str:
    """Name a bar: the layer, or phase and batch of a whole model."""
    record = timing.record
    if record.get("layer") != "*":
        return text(record.get("layer"))
    batch = finite(record.get("batch"))
    phase = words.name(words.PHASES, record.get("phase"))
    return " ".join(part for part in (phase, f"batch {batch:g}" if batch else "") if part)


def bar_names(found: Sequence[Speed]) -> list[str]:
    """Return the bars of a row, from top to bottom."""
    return list(dict.fromkeys(bar_name(t) for s in found for t in s.timings))


def _limits(found: Sequence[Speed]) -> tuple[float, float]:
    reach = [value for s in found for t in s.timings for value in (t.over_fastest_dense, *(t.spread or ())) if value]
    return around([*reach, 0.8, 1.25], log=True, margin=0.03)


def _height(found: Sequence[Speed], wide: bool) -> float:
    bars = max((len(s.timings) for s in found), default=1)
    return max(14.0, bars * BAR) + 7 + (0 if wide else HEAD)


def _panel(
    canvas: Canvas,
    box: Box,
    found: Sequence[Speed],
    heights: dict[Contender, float],
    limits: tuple[float, float],
    colours: dict[str, str],
) -> None:
    scale = box.across(*limits, log=True)
    x_axis(canvas, box, scale, scale.ticks(5), lambda v: f"{v:g}x", "speed over dense")
    head = 0.0 if box.left > 60 else HEAD
    by_row = {(s.op, s.impl): s for s in found}
    y = box.top
    for row, height in heights.items():
        if row in by_row:
            _row(canvas, (y + head, y + height), scale, by_row[row], colours[row[1]])
        else:
            canvas.text(
                (scale.at(1) + 4, y + head + (height - head) / 2 + 3), "no verified time", colour="muted", size=10
            )
        y += height
    canvas.line([(scale.at(1), box.top - 4), (scale.at(1), box.bottom)], "ink", 1.4)


def _row(canvas: Canvas, span: tuple[float, float], scale: Scale, speed: Speed, colour: str) -> None:
    (top, bottom), one = span, scale.at(1)
    y = (top + bottom) / 2 - BAR * len(speed.timings) / 2
    for timing in speed.timings:
        with canvas.titled(_words(timing)):
            end = scale.at(timing.over_fastest_dense or 1)
            canvas.rectangle((min(one, end), y + 0.7), (abs(end - one) or 0.5, BAR - 1.4), colour, 0.75)
            if timing.spread:
                middle = y + BAR / 2
                canvas.line([(scale.at(v), middle) for v in timing.spread], "ink", 0.9)
        y += BAR
    middle = (top + bottom) / 2
    canvas.mark((scale.at(speed.mean), middle), "diamond", "ink", 3)
    canvas.text((scale.end + 6, middle + 4), words.factor(speed.mean), bold=True)


def _words(timing: Timing) -> str:
    record = timing.record
    spread = f" ({words.figures(timing.spread[0])}-{words.figures(timing.spread[1])})" if timing.spread else ""
    return (
        f"{layer_title(record)}, {words.contender(record)}, {words.tokens(record.get('tokens'))}: "
        f"{words.factor(timing.over_fastest_dense)} dense{spread}, p50 {words.microseconds(timing.p50)} us"
    )


def _names(
    canvas: Canvas, box: Box, heights: dict[Contender, float], names: dict[Contender, str], beside: bool
) -> None:
    y = box.top
    groups = grouped(heights, lambda row: row[0])
    for rows in groups.values():
        if y > box.top:
            canvas.line([(0, y - 1), (box.right + 44, y - 1)], "rule", 1)
        for row in rows:
            if beside:
                canvas.text((box.left - 8, y + heights[row] / 2 + 3), names[row], anchor="end")
            else:
                canvas.text((box.left, y + 12), cut(names[row], canvas.width - 10))
            y += heights[row]
