"""The roofline: what the machine allows at each arithmetic intensity, and what every layer reached.

Intensity is FLOP per byte moved, speed is FLOP per second. The roof is min(peak FLOP/s, intensity x peak
bytes/s) with the peaks of the `env` record; a layer's bound is its FLOP over `bound_us`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from blrlab.report import words
from blrlab.report.groups import Record, finite, grouped
from blrlab.report.plots.style import (
    BACKEND_COLOURS,
    CARD,
    FORMAT_MARKERS,
    INK,
    MUTED,
    WIDE,
    new_figure,
    spread,
    styled,
)
from blrlab.report.summary.latency import by_layer, verified_time

Point = tuple[float, float, Record]

LEADER = 0.22


@dataclass(frozen=True)
class Roof:
    """A machine's peaks (FLOP/s, bytes/s) and the limits of the axes that show them."""

    flops: float
    bandwidth: float
    left: float
    right: float
    low: float
    top: float

    @property
    def ridge(self) -> float:
        """Return the intensity from which on the arithmetic limits, in FLOP per byte."""
        return self.flops / self.bandwidth

    def at(self, intensity: float) -> float:
        """Return the roof's height in FLOP/s."""
        return min(self.flops, intensity * self.bandwidth)


@styled
def roofline_figure(records: list[Record], peaks: Record, width: float = WIDE) -> Figure | None:
    """Draw a device's bench records under its roof, a panel per net; None without peaks or a measured layer.

    `width` in inches.
    """
    rows = [t.record for timings in by_layer(records).values() for t in timings]
    nets = grouped(rows, lambda r: str(r.get("net") or ""))
    names = {net: _names(members) for net, members in nets.items()}
    longest = max((len(name) for found in names.values() for _, name in found), default=0)
    roof = _roof(peaks, [point for point in map(_measured, rows) if point], longest)
    if roof is None:
        return None
    columns = min(len(nets), 2) if width > 6 else 1
    lines = -(-len(nets) // columns)
    figure = new_figure(width, 0.5 + 3.9 * lines)
    axes: list[Axes] = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    for place, (net, members) in zip(axes, nets.items(), strict=False):
        _draw_roof(place, roof)
        _draw_names(place, names[net], roof)
        _draw_points(place, members)
        place.set_title(net)
        place.label_outer(remove_inner_ticks=True)
    for place in axes[len(nets) :]:
        place.set_visible(False)
    handles = _handles(rows)
    figure.legend(handles=handles, loc="outside lower center", ncols=6 if width > 6 else 3, handletextpad=0.3)
    return figure


def _intensity(record: Record) -> float | None:
    flops, moved = finite(record.get("flops")), finite(record.get("bytes"))
    return flops / moved if flops and moved and flops > 0 and moved > 0 else None


def _point(record: Record, time: float | None) -> Point | None:
    intensity, flops = _intensity(record), finite(record.get("flops"))
    return (intensity, flops / (time * 1e-6), record) if intensity and flops and time and time > 0 else None


def _measured(record: Record) -> Point | None:
    return _point(record, verified_time(record))


def _bound(record: Record) -> Point | None:
    return _point(record, finite(record.get("bound_us")))


def _roof(peaks: Record, measured: list[Point], longest: int) -> Roof | None:
    """Fit the axes to every point and the ridge, with room above the roof for names of `longest` letters."""
    flops, bandwidth = finite(peaks.get("flops_per_s")), finite(peaks.get("bytes_per_s"))
    if not measured or not flops or not bandwidth or flops < 0 or bandwidth < 0:
        return None
    intensities = [flops / bandwidth, *(x for x, _, _ in measured)]
    low = min(flops, *(y for _, y, _ in measured)) / 2
    # A letter takes a seventieth of the panel's height; leaders take LEADER of what is above the roof.
    share = min(0.5, longest / 70 + 0.05)
    top = flops * (flops / low) ** (share / (1 - LEADER - share))
    return Roof(flops, bandwidth, min(intensities) / 3, max(intensities) * 3, low, top)


def _draw_roof(axes: Axes, roof: Roof) -> None:
    axes.set(xscale="log", yscale="log", xlim=(roof.left, roof.right), ylim=(roof.low, roof.top))
    axes.plot(
        [roof.left, roof.ridge, roof.right],
        [roof.left * roof.bandwidth, roof.flops, roof.flops],
        color=INK,
        linewidth=1.3,
    )
    style = {"textcoords": "offset points", "fontsize": 8, "color": INK}
    axes.annotate(words.rate(roof.flops, "FLOP/s"), (roof.right, roof.flops), xytext=(-2, 3), ha="right", **style)
    slope = (roof.ridge / 1.6, roof.flops / 1.6)
    axes.annotate(words.rate(roof.bandwidth, "B/s"), slope, xytext=(8, -4), va="top", **style)
    axes.set_xlabel("arithmetic intensity (FLOP per byte)")
    axes.set_ylabel("speed")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if roof.top > 1e4 * roof.low else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _speed(value, roof)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())


