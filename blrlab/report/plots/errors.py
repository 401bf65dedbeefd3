"""Relative error of every compressed layer over the model's depth, a panel per kind of layer."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from blrlab.report import words
from blrlab.report.groups import Run, finite, grouped, labels
from blrlab.report.plots.style import (
    FORMAT_COLOURS,
    FORMAT_MARKERS,
    INK,
    MUTED,
    WIDE,
    name_lines,
    new_figure,
    styled,
)
from blrlab.report.summary.compression import depth, layer_name, layer_records

DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))


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


@styled
def error_figure(runs: list[Run], width: float = WIDE) -> Figure | None:
    """Draw every layer's relative error; None where no record holds one. `width` in inches."""
    points = _points(runs)
    if not points:
        return None
    panels = grouped(points, lambda point: point.layer)
    columns = min(len(panels), 3 if width > 6 else 1)
    lines = -(-len(panels) // columns)
    figure = new_figure(width, 0.5 + 2.1 * lines)
    axes: list[Axes] = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    axes[0].set_ylim(0, 1.12 * max(point.error for point in points) or 1)
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    names = _names(list(dict.fromkeys(point.series for point in points)))
    for place, (title, members) in zip(axes, panels.items(), strict=False):
        _panel(place, members, names)
        place.tick_params(labelbottom=True)
        place.set_title(title)
    for place in axes[len(panels) :]:
        place.set_visible(False)
    figure.supxlabel("block of the model", fontsize=9, color=MUTED)
    figure.supylabel("relative error", fontsize=9, color=MUTED)
    return figure


def _points(runs: list[Run]) -> list[Point]:
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
    return dict(zip(series, chosen, strict=True))


def _panel(axes: Axes, points: list[Point], names: dict[Series, str]) -> None:
    ends: list[tuple[float, str, str]] = []
    for series, members in grouped(points, lambda point: point.series).items():
        ordered = sorted((point.depth, point.error) for point in members)
        colour = FORMAT_COLOURS.get(series.format, INK)
        # Lines of one format share its colour and differ in their dashes.
        alike = [other for other in names if other.format == series.format]
        dash = DASHES[alike.index(series) % len(DASHES)]
        marker = FORMAT_MARKERS.get(series.format, "o")
        axes.plot(*zip(*ordered, strict=True), color=colour, marker=marker, markersize=5, ls=dash, linewidth=1.2)
        ends += [(ordered[-1][1], names[series], colour)] if names[series] else []
    name_lines(axes, ends)
