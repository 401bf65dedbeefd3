"""Parameter trees whose `kernel` leaves [i, o] are replaced by factors, one layer at a time, and counts of them."""

import dataclasses
import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from blrlab import factors
from blrlab.compress.fit import algorithm_of, fit
from blrlab.compress.lean import lean
from blrlab.compress.statistics import Statistics
from blrlab.errors import InputError
from blrlab.factors import Spec

Tree = dict[str, Any]
_fit_alone = lean(fit, "spec", "algorithm", "has_bias", "dtype")


@dataclasses.dataclass(frozen=True)
class Loss:
    """What compressing one layer cost.

    Attributes:
      path: of the layer.
      spec: what it became.
      algorithm: how.
      relative_error: ||W - W'|| / ||W||, Frobenius, in float32 or better; 0 for a weight that is all zeros.
      output_error: ||X (W - W')|| / ||X W|| on the inputs it was fitted to, which in a sequence are those that the
        compressed layers before it hand it, so that it holds nothing of what those lost; None without inputs.
      sweeps: of an iterative algorithm; None of a closed form.
      params_before: parameters of the kernel, before.
      params_after: and after.
      seconds: wall time, compilation included.
    """

    path: str
    spec: Spec
    algorithm: str
    relative_error: float
    output_error: float | None
    sweeps: int | None
    params_before: int
    params_after: int
    seconds: float


def compress_layer(
    tree: Tree,
    path: str,
    spec: Spec,
    key: Array,
    inputs: Statistics | None = None,
    algorithms: Mapping[str, str] | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> Loss:
    """Replace one dense kernel of a tree, in place; arguments and errors as of `model.compress`, dtype as of `fit`."""
    layer = layer_of(tree, path)
    weight = finite(path, layer["kernel"])
    started = time.perf_counter()
    try:
        check(inputs, spec.in_features)
        name = algorithm_of(spec.format, (algorithms or {}).get(spec.format, ""))
        has_bias = inputs is not None and "bias" in layer
        found = _fit_alone(weight, spec, key, inputs, algorithm=name, has_bias=has_bias, dtype=dtype)
    except InputError as problem:
        raise InputError(f"{path}: {problem}") from None
    relative_error = float(found.relative_error)
    if not np.isfinite(relative_error):
        raise InputError(f"{path} cannot be compressed: its fit diverged.")
    seconds = time.perf_counter() - started
    layer["kernel"] = found.kernel
    if found.shift is not None:
        layer["bias"] = layer["bias"] + found.shift.astype(layer["bias"].dtype)
    return Loss(
        path=path,
        spec=spec,
        algorithm=name,
        relative_error=relative_error,
        output_error=None if found.output_error is None else float(found.output_error),
        sweeps=None if found.sweeps is None else int(found.sweeps),
        params_before=weight.size,
        params_after=factors.parameter_count(spec),
        seconds=seconds,
    )


def check(inputs: Statistics | None, in_features: int) -> None:
    """Check what is known of a layer's inputs.

    Raises:
      InputError: they are of another size, none at all, or hold NaN or infinity.
    """
    if inputs is None:
        return
    if inputs.mean.shape != (in_features,):
        raise InputError(f"the statistics are of {inputs.mean.shape[0]} inputs, and the layer has {in_features}.")
    if not float(inputs.count) > 0:
        raise InputError("no calibration input reached the layer.")
    if not bool(jnp.isfinite(inputs.scatter).all()):
        raise InputError("its calibration inputs hold NaN or infinity.")


def expand(params: Mapping[str, Any]) -> Tree:
    """Multiply every factored kernel of a tree out, the inverse of `compress` up to its error."""
    return jax.tree.map(
        lambda node: factors.to_dense(node) if isinstance(node, Mapping) else node,
        dict(params),
        is_leaf=lambda node: isinstance(node, Mapping) and factors.is_kernel(node),
    )


def shapes_of(params: Mapping[str, Any], specs: Mapping[str, Spec]) -> Tree:
    """Return the shapes (`jax.ShapeDtypeStruct`) that `compress` would give, without computing it."""
    tree = copy_tree(jax.eval_shape(lambda tree: tree, dict(params)))
    for path, spec in specs.items():
        layer = layer_of(tree, path)
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


def finite(path: str, weight: Array) -> Array:
    """Return the weight of a layer, since an SVD of infinities may never end.

    Raises:
      InputError: it holds NaN or infinity.
    """
    if not bool(jnp.isfinite(weight).all()):
        raise InputError(f"{path} cannot be compressed: its weight holds NaN or infinity.")
    return weight


def copy_tree(tree: Mapping[str, Any]) -> Tree:
    """Return new nested dicts of the same arrays."""
    return {name: copy_tree(node) if isinstance(node, Mapping) else node for name, node in tree.items()}


def layer_of(tree: Tree, path: str, dense: bool = True) -> Tree:
    """Return the parameters of a linear layer.

    Raises:
      InputError: there is no such layer, or its kernel is no dense one where that is asked for.
    """
    node: Any = tree
    for name in path.split("/"):
        node = node.get(name) if isinstance(node, dict) else None
    kernel = node.get("kernel") if isinstance(node, dict) else None
    if kernel is None or (dense and getattr(kernel, "ndim", 0) != 2):
        raise InputError(f"{path} has no dense kernel to compress.")
    return node
