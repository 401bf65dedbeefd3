"""Speed over dense of every op and backend: layer by layer, and as a geometric mean over them.

Where one op and backend was timed on a layer at several blocks or ranks, the fastest of them counts. A mean is over
layers of one number of tokens and one dtype; of whole models, also of one batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from blrlab.report import words
from blrlab.report.groups import finite, grouped, text
from blrlab.report.summary.latency import LayerKey, Timing, order

Contender = tuple[str, str]
Place = tuple[float | None, str, float | None]
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Speed:
    """One op and backend at one number of tokens and dtype: its timings, one a layer, and their mean over dense.

    `batch` is that of whole models, None of layers.
    """

    op: str
    impl: str
    tokens: float | None
    dtype: str
    batch: float | None
    timings: tuple[Timing, ...]
    mean: float

    @property
    def wins(self) -> int:
        """Count the layers on which it beat dense."""
        return sum(t.wins for t in self.timings)

    @property
    def clear(self) -> int:
        """Count the layers on which it beat dense by more than the spread."""
        return sum(t.wins and t.clear is True for t in self.timings)

    @property
    def counted(self) -> bool:
        """Say whether any of it may win."""
        return any(t.counted for t in self.timings)

    @property
    def place(self) -> Place:
        """Return what its timings share, and with them those of the contenders beside it."""
        return self.tokens, self.dtype, self.batch

    @property
    def nets(self) -> list[str]:
        """Return the nets of its layers."""
        return list(dict.fromkeys(text(t.record.get("net"), "") for t in self.timings))


def geometric_mean(values: Iterable[float]) -> float | None:
    """Return the geometric mean of positive numbers, None of none.

    >>> geometric_mean([1, 4])
    2.0
    """
    logs = [math.log(value) for value in values]
    return math.exp(math.fsum(logs) / len(logs)) if logs else None


def contenders(layers: Iterable[list[Timing]]) -> list[Timing]:
    """Return what is set against dense, one timing per layer, op and backend.

    A dense backend that is the fastest on every layer it was timed on is what the others are set against, and no
    contender; one that is so on some layers has the ratio 1 there.
    """
    groups: dict[Contender, list[Timing]] = {}
    for timings in layers:
        rows = [t for t in timings if t.over_fastest_dense]
        for pair, members in grouped(rows, _contender).items():
            groups.setdefault(pair, []).append(max(members, key=lambda t: t.over_fastest_dense or 0.0))
    return [
        t
        for (op, _), found in groups.items()
        if op != "dense" or any(t.over_fastest_dense != 1 for t in found)
        for t in found
    ]


def speeds(layers: dict[LayerKey, list[Timing]], whole_models: bool = False) -> list[Speed]:
    """Return every op and backend at every number of tokens, ops and backends in order, tokens rising.

    Layers and whole models never share a mean: `whole_models` picks the one or the other. Nor do dtypes, nor the
    batches of whole models.
    """
    chosen = [timings for timings in layers.values() if (timings[0].record.get("layer") == "*") == whole_models]
    groups = grouped(contenders(chosen), lambda t: (_contender(t), _place(t, whole_models)))
    found = [Speed(*pair, *place, timings=tuple(rows), mean=_mean(rows)) for (pair, place), rows in groups.items()]
    order = {pair: place for place, pair in enumerate(_ordered(chosen))}
    return sorted(found, key=lambda s: (s.tokens or 0, s.dtype, s.batch or 0, order[s.op, s.impl]))


def places(found: Iterable[Speed]) -> dict[Place, str]:
    """Return what speeds share, in order, with its name: the tokens, and dtype and batch where there are several."""
    seen = list(dict.fromkeys(s.place for s in found))
    dtypes, batches = ({place[k] for place in seen} for k in (1, 2))
    names = {}
    for tokens, dtype, batch in seen:
        more = [dtype or "no dtype"] if len(dtypes) > 1 else []
        more += [f"batch {batch:g}" if batch else "no batch"] if len(batches) > 1 else []
        names[tokens, dtype, batch] = ", ".join([words.tokens(tokens), *more])
    return names


def mean_words(found: Sequence[Speed]) -> dict[Speed, str]:
    """Write means; with the number of layers behind each where it is not the same for all that stand beside it."""
    groups = grouped(found, lambda s: s.place)
    uneven = {place for place, beside in groups.items() if len({len(s.timings) for s in beside}) > 1}
    return {s: words.factor(s.mean) + (f" ({len(s.timings)})" if s.place in uneven else "") for s in found}


def by_net(layers: dict[LayerKey, list[Timing]]) -> dict[str, dict[LayerKey, list[Timing]]]:
    """Split layers by the net they are of."""
    found = grouped(layers.items(), lambda item: text(item[1][0].record.get("net"), ""))
    return {net: dict(items) for net, items in found.items()}


def some_tokens(counts: Iterable[float | None], most: int) -> list[float]:
    """Choose up to `most` numbers of tokens: the least, the most, and others evenly between.

    >>> some_tokens([1, 16, 64, 256, 4096], 3)
    [1, 64, 4096]
    """
    return evenly(sorted({count for count in counts if count is not None}), most)


def evenly(items: list[T], most: int) -> list[T]:
    """Choose up to `most` items: the first, the last, and others evenly between."""
    if len(items) <= most:
        return items
    step = (len(items) - 1) / max(1, most - 1)
    return [items[round(k * step)] for k in range(most)]


def _contender(timing: Timing) -> Contender:
    return text(timing.record.get("op"), ""), text(timing.record.get("impl"), "")


def _place(timing: Timing, whole_model: bool) -> Place:
    record = timing.record
    batch = finite(record.get("batch")) if whole_model else None
    return finite(record.get("tokens")), text(record.get("dtype"), ""), batch


def _mean(timings: list[Timing]) -> float:
    return geometric_mean(t.over_fastest_dense for t in timings if t.over_fastest_dense) or math.nan


def _ordered(layers: list[list[Timing]]) -> list[Contender]:
    # Timings of a layer are in order already; layers may lack some of them.
    rows = {_contender(t): t.record for timings in layers for t in timings}
    return sorted(rows, key=lambda pair: order(rows[pair]))
