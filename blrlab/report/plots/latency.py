"""Times of layers over backends: a figure per net, a panel per layer, dense beside factored."""

from __future__ import annotations

import textwrap
from itertools import accumulate, pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from blrlab.report import words
from blrlab.report.groups import Record, finite, grouped
from blrlab.report.plots.style import BACKEND_COLOURS, INK, MUTED, WIDE, new_figure, styled
from blrlab.report.summary.latency import Timing, by_layer, op_names, verified_time, why_no_time

Line = tuple[str, str]


@styled
def latency_figures(records: list[Record], width: float = WIDE) -> dict[str, Figure]:
    """Return a figure per net of one device's bench records, for nets with any time; `width` in inches."""
    nets = grouped(by_layer(records).values(), lambda timings: str(timings[0].record.get("net") or ""))
    return {
        net: _figure(panels, width)
        for net, panels in nets.items()
        if any(timing.p50 is not None for timings in panels for timing in timings)
    }


def _figure(panels: list[list[Timing]], width: float) -> Figure:
    lines = list(dict.fromkeys(line for timings in panels for line in _lines(timings)))
    columns = min(len(panels), 3 if width > 6 else 1)
    rows = -(-len(panels) // columns)
    height = rows * (0.8 + 0.27 * len(lines))
    figure = new_figure(width, height)
    axes: list[Axes] = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for index, (place, timings) in enumerate(zip(axes, panels, strict=False)):
        _panel(place, timings, lines, first=index % columns == 0, width=(width - 1.5) / columns)
    for place in axes[len(panels) :]:
        place.set_visible(False)
    return figure


def _lines(timings: list[Timing]) -> list[Line]:
    backends = [str(timing.record.get("impl") or words.MISSING) for timing in timings]
    return list(zip(op_names(timings), backends, strict=True))


def _panel(axes: Axes, timings: list[Timing], lines: list[Line], first: bool, width: float) -> None:
    found = dict(zip(_lines(timings), timings, strict=True))
    places = _places(lines)
    for place, line in zip(places, lines, strict=True):
        if line in found and found[line].p50 is not None:
            _bar(axes, place, found[line].record)
        else:
            reason = why_no_time(found[line].record) if line in found else "not measured"
            _why(axes, place, reason or "not measured", width)
    _frame(axes, timings)
    axes.set_yticks(places, [f"{op}  {words.name(words.BACKENDS, impl)}" for op, impl in lines])
    axes.set_ylim(places[-1] + 0.6, -0.6)
    axes.tick_params(axis="y", length=0, labelleft=first)


def _frame(axes: Axes, timings: list[Timing]) -> None:
    record = timings[0].record
    tokens = finite(record.get("tokens"))
    about = ["us", f"{tokens:.0f} tokens" if tokens else "", str(record.get("dtype") or "")]
    name = "whole model" if record.get("layer") == "*" else str(record.get("layer"))
    axes.set_title(f"{name}  {words.shape(record)}")
    axes.set_xlabel(", ".join(part for part in about if part))
    axes.set_xlim(0, 1.3 * max(_reach(t.record) for t in timings) or 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)


def _places(lines: list[Line]) -> list[float]:
    # Half a bar of air where one op ends and the next begins.
    breaks = [float(a[0] != b[0]) for a, b in pairwise(lines)]
    return [place + 0.5 * gaps for place, gaps in enumerate(accumulate([0.0, *breaks]))]


def _reach(record: Record) -> float:
    return max((v for v in (verified_time(record), finite(record.get("p80"))) if v is not None), default=0.0)


def _bar(axes: Axes, place: float, record: Record) -> None:
    p50 = verified_time(record) or 0.0
    dense = record.get("op") == "dense"
    colour = BACKEND_COLOURS.get(str(record.get("impl")), MUTED)
    axes.barh(place, p50, height=0.62, color=colour, alpha=0.45 if dense else 1.0)
    low, high = (finite(record.get(key)) for key in ("p20", "p80"))
    end = p50 if high is None else max(p50, high)
    if low is not None and high is not None:
        axes.plot([low, high], [place, place], color=INK, linewidth=1.1, solid_capstyle="butt")
    bound = finite(record.get("bound_us"))
    if bound is not None:
        axes.plot([bound, bound], [place - 0.36, place + 0.36], color=INK, linewidth=1.6)
    axes.annotate(
        words.microseconds(p50),
        (end, place),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
    )


def _why(axes: Axes, place: float, reason: str, width: float) -> None:
    # Sixteen characters of this size take an inch.
    said = textwrap.wrap(reason, max(20, int(16 * width)), max_lines=2, placeholder=" ...")
    axes.annotate(
        "\n".join(said),
        (0, place),
        xycoords=("axes fraction", "data"),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        color=MUTED,
        fontsize=6.8,
        linespacing=1.0,
    )
