"""Block low-rank formats as pure functions on kernels.

A kernel is what stands in a parameter tree where a dense layer has its weight: the bare array W [i, o] for
dense, and for every other format a dict of factors, `{"V": ..., "U": ...}` or `{"V": ..., "S": ..., "U": ...}`.
A format is a module with `shapes`, `init`, `apply`, `to_dense` and `project`; its docstring gives the shapes.

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
from blrlab.factors.spec import BLOCKED, FORMATS, Spec, from_total_rank

__all__ = [
    "BLOCKED", "FORMATS", "Kernel", "Spec", "apply", "format_of", "from_total_rank", "init", "is_kernel",
    "parameter_count", "project", "shapes", "spec_of", "to_dense",
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


def init(key: Array, spec: Spec, dtype: jax.typing.DTypeLike = jnp.float32) -> Kernel:
    """Draw a kernel whose weight has entries of variance 1 / in_features."""
    return _MODULES[spec.format].init(key, spec, dtype)


def apply(kernel: Kernel, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
    """Multiply x [..., in_features] by the kernel's weight -> [..., out_features]; dtypes must agree."""
    return _MODULES[format_of(kernel)].apply(kernel, x)


def to_dense(kernel: Kernel) -> Float[Array, "i o"]:
    """Return the weight [in_features, out_features] that a kernel stands for."""
    return _MODULES[format_of(kernel)].to_dense(kernel)


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
