"""The table that holds the cost model against what a GPU counted."""

from __future__ import annotations

from blrlab.report import words
from blrlab.report.groups import Record, finite, latest, text
from blrlab.report.tables.table import Column, Table

COLUMNS = (
    Column("layer", 0, False, group=True),
    Column("tokens", 0, group=True),
    Column("op", 0, False),
    Column("backend", 0, False),
    Column("tensor cores\nx model"),
    Column("CUDA cores\nx model", 3),
    Column("DRAM\nMB", 2),
    Column("DRAM\nx model"),
    Column("L2\nMB", 4),
    Column("L2\nx model", 1),
)
HOW_TO_READ = (
    "x model: what the profiler counted over what the cost model says, of one call; operations are of whole tiles.",
    "A star: moves less than twice the L2, where what a call before it left there counts.",
)


def counters_table(device: str, records: list[Record]) -> Table:
    """Return the counts of one device beside the cost model's."""
    kept = latest(records, lambda r: tuple(text(r.get(key), "") for key in ("net", "layer", "tokens", "op", "impl")))
    shapes = [(r.get("net"), r.get("layer"), r.get("tokens")) for r in kept]
    breaks = frozenset(i for i, shape in enumerate(shapes) if i == 0 or shape != shapes[i - 1])
    rows = tuple(_cells(record) for record in kept)
    return Table(f"Counted on {device}", COLUMNS, rows, breaks).noted(*HOW_TO_READ)


def _cells(record: Record) -> tuple[str, ...]:
    moved, l2 = finite(record.get("dram_bytes")), finite(record.get("l2_size"))
    small = "*" if moved and l2 and moved <= 2 * l2 else ""
    return (
        f"{text(record.get('net'))} {text(record.get('layer'))}",
        text(record.get("tokens")),
        words.name(words.FORMATS, record.get("op")),
        words.backend(record.get("impl")),
        _ratio(record, "tensor_flops"),
        _ratio(record, "cuda_flops"),
        _megabytes(record, "dram_bytes"),
        _ratio(record, "dram_bytes") + small,
        _megabytes(record, "l2_bytes"),
        _ratio(record, "l2_bytes"),
    )


def _ratio(record: Record, key: str) -> str:
    counted, predicted = finite(record.get(f"counted_{key}")), finite(record.get(key))
    return f"{counted / predicted:.3f}" if counted is not None and predicted else words.MISSING


def _megabytes(record: Record, key: str) -> str:
    counted = finite(record.get(f"counted_{key}"))
    return f"{counted / 1e6:,.0f}" if counted is not None else words.MISSING
