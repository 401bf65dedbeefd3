"""Relative error of every compressed layer over the model's depth, a panel per kind of layer."""

from __future__ import annotations

from dataclasses import dataclass

from blrlab.report import words
from blrlab.report.groups import Run, finite, grouped, labels
from blrlab.report.plots.axes import Box, Scale, frame, name_lines, panels, x_axis, y_axis
from blrlab.report.plots.canvas import Canvas, cut, text_width
from blrlab.report.plots.style import FORMAT_COLOURS, FORMAT_MARKERS, WIDE
from blrlab.report.summary.compression import depth, layer_name, layer_records

DASHES = ("", "6 3", "2 3")
HEIGHT = 160.0


@dataclass(frozen=True)
class Series:
    """What one line stands for: layers compressed in one run, to one format, by one algorithm."""

    run: str
    format: str
    algorithm: str


@dataclass(frozen=True)
class Point:
    """One layer's relative error at its depth in the model."""

    series: Series
    layer: str
    depth: int
    error: float


def error_figure(runs: list[Run], width: float = WIDE) -> Canvas | None:
    """Draw every layer's relative error; None where no record holds one."""
    points = error_points(runs)
    if not points:
        return None
    found = grouped(points, lambda point: point.layer)
    names = _names(list(dict.fromkeys(point.series for point in points)))
    room = 10 + max(text_width(name) for name in names.values())
    columns = min(len(found), 3 if width > 600 else 1)
    places = panels(width, len(found), columns, 52, 34 + room, room)
    depths = [point.depth for point in points]
    reach = 1.12 * max(point.error for point in points) or 1.0
    canvas, top = Canvas(width), 28.0
    for first in range(0, len(found), columns):
        for (start, end), (title, members) in zip(places, list(found.items())[first : first + columns], strict=False):
            box = Box(start, top, end, top + HEIGHT)
            x = box.across(min(depths) - 0.4, max(depths) + 0.4)
            _panel(canvas, box, x, box.upwards(0, reach), title, members, names)
        top += HEIGHT + 62
    canvas.height = top - 24
    return canvas


def error_points(runs: list[Run]) -> list[Point]:
    """Return every layer with a known error."""
    found: list[Point] = []
    for label, run in zip(labels(runs), runs, strict=True):
        for index, record in enumerate(layer_records(run)):
            error = finite(record.get("relative_error"))
            if error is not None:
                series = Series(label, str(record.get("format")), str(record.get("algorithm") or ""))
                layer = f"{layer_name(record)}  {words.shape(record)}"
                found.append(Point(series, layer, depth(record, index), error))
    return found


def _names(series: list[Series]) -> dict[Series, str]:
    """Name each line by as little as tells them apart; a line on its own needs no name."""
    if len(series) == 1:
        return {series[0]: ""}
    formats = [words.name(words.FORMATS, s.format) for s in series]
    choices = (
        formats,
        [f"{name} {s.algorithm}".strip() for name, s in zip(formats, series, strict=True)],
        [s.run for s in series],
        [f"{s.run} {name}" for name, s in zip(formats, series, strict=True)],
        [f"{s.run} {name} {s.algorithm}".strip() for name, s in zip(formats, series, strict=True)],
    )
    chosen = next((names for names in choices if len(set(names)) == len(series)), choices[-1])
    return dict(zip(series, (cut(name, 110) for name in chosen), strict=True))


def _panel(
    canvas: Canvas, box: Box, x: Scale, y: Scale, title: str, points: list[Point], names: dict[Series, str]
) -> None:
    frame(canvas, box, cut(title, box.width + 40, 12, bold=True))
    whole = sorted({round(v) for v in x.ticks(8) if x.low <= round(v) <= x.high})
    x_axis(canvas, box, x, whole, lambda v: f"{v:g}", "block of the model", grid=False)
    y_axis(canvas, box, y, y.ticks(4), lambda v: f"{v:.3g}", "relative error" if box.left < 60 else "")
    ends: list[tuple[float, str, str]] = []
    for series, members in grouped(points, lambda point: point.series).items():
        colour = FORMAT_COLOURS.get(series.format, "ink")
        # Lines of one format share its colour and differ in their dashes.
        alike = [other for other in names if other.format == series.format]
        ordered = sorted(members, key=lambda point: point.depth)
        at = [(x.at(point.depth), y.at(point.error)) for point in ordered]
        canvas.line(at, colour, 1.3, DASHES[alike.index(series) % len(DASHES)])
        for place, point in zip(at, ordered, strict=True):
            with canvas.titled(f"{title}, block {point.depth}: {point.error:.3f}"):
                canvas.mark(place, FORMAT_MARKERS.get(series.format, "circle"), colour, 3.6)
        ends += [(at[-1][1], names[series], colour)] if names[series] else []
    name_lines(canvas, box, ends)
