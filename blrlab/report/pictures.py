"""A figure of the page: title, caption and the data behind it, or the sentence that stands for a missing one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from blrlab.report.plots.canvas import Canvas
from blrlab.report.plots.style import NARROW, WIDE
from blrlab.report.tables.table import Table

Data = Callable[[], Table | tuple[Table, ...]]


@dataclass(frozen=True)
class Picture:
    """A figure for wide and one for narrow screens and its data, or `absent`: why there is none."""

    title: str
    caption: str
    figures: tuple[Canvas, Canvas] | None
    absent: str = ""
    data: tuple[Table, ...] = ()


def picture(
    title: str,
    caption: str,
    draw: Callable[[float], Canvas | None],
    absent: str,
    data: Data,
) -> Picture:
    """Draw a figure for wide and for narrow screens; `absent` is said where there is nothing to draw."""
    wide, narrow = draw(WIDE), draw(NARROW)
    if wide is None or narrow is None:
        return Picture(title, caption, None, absent)
    found = data()
    return Picture(title, caption, (wide, narrow), absent, found if isinstance(found, tuple) else (found,))


def there(shown: Picture) -> list[Picture]:
    """Return a picture that was drawn; one that has nothing to show and nothing to say is left out."""
    return [shown] if shown.figures else []
