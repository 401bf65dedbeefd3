"""Formats, blocks and ranks for every layer within a budget: each unit of it goes where it saves the most loss.

Every layer has options, specs with a cost and a loss (see `curves`), among which `spending` chooses. What counts is
the sum of every layer's weighted loss. Losses are shares of the layer's energy: with equal weights, layers that lose a
tenth of it count alike, whatever they do in the model. `sensitivities` measures weights.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jaxtyping import Array

from blrlab import factors
from blrlab.compress import losses
from blrlab.compress.losses import Losses
from blrlab.compress.plan import linears
from blrlab.compress.spending import Allocation, Option, choose
from blrlab.compress.statistics import Statistics
from blrlab.compress.tree import Tree, compress_layer, copy_tree, layer_of
from blrlab.errors import InputError, one_of
from blrlab.factors import BLOCKED, FORMATS, Spec

TARGETS = ("layer_factor", "model_factor", "bytes", "microseconds")
Latencies = Mapping[Spec, float]


@dataclasses.dataclass(frozen=True)
class Target:
    """How small a model is to become.

    Attributes:
      kind: layer_factor, of the kernels that are given out; model_factor, of all parameters; bytes, of all parameters
        in the dtypes they have; microseconds, summed over the layers by measured times.
      value: of it.

    Raises:
      InputError: the kind is unknown, or the value not positive.
    """

    kind: str
    value: float

    def __post_init__(self) -> None:
        one_of(self.kind, TARGETS, "target")
        if not self.value > 0:
            raise InputError(f"a target of {self.value:g} {self.kind} is not positive.")


@dataclasses.dataclass(frozen=True)
class Allowed:
    """What a layer may become.

    Attributes:
      formats: of dense, low_rank, monarch, blast.
      blocks: b, the same on both sides; a layer has those that divide it.
      multiple: of which ranks are multiples (monarch: r', of a block), as kernels like it.

    Raises:
      InputError: a format is unknown, or a number not positive.
    """

    formats: tuple[str, ...] = FORMATS
    blocks: tuple[int, ...] = (4, 8, 16)
    multiple: int = 16

    def __post_init__(self) -> None:
        for name in self.formats:
            one_of(name, FORMATS, "format")
        if not self.formats:
            raise InputError(f"no format is allowed: give some of {', '.join(FORMATS)}.")
        if self.multiple < 1 or min(self.blocks, default=1) < 1:
            raise InputError(f"blocks {self.blocks} and multiples of {self.multiple} must be 1 or more.")

    def specs(self, in_features: int, out_features: int) -> list[Spec]:
        """List the specs of a layer that are smaller than dense, and dense."""
        found = [Spec("dense", in_features, out_features)] if "dense" in self.formats else []
        for name in self.formats:
            for blocks in self.blocks if name in BLOCKED else (1,):
                if name != "dense" and not (in_features % blocks or out_features % blocks):
                    found += self._ranks(name, in_features, out_features, (blocks, blocks))
        return found

    def _ranks(self, format: str, in_features: int, out_features: int, blocks: tuple[int, int]) -> list[Spec]:
        found, rank = [], self.multiple
        while True:
            spec = Spec(format, in_features, out_features, blocks, rank)
            if factors.parameter_count(spec) >= in_features * out_features:
                return found
            found.append(spec)
            rank += self.multiple


def allocate(
    params: Mapping[str, Any],
    target: Target,
    allowed: Allowed | None = None,
    *,
    paths: Sequence[str] | None = None,
    statistics: Mapping[str, Statistics] | None = None,
    weights: Mapping[str, float] | None = None,
    latencies: Latencies | None = None,
    key: Array | None = None,
    progress: Callable[[str], None] = lambda path: None,
    measured: Losses | None = None,
) -> Allocation:
    """Give out a budget over the dense layers of a model.

    Args:
      params: nested dicts with `kernel` leaves [i, o].
      target: the budget.
      allowed: formats, blocks and ranks; None: the defaults.
      paths: of the layers; None: every dense kernel.
      statistics: {path: of the layer's inputs}; a layer that is not named is judged by its weight alone.
      weights: {path: how much a lost share counts}; 1 where not named.
      latencies: {spec: us}, for microseconds; only these specs are options then.
      key: random starts.
      progress: called with the path of each layer once it is measured.
      measured: what `losses.measure` found for the same layers and at least these formats and blocks; None: measured
        here.

    Raises:
      InputError: a path has no dense kernel, or the budget is less than the cheapest options cost, or a layer, a format
        or its blocks were not measured.
    """
    allowed = allowed or Allowed()
    sizes, tree = linears(params), copy_tree(params)
    for path in paths or ():
        layer_of(tree, path)
    chosen = [path for path in sizes if paths is None or path in paths]
    if not chosen:
        raise InputError("there is no dense layer to give a budget to.")
    for path, weight in (weights or {}).items():
        if path not in chosen or not 0 <= weight < math.inf:
            raise InputError(f"{path} has weight {weight:g}: weights are finite, not negative, and of layers.")
    price, budget = _price(tree, target, chosen, latencies)
    specs = {path: [spec for spec in allowed.specs(*sizes[path]) if price(path, spec) is not None] for path in chosen}
    for path in chosen:
        if not specs[path]:
            raise InputError(f"{path}: none of {', '.join(allowed.formats)} fits a layer of {sizes[path]}.")
    known = losses.measure(params, specs, statistics, key, progress) if measured is None else measured
    options = {}
    for path in chosen:
        if path not in known:
            raise InputError(f"{path} was not measured.")
        options[path] = [Option(spec, price(path, spec) or 0.0, losses.lost(known[path], spec)) for spec in specs[path]]
    return choose(options, budget, {path: (weights or {}).get(path, 1.0) for path in chosen})


def sensitivities(
    params: Mapping[str, Any],
    specs: Mapping[str, Spec],
    loss: Callable[[Mapping[str, Any]], float],
    key: Array | None = None,
    statistics: Mapping[str, Statistics] | None = None,
    progress: Callable[[str], None] = lambda path: None,
) -> dict[str, float]:
    """Measure what a lost share of each layer's energy does to a model's loss: weights for `allocate`.

    One layer at a time is compressed to its spec and multiplied out again. The more a spec loses, the clearer its
    effect stands out of the loss's noise; a layer whose effect does not gets a hundredth of the greatest. Where no
    layer raises the loss, all weights are 1.

    Args:
      params: nested dicts with `kernel` leaves [i, o].
      specs: {path: what to try}, such as a uniform budget's.
      loss: (dense parameters) -> the loss on a fixed set of examples.
      key: random starts.
      statistics: {path: of the layer's inputs}.
      progress: called with the path of each layer once it is measured.

    Raises:
      InputError: as `compress`, or a loss is no finite number.
    """
    key, before = jax.random.key(0) if key is None else key, loss(params)
    rises, lost = {}, {}
    for number, (path, spec) in enumerate(specs.items()):
        tree, inputs = copy_tree(params), (statistics or {}).get(path)
        found = compress_layer(tree, path, spec, jax.random.fold_in(key, number), inputs)
        layer = layer_of(tree, path, dense=False)
        layer["kernel"] = factors.to_dense(layer["kernel"])
        rises[path] = loss(tree) - before
        if not math.isfinite(rises[path]):
            raise InputError(f"{path}: the model's loss is no finite number without a part of it.")
        lost[path] = (found.relative_error if found.output_error is None else found.output_error) ** 2
        progress(path)
    least = max([*rises.values(), 0.0]) / 100
    if not least:
        return dict.fromkeys(rises, 1.0)
    return {path: max(rise, least) / max(lost[path], 1e-12) for path, rise in rises.items()}


def latencies(rows: Sequence[Mapping[str, Any]], tokens: int) -> dict[Spec, float]:
    """Read the fastest verified time of every spec, in us, from the layers of `bench` records at a number of tokens.

    Kernels of the source paper and quantised ones are left out: the one is not ours to run, the other loses more.

    Raises:
      InputError: the records are of several devices or dtypes.
    """
    found: dict[Spec, float] = {}
    kinds = set()
    for row in rows:
        fits = row.get("kind") == "bench" and row.get("tokens") == tokens and row.get("passed") and row.get("p50")
        layer = row.get("in_features") and row.get("op") in FORMATS  # not a whole model
        if not (fits and layer) or row.get("quantisation_error") is not None or row["impl"].startswith("paper_"):
            continue
        kinds.add(f"{row.get('device')}, {row.get('dtype')}")
        if len(kinds) > 1:
            raise InputError(f"the times are of {' and '.join(sorted(kinds))}: give those of one device and dtype.")
        blocks = tuple(row["blocks"]) if row["op"] in BLOCKED else (1, 1)
        rank = row["block_rank"] if row["op"] == "monarch" else row["rank"] or 0
        spec = Spec(row["op"], row["in_features"], row["out_features"], blocks, rank)
        found[spec] = min(row["p50"], found.get(spec, row["p50"]))
    return found


def _price(
    params: Tree, target: Target, paths: Sequence[str], times: Latencies | None
) -> tuple[Callable[[str, Spec], float | None], float]:
    """Return what a spec costs, None where that is not known, and what all layers may cost."""
    kernels = {path: layer_of(params, path)["kernel"] for path in paths}
    if target.kind == "microseconds":
        if not times:
            raise InputError("a target in microseconds needs the measured times of specs: allocate's latencies.")
        return lambda path, spec: times.get(spec), target.value
    unit = {path: kernel.dtype.itemsize if target.kind == "bytes" else 1 for path, kernel in kernels.items()}
    layers = sum(unit[path] * kernel.size for path, kernel in kernels.items())
    sizes = [leaf.size * (leaf.dtype.itemsize if target.kind == "bytes" else 1) for leaf in jax.tree.leaves(params)]
    others = sum(sizes) - layers
    budget = {
        "layer_factor": layers / target.value,
        "model_factor": (others + layers) / target.value - others,
        "bytes": target.value - others,
    }[target.kind]
    if budget <= 0:
        what = "bytes" if target.kind == "bytes" else "parameters"
        raise InputError(
            f"a target of {target.value:g} {target.kind} is out of reach: what is not given out has {others:,} of the "
            f"model's {others + layers:,} {what}."
        )
    return lambda path, spec: unit[path] * factors.parameter_count(spec), budget
