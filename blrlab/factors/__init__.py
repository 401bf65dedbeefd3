"""Block low-rank formats as pure functions on kernels.

A kernel is what stands in a parameter tree where a dense layer has its weight: the bare array W [i, o] for
dense, and for every other format a dict of factors, `{"V": ..., "U": ...}` or `{"V": ..., "S": ..., "U": ...}`.
A format is a module with `shapes`, `fans`, `init`, `apply`, `to_dense`, `squared_norm` and `project`; its docstring
gives the shapes.

>>> import jax
>>> from blrlab import factors
>>> spec = factors.Spec("monarch", in_features=8, out_features=12, blocks=(2, 2), rank=3)
>>> kernel = factors.init(jax.random.key(0), spec)
>>> factors.apply(kernel, jax.numpy.ones((5, 8))).shape
(5, 12)
>>> factors.to_dense(kernel).shape, factors.parameter_count(spec)
((8, 12), 120)
"""

import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from blrlab.errors import InputError
from blrlab.factors import blast, dense, low_rank, monarch
from blrlab.factors.spec import BLOCKED, FORMATS, Spec, described, from_total_rank

__all__ = [
    "BLOCKED", "FORMATS", "Kernel", "Spec", "apply", "described", "fans", "format_of", "from_total_rank", "init",
    "is_kernel", "learning_rates", "parameter_count", "project", "shapes", "spec_of", "squared_norm", "to_dense",
]  # fmt: skip

Kernel = Array | Mapping[str, Array]
_MODULES: dict[str, ModuleType] = {
    "dense": dense,
    "low_rank": low_rank,
    "monarch": monarch,
    "blast": blast,
}


def shapes(spec: Spec) -> Any:
    """Return the shapes of a kernel: a tuple for dense, `{name: tuple}` for the factored formats."""
    return _MODULES[spec.format].shapes(spec)


def parameter_count(spec: Spec) -> int:
    """Return how many numbers a kernel holds."""
    sizes = shapes(spec)
    return sum(map(math.prod, sizes.values())) if isinstance(sizes, dict) else math.prod(sizes)


def fans(spec: Spec) -> Any:
    """Return (d_in, d_out) for dense, `{name: (d_in, d_out)}` for the factored formats, in the order of the product.

    A factor is a (block) dense layer of its own: d_in numbers are summed into each of what it puts out, and each of
    what it is given goes into d_out.
    """
    return _MODULES[spec.format].fans(spec)


def init(key: Array, spec: Spec, dtype: jax.typing.DTypeLike = jnp.float32) -> Kernel:
    """Draw a kernel whose weight has entries of variance 1 / in_features.

    Every factor is drawn as a dense layer is: normal, with variance 1 / its fan-in. So the numbers between the factors
    have the variance of the inputs, and so have the outputs; the gradient of x has o / i times that of y, as behind a
    dense layer. The gradient of a factor has the variance of a dense weight's times d_out / d_in of every factor after
    it: the last factor's is a dense weight's, low rank's V has o / r times as much. Adam does not see that scale.

    The rank changes none of these, but how they come about: ||W||_F^2 is o at any rank, shared by fewer directions, so
    W's largest singular value grows as the square root of o / r; an entry's fourth moment, 3 (1 + 2 / r) of its
    squared variance in low rank, grows, and a single draw strays more from the mean. Qiu et al. (arXiv 2406.06248)
    keep the spectral norm instead, with W's variance r / i times as large where r is below i.
    """
    return _MODULES[spec.format].init(key, spec, dtype)


def learning_rates(spec: Spec) -> Any:
    """Return what to multiply a dense layer's learning rate by, under Adam: 1.0 for dense, `{name: multiplier}` else.

    The multiplier is in_features / d_in / (number of factors), d_in being the factor's fan-in. A step of Adam is about
    as large in every entry, so it moves what a factor puts out by d_in times its learning rate; with the multiplier
    each factor moves the outputs by a dense layer's change over the number of factors, at any width, block count and
    rank. Source: Qiu et al., arXiv 2406.06248, section 3 (learning rates as 1 / d_in, from the maximal update
    parametrisation), with the division by the number of factors of its released code.
    """
    found = fans(spec)
    if not isinstance(found, dict):
        return 1.0
    return {name: spec.in_features / fan_in / len(found) for name, (fan_in, _) in found.items()}


