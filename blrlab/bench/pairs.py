"""Benchmark rows of two files, paired and judged: what got faster, what got slower, and what cannot be compared."""

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from blrlab.bench.results import identity
from blrlab.errors import InputError, did_you_mean, one_of

Row = dict[str, Any]
WORDS = ("op", "impl", "net", "layer")
VERSIONS = ("torch", "triton", "jax", "driver")
FASTER, SLOWER, WITHIN = "faster", "slower", "within spread"
LOST, GAINED, UNTIMED = "lost its time", "gained a time", "not timed"
VERDICTS = (FASTER, SLOWER, WITHIN, LOST, GAINED, UNTIMED)


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same measurement in both files.

    Attributes:
      a: the row of the first.
      b: the row of the second.
      threshold: how many times slower B's p50 may be.
    """

    a: Row
    b: Row
    threshold: float

    @property
    def ratio(self) -> float | None:
        """The speed-up: p50 of A over p50 of B; None where one has no time."""
        return self.a["p50"] / self.b["p50"] if timed(self.a) and timed(self.b) else None

    @property
    def spread(self) -> tuple[float, float] | None:
        """The speed-up from A's p20 over B's p80 to A's p80 over B's p20."""
        if self.ratio is None:
            return None
        return _at(self.a, "p20") / _at(self.b, "p80"), _at(self.a, "p80") / _at(self.b, "p20")

    @property
    def verdict(self) -> str:
        """Faster or slower where the p20 to p80 ranges do not overlap; the words for a missing time."""
        if self.spread is None:
            return LOST if self._lost else GAINED if timed(self.b) else UNTIMED
        least, most = self.spread
        return FASTER if least > 1 else SLOWER if most < 1 else WITHIN

    @property
    def regressed(self) -> bool:
        """Whether B is slower by more than the threshold, or has lost what passed in A."""
        if self.ratio is None:
            return self._lost
        return self.verdict == SLOWER and 1 / self.ratio > self.threshold

    @property
    def _lost(self) -> bool:
        return self.a.get("passed") is True and (self.b.get("passed") is False or (timed(self.a) and not timed(self.b)))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two sets of rows, paired.

    Attributes:
      pairs: in A's order.
      only_a: rows that B has no counterpart of.
      only_b: rows that A has no counterpart of.
    """

    pairs: Sequence[Pair]
    only_a: Sequence[Row]
    only_b: Sequence[Row]

    @property
    def regressions(self) -> list[Pair]:
        """Return the pairs that fail the comparison."""
        return [pair for pair in self.pairs if pair.regressed]

    def means(self) -> list[tuple[str, str, float, int]]:
        """Return (op, impl, geometric mean of the speed-up, pairs in it), and the total under ("all", "all")."""
        groups: dict[tuple[str, str], list[float]] = {}
        for pair in self.pairs:
            if pair.ratio is not None:
                groups.setdefault((pair.a["op"], pair.a["impl"]), []).append(pair.ratio)
        if groups:
            groups["all", "all"] = [ratio for ratios in groups.values() for ratio in ratios]
        return [(*key, _geometric_mean(ratios), len(ratios)) for key, ratios in groups.items()]


def timed(row: Mapping[str, Any]) -> bool:
    """Say whether a row has a speed: it passed its gate and has a positive time."""
    p50 = row.get("p50")
    return row.get("passed") is True and isinstance(p50, (int, float)) and math.isfinite(p50) and p50 > 0


def compare(a: Iterable[Row], b: Iterable[Row], threshold: float, across_devices: bool = False) -> Comparison:
    """Pair the rows of A and B; of several rows of one measurement the last counts.

    Raises:
      InputError: nothing is in common, or only across devices where that is not asked for.
    """
    first, second = ({_key(row, across_devices): row for row in rows} for rows in (a, b))
    pairs = [Pair(row, second[key], threshold) for key, row in first.items() if key in second]
    if not pairs:
        _refuse(list(first.values()), list(second.values()))
    only_a = [row for key, row in first.items() if key not in second]
    only_b = [row for key, row in second.items() if key not in first]
    return Comparison(pairs, only_a, only_b)


def _key(row: Row, across_devices: bool) -> tuple[str, Any]:
    return identity(row), None if across_devices else row.get("device")


