"""The stages that give a budget out over a model's layers: curves measures what they would lose, allocate shares out.

Curves are the same whatever the budget, so another target takes moments. `curves/losses.json` and `weights.json` have
what was measured, `allocate/plan.json` is a set of rules.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blrlab import compress, factors, records, train
from blrlab.compress import Allocation, Allowed, Target, losses
from blrlab.errors import InputError
from blrlab.experiments import build, model_stages
from blrlab.experiments.build import Experiment
from blrlab.experiments.model_stages import Run
from blrlab.factors import Spec

LOSSES, WEIGHTS = "losses.json", "weights.json"


def check(made: Experiment) -> None:
    """Check before anything is measured that there are the times which a target in microseconds needs.

    Raises:
      InputError: there are none.
    """
    if made.config.budget.target == "microseconds":
        _latencies(made.config)


def curves(run: Run, folder: Path) -> None:
    """Measure what the layers that the rules match lose by every format, block count and rank that is allowed."""
    made, config, params = run.made, run.made.config, run.params("dense")
    _, allowed = build.budget(config)
    batches = model_stages.calibration_batches(run)
    mode, paths = config.compress.mode, build.budgeted(made)
    inputs = None if mode == "plain" else compress.collect(run.model(dense=True, watched=True), params, batches, paths)
    weights = _weights(run, params, paths, allowed, inputs) if config.budget.sensitivity else {}
    sizes = compress.linears(made.dense_shapes)
    found = losses.measure(
        params,
        {path: allowed.specs(*size) for path, size in sizes.items() if path in paths},
        inputs,
        run.key(model_stages.COMPRESS),
        lambda path: run.say(f"curves: {path} measured"),
    )
    records.write_text(folder / WEIGHTS, json.dumps(weights))
    losses.save(found, folder / LOSSES)


def allocate(run: Run, folder: Path) -> None:
    """Choose format, blocks and rank of every layer that the rules match."""
    made, config = run.made, run.made.config
    target, allowed = build.budget(config)
    measured = run.workdir.path("curves")
    weights = json.loads((measured / WEIGHTS).read_text(encoding="utf-8"))
    found = compress.allocate(
        run.params("dense"),
        target,
        allowed,
        paths=build.budgeted(made),
        weights=weights,
        latencies=_latencies(config) if target.kind == "microseconds" else None,
        measured=losses.load(measured / LOSSES),
    )
    compress.save(found.specs, folder / "plan.json")
    rows = [_record(path, spec, found, weights) for path, spec in found.specs.items()]
    records.rewrite(folder / "records.jsonl", [*rows, *_totals(target, found)])
    _say(run, found, folder)


def _weights(
    run: Run, params: Mapping[str, Any], paths: tuple[str, ...], allowed: Allowed, inputs: Any
) -> dict[str, float]:
    """Measure how much each layer matters, by low rank of half its size, on training data."""
    made, config = run.made, run.made.config.compress
    examples, objective = made.task.calibration(made, run.dataset, config.windows), made.task.objective(made, False)
    model = run.model(dense=True)
    half = {}
    for path, (i, o) in compress.linears(made.dense_shapes).items():
        if path not in paths:
            continue
        rank = max(i * o // (2 * (i + o)) // allowed.multiple, 1) * allowed.multiple
        half[path] = Spec("low_rank", i, o, rank=rank)
    return compress.sensitivities(
        params,
        half,
        lambda tree: train.evaluate(model, tree, examples, config.batch, objective)["loss"],
        run.key(model_stages.COMPRESS),
        inputs,
        lambda path: run.say(f"curves: {path} tried"),
    )


def _latencies(config: Any) -> dict[Spec, float]:
    file = Path(config.budget.records)
    if not file.is_file():
        raise InputError(f'budget.target=microseconds needs budget.records, bench records; "{file}" is no file.')
    found = compress.latencies(records.read(file), config.budget.tokens)
    if not found:
        raise InputError(f"{file} has no verified time at {config.budget.tokens} tokens.")
    return found


def _record(path: str, spec: Spec, found: Allocation, weights: Mapping[str, float]) -> records.Record:
    return {
        "kind": "allocate",
        "path": path,
        **factors.described(spec),
        "lost": found.lost[path],
        "weight": weights.get(path, 1.0),
        "params_before": spec.in_features * spec.out_features,
        "params_after": factors.parameter_count(spec),
    }


def _totals(target: Target, found: Allocation) -> list[records.Record]:
    shared = {"kind": "allocate", "path": "*", "target": target.kind, "value": target.value}
    budget = shared | {"plan": "budget", "total": found.total, "cost": found.cost, "budget": found.budget}
    return [budget, *(shared | {"plan": name, "total": total} for name, total in found.uniform.items())]


def _say(run: Run, found: Allocation, folder: Path) -> None:
    for path, spec in found.specs.items():
        blocks = f" b {spec.blocks[0]}" if spec.blocks != (1, 1) else ""
        rank = f" r {spec.total_rank}" if spec.rank else ""
        run.say(f"allocate: {path:<20} {spec.format}{blocks}{rank}  loses {found.lost[path]:.4f} of its energy")
    rivals = ", ".join(f"{name} {total:.4g}" for name, total in sorted(found.uniform.items(), key=lambda each: each[1]))
    run.say(f"allocate: expected loss {found.total:.4g}; equal shares: {rivals or 'none fits'}")
    run.say(f"allocate: to compress so, add --config.rules_file={folder / 'plan.json'}")
