"""Predicted times: a bar per algorithm in the colour of the term that takes most of it, and what each term takes."""

from __future__ import annotations

from collections.abc import Sequence

from blrlab.report import words
from blrlab.report.groups import Record, finite, text
from blrlab.report.plots.axes import Box, Key, Scale, legend, panels, x_axis
from blrlab.report.plots.canvas import Canvas, cut, text_width
from blrlab.report.plots.style import TERM_COLOURS, WIDE
from blrlab.report.summary.bounds import algorithm, term_times

MOST = 9
ROW = 20.0


def bounds_figure(shapes: Sequence[list[Record]], width: float = WIDE) -> Canvas | None:
    """Draw a panel per layer and number of tokens with its predictions; None without any."""
    if not shapes:
        return None
    wide = width > 600
    columns = min(len(shapes), 3 if wide else 1)
    names = list(dict.fromkeys(name for rows in shapes for name in _names(rows)))
    left = 10 + min(max(map(text_width, names)), 0.45 * width)
    places = panels(width, len(shapes), columns, left, 20, 6)
    canvas, top = Canvas(width), 30.0
    for first in range(0, len(shapes), columns):
        line = shapes[first : first + columns]
        lines = list(dict.fromkeys(name for rows in line for name in _names(rows)))
        high = ROW * len(lines) + 4
        for (start, end), rows in zip(places, line, strict=False):
            _panel(canvas, Box(start, top, end, top + high), rows, lines)
        for place, name in enumerate(lines):
            canvas.text((left - 6, top + ROW * (place + 0.5) + 4), cut(name, left - 8), anchor="end")
        top += high + 66
    keys = [Key(words.TERMS[term], colour, "square") for term, colour in TERM_COLOURS.items()]
    canvas.height = top - 26 + legend(canvas, [*keys, Key("bound of the layer", "ink")], 4, top - 28)
    return canvas


def _name(record: Record) -> str:
    cut_up = words.blocks(record.get("blocks"))
    return algorithm(record) + (f" {cut_up}" if cut_up not in (words.MISSING, "1 x 1") else "")


def _names(rows: list[Record]) -> list[str]:
    """Name the predictions of one panel, with the rank where one algorithm was predicted at several."""
    names = [_name(r) for r in rows]
    return [
        f"{name} r {text(r.get('rank'))}" if names.count(name) > 1 else name
        for name, r in zip(names, rows, strict=True)
    ]


def _panel(canvas: Canvas, box: Box, rows: list[Record], lines: list[str]) -> None:
    record = rows[0]
    title = f"{text(record.get('net'), '')} {text(record.get('layer'))}  {words.shape(record)}".strip()
    canvas.text((box.left, box.top - 10), cut(title, box.width, 12, bold=True), bold=True, size=12)
    scale = box.across(0, 1.5 * max(finite(r.get("us")) or 0.0 for r in rows))
    label = f"predicted us, {words.tokens(record.get('tokens'))}, {text(record.get('dtype'), '')}".rstrip(", ")
    x_axis(canvas, box, scale, scale.ticks(4), lambda v: f"{v:,g}", label)
    for found, name in zip(rows, _names(rows), strict=True):
        middle = box.top + ROW * (lines.index(name) + 0.5)
        with canvas.titled(in_words(found)):
            _bar(canvas, scale, middle, found)


def _bar(canvas: Canvas, scale: Scale, middle: float, record: Record) -> None:
    us, term = finite(record.get("us")) or 0.0, text(record.get("term"), "")
    canvas.rectangle((scale.start, middle - 7), (scale.at(us) - scale.start, 9), TERM_COLOURS.get(term, "muted"), 0.85)
    # Terms overlap inside a launch, so they do not add up to the bar: each has a thin line of its own.
    start = middle + 2.6
    for name, time in term_times(record).items():
        canvas.rectangle((scale.start, start), (scale.at(min(time, 3 * us)) - scale.start, 1.1), TERM_COLOURS[name])
        start += 1.2
    bound = finite(record.get("bound_us"))
    if bound:
        canvas.line([(scale.at(bound), middle - 8), (scale.at(bound), middle + 3)], "ink", 1.6)
    told = f"{words.microseconds(us)} {words.TERMS.get(term, term).removesuffix(' cores')}"
    canvas.text((scale.at(us) + 5, middle + 2), cut(told, scale.end - scale.at(us) - 5, 10), size=10)


def in_words(record: Record) -> str:
    """Say what a bar is: the algorithm, its time and what each term takes of it."""
    terms = ", ".join(f"{words.TERMS[name]} {words.microseconds(us)}" for name, us in term_times(record).items())
    return (
        f"{text(record.get('net'), '')} {text(record.get('layer'))}, {_name(record)}, "
        f"{words.tokens(record.get('tokens'))}: {words.microseconds(finite(record.get('us')))} us"
        + (f" ({terms})" if terms else "")
    ).strip()
