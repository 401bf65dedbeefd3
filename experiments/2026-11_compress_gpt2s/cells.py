"""The cells of the study's table: how each is named, ranked and made."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

from blrlab import records

STUDY = Path(__file__).resolve().parent
# Format and blocks; a budget chooses them.
KINDS = {
    "blast": ("blast", 6),
    "low_rank": ("low_rank", 1),
    "blast12": ("blast", 12),
    "monarch": ("monarch", 4),
    "blast_precgd": ("blast", 6),
    "budget": ("", 0),
}
MODES = ("whitened", "plain", "sequential")
ONLY = {"blast12": ("whitened", "plain"), "blast_precgd": ("plain",), "budget": ("whitened", "plain")}
FACTORS = ("3", "1.5", "2")
MULTIPLE = 4  # of which ranks, of a Monarch block too, are multiples
SHAPES = {"*/attn/c_attn": (1, 3), "*/mlp/c_fc": (1, 4), "*/mlp/c_proj": (4, 1)}  # in and out, in model widths


@dataclasses.dataclass(frozen=True)
class Cell:
    """One compressed model of the table."""

    kind: str
    mode: str
    factor: str

    @property
    def name(self) -> str:
        """Its file's name in the records."""
        return f"{self.kind}_{self.mode}_{self.factor}"

    def importance(self) -> int:
        """Return its place in the order: factors 3 and 1.5 first, then sequences at 2, budgets, the rest."""
        if self.kind == "budget":
            return 3 if self.name == "budget_whitened_2" else 4
        return FACTORS.index(self.factor) if self.factor != "2" or self.mode == "sequential" else 5


def cells() -> list[Cell]:
    """List all cells, the most important first."""
    every = (Cell(kind, mode, factor) for factor, mode, kind in itertools.product(FACTORS, MODES, KINDS))
    return sorted((cell for cell in every if cell.mode in ONLY.get(cell.kind, MODES)), key=Cell.importance)


def rules(cell: Cell, width: int) -> list[tuple[str, dict[str, Any]]]:
    """Give every layer of a model [width] the largest rank that fits the cell's factor."""
    form, blocks = KINDS[cell.kind]
    multiple, found = MULTIPLE * (blocks if form == "monarch" else 1), []
    for path, (i, o) in SHAPES.items():
        for_each = width * (i + o) + (blocks**2 if form == "blast" else 0)
        rank = int(width**2 * i * o / float(cell.factor) / for_each) // multiple * multiple
        found.append((path, {"format": form, "blocks": blocks, "rank": rank}))
    return found


def losses(file: Path) -> dict[str, float]:
    """Return {stage: validation loss, nats/token} of a cell's records; empty where there is no file."""
    rows = records.read(file) if file.exists() else []
    return {row["stage"]: row["value"] for row in rows if row["kind"] == "eval" and row["metric"] == "loss"}