def _refuse(a: Sequence[Row], b: Sequence[Row]) -> None:
    if {identity(row) for row in a} & {identity(row) for row in b}:
        raise InputError(
            f"A was measured on {_values(a, 'device')}, B on {_values(b, 'device')}: times of different devices say "
            "nothing about the code; --across-devices compares them all the same."
        )
    if _without_dtype(a) & _without_dtype(b):
        raise InputError(
            f"A was measured in {_values(a, 'dtype')}, B in {_values(b, 'dtype')}: measure both in one dtype."
        )
    held = "; ".join(
        f"{name} has " + ", ".join(f"{word} {_values(rows, word)}" for word in (*WORDS, "tokens"))
        for name, rows in (("A", a), ("B", b))
    )
    raise InputError(f"A and B have no measurement in common: {held}. Measure the same layers in both.")


def notes(found: Comparison) -> list[str]:
    """Say in sentences where A and B differ in more than the code."""
    said = []
    for name in ("device", *VERSIONS, "method"):
        for (before, after), count in _count((pair.a.get(name), pair.b.get(name)) for pair in found.pairs).items():
            if before != after and not (name == "method" and None in (before, after)):
                said.append(f"{_rows(count)} in {name}: {before} in A, {after} in B.")
    again = _without_dtype(found.only_a) & _without_dtype(found.only_b)
    if again:
        dtypes = f"{_values(found.only_a, 'dtype')} in A, {_values(found.only_b, 'dtype')} in B"
        said.append(f"{_rows(len(again))} in dtype and cannot be compared: {dtypes}.")
    if not again and {identity(row) for row in found.only_a} & {identity(row) for row in found.only_b}:
        said.append("Some rows have a counterpart on another device only and are not compared (--across-devices does).")
    return said


def differs(pair: Pair) -> list[str]:
    """Name what a pair's rows differ in beside the time."""
    return [name for name in ("device", *VERSIONS, "method") if pair.a.get(name) != pair.b.get(name)]


def chosen(rows: Sequence[Row], words: Sequence[str]) -> list[Row]:
    """Keep the rows that each of `words` matches: patterns with commas between, of which one has to match.

    A pattern is matched against op, impl, net and layer, or against one of them as in `layer=c_*`.

    Raises:
      InputError: a field is unknown.
    """
    for word in words:
        alternatives = [_pattern(part.strip()) for part in word.split(",") if part.strip()]
        rows = [row for row in rows if any(_matches(row, *each) for each in alternatives)]
    return list(rows)


def check_patterns(rows: Sequence[Row], words: Sequence[str]) -> None:
    """Refuse a pattern that matches no row.

    Raises:
      InputError: naming the nearest word of the rows.
    """
    for part in (part.strip() for word in words for part in word.split(",")):
        fields, pattern = _pattern(part)
        if not any(_matches(row, fields, pattern) for row in rows):
            known = sorted({str(row.get(field)) for row in rows for field in fields})
            near = did_you_mean(pattern, known) or f" There are {', '.join(known)}."
            raise InputError(f'--only: no row matches "{part}".{near}')


def _pattern(part: str) -> tuple[tuple[str, ...], str]:
    field, equals, pattern = part.partition("=")
    return ((one_of(field, WORDS, "field of --only"),), pattern) if equals else (WORDS, part)


def _matches(row: Row, fields: Iterable[str], pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(str(row.get(field)), pattern) for field in fields)


def _at(row: Row, name: str) -> float:
    """Return a percentile; the median where a row does not have it."""
    value = row.get(name)
    return value if isinstance(value, (int, float)) and value > 0 else row["p50"]


def _without_dtype(rows: Iterable[Row]) -> set[str]:
    return {identity({**row, "dtype": None}) for row in rows}


def _geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _values(rows: Iterable[Row], name: str, most: int = 6) -> str:
    found = list(dict.fromkeys(str(row.get(name)) for row in rows))
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def _count(items: Iterable[Any]) -> dict[Any, int]:
    counts: dict[Any, int] = {}
    for item in items:
        counts[item] = counts.get(item, 0) + 1
    return counts


def _rows(count: int) -> str:
    return "1 row differs" if count == 1 else f"{count} rows differ"
