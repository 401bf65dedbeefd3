"""Quality against time and size: a point per evaluated model, and a line through those that none beats in both."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from blrlab.report import words
from blrlab.report.groups import Run
from blrlab.report.plots.axes import Box, around, frame, panels, x_axis, y_axis
from blrlab.report.plots.canvas import Canvas, Point, cut, text_width
from blrlab.report.plots.style import FORMAT_COLOURS, FORMAT_MARKERS, WIDE
from blrlab.report.summary.pareto import Metric, Model, bases, frontier, metric_of, model_time, models
from blrlab.report.summary.sizes import sizes

Placed = tuple[float, Model]


def pareto_panels(runs: Sequence[Run]) -> list[tuple[str, str, list[Placed]]]:
    """Return (title, unit of the cost, [(cost, model)]) for every panel that holds dense and a factored model."""
    metric = metric_of(runs)
    found = models(runs, metric) if metric else []
    told = [(b.told, "us", [(t, m) for m in found if (t := model_time(b, m))]) for b in bases(runs)]
    if not sizes(runs):  # runs at many sizes have a figure of their own
        told.append(("Size", "parameters", [(m.parameters, m) for m in found if m.parameters]))
    return [panel for panel in told if len({m.form for _, m in panel[2]}) > 1]


def pareto_figure(runs: Sequence[Run], width: float = WIDE) -> Canvas | None:
    """Draw quality against time and size; None where no factored model has either."""
    found, metric = pareto_panels(runs), metric_of(runs)
    if not found or metric is None:
        return None
    columns = min(len(found), 2 if width > 600 else 1)
    places = panels(width, len(found), columns, 60, 60, 12)
    canvas, top = Canvas(width), 28.0
    for first in range(0, len(found), columns):
        for (start, end), panel in zip(places, found[first : first + columns], strict=False):
            _panel(canvas, Box(start, top, end, top + 290), *panel, metric)
        top += 290 + 64
    canvas.height = top - 22
    return canvas


def _panel(canvas: Canvas, box: Box, title: str, unit: str, placed: list[Placed], metric: Metric) -> None:
    costs, values = [cost for cost, _ in placed], [m.quality for _, m in placed]
    x, y = box.across(*around([*costs, 0.9 * min(costs)], margin=0.1)), box.upwards(*around(values, margin=0.1))
    write: Callable[[float], str] = words.count if unit == "parameters" else lambda v: f"{v:,g}"
    frame(canvas, box, cut(title, canvas.width - box.left if canvas.width < 600 else box.width + 40, 12, bold=True))
    x_axis(canvas, box, x, x.ticks(5), write, "parameters of the model" if unit == "parameters" else unit)
    y_axis(canvas, box, y, y.ticks(6), lambda v: f"{v:g}", metric.label if box.left < 70 else "")
    edge = frontier([(cost, m.quality) for cost, m in placed], metric.rising)
    steps: list[Point] = []
    for (cost, value), (following, _) in zip(edge, [*edge[1:], (x.high, 0.0)], strict=True):
        steps += [(x.at(cost), y.at(value)), (x.at(following), y.at(value))]
    canvas.line(steps, "muted", 1, "4 3")
    for cost, model in placed:
        at, colour = (x.at(cost), y.at(model.quality)), FORMAT_COLOURS.get(model.form, "ink")
        with canvas.titled(f"{model.name}: {metric.name} {words.loss(model.quality)}, {write(cost)} {unit}"):
            canvas.mark(at, FORMAT_MARKERS.get(model.form, "circle"), colour, 5, hollow=model.stage == "compressed")
    _names(canvas, box, sorted(((y.at(m.quality), x.at(cost), m.name) for cost, m in placed)))


def _names(canvas: Canvas, box: Box, points: list[tuple[float, float, str]]) -> None:
    """Write the names of points (y, x, name) beside and a little above them, in the same order from top to bottom."""
    taken: list[tuple[float, float, float]] = []
    for y, x, name in points:
        name = cut(name, max(box.right - x, x - box.left) - 10, 10)
        wide = text_width(name, 10)
        right = x + 9 + wide <= box.right
        left = x + 9 if right else x - 9 - wide
        beside = [height for start, end, height in taken if start < left + wide and end > left]
        height = max([y - 4, *(h + 12 for h in beside)])
        if height > y + 10:
            # What was pushed far down is tied to its point.
            canvas.line([(x, y), (left - 2 if right else left + wide + 2, height - 4)], "muted", 0.6)
        taken.append((left, left + wide, height))
        canvas.text((left, height), name, size=10)
