"""An SVG drawing, mark by mark: lines, rectangles, text, and groups that say on hovering what they are.

Sizes are CSS pixels at full width. Colours are words of `style.COLOURS`, written as the classes `f-<word>` (fill)
and `s-<word>` (stroke), which the page's stylesheet defines; so a drawing follows the page into the dark.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape

Point = tuple[float, float]

# Widths of letters in ems, as the broader of the usual sans-serif faces have them; a browser's own may be narrower.
_NARROW, _BROAD = frozenset("iljtfrI.,:;|!()[]'/- "), frozenset("mwMW@%")


def text_width(text: str, size: float = 11) -> float:
    """Return about how many pixels a line of text takes."""
    ems = (0.37 if c in _NARROW else 0.95 if c in _BROAD else 0.7 if c.isupper() else 0.62 for c in text)
    return size * sum(ems)


def cut(text: str, width: float, size: float = 11, bold: bool = False) -> str:
    """Shorten a line of text to a width in pixels, with an ellipsis where something is gone."""
    size = 1.1 * size if bold else size
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + "…", size) > width:
        text = text[:-1]
    return text.rstrip() + "…"


@dataclass
class Canvas:
    """A drawing of `width` pixels; `height` may grow until it is written."""

    width: float
    height: float = 0.0
    parts: list[str] = field(default_factory=list)

    def text(
        self,
        at: Point,
        text: str,
        *,
        anchor: str = "start",
        colour: str = "ink",
        size: float = 11,
        bold: bool = False,
        turn: float = 0,
    ) -> None:
        """Write one line: `anchor` start, middle or end; turned by `turn` degrees; its baseline at `at`."""
        x, y = at
        words = "" if colour == "ink" else f" f-{colour}"
        attributes = "" if anchor == "start" else f' text-anchor="{anchor}"'
        attributes += f' transform="rotate({_n(turn)} {_n(x)} {_n(y)})"' if turn else ""
        kind = f"t{size:g}{words}{' b' if bold else ''}"
        self.parts.append(
            f'<text class="{kind}" x="{_n(x)}" y="{_n(y)}"{attributes}>{escape(text, quote=False)}</text>'
        )

    def line(
        self, points: Sequence[Point], colour: str = "ink", width: float = 1, dash: str = "", opacity: float = 1
    ) -> None:
        """Draw a line through points."""
        path = "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in points)
        extra = f' stroke-dasharray="{dash}"' if dash else ""
        extra += f' opacity="{opacity:g}"' if opacity < 1 else ""
        self.parts.append(f'<path class="s-{colour}" d="{path}" stroke-width="{width:g}"{extra}/>')

    def rectangle(self, corner: Point, size: Point, colour: str, opacity: float = 1, border: str = "") -> None:
        """Fill a rectangle from its upper left corner."""
        extra = f' fill-opacity="{opacity:.2g}"' if opacity < 1 else ""
        kind = f"f-{colour}" + (f" s-{border}" if border else "")
        self.parts.append(
            f'<rect class="{kind}" x="{_n(corner[0])}" y="{_n(corner[1])}" '
            f'width="{_n(max(0.0, size[0]))}" height="{_n(max(0.0, size[1]))}"{extra}/>'
        )

    def mark(
        self, at: Point, shape: str, colour: str, radius: float = 4, hollow: bool = False, pale: bool = False
    ) -> None:
        """Draw a square, triangle, circle, diamond or cross; edges in the card's colour keep neighbours apart."""
        kind = f"f-card s-{colour}" if hollow else f"f-{colour} s-card"
        extra = ' opacity=".45"' if pale else ""
        self.parts.append(f'<path class="{kind}" d="{_shape(at, shape, radius)}"{extra}/>')

    @contextmanager
    def titled(self, title: str) -> Iterator[None]:
        """Group what is drawn inside under a title, which a browser shows on hovering."""
        self.parts.append(f"<g><title>{escape(title, quote=False)}</title>")
        yield
        self.parts.append("</g>")

    def svg(self, label: str, described_by: str = "") -> str:
        """Return the drawing as an inline SVG element, an image with a name for who cannot see it."""
        about = f' aria-describedby="{described_by}"' if described_by else ""
        return (
            f'<svg role="img" aria-label="{escape(label, quote=True)}"{about} '
            f'viewBox="0 0 {_n(self.width)} {_n(self.height)}" style="max-width:{self.width:.0f}px">'
            + "".join(self.parts)
            + "</svg>"
        )


def _n(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".") if value else "0"


def _shape(at: Point, shape: str, r: float) -> str:
    (x, y), d = at, 2 * r
    if shape == "square":
        s = 0.9 * r
        return f"M{_n(x - s)} {_n(y - s)}h{_n(2 * s)}v{_n(2 * s)}h{_n(-2 * s)}z"
    if shape == "triangle":
        return f"M{_n(x)} {_n(y - 1.2 * r)}l{_n(1.15 * r)} {_n(d)}h{_n(-2.3 * r)}z"
    if shape == "diamond":
        s = 1.3 * r
        return f"M{_n(x)} {_n(y - s)}l{_n(s)} {_n(s)}l{_n(-s)} {_n(s)}l{_n(-s)} {_n(-s)}z"
    if shape == "cross":
        return f"M{_n(x - r)} {_n(y)}h{_n(d)}M{_n(x)} {_n(y - r)}v{_n(d)}"
    return f"M{_n(x - r)} {_n(y)}a{_n(r)} {_n(r)} 0 1 0 {_n(d)} 0a{_n(r)} {_n(r)} 0 1 0 {_n(-d)} 0z"
