"""What every layer of a model would lose by every format and block count: measured once, for any budget."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array

from blrlab import records
from blrlab.compress.curves import Curve, curve
from blrlab.compress.statistics import Statistics
from blrlab.compress.tree import check, copy_tree, finite, layer_of
from blrlab.errors import InputError
from blrlab.factors import Spec

Kind = tuple[str, tuple[int, int]]  # format and blocks
Losses = dict[str, dict[Kind, Curve]]  # by path


def measure(
    params: Mapping[str, Any],
    options: Mapping[str, Sequence[Spec]],
    statistics: Mapping[str, Statistics] | None = None,
    key: Array | None = None,
    progress: Callable[[str], None] = lambda path: None,
) -> Losses:
    """Measure what the layers of a model lose of their energy.

    Args:
      params: nested dicts with `kernel` leaves [i, o].
      options: {path: specs of interest}; dense loses nothing and is not measured.
      statistics: {path: of the layer's inputs}; a layer that is not named is judged by its weight alone.
      key: random starts.
      progress: called with the path of each layer once it is measured.

    Raises:
      InputError: a path has no dense kernel, or one that is not finite, or its statistics are not its own.
    """
    tree, key, found = copy_tree(params), jax.random.key(0) if key is None else key, Losses()
    for number, (path, specs) in enumerate(options.items()):
        layer, inputs = layer_of(tree, path), (statistics or {}).get(path)
        finite(path, layer["kernel"])
        try:
            check(inputs, layer["kernel"].shape[0])
        except InputError as problem:
            raise InputError(f"{path}: {problem}") from None
        found[path] = _layer(layer, specs, jax.random.fold_in(key, number), inputs)
        progress(path)
    return found


def _layer(layer: Mapping[str, Any], specs: Sequence[Spec], key: Array, inputs: Statistics | None) -> dict[Kind, Curve]:
    found: dict[Kind, Curve] = {}
    for number, kind in enumerate(dict.fromkeys((spec.format, spec.blocks) for spec in specs if spec.rank)):
        ranks = sorted(spec.rank for spec in specs if (spec.format, spec.blocks) == kind)
        own, has_bias = jax.random.fold_in(key, number), inputs is not None and "bias" in layer
        found[kind] = curve(layer["kernel"], *kind, ranks, own, inputs, has_bias)
    return found


def lost(curves: Mapping[Kind, Curve], spec: Spec) -> float:
    """Return the share of its energy that a layer loses.

    Raises:
      InputError: the spec's format and blocks were not measured.
    """
    if spec.format == "dense":
        return 0.0
    found = curves.get((spec.format, spec.blocks))
    if found is None:
        raise InputError(f"{spec.format} of {spec.blocks[0]} x {spec.blocks[1]} blocks was not measured.")
    return found.at(spec.rank)


def save(found: Losses, file: Path) -> None:
    """Write them as JSON: {path: [{format, blocks, ranks, lost}]}."""
    told = {
        path: [{"format": format, "blocks": blocks, **of._asdict()} for (format, blocks), of in curves.items()]
        for path, curves in found.items()
    }
    records.write_text(file, json.dumps(told))


def load(file: Path) -> Losses:
    """Read what `save` wrote.

    Raises:
      InputError: the file is damaged.
    """
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
        return {
            path: {
                (one["format"], (one["blocks"][0], one["blocks"][1])): Curve(tuple(one["ranks"]), tuple(one["lost"]))
                for one in curves
            }
            for path, curves in given.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as problem:
        raise InputError(f"{file} is damaged: {type(problem).__name__}: {problem}") from None
