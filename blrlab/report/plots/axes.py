"""Scales, axes, panels and legends of the report's figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from blrlab.report.plots.canvas import Canvas, Point, text_width

LINE = 15.0  # pixels from one line of text to the next


@dataclass(frozen=True)
class Scale:
    """Maps values low..high to pixels start..end, by their logarithm where `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Return the pixel of a value, which for a log scale is above zero; far outside is cut off."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        place = ((math.log(value) if self.log else value) - low) / ((high - low) or 1.0)
        return self.start + min(3.0, max(-2.0, place)) * (self.end - self.start)

    def value(self, share: float) -> float:
        """Return the value at a share of the way from low to high."""
        if self.log:
            return self.low * (self.high / self.low) ** share
        return self.low + share * (self.high - self.low)

    def ticks(self, most: int = 6) -> list[float]:
        """Return round values inside the scale, about `most` of them."""
        return _log_ticks(self.low, self.high, most) if self.log else _even_ticks(self.low, self.high, most)


@dataclass(frozen=True)
class Box:
    """The plot area of one panel, in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        """Return the width."""
        return self.right - self.left

    @property
    def height(self) -> float:
        """Return the height."""
        return self.bottom - self.top

    def across(self, low: float, high: float, log: bool = False) -> Scale:
        """Return a scale from the left to the right edge."""
        return Scale(low, high, self.left, self.right, log)

    def upwards(self, low: float, high: float, log: bool = False) -> Scale:
        """Return a scale from the bottom to the top edge."""
        return Scale(low, high, self.bottom, self.top, log)


@dataclass(frozen=True)
class Key:
    """One entry of a legend: a mark, or a line where `shape` is empty."""

    label: str
    colour: str
    shape: str = ""
    dash: str = ""
    hollow: bool = False


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [s * 10.0**e for e in range(first, last + 1) for s in steps if low <= s * 10.0**e <= high * (1 + 1e-9)]
        if len(found) <= most:
            break
    stride = -(-len(found) // most)
    return found[::stride]


def _even_ticks(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / most or 1.0
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(s * unit for s in (1, 2, 2.5, 5, 10) if s * unit >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def around(values: Iterable[float], log: bool = False, margin: float = 0.06) -> tuple[float, float]:
    """Return limits that hold all values with a margin on both sides, a share of their span."""
    known = list(values)
    low, high = min(known), max(known)
    if log:
        air = max((high / low) ** margin, 1.02)
        return low / air, high * air
    air = margin * (high - low) or 0.1 * abs(high) or 1.0
    return low - air, high + air


def panels(width: float, count: int, columns: int, left: float, gap: float, right: float = 8.0) -> list[Point]:
    """Return (left, right) of the plot areas of a row of panels; `left` and `gap` leave room for their labels."""
    columns = max(1, min(columns, count))
    each = (width - left - right - (columns - 1) * gap) / columns
    return [(left + k * (each + gap), left + k * (each + gap) + each) for k in range(columns)]


def frame(canvas: Canvas, box: Box, title: str = "") -> None:
    """Draw the left and lower edge of a panel, and its title above."""
    canvas.line([(box.left, box.top), (box.left, box.bottom), (box.right, box.bottom)], "muted", 0.8)
    if title:
        canvas.text((box.left, box.top - 8), title, bold=True, size=12)


def x_axis(
    canvas: Canvas,
    box: Box,
    scale: Scale,
    ticks: Sequence[float],
    write: Callable[[float], str],
    label: str = "",
    grid: bool = True,
) -> None:
    """Draw ticks, their numbers (those that find room) and the axis label below a panel."""
    free = -math.inf
    for value in ticks:
        x = scale.at(value)
        if grid:
            canvas.line([(x, box.top), (x, box.bottom)], "rule", 0.7)
        half = text_width(write(value), 10) / 2
        # A number at the edge is moved in, so that it is not cut off.
        x = max(half, min(x, canvas.width - half))
        if x - half > free:
            canvas.text((x, box.bottom + 14), write(value), anchor="middle", colour="muted", size=10)
            free = x + half + 4
    if label:
        half = text_width(label) / 2
        middle = max(half, min((box.left + box.right) / 2, canvas.width - half))
        canvas.text((middle, box.bottom + 30), label, anchor="middle", colour="muted")


def y_axis(
    canvas: Canvas, box: Box, scale: Scale, ticks: Sequence[float], write: Callable[[float], str], label: str = ""
) -> None:
    """Draw ticks, their numbers and the axis label left of a panel."""
    for value in ticks:
        y = scale.at(value)
        canvas.line([(box.left, y), (box.right, y)], "rule", 0.7)
        canvas.text((box.left - 6, y + 3.5), write(value), anchor="end", colour="muted", size=10)
    if label:
        widest = max((text_width(write(value), 10) for value in ticks), default=0.0)
        at = (box.left - widest - 14, (box.top + box.bottom) / 2)
        canvas.text(at, label, anchor="middle", colour="muted", turn=-90)


def legend(canvas: Canvas, keys: Sequence[Key], left: float, top: float) -> float:
    """Draw entries in lines from (left, top) on, and return how many pixels high they are."""
    x, y = left, top + 11
    for key in keys:
        wide = 22 + text_width(key.label) + 12
        if x + wide > canvas.width and x > left:
            x, y = left, y + LINE + 2
        if key.shape:
            canvas.mark((x + 8, y - 4), key.shape, key.colour, 4, key.hollow)
        else:
            canvas.line([(x, y - 4), (x + 16, y - 4)], key.colour, 1.8, key.dash)
        canvas.text((x + 21, y), key.label)
        x += wide
    return y - top + 6 if keys else 0.0


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


def name_lines(canvas: Canvas, box: Box, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write (y, label, colour) right of a panel at these heights, moved apart where they would overlap."""
    lines = max((label.count("\n") + 1 for _, label, _ in ends), default=1)
    heights = [min(box.bottom, max(box.top, y)) for y, _, _ in ends]
    for y, (_, label, colour) in zip(spread(heights, 13.0 * lines + 1), ends, strict=True):
        parts = label.split("\n")
        for k, part in enumerate(parts):
            canvas.text((box.right + 6, y + 4 + 13 * (k - (len(parts) - 1) / 2)), part, colour=colour)
