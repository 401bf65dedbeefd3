"""The roofline: what the machine allows at each arithmetic intensity, and what every layer reached.

Both axes are logarithmic. Flat roofs are peaks of arithmetic, slopes peaks of memory; solid ones were measured on
the machine, dashed ones are its data sheet's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from blrlab.report import words
from blrlab.report.groups import Record, finite, grouped, text
from blrlab.report.plots.axes import Box, Key, Scale, frame, legend, panels, spread, x_axis, y_axis
from blrlab.report.plots.canvas import Canvas, cut, text_width
from blrlab.report.plots.style import FORMAT_MARKERS, WIDE, backend_colours
from blrlab.report.summary.latency import by_layer
from blrlab.report.summary.roofline import Point, Roof, foremost, point, roof, sheet_roof, units
from blrlab.report.summary.speed import some_tokens

Place = tuple[float, float]

# Up to so many names a panel are written out; past that, brackets say how many tokens the points below them have.
MOST_NAMES = 12
MOST_TOKENS = 3


def roofline_points(records: list[Record], peaks: Record) -> dict[str, list[Point]]:
    """Return what is drawn, net by net: all points where they are few, else those of some numbers of tokens."""
    under = roof(peaks)
    if under is None:
        return {}
    rows = [t.record for timings in by_layer(records).values() for t in timings]
    nets = grouped([p for p in (point(row, under) for row in rows) if p], lambda p: text(p.record.get("net"), ""))
    for net, points in nets.items():
        if len(points) > 60:
            chosen = some_tokens((finite(p.record.get("tokens")) for p in points), MOST_TOKENS)
            nets[net] = [p for p in points if finite(p.record.get("tokens")) in chosen]
    return nets


def roofline_figure(records: list[Record], peaks: Record, width: float = WIDE) -> Canvas | None:
    """Draw a device's bench records under its roofs, a panel per net; None without peaks or a measured layer."""
    nets, under = roofline_points(records, peaks), roof(peaks)
    if under is None or not nets:
        return None
    columns = min(len(nets), 2 if width > 600 else 1)
    places = panels(width, len(nets), columns, 96 if width > 600 else 70, 96)
    strips = [_strip(points) for points in nets.values()]
    plain = 400 if columns == 1 and width > 600 else 290
    canvas, top = Canvas(width), 26.0
    everything = [p for points in nets.values() for p in points]
    colours = backend_colours(text(p.record.get("impl")) for p in everything)
    for first in range(0, len(nets), columns):
        strip = max(strips[first : first + columns])
        bottom = top + strip + plain
        row = list(nets.items())[first : first + columns]
        for (left, right), (net, points) in zip(places, row, strict=False):
            canvas.text((left, top - 10), net, bold=True, size=12)
            box = Box(left, top + strip, right, bottom)
            _panel(canvas, box, points, everything, peaks, strip, colours, outer=left == places[0][0])
        top = bottom + 66
    canvas.height = top - 24 + legend(canvas, _keys(everything, colours, peaks), 8, top - 26)
    return canvas


def _panel(
    canvas: Canvas,
    box: Box,
    points: list[Point],
    everything: list[Point],
    peaks: Record,
    strip: float,
    colours: dict[str, str],
    outer: bool,
) -> None:
    x, y = _scales(box, everything, peaks)
    frame(canvas, box)
    decades = [10.0**e for e in range(-3, 20)]
    x_axis(canvas, box, x, x.ticks(7), lambda v: f"{v:g}", "arithmetic intensity (FLOP per byte)")
    speeds = [v for v in decades if y.low <= v <= y.high]
    speeds = speeds if len(speeds) > 2 else y.ticks(6)
    y_axis(canvas, box, y, speeds, lambda v: words.rate(v, "FLOP/s"), "speed" if outer and canvas.width > 600 else "")
    _roofs(canvas, box, x, y, peaks, [(x.at(p.intensity), y.at(p.speed)) for p in points])
    (_names if len(_named(points)) <= MOST_NAMES else _brackets)(canvas, box, x, points, strip)
    best = foremost(points) if len(points) > 30 else set(range(len(points)))
    # The fastest of each layer come last, and so lie on top.
    for place in sorted(range(len(points)), key=lambda k: k in best):
        found = points[place]
        shape = FORMAT_MARKERS.get(text(found.record.get("op")), "circle")
        colour = colours[text(found.record.get("impl"))]
        with canvas.titled(found.words):
            at = x.at(found.intensity), y.at(found.speed)
            canvas.mark(at, shape, colour, 4.4 if place in best else 3.2, pale=place not in best)


