"""Quality against latency and size: every evaluated model with the time and the parameters it takes.

The metric is one of the `eval` records. The time is that of the whole model where it was timed (layer `*`); else it
is the sum over the model's layers of the fastest verified backend of each, and says so. The net of the timings is
the run's `own`, or the only one that was timed. A profiler's times, on another clock than the rest, are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from blrlab.report import words
from blrlab.report.groups import Record, Run, finite, grouped, labels, latest, text
from blrlab.report.summary.compression import layer_name, layer_records
from blrlab.report.summary.latency import prized, profiled, verified_time
from blrlab.report.summary.quality import Quality, quality_rows, splits, variants
from blrlab.report.summary.speed import some_tokens

PREFERRED = ("loss", "perplexity", "bits_per_byte", "accuracy", "top1")
RISING = ("accuracy", "top1", "top5", "inception_score")
MOST_BASES = 2


@dataclass(frozen=True)
class Model:
    """One evaluated model: its name, stage, format ("dense" for dense), quality and parameters."""

    name: str
    stage: str
    form: str
    quality: float
    parameters: float | None
    run: Run


@dataclass(frozen=True)
class Basis:
    """What a time is made of: `told` in words, the net's rows, and how often each layer counts ({}: whole model)."""

    told: str
    rows: tuple[Record, ...]
    counts: dict[str, int]


@dataclass(frozen=True)
class Metric:
    """The measure of quality, its unit and whether more is better."""

    name: str
    unit: str
    rising: bool

    @property
    def label(self) -> str:
        """Name the axis."""
        unit = f" ({self.unit})" if self.unit else ""
        return f"{self.name.replace('_', ' ')}{unit}, {'higher' if self.rising else 'lower'} is better"


def metric_of(runs: Sequence[Run]) -> Metric | None:
    """Choose the measure of quality: the loss where there is one, else the first that was recorded."""
    rows = [r for run in runs for r in run.of("eval") if finite(r.get("value")) is not None]
    names = list(dict.fromkeys(text(r.get("metric")) for r in rows))
    if not names:
        return None
    name = next((m for m in PREFERRED if m in names), names[0])
    unit = next((text(r.get("unit"), "") for r in rows if r.get("metric") == name), "")
    return Metric(name, unit, name in RISING)


def models(runs: Sequence[Run], metric: Metric) -> list[Model]:
    """Return every evaluated model once, under as short a name as tells it from the others."""
    found: list[tuple[str, Model]] = []
    for label, run in zip(labels(list(runs)), runs, strict=True):
        split = (splits(run) or ["valid"])[0]
        for row in quality_rows(run, split):
            value = _value(run, split, row, metric.name)
            if value is not None:
                found.append((label, Model(_name(run, row), row.stage, _form(row), value, row.parameters, run)))
    # Runs that share their dense model evaluate it again, to the same value.
    found = latest(found, lambda pair: (pair[1].name, pair[1].quality))
    names = Counter(model.name for _, model in found)
    return [replace(m, name=f"{m.name} ({label})") if names[m.name] > 1 else m for label, m in found]


def _form(row: Quality) -> str:
    return row.variant[0] or "dense"


def _name(run: Run, row: Quality) -> str:
    stage = words.name(words.STAGES, row.stage)
    if _form(row) == "dense":
        return stage
    algorithms = {variant for variant in variants(run) if variant[0] == row.variant[0]}
    told = [words.name(words.FORMATS, row.variant[0]), row.variant[1] if len(algorithms) > 1 else "", stage]
    return " ".join(part for part in told if part)


def bases(runs: Sequence[Run]) -> list[Basis]:
    """Return what the models' times can be made of, whole models first; empty where nothing fits."""
    rows = [r for run in runs for r in run.of("bench") if verified_time(r) and not profiled(r)]
    nets = list(dict.fromkeys(text(r.get("net"), "") for r in rows))
    net = "own" if "own" in nets else nets[0] if len(nets) == 1 else None
    rows = [r for r in rows if text(r.get("net"), "") == net]
    whole = grouped([r for r in rows if r.get("layer") == "*"], _setting)
    if whole:
        told = {key: f"{words.sentence(key)[:-1]}, whole model" if key else "Whole model" for key in whole}
        return [Basis(told[key], tuple(members), {}) for key, members in whole.items()][:MOST_BASES]
    counts = next((c for c in map(layer_counts, runs) if c), {})
    counts = counts or dict.fromkeys((text(r.get("layer")) for r in rows), 1)
    found = []
    for tokens in some_tokens((finite(r.get("tokens")) for r in rows), MOST_BASES):
        members = tuple(r for r in rows if finite(r.get("tokens")) == tokens)
        told = f"Sum of its {sum(counts.values())} factored layers, {words.tokens(tokens)}"
        found.append(Basis(told, members, counts))
    return found


def layer_counts(run: Run) -> dict[str, int]:
    """Count how often the model has each compressed layer."""
    paths = {text(r.get("path")): layer_name(r) for r in layer_records(run)}
    return dict(Counter(paths.values()))


def model_time(basis: Basis, model: Model) -> float | None:
    """Return a model's us on this basis; None where a part of it has no verified time at the model's own ranks."""
    rows = [r for r in basis.rows if r.get("op") == model.form and prized(r)]
    rows = [r for r in rows if _same_size(r, model)]
    if not basis.counts:
        return min((v for r in rows if (v := verified_time(r))), default=None)
    total = 0.0
    for layer, count in basis.counts.items():
        times = [v for r in rows if text(r.get("layer")) == layer and (v := verified_time(r))]
        if not times:
            return None
        total += count * min(times)
    return total


def frontier(points: Sequence[tuple[float, float]], rising: bool) -> list[tuple[float, float]]:
    """Return the (cost, quality) points that no other beats in both, cheapest first.

    >>> frontier([(1, 5), (2, 3), (3, 4), (4, 1)], rising=False)
    [(1, 5), (2, 3), (4, 1)]
    """
    best: list[tuple[float, float]] = []
    for cost, quality in sorted(points, key=lambda p: (p[0], -p[1] if rising else p[1])):
        if not best or (quality > best[-1][1] if rising else quality < best[-1][1]):
            best.append((cost, quality))
    return best


def _value(run: Run, split: str, row: Quality, metric: str) -> float | None:
    if metric == "loss":
        return row.loss
    wanted = [
        r
        for r in run.of("eval", stage=row.stage, metric=metric)
        if text(r.get("split"), "valid") == split
        and (text(r.get("format"), ""), text(r.get("algorithm"), "")) in (row.variant, ("dense", ""))
    ]
    return finite(wanted[-1].get("value")) if wanted else None


def _setting(record: Record) -> str:
    batch = finite(record.get("batch"))
    parts = [
        words.name(words.PHASES, record.get("phase")) if record.get("phase") else "",
        f"batch {batch:g}" if batch else "",
        words.tokens(record.get("tokens")) if record.get("tokens") else "",
    ]
    return ", ".join(part for part in parts if part)


def _same_size(row: Record, model: Model) -> bool:
    """Say whether a timed row has the blocks and ranks that the model was compressed to, where both are known."""
    for record in layer_records(model.run):
        if record.get("format") == model.form and row.get("layer") in ("*", layer_name(record)):
            return all(row.get(k) == record.get(k) for k in ("blocks", "rank") if row.get(k) and record.get(k))
    return True
