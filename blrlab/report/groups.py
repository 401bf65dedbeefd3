"""Which records belong together.

A run is one configuration on one data set and one device: the records between one `env` record and the
next, from one file. Losses are compared inside one run, and runs share a table only where data hash and
device agree. An `env` record without a config goes on with that of the one before it. Records that carry
no data hash of their own (compress, bench) take that of their `env` record; where there is none, the
first one found in the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, TypeVar

Record = dict[str, Any]

T = TypeVar("T")

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Run:
    """The records of one configuration (`config`, `scale`) on one data set and device, in the order written.

    `source` is the record field `run`: the folder or file they were read from, empty where nobody set it.
    """

    source: str
    config: str
    scale: str
    data_hash: str
    device: str
    records: tuple[Record, ...]

    def of(self, kind: str, **fields: Any) -> list[Record]:
        """Return the records of one kind whose `fields` have the values given."""
        return [r for r in self.records if r.get("kind") == kind and all(r.get(k) == v for k, v in fields.items())]

    @property
    def env(self) -> Record:
        """Return the latest known value of every field of the `env` records, empty where there is none."""
        merged: Record = {}
        for record in self.of("env"):
            merged |= {key: value for key, value in record.items() if value is not None or key not in merged}
        return merged

    @property
    def has_quality(self) -> bool:
        """Say whether the run trained, compressed or evaluated anything."""
        return any(r.get("kind") in ("train", "compress", "eval") for r in self.records)


def finite(value: Any) -> float | None:
    """Return a number as a float, and None for what is missing, not a number or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def text(value: Any, missing: str = UNKNOWN) -> str:
    """Return a field as text, and `missing` for null or an empty string."""
    return missing if value is None or value == "" else str(value)


def mapping(value: Any) -> Record:
    """Return a nested object of a record, and an empty one where it is null or no object."""
    return value if isinstance(value, dict) else {}


def latest(items: Iterable[T], key: Callable[[T], Hashable]) -> list[T]:
    """Keep the last item of every key, in the order in which the keys first appeared."""
    kept: dict[Hashable, T] = {}
    for item in items:
        kept[key(item)] = item
    return list(kept.values())


def grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """Sort items into lists by key, keys in the order in which they first appeared."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def split_runs(records: Iterable[Record]) -> list[Run]:
    """Split records into runs, in the order in which the runs first appeared."""
    found: dict[tuple[str, str, str, str, str], list[Record]] = {}
    for source, rows in grouped(records, lambda r: text(r.get("run"), "")).items():
        hashes = (r.get("data_hash") or mapping(r.get("data")).get("hash") for r in rows)
        first_hash = next((text(h) for h in hashes if h), UNKNOWN)
        first_device = next((text(r["device"]) for r in rows if r.get("device")), UNKNOWN)
        env: Record = {}
        for row in rows:
            if row.get("kind") == "env":
                # A later stage records its machine again, without naming the config it goes on with.
                env = row if row.get("config") else {**env, **row}
            data_hash = row.get("data_hash") or mapping(env.get("data")).get("hash")
            key = (
                source,
                text(env.get("config")),
                text(env.get("scale"), ""),
                text(data_hash, first_hash),
                text(env.get("device"), first_device),
            )
            found.setdefault(key, []).append(row)
    return [Run(*key, records=tuple(rows)) for key, rows in found.items()]


def sections(runs: Iterable[Run]) -> dict[tuple[str, str], list[Run]]:
    """Group the runs that trained, compressed or evaluated something by (data hash, device)."""
    return grouped((run for run in runs if run.has_quality), lambda run: (run.data_hash, run.device))


def labels(runs: list[Run]) -> list[str]:
    """Name each run by as little as tells them apart: config, scale, folder, and in the end everything."""
    configs = [f"{run.config} {run.scale}".strip() for run in runs]
    choices = (
        [run.config for run in runs],
        configs,
        [PurePath(text(run.source)).name for run in runs],
        [f"{name} ({text(run.source)})" for name, run in zip(configs, runs, strict=True)],
        [
            f"{name} ({text(run.source)}, {run.device}, {run.data_hash[:12]})"
            for name, run in zip(configs, runs, strict=True)
        ],
    )
    return next((names for names in choices if len(set(names)) == len(names)), choices[-1])


def bench_by_device(runs: Iterable[Run], kind: str = "bench") -> dict[str, list[Record]]:
    """Group bench (or counters) records by their device, which is that of their run where they name none."""
    rows = ({**r, "device": text(r.get("device"), run.device)} for run in runs for r in run.of(kind))
    return grouped(rows, lambda r: r["device"])
