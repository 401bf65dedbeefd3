"""Times of layers over kernel backends, and how they stand against dense.

A time counts only where the backend passed its accuracy gate on the same device: a failed gate has no
speed. A factored layer is set against dense at the same net, layer, shape, tokens and dtype, both against
the fastest verified dense backend and against dense on its own backend. A ratio above 1 means faster than
dense.
"""

from __future__ import annotations

from dataclasses import dataclass

from blrlab.report import words
from blrlab.report.groups import Record, finite, grouped, latest, text

OPS = ("dense", "low_rank", "monarch", "blast")
IMPLS = ("xla", "torch", "torch_compile", "triton")

LayerKey = tuple[str, ...]


@dataclass(frozen=True)
class Timing:
    """One backend's time for one layer, in us; `p50` and both ratios are None where it has no speed."""

    record: Record
    p50: float | None
    over_fastest_dense: float | None
    over_same_backend: float | None


def verified_time(record: Record) -> float | None:
    """Return p50 in us of a record whose gate passed, else None."""
    p50 = finite(record.get("p50"))
    return p50 if record.get("passed") is True and p50 is not None and p50 > 0 else None


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
    return {key: _timings(sorted(rows, key=_order)) for key, rows in groups.items()}


def best_ratios(layers: dict[LayerKey, list[Timing]], op: str) -> list[float]:
    """Return an op's best ratio over the fastest dense backend for every layer where it is known."""
    best: list[float] = []
    for timings in layers.values():
        mine = [t for t in timings if t.record.get("op") == op and t.record.get("layer") != "*"]
        ratios = [t.over_fastest_dense for t in mine if t.over_fastest_dense]
        best += [max(ratios)] if ratios else []
    return best


def _order(record: Record) -> tuple[int, int]:
    op, impl = record.get("op"), record.get("impl")
    return (OPS.index(op) if op in OPS else len(OPS), IMPLS.index(impl) if impl in IMPLS else len(IMPLS))


def _timings(rows: list[Record]) -> list[Timing]:
    dense = {r.get("impl"): verified_time(r) for r in rows if r.get("op") == "dense"}
    known = [p50 for p50 in dense.values() if p50 is not None]
    fastest = min(known, default=None)
    timings: list[Timing] = []
    for row in rows:
        p50, same = verified_time(row), dense.get(row.get("impl"))
        ratio = fastest / p50 if fastest and p50 else None
        timings.append(Timing(row, p50, ratio, same / p50 if same and p50 else None))
    return timings
