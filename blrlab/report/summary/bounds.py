"""Predicted times of algorithms on a device, from `bound` records."""

from __future__ import annotations

from collections.abc import Iterable

from blrlab.report import words
from blrlab.report.groups import Record, Run, finite, grouped, latest, mapping, text
from blrlab.report.summary.latency import OPS, setting

TERMS = ("tensor", "cuda", "dram", "l2", "launch")

FIELDS = ("device", "device_name", "net", "layer", "in_features", "out_features", "tokens", "dtype", "op", "algorithm")


def predictions(runs: Iterable[Run]) -> dict[str, list[Record]]:
    """Return the latest prediction of every algorithm, by device, in the order of net, layer, tokens and op."""
    rows = [r for run in runs for r in run.of("bound") if (finite(r.get("us")) or 0) > 0]
    kept = latest(rows, lambda r: (*(text(r.get(key), "") for key in FIELDS), setting(r)))
    return grouped(kept, device_name)


def device_name(record: Record) -> str:
    """Return the device's full name, else its short one."""
    return text(record.get("device_name"), text(record.get("device")))


def by_shape(rows: Iterable[Record]) -> dict[tuple[str, ...], list[Record]]:
    """Group predictions of one layer, tokens and dtype, ops in order."""
    keys = ("net", "layer", "in_features", "out_features", "tokens", "dtype")
    groups = grouped(rows, lambda r: tuple(text(r.get(key), "") for key in keys))
    return {key: sorted(found, key=_place) for key, found in groups.items()}


def term_times(record: Record) -> dict[str, float]:
    """Return the us of every term that is known and takes any time."""
    terms = mapping(record.get("terms"))
    return {term: us for term in TERMS if (us := finite(terms.get(term))) and us > 0}


def algorithm(record: Record) -> str:
    """Return op and algorithm: BLAST 16 x 16 three stage."""
    op = words.name(words.FORMATS, record.get("op"))
    return f"{op} {text(record.get('algorithm'), words.MISSING).replace('_', ' ')}"


def fastest(rows: Iterable[Record]) -> list[Record]:
    """Return the fastest prediction of every op."""
    groups = grouped(rows, lambda r: r.get("op"))
    return [min(found, key=lambda r: finite(r.get("us")) or 0.0) for found in groups.values()]


def _place(record: Record) -> int:
    op = record.get("op")
    return OPS.index(op) if op in OPS else len(OPS)
