"""One self-contained HTML page of a report: the answer, figures, tables, provenance.

Everything is inline: no script, no file and no font from elsewhere. Each figure is there twice, for wide and
for narrow screens, and takes its colours from the page's light or dark variables.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from blrlab.report import html
from blrlab.report.device_pictures import advice_pictures, device_pictures, prediction_pictures
from blrlab.report.groups import Record, Run, bench_by_device, labels, mapping, sections, split_runs
from blrlab.report.look import STYLESHEET
from blrlab.report.pictures import Picture
from blrlab.report.run_pictures import run_pictures
from blrlab.report.sentences import NO_RECORDS, headlines, latency_sentences, prediction_sentences
from blrlab.report.summary.advice import advices
from blrlab.report.summary.bounds import predictions
from blrlab.report.tables.budget import (
    budget_sentences,
    budget_tables,
    extrapolation_sentences,
    extrapolation_tables,
)
from blrlab.report.tables.compression import compression_table
from blrlab.report.tables.counters import counters_table
from blrlab.report.tables.latency import latency_table
from blrlab.report.tables.predictions import advice_table, prediction_table
from blrlab.report.tables.provenance import provenance_table
from blrlab.report.tables.quality import quality_tables
from blrlab.report.tables.speed import means_table
from blrlab.report.tables.table import Table

Quality = dict[tuple[str, str], list[Run]]


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
    body = "\n".join(_body(runs) if records else [html.paragraph("answer", NO_RECORDS)])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>blrlab report: {escape(names)}</title>\n<style>\n{STYLESHEET}</style>\n</head>\n"
        '<body>\n<a class="skip" href="#content">Skip to the report</a>\n'
        f'<main id="content">\n<h1>blrlab report</h1>\n{body}\n</main>\n</body>\n</html>\n'
    )


def pictures_of(records: Sequence[Record]) -> list[Picture]:
    """Return the page's figures, in its order."""
    runs = split_runs(records)
    return _pictures(runs, sections(runs), bench_by_device(runs))


def _body(runs: list[Run]) -> list[str]:
    quality, timings = sections(runs), bench_by_device(runs)
    pictures, tables = _pictures(runs, quality, timings), _tables(runs, quality, timings)
    parts = _answers(runs, quality, timings)
    parts.append(_contents(pictures, tables))
    parts.append(html.heading(2, "Figures", "figures"))
    parts += [html.picture(shown, f"figure-{number}") for number, shown in enumerate(pictures, 1)]
    parts += [] if pictures else [html.paragraph("aside", "No figure has a record to show.")]
    parts.append(html.heading(2, "Tables", "tables"))
    parts += [html.table(shown, f"table-{number}") for number, shown in enumerate(tables, 1)]
    parts += [] if tables else [html.paragraph("aside", "No table has a record to show.")]
    parts.append(html.heading(2, "Provenance", "provenance"))
    facts = provenance_table(runs)
    absent = html.paragraph("aside", "No environment was recorded.")
    return [*parts, html.table(facts, "machine", wraps=True) if facts else absent]


def _pictures(runs: list[Run], quality: Quality, timings: dict[str, list[Record]]) -> list[Picture]:
    named = sum(map(len, quality.values())) > 1
    pictures = [shown for members in quality.values() for shown in run_pictures(members, named)]
    for device, rows in timings.items():
        pictures += device_pictures(device, rows, _peaks(runs, device))
    for device, rows in predictions(runs).items():
        pictures += prediction_pictures(device, rows)
    for device, found in advices(runs).items():
        pictures += advice_pictures(device, found)
    return pictures


def _tables(runs: list[Run], quality: Quality, timings: dict[str, list[Record]]) -> list[Table]:
    tables: list[Table | None] = []
    for (data_hash, device), members in quality.items():
        tables += [*quality_tables(data_hash, device, members), compression_table(members)]
    tables += budget_tables(runs)
    tables += extrapolation_tables(runs)
    for device, rows in timings.items():
        tables += [means_table(device, rows), latency_table(device, rows)]
    tables += [counters_table(device, rows) for device, rows in bench_by_device(runs, "counters").items()]
    tables += [prediction_table(device, rows) for device, rows in predictions(runs).items()]
    tables += [advice_table(device, found) for device, found in advices(runs).items()]
    return [shown for shown in tables if shown]


def _contents(pictures: list[Picture], tables: list[Table]) -> str:
    entries = [("figures", "Figures", [(f"figure-{k}", p.title) for k, p in enumerate(pictures, 1)])]
    entries.append(("tables", "Tables", [(f"table-{k}", t.title) for k, t in enumerate(tables, 1)]))
    entries.append(("provenance", "Provenance", []))
    lines = []
    for name, title, inner in entries:
        items = "".join(f'<li><a href="#{target}">{html.plain(about)}</a></li>' for target, about in inner)
        lines.append(f'<li><a href="#{name}">{title}</a>{f"<ul>{items}</ul>" if items else ""}</li>')
    return (
        f'<nav aria-label="Contents"><details><summary>Contents</summary>\n<ul>{"".join(lines)}</ul>\n</details></nav>'
    )


def _answers(everything: list[Run], quality: Quality, timings: dict[str, list[Record]]) -> list[str]:
    runs = [run for members in quality.values() for run in members]
    parts: list[str] = []
    for label, run in zip(labels(runs), runs, strict=True):
        scale = f"{run.scale} scale" if run.scale and run.scale not in label else ""
        about = ", ".join(part for part in (label, scale, run.device) if part)
        parts += [html.paragraph("answer", line, about) for line in headlines(run)]
    for device, rows in timings.items():
        parts += [html.paragraph("aside" if runs else "answer", line) for line in latency_sentences(device, rows)]
    for device, rows in predictions(everything).items():
        parts += [html.paragraph("aside" if parts else "answer", line) for line in prediction_sentences(device, rows)]
    for line in [*budget_sentences(everything), *extrapolation_sentences(everything)]:
        parts.append(html.paragraph("aside" if parts else "answer", line))
    return parts or [html.paragraph("answer", "These records hold no evaluation, no timing and no prediction.")]


def _peaks(runs: Iterable[Run], device: str) -> Record:
    known = [mapping(run.env.get("peaks")) for run in runs if run.device == device]
    return next((peaks for peaks in reversed(known) if peaks), {})
