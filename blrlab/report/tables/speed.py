"""Tables of speed over dense: geometric means, and each layer's times side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from blrlab.report import words
from blrlab.report.groups import Record, finite, grouped
from blrlab.report.summary.latency import Timing, by_layer, layer_title, prized, profiled
from blrlab.report.summary.speed import Speed, speeds
from blrlab.report.tables.table import Column, Table

SHARED = (
    Column("tokens", 0, group=True),
    Column("dtype", 0, False, group=True),
    Column("batch", 0, group=True),
)
MEANS = (
    *SHARED,
    Column("op", 0, False),
    Column("backend", 0, False),
    Column("x dense"),
    Column("slowest\nlayer", 3),
    Column("fastest\nlayer", 2),
    Column("layers"),
    Column("faster"),
    Column("clearly"),
)
HOW_TO_READ = (
    "x dense: geometric mean over layers of the speed over the fastest dense backend, quantised ones left aside.",
    "clearly: within this run, p80 lies below dense's p20; the other wins are within the spread of the two times.",
)


def means_table(device: str, records: list[Record]) -> Table | None:
    """Return the geometric means of a device by tokens, op and backend; None where nothing stands against dense."""
    found = speeds(by_layer(records))
    if not found:
        return None
    rows = [_means(speed) for speed in found]
    nets = list(dict.fromkeys(net for speed in found for net in speed.nets))
    title = f"Speed over dense on {device}: geometric means over {words.listed(nets, 9)}"
    notes = (*HOW_TO_READ, *([words.PROFILED] if any(map(profiled, records)) else []))
    return _grouped(Table(title, MEANS, tuple(rows), notes=notes), found)


def _grouped(table: Table, places: Sequence[Speed]) -> Table:
    """Open a group wherever the speed behind a row shares less with the one before; leave out what all share."""
    breaks = {k for k, speed in enumerate(places) if not k or speed.place != places[k - 1].place}
    agreed = [title for title in ("dtype", "batch") if len(set(table.cells(title))) == 1]
    return replace(table, breaks=frozenset(breaks)).without(agreed)


def _shared(speed: Speed) -> tuple[str, ...]:
    return (
        words.MISSING if speed.tokens is None else f"{speed.tokens:,.0f}",
        speed.dtype or words.MISSING,
        f"{speed.batch:g}" if speed.batch else words.MISSING,
    )


def _means(speed: Speed) -> tuple[str, ...]:
    ratios = [t.over_fastest_dense for t in speed.timings if t.over_fastest_dense]
    return (
        *_shared(speed),
        words.name(words.FORMATS, speed.op),
        words.backend(speed.impl),
        words.factor(speed.mean),
        words.factor(min(ratios)),
        words.factor(max(ratios)),
        str(len(speed.timings)),
        *([str(speed.wins), str(speed.clear)] if speed.counted else [words.MISSING] * 2),
    )


def speed_table(title: str, found: Sequence[Speed]) -> Table:
    """Return the data of a picture of speeds: a row per bar, with the ratio's spread."""
    columns = (
        *SHARED,
        Column("op", 0, False),
        Column("backend", 0, False),
        Column("layer", 0, False),
        Column("x dense"),
        Column("spread"),
        Column("win", 0, False),
    )
    rows = [
        (
            *_means(speed)[: len(SHARED) + 2],
            layer_title(t.record),
            words.factor(t.over_fastest_dense),
            "-".join(words.figures(v) for v in t.spread) if t.spread else words.MISSING,
            win(t),
        )
        for speed in found
        for t in speed.timings
    ]
    return _grouped(Table(title, columns, tuple(rows)), [speed for speed in found for _ in speed.timings])


def win(timing: Timing) -> str:
    """Say whether a timing beats dense, and how surely."""
    if not timing.counted:
        return "not counted"
    if not timing.wins:
        return "slower"
    return {True: "clear", False: "within the spread", None: "spread not known"}[timing.clear]


@dataclass(frozen=True)
class Times:
    """Layers' p50 side by side, of every contender, and the bounds of every op, in us.

    `rows` are (layer, {contender: p50}, {op: bound}, fastest contender).
    """

    contenders: tuple[str, ...]
    ops: tuple[str, ...]
    rows: tuple[tuple[str, dict[str, float], dict[str, float], str], ...]

    @property
    def heads(self) -> list[str]:
        """Return the columns' heads, after that of the layers."""
        return [*self.contenders, *(f"bound of {op}" for op in self.ops)]

    def cells(self, times: dict[str, float], bounds: dict[str, float]) -> list[str]:
        """Return the cells of one row."""
        found = [*map(times.get, self.contenders), *map(bounds.get, self.ops)]
        return [words.microseconds(value) for value in found]


def side_by_side(layers: Sequence[list[Timing]], with_tokens: bool) -> Times:
    """Lay the verified times of layers side by side, the fastest setting of each op and backend."""
    names: dict[str, None] = {}
    rows = []
    for timings in layers:
        times: dict[str, float] = {}
        for name, members in grouped((t for t in timings if t.p50), lambda t: words.contender(t.record)).items():
            times[name] = min(t.p50 for t in members)
            names.setdefault(name)
        record = timings[0].record
        title = layer_title(record) + (f", {words.tokens(record.get('tokens'))}" if with_tokens else "")
        title += f", batch {batch:g}" if (batch := finite(record.get("batch"))) else ""
        bounds = {_op(t): b for t in timings if (b := finite(t.record.get("bound_us")))}
        able = {words.contender(t.record) for t in timings if prized(t.record)}
        best = min((name for name in times if name in able), key=lambda name: times[name], default="")
        rows.append((title, times, bounds, best))
    ops = dict.fromkeys(op for _, _, bounds, _ in rows for op in bounds)
    return Times(tuple(names), tuple(ops), tuple(rows))


def times_table(title: str, layers: Sequence[list[Timing]]) -> Table:
    """Return the data of a picture of times: a row per layer and number of tokens, a column per op and backend."""
    found = side_by_side(layers, with_tokens=True)
    columns = (Column("p50 in us", 0, False), *map(Column, found.heads))
    rows = [(name, *found.cells(times, bounds)) for name, times, bounds, _ in found.rows]
    return Table(title, columns, tuple(rows))


def _op(timing: Timing) -> str:
    return words.name(words.FORMATS, timing.record.get("op"))