def _scales(box: Box, points: Sequence[Point], peaks: Record) -> tuple[Scale, Scale]:
    roofs = [r for r in (roof(peaks), sheet_roof(peaks)) if r]
    intensities = [p.intensity for p in points] + [r.ridge for r in roofs]
    heights = [p.speed for p in points] + [r.cuda for r in roofs if r.cuda]
    top = max([r.flops for r in roofs] + heights)
    x = box.across(min(intensities) / 2.5, max(intensities) * 3, log=True)
    return x, box.upwards(min([*heights, top]) / 2, top * 2.2, log=True)


def _roofs(canvas: Canvas, box: Box, x: Scale, y: Scale, peaks: Record, taken: list[Place]) -> None:
    measured, sheet = roof(peaks), sheet_roof(peaks)
    if measured is None:
        return
    if sheet:
        _roof(canvas, x, y, sheet, "5 4", "muted")
    _roof(canvas, x, y, measured, "", "ink")
    size = 10 if box.width > 300 else 9
    height = min(y.at(r.flops) for r in (measured, sheet) if r)
    told = f"{units(peaks)} {words.rate(measured.flops, 'FLOP/s')}"
    told += f", data sheet {words.rate(sheet.flops, 'FLOP/s')}" if sheet else ""
    canvas.text((box.right - 2, height - 5), told, anchor="end", size=size)
    if measured.cuda:
        told = f"CUDA cores {words.rate(measured.cuda, 'FLOP/s')}"
        canvas.text((box.right - 2, y.at(measured.cuda) + 12), told, anchor="end", size=size)
    for name, rate, off in (("DRAM", measured.dram, 12), ("L2", measured.l2, -4)):
        if rate:
            told = f"{name} {words.rate(rate, 'B/s')}"
            _slope_name(canvas, _slope(x, y, rate, measured.flops), told, off, taken)


def _roof(canvas: Canvas, x: Scale, y: Scale, peaks: Roof, dash: str, colour: str) -> None:
    canvas.line([*_slope(x, y, peaks.dram, peaks.flops), (x.end, y.at(peaks.flops))], colour, 1.4, dash)
    if peaks.l2:
        canvas.line(_slope(x, y, peaks.l2, peaks.flops), colour, 1, dash, 0.7)
    if peaks.cuda:
        # Left of where DRAM limits, CUDA cores wait as well.
        start = max(x.low, peaks.cuda / peaks.dram)
        canvas.line([(x.at(start), y.at(peaks.cuda)), (x.end, y.at(peaks.cuda))], colour, 1, dash)


def _slope(x: Scale, y: Scale, bandwidth: float, flops: float) -> list[tuple[float, float]]:
    """Return the part of a slope that lies inside the panel, up to the flat roof."""
    start, end = max(x.low, y.low / bandwidth), min(x.high, flops / bandwidth)
    if end <= start:
        return [(x.at(x.low), y.at(flops))]
    return [(x.at(v), y.at(v * bandwidth)) for v in (start, end)]


