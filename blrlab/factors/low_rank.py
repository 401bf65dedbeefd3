"""The low-rank format: W = V U, with V [i, r] and U [r, o]: r (i + o) parameters."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from blrlab.factors.spec import Spec

Factors = dict[str, Array]


def shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Return the shape of each factor."""
    return {"V": (spec.in_features, spec.rank), "U": (spec.rank, spec.out_features)}


def init(key: Array, spec: Spec, dtype: jax.typing.DTypeLike) -> Factors:
    """Draw factors whose product has entries of variance 1 / i, like a dense layer's."""
    v, u = jax.random.split(key)
    size = shapes(spec)
    return {
        "V": jax.random.normal(v, size["V"], dtype) * spec.in_features**-0.5,
        "U": jax.random.normal(u, size["U"], dtype) * spec.rank**-0.5,
    }


def apply(factors: Factors, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
    """Multiply: x [..., i] -> [..., o]."""
    return (x @ factors["V"]) @ factors["U"]


def to_dense(factors: Factors) -> Float[Array, "i o"]:
    """Multiply the factors out."""
    return factors["V"] @ factors["U"]


def project(weight: Float[Array, "i o"], spec: Spec, key: Array) -> Factors:
    """Find the nearest factors in the Frobenius norm: the truncated SVD (Eckart and Young, 1936).

    The square root of each singular value goes to either side, so that V and U train alike. A rank above
    min(i, o) is filled up with zero columns.
    """
    left, values, right = jnp.linalg.svd(weight, full_matrices=False)
    root = jnp.sqrt(values)
    V, U = left * root[None, :], root[:, None] * right
    return {"V": _fit(V, 1, spec.rank), "U": _fit(U, 0, spec.rank)}


def _fit(array: Array, axis: int, size: int) -> Array:
    """Cut an axis to `size`, or fill it up with zeros."""
    kept = jax.lax.slice_in_dim(array, 0, min(size, array.shape[axis]), axis=axis)
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, size - kept.shape[axis])
    return jnp.pad(kept, padding)
