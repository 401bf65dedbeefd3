"""The roofline: what the machine allows at each arithmetic intensity, and what every layer reached.

Intensity is FLOP per byte moved, speed is FLOP per second. The roof is min(peak FLOP/s,
intensity x peak bytes/s) with the peaks of the `env` record; a layer's bound is its FLOP over `bound_us`.
"""

from __future__ import annotations

import math

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
)
from blrlab.report.summary.latency import by_layer, verified_time

Point = tuple[float, float, Record]


def roofline_figure(records: list[Record], peaks: Record, width: float = WIDE) -> Figure | None:
    """Draw a device's bench records under its roof, a panel per net; None without peaks or a measured layer.

    `width` in inches.
    """
    flops, bandwidth = finite(peaks.get("flops_per_s")), finite(peaks.get("bytes_per_s"))
    rows = [t.record for timings in by_layer(records).values() for t in timings]
    measured = [p for p in map(_measured, rows) if p]
    if not flops or not bandwidth or not measured:
        return None
    nets = grouped(rows, lambda r: str(r.get("net") or ""))
    wide = width > 6
    columns = min(len(nets), 2) if wide else 1
    lines = -(-len(nets) // columns)
    figure = new_figure(width, 0.5 + 3.9 * lines)
    axes: list[Axes] = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    reach = _reach(measured, flops, bandwidth)
    for place, (net, members) in zip(axes, nets.items(), strict=False):
        _panel(place, members, (flops, bandwidth), reach)
        place.set_title(net)
        place.label_outer(remove_inner_ticks=True)
    for place in axes[len(nets) :]:
        place.set_visible(False)
    _key(figure, rows, 6 if wide else 3)
    return figure


def _intensity(record: Record) -> float | None:
    flops, moved = finite(record.get("flops")), finite(record.get("bytes"))
    return flops / moved if flops and moved and flops > 0 and moved > 0 else None


def _measured(record: Record) -> Point | None:
    intensity, p50, flops = _intensity(record), verified_time(record), finite(record.get("flops"))
    return (intensity, flops / (p50 * 1e-6), record) if intensity and p50 and flops else None


def _bound(record: Record) -> Point | None:
    intensity, bound, flops = _intensity(record), finite(record.get("bound_us")), finite(record.get("flops"))
    return (
        (intensity, flops / (bound * 1e-6), record) if intensity and bound and bound > 0 and flops else None
    )


def _reach(measured: list[Point], flops: float, bandwidth: float) -> tuple[float, float, float, float]:
    """Return the limits of both axes: every point, the ridge of the roof, and room above it for the names."""
    ridge = flops / bandwidth
    left = min([ridge, *(x for x, _, _ in measured)]) / 3
    right = max([ridge, *(x for x, _, _ in measured)]) * 3
    low = min(y for _, y, _ in measured) / 2
    decades = math.log10(flops / low)
    return left, right, low, flops * 10 ** (0.75 * decades + 0.2)


def _panel(
    axes: Axes, rows: list[Record], peaks: tuple[float, float], reach: tuple[float, float, float, float]
) -> None:
    flops, bandwidth = peaks
    left, right, low, top = reach
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(low, top)
    ridge = flops / bandwidth
    axes.plot([left, ridge, right], [left * bandwidth, flops, flops], color=INK, linewidth=1.3)
    axes.annotate(
        words.rate(bandwidth, "B/s"),
        (ridge / 1.6, flops / 1.6),
        xytext=(8, -4),
        textcoords="offset points",
        va="top",
        fontsize=8,
        color=INK,
    )
    axes.annotate(
        words.rate(flops, "FLOP/s"),
        (right, flops),
        xytext=(-2, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=INK,
    )
    _names(axes, rows, peaks, reach)
    for x, y, _ in filter(None, map(_bound, rows)):
        axes.plot(x, y, "_", color=INK, markersize=11, markeredgewidth=3)
    for x, y, record in filter(None, map(_measured, rows)):
        colour = BACKEND_COLOURS.get(str(record.get("impl")), MUTED)
        axes.plot(
            x,
            y,
            FORMAT_MARKERS.get(str(record.get("op")), "o"),
            color=colour,
            markeredgecolor=CARD,
            markeredgewidth=0.7,
            markersize=6.5,
            linestyle="none",
        )
    axes.set_xlabel("arithmetic intensity (FLOP per byte)")
    axes.set_ylabel("speed")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if top > 1e4 * low else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: words.rate(value, "FLOP/s") if value < 1.5 * flops else "")
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())


def _names(
    axes: Axes, rows: list[Record], peaks: tuple[float, float], reach: tuple[float, float, float, float]
) -> None:
    """Write each layer's name above the roof at its intensity, layers of one op and intensity together."""
    flops, bandwidth = peaks
    left, right, low, top = reach
    # The names stand above the roof; what leads to them bends where neighbours were moved apart.
    step = (top / flops) ** 0.22
    known = [(x, r) for x, r in ((_intensity(r), r) for r in rows) if x is not None]
    groups = grouped(known, lambda pair: (str(pair[1].get("op")), round(math.log10(pair[0]), 2)))
    places = [members[0][0] for members in groups.values()]
    decades = math.log10(right / left)
    apart = spread([math.log10(x) for x in places], 0.06 * decades)
    for (op, _), members, x, shifted in zip(groups, groups.values(), places, apart, strict=True):
        layers = ", ".join(dict.fromkeys(str(r.get("layer")) for _, r in members))
        name = f"{words.name(words.FORMATS, op)} {layers}"
        roof = min(flops, x * bandwidth)
        axes.plot(
            [x, x, 10**shifted], [low, roof, step * flops], color=MUTED, linewidth=0.5, alpha=0.6, zorder=1
        )
        axes.text(
            10**shifted,
            1.06 * step * flops,
            name,
            rotation=90,
            rotation_mode="anchor",
            va="center",
            fontsize=7,
        )


def _key(figure: Figure, rows: list[Record], columns: int) -> None:
    """Tell backends by colour and ops by shape."""
    measured = [r for r in rows if _measured(r)]
    handles = [
        Line2D(
            [],
            [],
            linestyle="none",
            marker="s",
            markersize=7,
            color=colour,
            label=words.name(words.BACKENDS, impl),
        )
        for impl, colour in BACKEND_COLOURS.items()
        if any(r.get("impl") == impl for r in measured)
    ]
    handles += [
        Line2D(
            [],
            [],
            linestyle="none",
            marker=marker,
            color=CARD,
            markeredgecolor=INK,
            label=words.name(words.FORMATS, op),
        )
        for op, marker in FORMAT_MARKERS.items()
        if any(r.get("op") == op for r in measured)
    ]
    handles.append(Line2D([], [], linestyle="none", marker="_", color=INK, markersize=9, label="bound"))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8.5, handletextpad=0.3)