def apply(kernel: Kernel, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
    """Multiply x [..., in_features] by the kernel's weight -> [..., out_features]; dtypes must agree."""
    return _MODULES[format_of(kernel)].apply(kernel, x)


def to_dense(kernel: Kernel) -> Float[Array, "i o"]:
    """Return the weight [in_features, out_features] that a kernel stands for."""
    return _MODULES[format_of(kernel)].to_dense(kernel)


def squared_norm(kernel: Kernel) -> Float[Array, ""]:
    """Return ||W||_F^2 of the weight that a kernel stands for, from r x r products of its factors."""
    return _MODULES[format_of(kernel)].squared_norm(kernel)


def project(weight: Float[Array, "i o"], spec: Spec, key: Array | None = None) -> Kernel:
    """Find a kernel of the given spec near a weight [in_features, out_features].

    Closed forms for low_rank and monarch (the nearest in the Frobenius norm); alternating solves for blast. The work
    is done in float32, or in float64 for a float64 weight; the weight's dtype is kept.

    Args:
      weight: [in_features, out_features].
      spec: the format and sizes wanted.
      key: the random start of an iterative method; `jax.random.key(0)` if None.

    Raises:
      InputError: the weight's shape is not the spec's.
    """
    if weight.shape != (spec.in_features, spec.out_features):
        raise InputError(
            f"a weight of shape {weight.shape} is not {spec.in_features} x {spec.out_features}, "
            f"as its {spec.format} spec says."
        )
    key = jax.random.key(0) if key is None else key
    exact = weight.astype(jnp.float64 if weight.dtype == jnp.float64 else jnp.float32)
    kernel = _MODULES[spec.format].project(exact, spec, key)
    return jax.tree.map(lambda factor: factor.astype(weight.dtype), kernel)


def is_kernel(node: Any) -> bool:
    """Tell whether a node of a parameter tree is a kernel: a 2-D array or a dict of factors."""
    if isinstance(node, Mapping):
        return _match(node) is not None
    return getattr(node, "ndim", None) == 2


def format_of(kernel: Kernel | Mapping[str, Any]) -> str:
    """Tell a kernel's format from the names and dimensions of its factors.

    Raises:
      InputError: no format has these factors.
    """
    if not isinstance(kernel, Mapping):
        return "dense"
    found = _match(kernel)
    if found is None:
        given = {name: getattr(factor, "shape", factor) for name, factor in kernel.items()}
        raise InputError(f"no format has the factors {given}: low_rank and monarch have V, U; blast V, S, U.")
    return found


def _match(kernel: Mapping[str, Any]) -> str | None:
    dimensions = {name: getattr(factor, "ndim", None) for name, factor in kernel.items()}
    known = {
        "low_rank": {"V": 2, "U": 2},
        "monarch": {"V": 4, "U": 4},
        "blast": {"V": 3, "S": 3, "U": 3},
    }
    return next((name for name, wanted in known.items() if dimensions == wanted), None)


def spec_of(kernel: Kernel | Mapping[str, Any]) -> Spec:
    """Read the spec off a kernel's shapes.

    Raises:
      InputError: the factors do not fit together.
    """
    name = format_of(kernel)
    if not isinstance(kernel, Mapping):
        in_features, out_features = kernel.shape
        return Spec("dense", in_features, out_features)
    V, U = kernel["V"].shape, kernel["U"].shape
    # A block axis leads V and U of blast, two lead those of monarch, none those of low_rank.
    b1 = 1 if name == "low_rank" else V[0]
    b2 = 1 if name == "low_rank" else U[-3]
    spec = Spec(name, b1 * V[-2], b2 * U[-1], (b1, b2), V[-1])
    given = {factor: tuple(array.shape) for factor, array in kernel.items()}
    if given != shapes(spec):
        raise InputError(f"the factors of shapes {given} do not fit together; {shapes(spec)} would.")
    return spec
