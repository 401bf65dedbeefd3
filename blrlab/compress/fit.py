"""Fit one weight: every algorithm a pure function of a weight, a spec and what is known of the inputs.

| format | algorithm | weight alone | on calibration inputs |
|---|---|---|---|
| low_rank | svd | truncated SVD, the optimum | SVD of the whitened weight, the optimum (SVD-LLM, arXiv 2403.07378) |
|  | randomized_svd | subspace iteration (Halko et al., arXiv 0909.4061), for large matrices | of the whitened weight |
| monarch | block_svd | truncated SVD of every block, the optimum | alternating solves from the whitened ones |
| blast | alternating | alternating solves from the truncated SVD | the same from the whitened SVD |
|  | precgd | as published (arXiv 2410.21262, algorithm 2) | - |

What the inputs weigh is ||X (W - W')||. Where the layer has a bias, the mean of what is lost goes into it, and the
weight is fitted to the inputs less their mean.

After rounding to the dtype the weight is stored in, the last factor, U, is solved for again with the others as they
were rounded, where that dtype is 16 bits wide.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from blrlab import factors
from blrlab.compress import statistics as sums
from blrlab.compress.statistics import Statistics
from blrlab.errors import InputError, one_of
from blrlab.factors import Kernel, Spec, alternating, low_rank, monarch, precgd
from blrlab.factors.descent import Progress

Gram = Float[Array, "i i"] | None
Algorithm = Callable[[Array, Spec, Array, Gram], tuple[Any, Progress | None]]


class Fit(NamedTuple):
    """What a weight became.

    Attributes:
      kernel: the factors, or the weight itself for dense, in the weight's dtype.
      relative_error: ||W - W'|| / ||W||, of the kernel as stored; 0 for a weight that is all zeros.
      output_error: ||X (W - W')|| / ||X W|| on the inputs it was fitted to, the bias corrected; None without them.
      shift: [o] what the layer's bias is to gain; None without inputs or a bias.
      sweeps: of an iterative algorithm; None of a closed form.
    """

    kernel: Kernel
    relative_error: Array
    output_error: Array | None = None
    shift: Array | None = None
    sweeps: Array | None = None


def _svd(weight: Array, spec: Spec, key: Array, gram: Gram) -> tuple[Any, None]:
    V, U = low_rank.truncate(weight, spec.rank, gram)
    return {"V": V, "U": U}, None


def _randomized_svd(weight: Array, spec: Spec, key: Array, gram: Gram) -> tuple[Any, None]:
    V, U = low_rank.sketch(weight, spec.rank, key, gram)
    return {"V": V, "U": U}, None


def _block_svd(weight: Array, spec: Spec, key: Array, gram: Gram) -> tuple[Any, Progress | None]:
    if gram is None:
        return monarch.project(weight, spec, key), None
    return alternating.monarch(weight, spec.blocks, spec.rank, gram)


def _alternating(weight: Array, spec: Spec, key: Array, gram: Gram) -> tuple[Any, Progress]:
    return alternating.blast(weight, spec.blocks, spec.rank, key, gram)


def _precgd(weight: Array, spec: Spec, key: Array, gram: Gram) -> tuple[Any, None]:
    if gram is not None:
        raise InputError("precgd is published for the weight alone: take alternating for calibration inputs.")
    return precgd.factorize(weight, spec.blocks, spec.rank, key), None


def _as_it_is(weight: Array, spec: Spec, key: Array, gram: Gram) -> tuple[Any, None]:
    return weight, None


# By format, the default first.
ALGORITHMS: dict[str, dict[str, Algorithm]] = {
    "dense": {"none": _as_it_is},
    "low_rank": {"svd": _svd, "randomized_svd": _randomized_svd},
    "monarch": {"block_svd": _block_svd},
    "blast": {"alternating": _alternating, "precgd": _precgd},
}


def algorithm_of(format: str, name: str = "") -> str:
    """Return an algorithm's name, the format's default where none is given.

    Raises:
      InputError: the format has no such algorithm.
    """
    known = ALGORITHMS[format]
    return one_of(name, tuple(known), f"algorithm of {format}") if name else next(iter(known))


@functools.partial(jax.jit, static_argnames=("spec", "algorithm", "has_bias", "dtype"))
@jax.default_matmul_precision("highest")  # a GPU would fit the factors in tf32
def fit(
    weight: Float[Array, "i o"],
    spec: Spec,
    key: Array,
    statistics: Statistics | None = None,
    *,
    algorithm: str = "",
    has_bias: bool = False,
    dtype: jax.typing.DTypeLike | None = None,
) -> Fit:
    """Find factors near a weight; pure, and batched over equal shapes by `jax.vmap`.

    Args:
      weight: [in_features, out_features], finite. The work is done in float32, or float64 for a float64 weight.
      spec: the format and sizes wanted.
      key: the random start of an iterative method.
      statistics: of the layer's inputs, whose output's error is then made small; None: the weight's own error.
      algorithm: a name from `ALGORITHMS`; empty: the format's default.
      has_bias: the layer has a bias that takes up the mean of what is lost.
      dtype: of the factors; None: the weight's.

    Raises:
      InputError: the weight's shape is not the spec's, or the algorithm is unknown or takes no statistics.
    """
    if weight.shape != (spec.in_features, spec.out_features):
        raise InputError(
            f"a weight of shape {weight.shape} is not {spec.in_features} x {spec.out_features}, "
            f"as its {spec.format} spec says."
        )
    run = ALGORITHMS[spec.format][algorithm_of(spec.format, algorithm)]
    wide = jnp.float64 if weight.dtype == jnp.float64 else jnp.float32
    exact = weight.astype(wide)
    moments = gram = None
    if statistics is not None:
        moments = statistics.moments(centred=has_bias).astype(wide)
        gram = sums.damped(statistics, centred=has_bias).astype(wide)
    kernel, progress = run(exact, spec, key, gram)
    stored = _stored(exact, spec, kernel, jnp.dtype(dtype or weight.dtype), gram)
    lost = exact - factors.to_dense(jax.tree.map(lambda leaf: leaf.astype(wide), stored))
    output_error = shift = None
    if statistics is not None and moments is not None:
        whole = statistics.moments().astype(wide)
        output_error = _ratio(_energy(moments, lost), _energy(whole, exact))
        shift = statistics.mean.astype(wide) @ lost if has_bias else None
    relative_error = _ratio(jnp.vdot(lost, lost), jnp.vdot(exact, exact))
    return Fit(stored, relative_error, output_error, shift, progress.sweeps if progress else None)


def _stored(weight: Array, spec: Spec, kernel: Any, dtype: jnp.dtype, gram: Gram) -> Any:
    """Round a kernel to the dtype it is stored in, its last factor fitted to the others as they were rounded."""
    rounded = jax.tree.map(lambda leaf: leaf.astype(dtype), kernel)
    if spec.format == "dense" or jnp.dtype(dtype).itemsize > 2:
        return rounded
    others = {name: leaf.astype(weight.dtype) for name, leaf in rounded.items()}
    last = alternating.last_factor(weight, others, spec.blocks, gram)
    return rounded | {"U": last.astype(dtype)}


def _energy(moments: Array, weight: Array) -> Array:
    return jnp.maximum(jnp.vdot(weight, moments @ weight), 0)


def _ratio(lost: Array, whole: Array) -> Array:
    return jnp.where(whole == 0, 0.0, jnp.sqrt(lost / jnp.where(whole == 0, 1, whole)))
