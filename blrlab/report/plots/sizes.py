"""What is lost against size: a line for every way to compress, through the sizes it was tried at."""

from __future__ import annotations

from collections.abc import Sequence

from blrlab.report import words
from blrlab.report.groups import Run
from blrlab.report.plots.axes import Box, Key, around, frame, legend, name_lines, x_axis, y_axis
from blrlab.report.plots.canvas import Canvas, text_width
from blrlab.report.plots.style import FORMAT_COLOURS, FORMAT_MARKERS, WIDE
from blrlab.report.summary.sizes import Size, sizes

# By the last word of an algorithm's name: what it was fitted to.
DASHES = {"whitened": "", "sequential": "2 3"}
PLAIN = "7 3"


def sizes_figure(runs: Sequence[Run], width: float = WIDE) -> Canvas | None:
    """Draw what is lost against the model's parameters; None where no way to compress has two sizes."""
    found = sizes(runs)
    if not found:
        return None
    beside = width > 600
    longest = max(text_width(way) for way in found)
    box = Box(60, 14, width - (longest + 14 if beside else 12), 374)
    canvas = Canvas(width)
    members = [size for line in found.values() for size in line]
    values = [v for size in members for v in (size.lost, size.healed) if v is not None]
    log = min(values) > 0
    x = box.across(*around([size.parameters for size in members]))
    y = box.upwards(*around(values, log=log), log=log)
    frame(canvas, box)
    x_axis(canvas, box, x, x.ticks(6), words.count, "parameters of the model")
    y_axis(canvas, box, y, y.ticks(8), lambda v: f"{v:g}", "loss over the dense model's, lower is better")
    ends = []
    for way, line in found.items():
        points = [(x.at(size.parameters), y.at(size.lost)) for size in line]
        colour = _colour(line[0])
        canvas.line(points, colour, 1.4, _dash(line[0]), 0.85)
        for at, size in zip(points, line, strict=True):
            _mark(canvas, at, size, None if size.healed is None else y.at(size.healed))
        ends.append((points[-1][1], way, colour))
    canvas.height = box.bottom + 40
    if beside:
        name_lines(canvas, box, ends)
    else:
        keys = [Key(way, _colour(line[0]), dash=_dash(line[0])) for way, line in found.items()]
        canvas.height += legend(canvas, keys, 8, canvas.height)
    return canvas


def _colour(size: Size) -> str:
    return FORMAT_COLOURS.get(size.form, "ink")


def _dash(size: Size) -> str:
    return DASHES.get(size.algorithm.split(" ")[-1], PLAIN)


def _mark(canvas: Canvas, at: tuple[float, float], size: Size, healed: float | None) -> None:
    """Mark a compressed model, open; and the healed one, filled, tied to it by a thin line."""
    shape, colour = FORMAT_MARKERS.get(size.form, "circle"), _colour(size)
    if healed is not None:
        canvas.line([at, (at[0], healed)], colour, 0.7, "1 2")
        with canvas.titled(f"{size.way}, healed: {words.change(size.healed)}"):
            canvas.mark((at[0], healed), shape, colour, 4)
    with canvas.titled(f"{size.way}: {words.change(size.lost)} at {words.count(size.parameters)} parameters"):
        canvas.mark(at, shape, colour, 4, hollow=True)
