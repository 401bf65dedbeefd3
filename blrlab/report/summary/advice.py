"""What the cost model advises: which ranks would beat dense at how many tokens, read from `advice` records."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from blrlab.report import words
from blrlab.report.groups import Record, Run, finite, grouped, latest, text
from blrlab.report.summary.speed import geometric_mean


@dataclass(frozen=True)
class Advice:
    """One device, layer, op and blocks: `speedup[token][rank]` over dense, and the widest rank that beats dense.

    `beside` says that the layer is timed or predicted at these blocks in the same records.
    """

    record: Record
    tokens: tuple[float, ...]
    ranks: tuple[float, ...]
    factors: tuple[float | None, ...]
    speedup: tuple[tuple[float | None, ...], ...]
    bound_speedup: tuple[tuple[float | None, ...], ...]
    algorithms: tuple[tuple[str, ...], ...]
    widest: tuple[float | None, ...]
    beside: bool = False

    @property
    def layer(self) -> str:
        """Return net, layer and its features."""
        return f"{text(self.record.get('net'), '')} {text(self.record.get('layer'))}".strip()

    @property
    def op(self) -> str:
        """Return op and blocks as a reader meets them."""
        form, cut = words.name(words.FORMATS, self.record.get("op")), words.blocks(self.record.get("blocks"))
        return form if cut in (words.MISSING, "1 x 1") else f"{form} {cut}"

    @property
    def device(self) -> str:
        """Return the device's full name."""
        return text(self.record.get("device_name"), text(self.record.get("device")))

    @property
    def balance(self) -> float:
        """Return the share of the smaller of two groups: the cells that beat dense, and those that do not."""
        known = [v > 1 for row in self.speedup for v in row if v]
        share = sum(known) / len(known)
        return min(share, 1 - share)

    @property
    def mean(self) -> float:
        """Return the geometric mean of all predicted ratios, 0 where there is none."""
        return geometric_mean(v for row in self.speedup for v in row if v) or 0.0


def advices(runs: Iterable[Run]) -> dict[str, list[Advice]]:
    """Return the latest advice for every layer, op and blocks, by device; damaged records are left out."""
    everything = list(runs)
    rows = [r for run in everything for r in run.of("advice")]
    keys = ("device", "device_name", "net", "layer", "in_features", "out_features", "dtype", "op", "blocks")
    kept = latest(rows, lambda r: tuple(text(r.get(key), "") for key in keys))
    beside = {_layer_and_blocks(r) for run in everything for kind in ("bench", "bound") for r in run.of(kind)}
    found = [_advice(r, _layer_and_blocks(r) in beside) for r in kept]
    return grouped([a for a in found if a], lambda a: a.device)


def choose(found: list[Advice], most: int) -> tuple[list[Advice], list[Advice]]:
    """Return the advice worth a picture, and what is left out.

    Of each layer and op that is the one at the blocks that are timed or predicted beside it, else at a middle
    number of blocks; of too many, those where the answer hangs most on rank and tokens.
    """
    groups = grouped(found, lambda a: (a.layer, a.record.get("op")))
    usual = [_usual(group) for group in groups.values()]
    chosen = sorted(usual, key=lambda a: (-a.balance, -a.mean))[:most]
    # By identity: two layers may be given the same numbers.
    places = {id(a) for a in chosen}
    return [a for a in usual if id(a) in places], [a for a in found if id(a) not in places]


def _usual(group: list[Advice]) -> Advice:
    return next((a for a in group if a.beside), group[len(group) // 2])


def _layer_and_blocks(record: Record) -> tuple[str, ...]:
    return tuple(text(record.get(key), "") for key in ("net", "layer", "op", "blocks"))


def in_words(advice: Advice) -> str:
    """Say in one sentence up to which rank a layer is predicted to beat dense, by the number of tokens."""
    about = f"As {advice.op}, {advice.layer} is predicted to beat dense"
    steps = [
        (rank, [n for n, _ in members])
        for rank, members in groupby(zip(advice.tokens, advice.widest, strict=False), key=lambda pair: pair[1])
    ]
    known = [(rank, counts) for rank, counts in steps if rank is not None]
    if not known:
        return f"{about} at no number of tokens and none of the ranks."
    never = [n for rank, counts in steps if rank is None for n in counts]
    told = [f"{rank:g} at {_counts(counts)}" for rank, counts in _telling(known)]
    between = ", others between" if len(told) < len(known) else ""
    tail = f"; not at {_counts(never)}" if never else ""
    return words.sentence(f"{about} up to rank {', '.join(told)}{between}{tail}")


def thinned(advice: Advice, rows: int, columns: int) -> Advice:
    """Keep up to so many numbers of tokens and ranks, the first and the last among them."""
    down, across = _evenly(len(advice.tokens), rows), _evenly(len(advice.ranks), columns)
    grids = {
        key: tuple(tuple(getattr(advice, key)[row][column] for column in across) for row in down)
        for key in ("speedup", "bound_speedup", "algorithms")
    }
    return replace(
        advice,
        tokens=tuple(advice.tokens[row] for row in down),
        widest=tuple(advice.widest[row] for row in down),
        ranks=tuple(advice.ranks[column] for column in across),
        factors=tuple(advice.factors[column] for column in across),
        **grids,
    )


def _evenly(count: int, most: int) -> list[int]:
    return [round(k * (count - 1) / (most - 1)) for k in range(most)] if count > most else list(range(count))


def _telling(steps: list[tuple[float, list[float]]]) -> list[tuple[float, list[float]]]:
    """Return all of a few steps, and of many the first, the last, and the widest and narrowest rank."""
    if len(steps) <= 4:
        return steps
    least, most = min(steps, key=lambda step: step[0]), max(steps, key=lambda step: step[0])
    return [step for step in steps if step in (steps[0], steps[-1], least, most)]


def _counts(tokens: list[float]) -> str:
    low, high = min(tokens), max(tokens)
    return words.tokens(low) if low == high else f"{low:,.0f} to {words.tokens(high)}"


def _advice(record: Record, beside: bool) -> Advice | None:
    tokens, ranks = _numbers(record.get("tokens")), _numbers(record.get("ranks"))
    rows, columns = _rising(tokens), _rising(ranks)

    def grid(key: str) -> tuple[tuple[float | None, ...], ...]:
        values = [[v if v and v > 0 else None for v in _numbers(row)] for row in _items(record.get(key))]
        return tuple(tuple(_at(_at(values, row) or [], column) for column in columns) for row in rows)

    names = [[text(v, "") for v in _items(row)] for row in _items(record.get("algorithm"))]
    if not any(v for row in grid("speedup") for v in row):
        return None
    return Advice(
        record=record,
        tokens=tuple(tokens[row] or 0.0 for row in rows),
        ranks=tuple(ranks[column] or 0.0 for column in columns),
        factors=tuple(_at(_numbers(record.get("layer_factor")), column) for column in columns),
        speedup=grid("speedup"),
        bound_speedup=grid("bound_speedup"),
        algorithms=tuple(tuple(_at(_at(names, row) or [], column) or "" for column in columns) for row in rows),
        widest=tuple(_at(_numbers(record.get("widest_rank")), row) for row in rows),
        beside=beside,
    )


def _rising(values: list[float | None]) -> list[int]:
    """Return the places of the known values, least first."""
    return sorted((k for k, v in enumerate(values) if v is not None), key=lambda k: values[k] or 0.0)


def _at(values: list[Any], place: int) -> Any:
    return values[place] if place < len(values) else None


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _numbers(value: Any) -> list[float | None]:
    return [finite(v) for v in _items(value)]
