"""The table of losses: one per split and loss unit, for runs that share their data and their device."""

from __future__ import annotations

from blrlab.report import words
from blrlab.report.groups import Run, finite, labels, text
from blrlab.report.summary.quality import Quality, quality_rows, splits
from blrlab.report.tables.table import Column, Table

DENOISING = "mse + T/1000 vb"  # the unit of a denoiser's loss, T the steps of its noise


def quality_tables(data_hash: str, device: str, runs: list[Run]) -> list[Table]:
    """Return the tables of one (data hash, device) section; none where nothing was evaluated."""
    tables: list[Table] = []
    for split in dict.fromkeys(split for run in runs for split in splits(run)):
        rows = [(label, run, quality_rows(run, split)) for label, run in zip(labels(runs), runs, strict=True)]
        for unit in dict.fromkeys(row.loss_unit for _, _, found in rows for row in found):
            chosen = [(label, [r for r in found if r.loss_unit == unit]) for label, _, found in rows]
            title = f"Quality on {split}{_windows(split, runs)}, data {words.short_hash(data_hash)}, {device}"
            tables.append(_table(title, unit, [(label, found) for label, found in chosen if found]))
    return tables


def _windows(split: str, runs: list[Run]) -> str:
    rows = [r for run in runs for r in run.of("eval") if r.get("metric") != "fid"]  # which has images of its own
    counts = {finite(r.get("examples")) for r in rows if text(r.get("split"), "valid") == split}
    known = [c for c in counts if c is not None]
    units = {text(r.get("unit"), "") for run in runs for r in run.of("eval", metric="loss")}
    of_images = units & {"nats/image", DENOISING}
    return f", {words.span(known)} {'images' if of_images else 'windows'}" if known else ""


def _table(title: str, unit: str, runs: list[tuple[str, list[Quality]]]) -> Table:
    rows: list[tuple[str, ...]] = []
    breaks: set[int] = set()
    for label, found in runs:
        breaks.add(len(rows))
        rows += [(label, *_cells(row)) for row in found]
    per = next((r.perplexity_unit for _, found in runs for r in found if r.perplexity_unit), "")
    of_text, of_classes = (f"perplexity\n{per}".rstrip(), "bits\nper byte"), ("top-1", "top-5")
    of_noise = ("noise\nMSE", "bound\nbits/value", "FID")
    measures = of_text + of_classes + of_noise
    columns = (
        Column("run", 0, False, group=True),
        Column("stage", 0, False),
        Column("format", 2, False),
        Column("algorithm", 4, False),
        Column(f"loss\n{unit}"),
        Column("change\nvs dense"),
        *map(Column, measures),
        Column("parameters"),
        Column("smaller\n(model)", 1),
    )
    table = Table(title, columns, tuple(rows), frozenset(breaks))
    # Text has no right answers, images no perplexity; all else is shown, empty or not.
    answered = unit == DENOISING or any(row.top1 is not None for _, found in runs for row in found)
    optional = measures if answered else of_classes + of_noise
    table = table.without(title for title in optional if _empty(table, title))
    return table.without(["run"]) if len(runs) == 1 else table


def _empty(table: Table, title: str) -> bool:
    return not set(table.cells(title)) - {words.MISSING}


def _cells(row: Quality) -> tuple[str, ...]:
    format_, algorithm = row.variant
    return (
        words.name(words.STAGES, row.stage),
        words.name(words.FORMATS, format_ or "dense"),
        algorithm or words.MISSING,
        # A loss that is there and no number has diverged, which must not read like one that is absent.
        "not finite" if row.loss is None else words.loss(row.loss),
        words.change(row.change),
        words.loss(row.perplexity),
        words.loss(row.bits_per_byte),
        words.MISSING if row.top1 is None else f"{100 * row.top1:.1f} %",
        words.MISSING if row.top5 is None else f"{100 * row.top5:.1f} %",
        words.loss(row.mse),
        words.loss(row.vb),
        words.loss(row.fid),
        words.count(row.parameters),
        words.factor(row.model_factor),
    )
