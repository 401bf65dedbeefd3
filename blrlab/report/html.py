"""Parts of the page: paragraphs, figures, tables. Plain HTML, escaped, nothing that needs a script."""

from __future__ import annotations

from html import escape

from blrlab.report.pictures import Picture
from blrlab.report.tables.table import Column, Table

# A longer table is folded away; paper shows all of it.
MOST_ROWS = 60


def paragraph(kind: str, line: str, label: str = "") -> str:
    """Return a paragraph of a class, with a bold label before it."""
    return f'<p class="{kind}">{f"<b>{plain(label)}</b>" if label else ""}{plain(line)}</p>'


def heading(level: int, words: str, name: str) -> str:
    """Return a heading that a link can lead to."""
    return f'<h{level} id="{name}">{plain(words)}</h{level}>'


def picture(shown: Picture, name: str) -> str:
    """Return a figure in both widths with its data, or a card that says why there is none."""
    if shown.figures is None:
        return f'<div class="card" id="{name}"><h3>{plain(shown.title)}</h3>{paragraph("note", shown.absent)}</div>'
    drawn = "\n".join(
        f'<div class="{kind}">{canvas.svg(shown.title, f"{name}-caption")}</div>'
        for kind, canvas in zip(("wide", "narrow"), shown.figures, strict=True)
    )
    data = ""
    if shown.data:
        several = len(shown.data) > 1
        grids = ((paragraph("note", one.title) if several else "") + _grid(one) for one in shown.data)
        data = _folded(f"Data of this figure ({_rows(sum(len(one.rows) for one in shown.data))})", "\n".join(grids))
    return (
        f'<div class="card" id="{name}">\n<figure>\n<figcaption><h3>{plain(shown.title)}</h3>'
        f'<p id="{name}-caption">{plain(shown.caption)}</p></figcaption>\n{drawn}\n</figure>\n{data}</div>'
    )


def table(shown: Table, name: str, wraps: bool = False) -> str:
    """Return a table on a card, its notes beneath; a long one folded away."""
    notes = "\n".join(paragraph("note", note) for note in shown.told())
    grid = _grid(shown, wraps)
    grid = grid if len(shown.rows) <= MOST_ROWS else _folded(f"Show the table ({_rows(len(shown.rows))})", grid)
    return f'<div class="card" id="{name}">\n<h3>{plain(shown.title)}</h3>\n{grid}\n{notes}\n</div>'


def plain(words: str) -> str:
    """Escape text for the page."""
    # Plain text has no arrow of its own; a page does, and must not break the line inside it.
    return escape(words).replace(" -&gt; ", " → ")


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{plain(summary)}</summary>\n{content}\n</details>\n"


def _rows(count: int) -> str:
    return f"{count:,} {'row' if count == 1 else 'rows'}"


def _grid(shown: Table, wraps: bool = False) -> str:
    head = "".join(_cell("th", column, column.title) for column in shown.columns)
    rows = "\n".join(
        ("<tr class=opens>" if index in shown.breaks else "<tr>")
        + "".join(_cell("td", column, cell) for column, cell in zip(shown.columns, row, strict=True))
        + "</tr>"
        for index, row in enumerate(shown.shown())
    )
    kind = ' class="wraps"' if wraps else ""
    # Whoever has no mouse can still scroll what is wider than the screen.
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(shown.title, quote=True)}">'
        f"<table{kind}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>"
    )


def _cell(tag: str, column: Column, words: str) -> str:
    kind = " class=n" if column.number else " class=prose" if column.prose else ""
    scope = " scope=col" if tag == "th" else ""
    return f"<{tag}{scope}{kind}>{plain(words).replace(chr(10), '<br>')}</{tag}>"
