"""What compression loses, size by size: runs on one dense model that differ in how small they made it.

A series is one way to compress (format, blocks, algorithm) at two sizes or more; what is lost is its loss less the
dense model's. A layer-wise mixture, such as a budget gives out, is told by its formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blrlab.report import words
from blrlab.report.groups import Run, grouped, text
from blrlab.report.summary.compression import layer_records
from blrlab.report.summary.quality import quality_rows, splits


@dataclass(frozen=True)
class Size:
    """One compressed model: its way, parameters, and what is lost before and, where it was healed, after healing."""

    way: str
    form: str
    algorithm: str
    parameters: float
    lost: float
    healed: float | None


def sizes(runs: Sequence[Run]) -> dict[str, list[Size]]:
    """Return the compressed models of every way, smallest first; empty where no way has two sizes."""
    found = [size for run in runs for size in _of_run(run)]
    ways = {
        way: sorted(members, key=lambda s: s.parameters) for way, members in grouped(found, lambda s: s.way).items()
    }
    swept = any(len({size.parameters for size in members}) > 1 for members in ways.values())
    return ways if swept else {}


def _of_run(run: Run) -> list[Size]:
    rows = quality_rows(run, (splits(run) or ["valid"])[0])
    healed = {row.variant: row.change for row in rows if row.stage == "healed"}
    return [
        Size(
            _way(run, *row.variant),
            row.variant[0],
            row.variant[1],
            row.parameters,
            row.change,
            healed.get(row.variant),
        )
        for row in rows
        if row.stage == "compressed" and row.parameters and row.change is not None
    ]


def _way(run: Run, form: str, algorithm: str) -> str:
    layers = [r for r in layer_records(run) if r.get("format") not in (None, "dense")]
    blocks = {max(r["blocks"]) for r in layers if r.get("blocks")}
    mixed = len({(text(r.get("format")), str(r.get("blocks"))) for r in layers}) > 1
    told = [words.name(words.FORMATS, form)]
    if mixed:
        told.append("mixed")
    elif len(blocks) == 1 and blocks != {1}:
        told.append(f"{blocks.pop()} blocks")
    return ", ".join([*told, algorithm]).rstrip(", ")