def _slope_name(canvas: Canvas, ends: list[Place], name: str, off: float, taken: list[Place]) -> None:
    """Write along a slope, `off` pixels below it, where it is farthest from the points."""
    room = math.dist(*ends) - text_width(name, 10) - 16 if len(ends) == 2 else -1
    if room < 0:
        return
    (x0, y0), (x1, y1) = ends
    turn = math.atan2(y1 - y0, x1 - x0)
    along, across = (math.cos(turn), math.sin(turn)), (-math.sin(turn), math.cos(turn))

    def at(start: float) -> Place:
        return x0 + start * along[0] + off * across[0], y0 + start * along[1] + off * across[1]

    def clear(start: float) -> float:
        middle = at(start + text_width(name, 10) / 2)
        return min(40.0, *(math.dist(middle, place) for place in taken), 40.0)

    start = max((8 + room * k / 10 for k in range(11)), key=clear)
    canvas.text(at(start), name, size=10, turn=math.degrees(turn))


def _named(points: list[Point]) -> list[tuple[float, str]]:
    """Return (intensity, name) of a net's layers, layers of one op and intensity together."""
    groups = grouped(points, lambda p: (text(p.record.get("op")), round(math.log10(p.intensity), 2)))
    found: list[tuple[float, str]] = []
    for (op, _), members in groups.items():
        everything = {_layer(p) for p in points if p.record.get("op") == op}
        mine = dict.fromkeys(_layer(p) for p in members)
        layers = "all layers" if len(mine) > 2 and set(mine) == everything else ", ".join(mine)
        found.append((members[0].intensity, f"{words.name(words.FORMATS, op)} {layers}"))
    return found


def _layer(found: Point) -> str:
    return "whole model" if found.record.get("layer") == "*" else text(found.record.get("layer"))


def _strip(points: list[Point]) -> float:
    named = _named(points)
    if len(named) <= MOST_NAMES:
        return min(170.0, max(text_width(name, 10) for _, name in named)) + 22
    return 14.0 * len({p.record.get("tokens") for p in points}) + 10


def _names(canvas: Canvas, box: Box, x: Scale, points: list[Point], strip: float) -> None:
    """Write each name above the panel at its intensity, with a line down."""
    named = _named(points)
    apart = spread([x.at(value) for value, _ in named], 12)
    for (value, name), moved in zip(named, apart, strict=True):
        canvas.line([(x.at(value), box.bottom), (x.at(value), box.top), (moved, box.top - 14)], "muted", 0.5)
        canvas.text((moved + 3.5, box.top - 17), cut(name, strip - 20, 10), size=10, turn=-90)


def _brackets(canvas: Canvas, box: Box, x: Scale, points: list[Point], strip: float) -> None:
    """Draw above the panel, for every number of tokens, which intensities its points have."""
    groups = sorted(grouped(points, lambda p: finite(p.record.get("tokens")) or 0).items())
    for line, (tokens, members) in enumerate(groups):
        height = box.top - strip + 10 + 14 * line
        left, right = (x.at(f(p.intensity for p in members)) for f in (min, max))
        canvas.line([(left - 3, height + 4), (left - 3, height), (right + 3, height), (right + 3, height + 4)], "muted")
        name = words.tokens(tokens)
        fits = right + 8 + text_width(name, 10) < box.right
        at = (right + 8 if fits else left - 8, height + 4)
        canvas.text(at, name, anchor="start" if fits else "end", size=10, colour="muted")


def _keys(points: list[Point], colours: dict[str, str], peaks: Record) -> list[Key]:
    """Tell backends by colour and ops by shape, those measured only."""
    impls = list(dict.fromkeys(text(p.record.get("impl")) for p in points))
    ops = [op for op in FORMAT_MARKERS if any(p.record.get("op") == op for p in points)]
    keys = [Key(words.backend(impl), colours[impl], "circle") for impl in sorted(impls)]
    keys += [Key(words.name(words.FORMATS, op), "ink", FORMAT_MARKERS[op], hollow=True) for op in ops]
    keys.append(Key("measured ceiling", "ink"))
    return [*keys, Key("data sheet", "muted", dash="5 4")] if sheet_roof(peaks) else keys
