"""The dense format: y = x W, W [i, o]. Its kernel is the bare array, as in `flax.linen.Dense`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from blrlab.factors.spec import Spec


def shapes(spec: Spec) -> tuple[int, int]:
    """Return the shape of W."""
    return spec.in_features, spec.out_features


def fans(spec: Spec) -> tuple[int, int]:
    """Return W's fan-in and fan-out."""
    return spec.in_features, spec.out_features


def init(key: Array, spec: Spec, dtype: jax.typing.DTypeLike) -> Float[Array, "i o"]:
    """Draw W with variance 1 / i, so that outputs are as large as inputs."""
    return jax.random.normal(key, shapes(spec), dtype) * spec.in_features**-0.5


def apply(kernel: Float[Array, "i o"], x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
    """Multiply: x [..., i] -> [..., o]."""
    return x @ kernel


def to_dense(kernel: Float[Array, "i o"]) -> Float[Array, "i o"]:
    """Return W itself."""
    return kernel


def squared_norm(kernel: Array) -> Float[Array, ""]:
    """Return ||W||_F^2."""
    return jnp.sum(kernel**2)


def project(weight: Float[Array, "i o"], spec: Spec, key: Array) -> Float[Array, "i o"]:
    """Return W itself."""
    return weight