def _speed(value: float, roof: Roof) -> str:
    # Above the roof stand names, and there is no speed to read off.
    return words.rate(value, "FLOP/s") if value < 1.5 * roof.flops else ""


def _draw_points(axes: Axes, rows: list[Record]) -> None:
    for x, y, _ in filter(None, map(_bound, rows)):
        axes.plot(x, y, "_", color=INK, markersize=11, markeredgewidth=3)
    for x, y, record in filter(None, map(_measured, rows)):
        axes.plot(
            x,
            y,
            FORMAT_MARKERS.get(str(record.get("op")), "o"),
            color=BACKEND_COLOURS.get(str(record.get("impl")), MUTED),
            markeredgecolor=CARD,
            markeredgewidth=0.7,
            markersize=6.5,
        )


def _names(rows: list[Record]) -> list[tuple[float, str]]:
    """Return (intensity, name) of a net's layers, layers of one op and intensity together."""
    known = [(x, r) for x, r in ((_intensity(r), r) for r in rows) if x is not None]
    groups = grouped(known, lambda pair: (str(pair[1].get("op")), round(math.log10(pair[0]), 2)))
    found: list[tuple[float, str]] = []
    for (op, _), members in groups.items():
        layers = _together(members, [r for _, r in known if str(r.get("op")) == op])
        found.append((members[0][0], f"{words.name(words.FORMATS, op)} {layers}"))
    return found


def _draw_names(axes: Axes, names: list[tuple[float, str]], roof: Roof) -> None:
    """Write each name above the roof at its intensity."""
    apart = spread([math.log10(x) for x, _ in names], 0.06 * math.log10(roof.right / roof.left))
    # A name's leader bends above the roof where neighbours were moved apart.
    base = roof.flops * (roof.top / roof.flops) ** LEADER
    start = base * (roof.top / roof.low) ** 0.015
    for (x, name), moved in zip(names, apart, strict=True):
        leader = ([x, x, 10**moved], [roof.low, roof.at(x), base])
        axes.plot(*leader, color=MUTED, linewidth=0.5, alpha=0.6, zorder=1)
        axes.text(10**moved, start, name, rotation=90, rotation_mode="anchor", va="center", fontsize=7)


def _together(members: list[tuple[float, Record]], of_op: list[Record]) -> str:
    mine = dict.fromkeys(str(r.get("layer")) for _, r in members)
    everything = {str(r.get("layer")) for r in of_op}
    return "all layers" if len(mine) > 2 and set(mine) == everything else ", ".join(mine)


def _handles(rows: list[Record]) -> list[Line2D]:
    """Tell backends by colour and ops by shape, those measured only."""
    measured = [r for r in rows if _measured(r)]
    impls = [impl for impl in BACKEND_COLOURS if any(r.get("impl") == impl for r in measured)]
    ops = [op for op in FORMAT_MARKERS if any(r.get("op") == op for r in measured)]
    backends = [_handle("s", BACKEND_COLOURS[impl], words.name(words.BACKENDS, impl)) for impl in impls]
    shapes = [_handle(FORMAT_MARKERS[op], INK, words.name(words.FORMATS, op), hollow=True) for op in ops]
    return [*backends, *shapes, _handle("_", INK, "bound")]


def _handle(marker: str, colour: str, label: str, hollow: bool = False) -> Line2D:
    face = CARD if hollow else colour
    edge = INK if hollow else colour
    return Line2D([], [], linestyle="none", marker=marker, color=face, markeredgecolor=edge, label=label)
