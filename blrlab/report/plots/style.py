"""How figures look: one palette for the whole report, plain axes, labels beside the lines they name.

The hues are those of Okabe and Ito, told apart by readers who see few colours; shapes and words carry the
same meaning a second time. Every colour here is a token: `svg` turns it into a CSS variable of the same
name, so that a figure follows the page into the dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

WIDE = 9.6
NARROW = 4.0

COLOURS = {
    "ink": "#1b2430",
    "muted": "#5b6675",
    "rule": "#d5dae1",
    "card": "#fefefe",
    "slate": "#6b7684",
    "blue": "#0072b2",
    "sky": "#4aa8dc",
    "orange": "#e69f01",
    "vermilion": "#d55e00",
    "green": "#019e73",
    "purple": "#a4509a",
}
INK, MUTED, RULE, CARD = (COLOURS[key] for key in ("ink", "muted", "rule", "card"))

STAGE_COLOURS = {
    "dense": COLOURS["slate"],
    "dense_continued": COLOURS["blue"],
    "compressed": COLOURS["vermilion"],
    "healed": COLOURS["vermilion"],
    "heal": COLOURS["vermilion"],
}
FORMAT_COLOURS = {
    "dense": COLOURS["slate"],
    "low_rank": COLOURS["orange"],
    "monarch": COLOURS["green"],
    "blast": COLOURS["purple"],
}
BACKEND_COLOURS = {
    "xla": COLOURS["sky"],
    "torch": COLOURS["orange"],
    "torch_compile": COLOURS["vermilion"],
    "triton": COLOURS["blue"],
}
FORMAT_MARKERS = {"dense": "s", "low_rank": "^", "monarch": "o", "blast": "D"}

_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.facecolor": CARD,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "text.color": INK,
    "text.parse_math": False,
    "figure.facecolor": CARD,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    # Text stays text: readable by a screen reader, and in the page's own font.
    "svg.fonttype": "none",
    "svg.hashsalt": "blrlab",
}


# The decorator of whatever draws or writes a figure.
styled = matplotlib.rc_context(_RC)


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of `width` x `height` inches that keeps its panels apart."""
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Move positions apart until neighbours lie at least `gap` from each other, order and middle kept."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    placed = [values[i] for i in order]
    for _ in range(200):
        for i in range(len(placed) - 1):
            short = gap - (placed[i + 1] - placed[i])
            if short > 1e-9 * gap:
                placed[i] -= short / 2
                placed[i + 1] += short / 2
    result = [0.0] * len(values)
    for position, i in zip(placed, order, strict=True):
        result[i] = position
    return result


def name_lines(axes: Axes, ends: Sequence[tuple[float, str, str]], gap: float = 0.085) -> None:
    """Write (value, label, colour) right of the axes at their heights, moved apart where they would overlap.

    `gap` is the least distance between labels, as a share of the axes' height.
    """
    bottom, top = axes.get_ylim()
    # A label far outside would push the axes out of the figure.
    heights = [min(1.0, max(0.0, (value - bottom) / (top - bottom))) for value, _, _ in ends]
    for height, (_, label, colour) in zip(spread(heights, gap), ends, strict=True):
        axes.annotate(label, (1.015, height), xycoords="axes fraction", color=colour, va="center", fontsize=8.5)


def svg(figure: Figure, prefix: str, label: str) -> str:
    """Return a figure as an inline SVG element, coloured by CSS variables, its ids set apart by `prefix`."""
    drawing = _saved(figure)
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r' xmlns(:\w+)?="[^"]*"', "", drawing)
    drawing = drawing.replace("xlink:href", "href")
    drawing = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", drawing)
    # A font stack names fonts of the machine that drew the figure; the page has its own.
    drawing = re.sub(r"font: ([^;\"]*?[\d.]+px) [^;\"]*", r"font: \1 var(--font)", drawing)
    for name, colour in COLOURS.items():
        drawing = drawing.replace(colour, f"var(--{name})")
    width = figure.get_size_inches()[0]
    opening = f'<svg role="img" aria-label="{escape(label, quote=True)}" style="max-width: {96 * width:.0f}px" '
    return drawing.replace("<svg ", opening, 1)


@styled
def _saved(figure: Figure) -> str:
    buffer = io.StringIO()
    # No date and no version: the same records give the same page.
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return buffer.getvalue()
