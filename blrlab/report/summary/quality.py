"""Losses of the stages of one run, and the share of the loss that healing won back.

With L the evaluation loss of a stage:

    share against dense              = (L_compressed - L_healed) / (L_compressed - L_dense)
    share against dense, trained on  = (L_compressed - L_healed) / (L_compressed - L_dense_continued)

The second is the stricter one: the dense model had the same extra steps. Where compression lost nothing there
is nothing to win back, and there is no share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from blrlab.report.groups import Record, Run, finite, latest, text

DENSE_STAGES = ("dense", "dense_continued")
FACTORED_STAGES = ("compressed", "healed")

Variant = tuple[str, str]


@dataclass(frozen=True)
class Quality:
    """One stage's evaluation. `change` is its loss less the dense model's, in the loss's own unit."""

    stage: str
    variant: Variant
    loss: float | None
    loss_unit: str
    perplexity: float | None
    perplexity_unit: str
    bits_per_byte: float | None
    top1: float | None
    top5: float | None
    mse: float | None
    vb: float | None
    fid: float | None
    parameters: float | None
    change: float | None
    layer_factor: float | None
    model_factor: float | None


def share_won_back(reference: float | None, compressed: float | None, healed: float | None) -> float | None:
    """Return the share of the loss over `reference` won back by healing; None where there was none to win."""
    if reference is None or compressed is None or healed is None or compressed <= reference:
        return None
    return (compressed - healed) / (compressed - reference)


def splits(run: Run) -> list[str]:
    """Return the evaluated splits of a run, validation first."""
    names = dict.fromkeys(text(r.get("split"), "valid") for r in run.of("eval"))
    return sorted(names, key=lambda split: not split.startswith("valid"))


def variants(run: Run) -> list[Variant]:
    """Return the (format, algorithm) pairs that a run evaluated, or else the one it compressed with."""
    found = [_variant(r) for r in run.of("eval") if r.get("stage") in FACTORED_STAGES]
    if found:
        return list(dict.fromkeys(found))
    rows = [r for r in run.of("compress") if r.get("path") != "*" and r.get("format") not in (None, "dense")]
    formats = " and ".join(dict.fromkeys(text(r["format"]) for r in rows))
    algorithms = " and ".join(dict.fromkeys(text(r.get("algorithm"), "") for r in rows))
    return [(formats, algorithms)] if rows else []


def quality_rows(run: Run, split: str) -> list[Quality]:
    """Return the evaluated stages of a run: dense ones first, then compressed and healed of every variant."""
    rows = [r for r in run.of("eval") if text(r.get("split"), "valid") == split]
    stages = [(stage, ("", "")) for stage in DENSE_STAGES]
    stages += [(stage, variant) for variant in variants(run) for stage in FACTORED_STAGES]
    table: list[Quality] = []
    for stage, variant in stages:
        wanted = [r for r in rows if r.get("stage") == stage]
        wanted = wanted if stage in DENSE_STAGES else [r for r in wanted if _variant(r) == variant]
        if wanted:
            dense = table[0].loss if table and table[0].stage == "dense" else None
            table.append(_quality(run, stage, variant, wanted, dense))
    return table


def losses(rows: list[Quality], variant: Variant) -> dict[str, float | None]:
    """Return the loss of every stage that one variant is judged by."""
    return {row.stage: row.loss for row in rows if row.stage in DENSE_STAGES or row.variant == variant}


def factors(run: Run, variant: Variant) -> tuple[float | None, float | None]:
    """Return a variant's (layer, model) compression factors, from its evaluations or the total row."""
    rows = [r for r in run.of("eval") if r.get("stage") in FACTORED_STAGES and _variant(r) == variant]
    rows = _totals(run, variant) + rows
    found = [[finite(r.get(key)) for r in rows] for key in ("layer_factor", "model_factor")]
    layer, model = ([v for v in values if v is not None] or [None] for values in found)
    return layer[-1], model[-1]


def dense_parameters(run: Run) -> float | None:
    """Return the parameter count of the dense model."""
    totals = [finite(r.get("params_before")) for r in run.of("compress", path="*")]
    known = [v for v in [*totals, finite(run.env.get("parameters"))] if v is not None]
    return known[-1] if known else None


def _variant(record: Record) -> Variant:
    return text(record.get("format"), ""), text(record.get("algorithm"), "")


def _totals(run: Run, variant: Variant) -> list[Record]:
    # The whole-model row may leave format and algorithm out; where it has them, they must be the variant's.
    rows = run.of("compress", path="*")
    return [
        r for r in rows if all(not r.get(k) or r[k] == v for k, v in zip(("format", "algorithm"), variant, strict=True))
    ]


def _parameters(run: Run, stage: str, variant: Variant) -> float | None:
    dense = dense_parameters(run)
    if stage in DENSE_STAGES:
        return dense
    totals = [v for v in (finite(r.get("params_after")) for r in _totals(run, variant)) if v is not None]
    model_factor = factors(run, variant)[1]
    if totals:
        return totals[-1]
    return dense / model_factor if dense and model_factor else None


def _quality(run: Run, stage: str, variant: Variant, rows: list[Record], dense: float | None) -> Quality:
    by_metric = {r.get("metric"): r for r in latest(rows, lambda r: r.get("metric"))}
    loss_row = by_metric.get("loss", {})
    loss, unit = finite(loss_row.get("value")), text(loss_row.get("unit"), "nats")
    perplexity_row = by_metric.get("perplexity", {})
    bits = finite(by_metric.get("bits_per_byte", {}).get("value"))
    if bits is None and loss is not None and unit == "nats/byte":
        bits = loss / math.log(2)
    layer_factor, model_factor = (None, None) if stage in DENSE_STAGES else factors(run, variant)
    return Quality(
        stage=stage,
        variant=variant,
        loss=loss,
        loss_unit=unit,
        perplexity=finite(perplexity_row.get("value")),
        perplexity_unit=text(perplexity_row.get("unit"), ""),
        bits_per_byte=bits,
        top1=finite(by_metric.get("top1", {}).get("value")),
        top5=finite(by_metric.get("top5", {}).get("value")),
        mse=finite(by_metric.get("mse", {}).get("value")),
        vb=finite(by_metric.get("vb", {}).get("value")),
        fid=finite(by_metric.get("fid", {}).get("value")),
        parameters=_parameters(run, stage, variant),
        change=None if loss is None or dense is None or stage == "dense" else loss - dense,
        layer_factor=layer_factor,
        model_factor=model_factor,
    )
