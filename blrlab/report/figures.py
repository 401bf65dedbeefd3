"""The report's figures as SVG files, each complete in itself: for READMEs and papers."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from blrlab.report.groups import Record
from blrlab.report.look import DRAWINGS
from blrlab.report.page import pictures_of
from blrlab.report.plots.canvas import Canvas


def write_figures(records: Sequence[Record], folder: str | os.PathLike[str]) -> list[Path]:
    """Write every figure in its wide form, named by its title, and return the files in the order of the page.

    Files of the same names are replaced; others in the folder stay. Raises OSError where it cannot be written.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    written: dict[Path, str] = {}
    for shown in pictures_of(records):
        if shown.figures:
            path = target / f"{slug(shown.title)}.svg"
            # Two runs may have figures of one title.
            path = path if path not in written else path.with_stem(f"{path.stem}_{len(written) + 1}")
            written[path] = standalone(shown.figures[0], shown.title)
    for path, content in written.items():
        path.write_text(content, encoding="utf-8")
    return list(written)


def slug(title: str) -> str:
    """Return a file name of a title.

    >>> slug("Roofline of NVIDIA H100, 80GB")
    'roofline_of_nvidia_h100_80gb'
    """
    return re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")[:120] or "figure"


def standalone(canvas: Canvas, title: str) -> str:
    """Return a drawing as an SVG document with its colours, light or dark as the reader's screen."""
    drawing = canvas.svg(title)
    size = f'width="{canvas.width:.0f}" height="{canvas.height:.0f}"'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size} '
    ground = '<rect class="f-card" width="100%" height="100%"/>'
    inner = f"<title>{escape(title, quote=False)}</title><style>{DRAWINGS}</style>{ground}"
    return drawing.replace("<svg ", opening, 1).replace(">", f">{inner}", 1) + "\n"
