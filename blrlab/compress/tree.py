"""Compress a parameter tree: replace `kernel` leaves [i, o] by factors, one layer at a time."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from blrlab import factors
from blrlab.errors import InputError
from blrlab.factors import Kernel, Spec

Tree = dict[str, Any]
ALGORITHMS = {"dense": "none", "low_rank": "svd", "monarch": "block_svd", "blast": "precgd"}


@dataclasses.dataclass(frozen=True)
class Loss:
    """What compressing one layer cost.

    Attributes:
      path: of the layer.
      spec: what it became.
      algorithm: how.
      relative_error: ||W - W'|| / ||W||, Frobenius, in float32; 0 for a weight that is all zeros.
      params_before: parameters of the kernel, before.
      params_after: and after.
      seconds: wall time, compilation included.
    """

    path: str
    spec: Spec
    algorithm: str
    relative_error: float
    params_before: int
    params_after: int
    seconds: float


@functools.partial(jax.jit, static_argnums=1)
@jax.default_matmul_precision("highest")  # a GPU would fit the factors in tf32
def _project(weight: Float[Array, "i o"], spec: Spec, key: Array) -> tuple[Kernel, Array]:
    kernel = factors.project(weight, spec, key)
    wide = jnp.float64 if weight.dtype == jnp.float64 else jnp.float32
    exact, product = (
        weight.astype(wide),
        factors.to_dense(jax.tree.map(lambda leaf: leaf.astype(wide), kernel)),
    )
    difference, size = exact - product, jnp.linalg.norm(exact)
    return kernel, jnp.where(size == 0, 0.0, jnp.linalg.norm(difference) / size)


def compress(
    params: Mapping[str, Any],
    specs: Mapping[str, Spec],
    key: Array | None = None,
    progress: Callable[[Loss], None] = lambda loss: None,
) -> tuple[Tree, list[Loss]]:
    """Replace the dense kernels that `specs` names by factors.

    Args:
      params: nested dicts with `kernel` leaves [i, o]; it is left as it is.
      specs: {path of the layer: spec}.
      key: random starts; every layer draws its own from its place in `specs`.
      progress: called with the loss of each layer once it is known.

    Returns:
      The new tree, and one `Loss` a layer in the order of `specs`.

    Raises:
      InputError: a path has no dense kernel, its shape is not the spec's, or it holds NaN or infinity.
    """
    key = jax.random.key(0) if key is None else key
    tree, losses = _copy(params), []
    for index, (path, spec) in enumerate(specs.items()):
        layer = _layer(tree, path)
        weight = layer["kernel"]
        if not bool(jnp.isfinite(weight).all()):  # an SVD of infinities may never end
            raise InputError(f"{path} cannot be compressed: its weight holds NaN or infinity.")
        started = time.perf_counter()
        try:
            kernel, error = _project(weight, spec, jax.random.fold_in(key, index))
        except InputError as problem:
            raise InputError(f"{path}: {problem}") from None
        relative_error = float(error)
        if not np.isfinite(relative_error):
            raise InputError(f"{path} cannot be compressed: its fit diverged.")
        seconds = time.perf_counter() - started
        layer["kernel"] = kernel
        count = factors.parameter_count(spec)
        loss = Loss(path, spec, ALGORITHMS[spec.format], relative_error, weight.size, count, seconds)
        losses.append(loss)
        progress(loss)
    return tree, losses


def expand(params: Mapping[str, Any]) -> Tree:
    """Multiply every factored kernel of a tree out, the inverse of `compress` up to its error."""
    return jax.tree.map(
        lambda node: factors.to_dense(node) if isinstance(node, Mapping) else node,
        dict(params),
        is_leaf=lambda node: isinstance(node, Mapping) and factors.is_kernel(node),
    )


def shapes_of(params: Mapping[str, Any], specs: Mapping[str, Spec]) -> Tree:
    """Return the shapes (`jax.ShapeDtypeStruct`) that `compress` would give, without computing it."""
    tree = _copy(jax.eval_shape(lambda tree: tree, dict(params)))
    for path, spec in specs.items():
        layer = _layer(tree, path)
        dtype, sizes = layer["kernel"].dtype, tuple(layer["kernel"].shape)
        if sizes != (spec.in_features, spec.out_features):
            raise InputError(
                f"{path}: a weight of shape {sizes} is not {spec.in_features} x {spec.out_features}, "
                f"as its {spec.format} spec says."
            )
        layer["kernel"] = jax.eval_shape(functools.partial(factors.init, spec=spec, dtype=dtype), jax.random.key(0))
    return tree


def parameter_count(params: Mapping[str, Any]) -> int:
    """Return how many numbers a tree of arrays (or of their shapes) holds."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def compression_factors(params: Mapping[str, Any], specs: Mapping[str, Spec]) -> tuple[float, float]:
    """Return the compression factors (layer, model) that specs give a dense tree.

    The layer factor counts the kernels that `specs` names, the model factor every parameter.
    """
    before = sum(spec.in_features * spec.out_features for spec in specs.values())
    after = sum(factors.parameter_count(spec) for spec in specs.values())
    whole = parameter_count(params)
    return (before / after if after else 1.0), whole / (whole - before + after)


def _copy(tree: Mapping[str, Any]) -> Tree:
    return {name: _copy(node) if isinstance(node, Mapping) else node for name, node in tree.items()}


def _layer(tree: Tree, path: str) -> Tree:
    node: Any = tree
    for name in path.split("/"):
        node = node.get(name) if isinstance(node, dict) else None
    if not isinstance(node, dict) or getattr(node.get("kernel"), "ndim", 0) != 2:
        raise InputError(f"{path} has no dense kernel to compress.")
    return node
