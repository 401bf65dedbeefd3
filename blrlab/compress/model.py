"""Compress a whole parameter tree, by specs or within a budget."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array

from blrlab.compress.budget import Allowed, Target, allocate
from blrlab.compress.statistics import Statistics
from blrlab.compress.tree import Loss, Tree, compress_layer, copy_tree
from blrlab.errors import InputError
from blrlab.factors import Spec


def compress(
    params: Mapping[str, Any],
    specs: Mapping[str, Spec] | None = None,
    key: Array | None = None,
    progress: Callable[[Loss], None] = lambda loss: None,
    algorithms: Mapping[str, str] | None = None,
    statistics: Mapping[str, Statistics] | None = None,
    *,
    target: Target | None = None,
    allowed: Allowed | None = None,
) -> tuple[Tree, list[Loss]]:
    """Replace dense kernels by factors.

    Args:
      params: nested dicts with `kernel` leaves [i, o]; it is left as it is.
      specs: {path of the layer: spec}; None: as `allocate` gives the target out over all dense kernels.
      key: random starts; every layer draws its own from its place in `specs`.
      progress: called with the loss of each layer once it is known.
      algorithms: {format: name} from `ALGORITHMS`; a format that is not named takes its default.
      statistics: {path: of the layer's inputs}; a layer that is not named is fitted to its weight alone. A layer with
        a bias has its mean error added to it.
      target: the budget, in the place of specs; for one in microseconds call `allocate`.
      allowed: what layers may become within the budget; None: the defaults.

    Returns:
      The new tree, and one `Loss` a layer in the order of `specs`.

    Raises:
      InputError: neither or both of specs and target are given, the target is out of reach, a path has no dense
        kernel, its shape is not the spec's, it holds NaN or infinity, or an algorithm is unknown.
    """
    if (specs is None) == (target is None):
        raise InputError("give either specs or a target to compress to.")
    key = jax.random.key(0) if key is None else key
    if specs is None:
        assert target is not None
        specs = allocate(params, target, allowed, statistics=statistics, key=key).specs
    tree, losses = copy_tree(params), []
    for number, (path, spec) in enumerate(specs.items()):
        inputs = (statistics or {}).get(path)
        loss = compress_layer(tree, path, spec, jax.random.fold_in(key, number), inputs, algorithms)
        losses.append(loss)
        progress(loss)
    return tree, losses
