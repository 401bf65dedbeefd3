"""The answers in words: what compression cost, what healing won back, what the layers' times say."""

from __future__ import annotations

from blrlab.report import words
from blrlab.report.groups import Record, Run, finite
from blrlab.report.summary.bounds import by_shape
from blrlab.report.summary.latency import OPS, Timing, best_timings, by_layer
from blrlab.report.summary.quality import (
    Variant,
    factors,
    losses,
    quality_rows,
    share_won_back,
    splits,
    variants,
)

NO_RECORDS = "There is nothing to report: no records were given."


def headlines(run: Run) -> list[str]:
    """Return one sentence per compressed variant of a run, or one on what the run has instead."""
    return [headline(run, variant) for variant in variants(run)] or [_without_factors(run)]


def headline(run: Run, variant: Variant) -> str:
    """Say in one sentence how much a variant cut, what it lost and what healing won back."""
    split = (splits(run) or ["valid"])[0]
    rows = quality_rows(run, split)
    known = losses(rows, variant)
    course = _course(known, next((row.loss_unit for row in rows if row.loss is not None), "nats"))
    if not course:
        return words.sentence(f"{_cut(run, variant)}; its loss is not evaluated")
    won = won_back(known, continued_words(run))
    return words.sentence(f"{_cut(run, variant)}; {_loss_of(split)} {course}{': ' if won else ''}{won}")


def won_back(known: dict[str, float | None], continued: str = "the dense model trained on") -> str:
    """Say which share of the loss healing won back, against dense and `continued`; nothing where a loss is missing."""
    compressed, healed = known.get("compressed"), known.get("healed")
    if compressed is None or healed is None:
        return ""
    parts: list[str] = []
    for stage, reference in (("dense", "the dense model"), ("dense_continued", continued)):
        dense = known.get(stage)
        share = share_won_back(dense, compressed, healed)
        lost = "of the loss won back " if not any("won back" in part for part in parts) else ""
        if dense is None:
            parts.append(f"no loss of {reference} to compare with")
        elif share is None:
            parts.append(f"nothing was lost against {reference}")
        elif share < 0:
            parts.append(f"none {lost}against {reference} (healing added {healed - compressed:.3f})")
        elif share > 1:
            # The share of a small loss is a large and empty number; how far healing went past is a full one.
            parts.append(f"all {lost}against {reference} (healed {dense - healed:.3f} below it)")
        else:
            parts.append(f"{words.percent(share)} {lost}against {reference}")
    return ", ".join(parts)


def continued_words(run: Run) -> str:
    """Name the dense model trained on, and say whether it had as many steps as healing."""
    steps: list[float] = []
    for phase in ("heal", "dense_continued"):
        known = [v for v in (finite(r.get("step")) for r in run.of("train", phase=phase)) if v is not None]
        steps += [max(known)] if known else []
    if len(steps) < 2:
        return "the dense model trained on"
    if steps[0] == steps[1]:
        return "the dense model trained on for the same steps"
    return f"the dense model trained on (to step {steps[1]:g}, healing to step {steps[0]:g})"


def latency_sentences(device: str, records: list[Record]) -> list[str]:
    """Say for every factored op on how many layers, and on how many whole models, its best backend beats dense."""
    layers = by_layer(records)
    found: list[str] = []
    for op in OPS[1:]:
        if any(r.get("op") == op for r in records):
            best, models = best_timings(layers, op), best_timings(layers, op, whole_models=True)
            found += [_speed(op, best, device, _layers(best))] if best or not models else []
            found += (
                [_speed(op, models, device, "whole models" if len(models) > 1 else "whole model")] if models else []
            )
    return [words.sentence(line) for line in found]


def _speed(op: str, best: list[Timing], device: str, what: str) -> str:
    name = words.name(words.FORMATS, op)
    if not best:
        return f"On {device}, {name} has no verified time beside a dense one"
    ratios = [t.over_fastest_dense or 0.0 for t in best]
    low, high = words.factor(min(ratios)), words.factor(max(ratios))
    reach = low if low == high else f"{low} to {high}"
    wins = [t for t in best if t.wins]
    sure = f" ({_sureness(wins)})" if wins else ""
    told = f"{len(wins)} of {len(best)} {what}{sure}: {reach} its speed"
    return f"On {device}, the fastest {name} beat the fastest dense on {told}"


def prediction_sentences(device: str, records: list[Record]) -> list[str]:
    """Say for every factored op on how many layers its fastest algorithm is predicted to beat dense."""
    found: list[str] = []
    for op in OPS[1:]:
        shapes = by_shape(r for r in records if r.get("op") == op and (finite(r.get("speedup")) or 0.0) > 0)
        best = [max(finite(r.get("speedup")) or 0.0 for r in rows) for rows in shapes.values()]
        if best:
            name, wins = words.name(words.FORMATS, op), sum(ratio > 1 for ratio in best)
            reach = " to ".join(dict.fromkeys(words.factor(ratio) for ratio in (min(best), max(best))))
            told = f"{name} is predicted to beat dense on {wins} of {len(best)} pairs of layer and tokens"
            found.append(words.sentence(f"On {device}, {told}: {reach} its speed"))
    return found


def _layers(best: list[Timing]) -> str:
    if len(best) == 1:
        return "layer"
    layers = {(t.record.get("net"), t.record.get("layer"), words.shape(t.record)) for t in best}
    return "layers" if len(layers) == len(best) else "pairs of layer and tokens"


def _whole(best: list[Timing]) -> str:
    return "whole models" if len(best) > 1 else "whole model"


def _sureness(wins: list[Timing]) -> str:
    counts = [
        (sum(t.clear is True for t in wins), "clearly"),
        (sum(t.clear is False for t in wins), "within the spread"),
        (sum(t.clear is None for t in wins), "with no spread recorded"),
    ]
    return ", ".join(f"{count} {how}" for count, how in counts if count)


def _loss_of(split: str) -> str:
    return "validation loss" if split.startswith("valid") else f"{split} loss"


def _cut(run: Run, variant: Variant) -> str:
    name, algorithm = words.name(words.FORMATS, variant[0] or None), variant[1]
    name = "Compression" if name == words.MISSING else name
    name += f" ({algorithm})" if algorithm and len(variants(run)) > 1 else ""
    layer, model = (words.factor(value) if value else "" for value in factors(run, variant))
    if layer and model:
        return f"{name} cut the factored layers {layer} (model {model})"
    return (
        f"{name} cut the {'factored layers' if layer else 'model'} {layer or model}"
        if layer or model
        else (f"{name}: no compression factor is recorded")
    )


def _course(known: dict[str, float | None], unit: str) -> str:
    stages = (("dense", ""), ("compressed", " on compression"), ("healed", " after healing"))
    told = [(words.loss(value), when) for stage, when in stages if (value := known.get(stage)) is not None]
    # The unit is said once, after the second loss: "1.520 -> 2.310 nats/byte on compression".
    place = min(1, len(told) - 1)
    return " -> ".join(f"{value}{' ' + unit if i == place else ''}{when}" for i, (value, when) in enumerate(told))


def _without_factors(run: Run) -> str:
    split = (splits(run) or ["valid"])[0]
    rows = [row for row in quality_rows(run, split) if row.loss is not None]
    if not rows:
        return "No evaluation is recorded."
    told = ", ".join(f"{words.name(words.STAGES, r.stage)} {words.loss(r.loss)} {r.loss_unit}" for r in rows)
    return words.sentence(f"{_loss_of(split)}: {told}; no compressed model is recorded")
