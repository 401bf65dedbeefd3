"""What compression did to each kind of layer: errors, parameters and factors from the `compress` records."""

from __future__ import annotations

import re
from dataclasses import dataclass
from statistics import fmean

from blrlab.report.groups import Record, Run, finite, grouped, latest, text
from blrlab.report.words import blocks, shape


@dataclass(frozen=True)
class LayerKind:
    """All layers of one name, shape, format and algorithm; errors are relative, in Frobenius norm, of W and of x W."""

    layer: str
    shape: str
    format: str
    algorithm: str
    layers: int
    blocks: tuple[str, ...]
    ranks: tuple[float, ...]
    block_ranks: tuple[float, ...]
    mean_error: float | None
    worst_error: float | None
    output_error: float | None
    params_before: float | None
    params_after: float | None

    @property
    def factor(self) -> float | None:
        """Return parameters before over parameters after."""
        return self.params_before / self.params_after if self.params_before and self.params_after else None


def layer_records(run: Run) -> list[Record]:
    """Return the latest record of every compressed path, format and algorithm."""
    rows = (r for r in run.of("compress") if r.get("path") != "*")
    return latest(rows, lambda r: (r.get("path"), r.get("format"), r.get("algorithm")))


def layer_kinds(run: Run) -> list[LayerKind]:
    """Return one row per (layer name, shape, format, algorithm), in the order of the model."""
    return [_kind(rows) for rows in grouped(layer_records(run), _kind_key).values()]


def layer_name(record: Record) -> str:
    """Return the name of a record's layer: `layer`, or the last part of its path."""
    return text(record.get("layer"), text(record.get("path")).rsplit("/", 1)[-1])


def depth(record: Record, otherwise: int) -> int:
    """Return the block a path lies in: its first number, and `otherwise` where it has none."""
    number = re.search(r"\d+", text(record.get("path")))
    return int(number.group()) if number else otherwise


def _kind_key(record: Record) -> tuple[str, str, str, str]:
    return layer_name(record), shape(record), text(record.get("format")), text(record.get("algorithm"), "")


def _numbers(rows: list[Record], key: str) -> list[float]:
    return [v for v in (finite(r.get(key)) for r in rows) if v is not None]


def _total(rows: list[Record], key: str) -> float | None:
    numbers = _numbers(rows, key)
    # A sum over some of the layers would pass for the sum over all of them.
    return sum(numbers) if len(numbers) == len(rows) else None


def _kind(rows: list[Record]) -> LayerKind:
    name, size, format_, algorithm = _kind_key(rows[0])
    errors, of_output = _numbers(rows, "relative_error"), _numbers(rows, "output_error")
    return LayerKind(
        layer=name,
        shape=size,
        format=format_,
        algorithm=algorithm,
        layers=len(rows),
        blocks=tuple(dict.fromkeys(blocks(r.get("blocks")) for r in rows)),
        ranks=tuple(_numbers(rows, "rank")),
        block_ranks=tuple(_numbers(rows, "block_rank")),
        mean_error=fmean(errors) if errors else None,
        worst_error=max(errors, default=None),
        output_error=fmean(of_output) if of_output else None,
        params_before=_total(rows, "params_before"),
        params_after=_total(rows, "params_after"),
    )
