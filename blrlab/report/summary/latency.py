"""Times of layers over kernel backends, and how they stand against dense.

A time counts only where the backend passed its accuracy gate on the same device: a failed gate has no
speed. A factored layer is set against dense at the same net, layer, shape, tokens and dtype, both against
the fastest verified dense backend and against dense on its own backend. A ratio above 1 means faster than
dense. Quantised dense weights are a contender like any other, never the dense they are set against.

A profiler's time leaves the gaps between kernels out, which every other time has. Such rows are shown with their
ratio, but are never the dense they are set against, and count neither as a win nor as the fastest.

A ratio's spread goes from dense p20 over p80 to dense p80 over p20. A win is clear where p80 lies below
dense's p20; else it is within the spread. Both are of the calls of one process; another may turn either round.
"""

from __future__ import annotations

from dataclasses import dataclass

from blrlab.report import words
from blrlab.report.groups import Record, finite, grouped, latest, text

OPS = ("dense", "low_rank", "monarch", "blast")
IMPLS = tuple(words.BACKENDS)
QUANTISED = ("int8_weight_only", "int8_streaming")
# What a backend of factored layers is called where it runs dense ones.
DENSE_TWIN = {"torch_bmm": "torch_eager"}

LayerKey = tuple[str, ...]


@dataclass(frozen=True)
class Timing:
    """One backend's time for one layer, in us; `p50` and both ratios are None where it has no speed.

    `spread` is that of `over_fastest_dense`, None where either side has no p20 and p80; `clear` says whether
    the ratio lies above 1 by more than the spread, and is None where that is not known or does not count.
    """

    record: Record
    p50: float | None
    over_fastest_dense: float | None
    over_same_backend: float | None
    spread: tuple[float, float] | None = None
    clear: bool | None = None

    @property
    def counted(self) -> bool:
        """Say whether this is on the clock of what it is set against, and so may win."""
        return not profiled(self.record)

    @property
    def wins(self) -> bool:
        """Say whether this beats dense, clearly or not."""
        return self.counted and (self.over_fastest_dense or 0.0) > 1


def verified_time(record: Record) -> float | None:
    """Return p50 in us of a record whose gate passed, else None."""
    p50 = finite(record.get("p50"))
    return p50 if record.get("passed") is True and p50 is not None and p50 > 0 else None


def profiled(record: Record) -> bool:
    """Say whether a time is a profiler's sum over kernels, which leaves the gaps between them out."""
    return "profiler" in text(record.get("method"), "")


def prized(record: Record) -> bool:
    """Say whether a row may be called the fastest: not quantised, which is another model, nor a profiler's time."""
    return record.get("impl") not in QUANTISED and not profiled(record)


def why_no_time(record: Record) -> str | None:
    """Return the reason for which a record has no speed, or None where it has one."""
    if verified_time(record) is not None:
        return None
    if record.get("reason"):
        return str(record["reason"])
    if record.get("passed") is False:
        error, budget = finite(record.get("error")), finite(record.get("error_budget"))
        known = error is not None and budget is not None
        return "failed its accuracy gate" + (f": error {error:.1e} over the budget {budget:.1e}" if known else "")
    return "not verified" if finite(record.get("p50")) is not None else "not measured"


def layer_key(record: Record) -> LayerKey:
    """Return what records must share to be compared: net, layer, phase, shape, batch, tokens and dtype."""
    fields = ("net", "layer", "phase", "in_features", "out_features", "batch", "tokens", "dtype")
    return tuple(text(record.get(field), "") for field in fields)


def layer_title(record: Record) -> str:
    """Return net and layer, and the phase of a whole model's row."""
    words = (
        record.get("net"),
        "whole model" if record.get("layer") == "*" else record.get("layer"),
        record.get("phase"),
    )
    return " ".join(str(word) for word in words if word)


def setting(record: Record) -> str:
    """Return the blocks and rank that tell two records of one op and backend apart."""
    return f"{words.blocks(record.get('blocks'))} rank {text(record.get('rank'), words.MISSING)}"


def op_names(timings: list[Timing]) -> list[str]:
    """Name the op of every timing, with blocks and rank where one op and backend was timed at several."""
    rows = [timing.record for timing in timings]
    pairs = [(r.get("op"), r.get("impl")) for r in rows]
    names = [words.name(words.FORMATS, r.get("op")) for r in rows]
    return [
        f"{name} {setting(row)}" if pairs.count(pair) > 1 else name
        for name, pair, row in zip(names, pairs, rows, strict=True)
    ]


def by_layer(records: list[Record]) -> dict[LayerKey, list[Timing]]:
    """Return the latest timings of every layer: nets in order of appearance, then layer, op and backend."""
    kept = latest(records, lambda r: (layer_key(r), r.get("op"), r.get("impl"), setting(r)))
    nets = list(dict.fromkeys(r.get("net") for r in kept))
    kept.sort(key=lambda r: nets.index(r.get("net")))
    groups = grouped(kept, layer_key)
    return {key: _timings(sorted(rows, key=order)) for key, rows in groups.items()}


def best_timings(layers: dict[LayerKey, list[Timing]], op: str, whole_models: bool = False) -> list[Timing]:
    """Return an op's fastest timing for every layer where its ratio over the fastest dense backend is known.

    A profiler's times are left out. `whole_models` asks for whole models in place of layers.
    """
    best: list[Timing] = []
    for timings in layers.values():
        mine = [t for t in timings if t.record.get("op") == op and (t.record.get("layer") == "*") == whole_models]
        mine = [t for t in mine if t.over_fastest_dense and prized(t.record)]
        best += [max(mine, key=lambda t: t.over_fastest_dense or 0.0)] if mine else []
    return best


def order(record: Record) -> tuple[int, int, str]:
    """Return a record's place among ops and backends, to sort by."""
    op, impl = record.get("op"), text(record.get("impl"), "")
    return (OPS.index(op) if op in OPS else len(OPS), IMPLS.index(impl) if impl in IMPLS else len(IMPLS), impl)


def reference(rows: list[Record]) -> Record | None:
    """Return the fastest verified dense row that may take the prize: what the rows of a layer are set against."""
    dense = [r for r in rows if r.get("op") == "dense" and prized(r) and verified_time(r)]
    return min(dense, key=lambda r: verified_time(r) or 0.0, default=None)


def _timings(rows: list[Record]) -> list[Timing]:
    own = {(r.get("impl"), profiled(r)): verified_time(r) for r in rows if r.get("op") == "dense"}
    fastest = reference(rows)
    twins = [(DENSE_TWIN.get(str(row.get("impl")), row.get("impl")), profiled(row)) for row in rows]
    return [_timing(row, fastest, own.get(twin)) for row, twin in zip(rows, twins, strict=True)]


def _timing(row: Record, dense: Record | None, same: float | None) -> Timing:
    p50 = verified_time(row)
    fastest = verified_time(dense) if dense else None
    if not p50:
        return Timing(row, None, None, None)
    ratio, spread = (fastest / p50, _spread(row, dense)) if fastest and dense else (None, None)
    clear = None if spread is None or row is dense or profiled(row) else spread[0] > 1
    return Timing(row, p50, ratio, same / p50 if same else None, None if row is dense else spread, clear)


def _spread(row: Record, dense: Record) -> tuple[float, float] | None:
    low, high, dense_low, dense_high = (finite(r.get(key)) for r in (row, dense) for key in ("p20", "p80"))
    return (dense_low / high, dense_high / low) if low and high and dense_low and dense_high else None
