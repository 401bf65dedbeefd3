"""What every linear layer of a model is given: statistics of its inputs, and a fit of one layer after another.

A Linen model is watched as it runs, so any model whose linear layers are modules with a `kernel` will do. Layers are
named by their paths, as in `plan`.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from blrlab import factors
from blrlab.compress import statistics as sums
from blrlab.compress.statistics import Statistics
from blrlab.compress.tree import Loss, Tree, compress_layer, copy_tree, layer_of
from blrlab.errors import InputError
from blrlab.factors import Spec

Params = Mapping[str, Any]


def collect(model: nn.Module, params: Params, batches: Sequence[Any], paths: Collection[str]) -> dict[str, Statistics]:
    """Run batches through a model and sum up what its layers are given.

    Args:
      model: a Linen model, called with one batch.
      params: its parameters.
      batches: such as tokens [B, T], or tuples of arguments; every shape is compiled for once.
      paths: the layers to watch. All of their sums are held at once, in_features^2 numbers each.

    Returns:
      {path: statistics}.

    Raises:
      InputError: there is no batch, or a layer is not reached.
    """
    tree = copy_tree(params)
    features = {path: layer_of(tree, path)["kernel"].shape[0] for path in paths}
    found = {path: sums.empty(size) for path, size in features.items()}

    @jax.jit
    def add(params: Params, found: dict[str, Statistics], batch: Any) -> dict[str, Statistics]:
        found = dict(found)

        def watch(path: str, x: Array) -> None:
            if path in found:
                found[path] = sums.add(found[path], x)

        _run(model, params, batch, watch)
        return found

    for batch in _some(batches):
        found = add(params, found, batch)
    for path, each in found.items():
        _reached(path, each)
    return found


def compress_in_sequence(
    model: nn.Module,
    params: Params,
    specs: Mapping[str, Spec],
    batches: Sequence[Any],
    key: Array | None = None,
    progress: Callable[[Loss], None] = lambda loss: None,
    algorithms: Mapping[str, str] | None = None,
) -> tuple[Tree, list[Loss]]:
    """Compress one layer after another, each fitted to what the layers before it, compressed already, hand it.

    Args:
      model: a Linen model, called with one batch.
      params: its dense parameters; they are left as they are.
      specs: {path of the layer: spec}; taken in the order in which the model runs them.
      batches: as for `collect`; all are run again for every layer.
      key: as for `compress`.
      progress: as for `compress`.
      algorithms: as for `compress`.

    Returns:
      As `compress`, the losses in the order of the model.

    Raises:
      InputError: as `compress`; there is no batch, or a layer is not reached.
    """
    key = jax.random.key(0) if key is None else key
    small, dense, losses, batches = copy_tree(params), copy_tree(params), [], _some(batches)
    place = {path: number for number, path in enumerate(specs)}
    met = _in_order(model, dense, batches[0])

    @jax.jit
    def add(params: Params, found: Statistics, batch: Any, wanted: Array) -> Statistics:
        """One program for all layers of as many inputs: which of them is added is looked up as it runs."""
        kept = [found]

        def watch(path: str, x: Array) -> None:
            if path in place and x.shape[-1] == kept[0].mean.shape[0]:
                kept[0] = jax.lax.cond(wanted == place[path], sums.add, lambda so_far, _: so_far, kept[0], x)

        _run(model, params, batch, watch)
        return kept[0]

    for path in sorted(specs, key=lambda path: met.index(path) if path in met else -1):
        number = place[path]
        inputs = sums.empty(layer_of(dense, path)["kernel"].shape[0])
        for batch in batches:
            inputs = add(dense, inputs, batch, jnp.asarray(number))
        _reached(path, inputs)
        loss = compress_layer(small, path, specs[path], jax.random.fold_in(key, number), inputs, algorithms)
        compressed, expanded = layer_of(small, path, dense=False), layer_of(dense, path)
        with jax.default_matmul_precision("highest"):
            expanded |= {**compressed, "kernel": factors.to_dense(compressed["kernel"])}
        losses.append(loss)
        progress(loss)
    return small, losses


def _in_order(model: nn.Module, params: Params, batch: Any) -> list[str]:
    """List the modules that a model runs, the first time of each."""
    met: dict[str, None] = {}

    def meet(path: str, x: Array) -> None:
        met.setdefault(path)

    jax.eval_shape(lambda params, batch: _run(model, params, batch, meet), params, batch)
    return list(met)


def _run(model: nn.Module, params: Params, batch: Any, watch: Callable[[str, Array], None]) -> None:
    def intercept(method: Callable, args: tuple, kwargs: dict[str, Any], context: nn.module.InterceptorContext) -> Any:
        if context.method_name == "__call__" and args and isinstance(args[0], jax.Array):
            watch("/".join(context.module.path), args[0])
        return method(*args, **kwargs)

    with nn.intercept_methods(intercept):
        model.apply({"params": params}, *(batch if isinstance(batch, tuple) else (batch,)))


def _some(batches: Sequence[Any]) -> Sequence[Any]:
    if not len(batches):
        raise InputError("there are no calibration inputs.")
    return batches


def _reached(path: str, found: Statistics) -> None:
    if not float(found.count) > 0:
        raise InputError(f"no calibration input reached {path}.")
