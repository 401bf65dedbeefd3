"""One self-contained HTML page of a report: the answer, figures, tables, provenance.

Everything is inline: no script, no file and no font from elsewhere. Each figure is there twice, for wide and
for narrow screens, and takes its colours from the page's light or dark variables.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from blrlab.report.groups import Record, Run, bench_by_device, labels, mapping, sections, split_runs
from blrlab.report.look import STYLESHEET
from blrlab.report.pictures import Picture, device_pictures, run_pictures
from blrlab.report.plots.style import svg
from blrlab.report.sentences import NO_RECORDS, headlines, latency_sentences
from blrlab.report.tables.compression import compression_table
from blrlab.report.tables.latency import latency_table
from blrlab.report.tables.provenance import provenance_table
from blrlab.report.tables.quality import quality_tables
from blrlab.report.tables.table import Column, Table


def write_html(records: Sequence[Record], path: str | os.PathLike[str]) -> Path:
    """Write the report as one page and return its path; the file appears whole or not at all.

    Raises OSError where the folder is missing or cannot be written.
    """
    target = Path(path)
    content = page(records)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def page(records: Sequence[Record]) -> str:
    """Return the whole page as text."""
    runs = split_runs(records)
    names = ", ".join(dict.fromkeys(run.config for run in runs)) or "no records"
    body = "\n".join(_body(runs) if records else [_paragraph("answer", NO_RECORDS)])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>blrlab report: {escape(names)}</title>\n<style>\n{STYLESHEET}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>blrlab report</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _body(runs: list[Run]) -> list[str]:
    quality, timings = sections(runs), bench_by_device(runs)
    parts = _answers(quality, timings)
    parts.append("<h2>Figures</h2>")
    named = sum(map(len, quality.values())) > 1
    pictures = [picture for members in quality.values() for picture in run_pictures(members, named)]
    for device, rows in timings.items():
        pictures += device_pictures(device, rows, _peaks(runs, device))
    parts += [_picture(picture, f"f{number}") for number, picture in enumerate(pictures, 1)]
    parts.append("<h2>Tables</h2>")
    tables: list[Table | None] = []
    for (data_hash, device), members in quality.items():
        tables += [*quality_tables(data_hash, device, members), compression_table(members)]
    tables += [latency_table(device, rows) for device, rows in timings.items()]
    parts += [_table(table) for table in tables if table] or [_paragraph("aside", "No table has a record to show.")]
    parts.append("<h2>Provenance</h2>")
    provenance = provenance_table(runs)
    parts.append(_table(provenance, wraps=True) if provenance else _paragraph("aside", "No environment was recorded."))
    return parts


def _answers(quality: dict[tuple[str, str], list[Run]], timings: dict[str, list[Record]]) -> list[str]:
    runs = [run for members in quality.values() for run in members]
    parts: list[str] = []
    for label, run in zip(labels(runs), runs, strict=True):
        scale = f"{run.scale} scale" if run.scale and run.scale not in label else ""
        about = ", ".join(part for part in (label, scale, run.device) if part)
        parts += [_paragraph("answer", line, about) for line in headlines(run)]
    for device, rows in timings.items():
        parts += [_paragraph("aside" if runs else "answer", line) for line in latency_sentences(device, rows)]
    return parts or [_paragraph("answer", "These records hold no evaluation and no timing.")]


def _peaks(runs: Iterable[Run], device: str) -> Record:
    known = [mapping(run.env.get("peaks")) for run in runs if run.device == device]
    return next((peaks for peaks in reversed(known) if peaks), {})


def _paragraph(kind: str, line: str, label: str = "") -> str:
    return f'<p class="{kind}">{f"<b>{_text(label)}</b>" if label else ""}{_text(line)}</p>'


def _picture(picture: Picture, prefix: str) -> str:
    if picture.figures is None:
        return f'<div class="card"><h3>{_text(picture.title)}</h3>{_paragraph("note", picture.absent)}</div>'
    drawn = zip(("wide", "narrow"), picture.figures, strict=True)
    return (
        f"<figure>\n<figcaption><b>{escape(picture.title)}</b>{escape(picture.caption)}</figcaption>\n"
        + "\n".join(f'<div class="{kind}">{svg(f, prefix + kind[0], picture.title)}</div>' for kind, f in drawn)
        + "\n</figure>"
    )


def _table(table: Table, wraps: bool = False) -> str:
    head = "".join(_cell("th", column, column.title) for column in table.columns)
    rows = "\n".join(
        ('<tr class="opens">' if index in table.breaks else "<tr>")
        + "".join(_cell("td", column, cell) for column, cell in zip(table.columns, row, strict=True))
        + "</tr>"
        for index, row in enumerate(table.shown())
    )
    notes = "\n".join(_paragraph("note", note) for note in table.notes)
    kind = ' class="wraps"' if wraps else ""
    return (
        f'<div class="card">\n<h3>{_text(table.title)}</h3>\n<div class="scroll"><table{kind}>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>\n{notes}\n</div>"
    )


def _cell(tag: str, column: Column, words: str) -> str:
    kind = ' class="n"' if column.number else ""
    scope = ' scope="col"' if tag == "th" else ""
    return f"<{tag}{scope}{kind}>{_text(words).replace(chr(10), '<br>')}</{tag}>"


def _text(words: str) -> str:
    # Plain text has no arrow of its own; a page does, and must not break the line inside it.
    return escape(words).replace(" -&gt; ", " → ")
