"""The table of compression: a row per kind of layer, and the factors of the whole in the notes."""

from __future__ import annotations

from blrlab.report import words
from blrlab.report.groups import Record, Run, finite, labels, latest
from blrlab.report.summary.compression import LayerKind, layer_kinds
from blrlab.report.tables.table import Column, Table

OUTPUT = "of\noutput"
COLUMNS = (
    Column("run", 0, False, group=True),
    Column("layer", 0, False),
    Column("layers", 3),
    Column("in x out", 2, False),
    Column("format", 0, False),
    Column("algorithm", 6, False),
    Column("blocks", 1, False),
    Column("rank", 1),
    Column("mean\nerror"),
    Column("worst\nerror"),
    Column(OUTPUT, note="Of output: the mean error of what layers return; a fit to it may leave W itself far off."),
    Column("parameters"),
    Column("smaller"),
)


def compression_table(runs: list[Run]) -> Table | None:
    """Return a row per layer kind of every run, or None where nothing was compressed."""
    rows: list[tuple[str, ...]] = []
    breaks: set[int] = set()
    notes: list[str] = []
    for label, run in zip(labels(runs), runs, strict=True):
        kinds = layer_kinds(run)
        breaks |= {len(rows)} if kinds else set()
        rows += [(label, *_cells(kind)) for kind in kinds]
        notes += [f"{label}: {note}" if len(runs) > 1 else words.sentence(note) for note in _totals(run)]
    if not rows and not notes:
        return None
    table = Table(
        "Compression: relative Frobenius error by layer",
        COLUMNS,
        tuple(rows),
        frozenset(breaks),
        tuple(notes),
    )
    gone = ["run"] if len(runs) == 1 else []
    gone += [OUTPUT] if set(table.cells(OUTPUT)) <= {words.MISSING} else []
    return table.without(gone).say_once(["algorithm"]) if rows else table.without(gone)


def _totals(run: Run) -> list[str]:
    rows = latest(run.of("compress", path="*"), lambda r: (r.get("format"), r.get("algorithm")))
    return [note for note in map(_total, rows) if note]


def _total(record: Record) -> str:
    layer, model = finite(record.get("layer_factor")), finite(record.get("model_factor"))
    before, after = finite(record.get("params_before")), finite(record.get("params_after"))
    seconds = finite(record.get("seconds"))
    parts = [
        f"factored layers {words.factor(layer)} smaller" if layer else "",
        f"whole model {words.factor(model)} smaller" if model else "",
        f"{words.count(before)} -> {words.count(after)} parameters" if before and after else "",
        f"{seconds:.1f} s" if seconds is not None else "",
    ]
    return ", ".join(part for part in parts if part)


def _cells(kind: LayerKind) -> tuple[str, ...]:
    rank = words.span(list(kind.ranks))
    rank += f" ({words.span(list(kind.block_ranks))} a block)" if kind.block_ranks else ""
    return (
        kind.layer,
        str(kind.layers),
        kind.shape,
        words.name(words.FORMATS, kind.format),
        kind.algorithm or words.MISSING,
        ", ".join(kind.blocks),
        rank,
        _error(kind.mean_error),
        _error(kind.worst_error),
        _error(kind.output_error),
        f"{words.count(kind.params_before)} -> {words.count(kind.params_after)}",
        words.factor(kind.factor),
    )


def _error(value: float | None) -> str:
    return words.MISSING if value is None else f"{value:.3f}"
