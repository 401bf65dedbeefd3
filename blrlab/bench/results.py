"""The file a benchmark writes: a row as soon as it is measured, and what a resumed run need not measure again."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from blrlab import records

Row = dict[str, Any]
IDENTITY = (
    "op", "impl", "net", "layer", "phase", "in_features", "out_features", "blocks", "rank", "block_rank", "batch",
    "tokens", "dtype", "plan_hash",
)  # fmt: skip
# What another run may not meet: a crash, a full memory.
BY_CHANCE = ("it cannot be timed", "the process that ran XLA", "MemoryError", "out of memory", "RESOURCE_EXHAUSTED")
MACHINE = ("device", "torch", "triton", "jax", "driver")


class Results:
    """Bench rows in a JSON-lines file, by what identifies them."""

    def __init__(self, path: Path, fresh: bool = False):
        """Open a file, whose torn last line is dropped; `fresh` empties it.

        Raises:
          InputError: a line of the file is damaged.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            path.unlink(missing_ok=True)
        records.keep(path, lambda record: True)
        self._found = {identity(row): row for row in self._rows()}

    def has(self, row: Mapping[str, Any], machine: Mapping[str, Any]) -> bool:
        """Say whether a row was measured before, on the same machine and versions, and did not fail by chance."""
        found = self._found.get(identity(row))
        if found is None or any(found.get(name) != machine.get(name) for name in MACHINE):
            return False
        reason = str(found.get("reason") or "")
        return not any(chance in reason for chance in BY_CHANCE)

    def commits(self) -> list[str]:
        """Return the commits that the rows were measured at."""
        return sorted({str(row.get("commit")) for row in self._found.values()})

    def start(self, env: Row) -> None:
        """Append the record of machine and ceilings that the next rows belong to."""
        records.append(self.path, env)

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows."""
        for row in rows:
            self._found[identity(row)] = row
            records.append(self.path, row)

    def _rows(self) -> Sequence[Row]:
        found = records.read(self.path) if self.path.exists() else []
        return [record for record in found if record.get("kind") == "bench"]


def identity(row: Mapping[str, Any]) -> str:
    """Return what two rows of the same measurement share."""
    return repr([row.get(name) for name in IDENTITY])
