"""The BLAST format: the blocks of a row share a left factor, those of a column a right one.

W [i, o] is cut into b1 x b2 blocks W[l, k] [p, q], and W[l, k] = V[l] diag(S[l, k]) U[k]. The factors are
V [b1, p, r], S [b1, b2, r] and U [b2, r, q]: r (i + o + b1 b2) parameters. With S = 1 it is low rank.
Source: Lee et al., arXiv 2410.21262.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from blrlab.factors import alternating
from blrlab.factors.spec import Spec

Factors = dict[str, Array]


def shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Return the shape of each factor."""
    (b1, b2), (p, q) = spec.blocks, spec.block_sizes
    return {"V": (b1, p, spec.rank), "S": (b1, b2, spec.rank), "U": (b2, spec.rank, q)}


def fans(spec: Spec) -> dict[str, tuple[int, int]]:
    """Return the fan-in and the fan-out of each factor; S takes b1 numbers to b2, for every rank by itself."""
    p, q = spec.block_sizes
    return {"V": (p, spec.rank), "S": spec.blocks, "U": (spec.rank, q)}


def init(key: Array, spec: Spec, dtype: jax.typing.DTypeLike) -> Factors:
    """Draw each factor with variance 1 / its fan-in: 1 / p for V, 1 / b1 for S, 1 / r for U."""
    v, s, u = jax.random.split(key, 3)
    size, fan = shapes(spec), fans(spec)
    return {
        "V": jax.random.normal(v, size["V"], dtype) * fan["V"][0] ** -0.5,
        "S": jax.random.normal(s, size["S"], dtype) * fan["S"][0] ** -0.5,
        "U": jax.random.normal(u, size["U"], dtype) * fan["U"][0] ** -0.5,
    }


def apply(factors: Factors, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
    """Multiply: x [..., i] -> [..., o]. Output block k is (sum over l of x[l] V[l] * S[l, k]) U[k]."""
    blocks = rearrange(x, "... (l p) -> ... l p", l=factors["V"].shape[0])
    inner = jnp.einsum("...lp,lpr->...lr", blocks, factors["V"])
    mixed = jnp.einsum("...lr,lkr->...kr", inner, factors["S"])
    return rearrange(jnp.einsum("...kr,krq->...kq", mixed, factors["U"]), "... k q -> ... (k q)")


def to_dense(factors: Factors) -> Float[Array, "i o"]:
    """Multiply the factors out."""
    blocks = jnp.einsum("lpr,lkr,krq->lpkq", factors["V"], factors["S"], factors["U"])
    return rearrange(blocks, "l p k q -> (l p) (k q)")


def squared_norm(factors: Factors) -> Float[Array, ""]:
    """Return ||W||_F^2, the sum over l and k of S[l, k]^T ((V[l]^T V[l]) * (U[k] U[k]^T)) S[l, k]."""
    V, S, U = factors["V"], factors["S"], factors["U"]
    right = U @ U.mT  # [b2, r, r]

    @jax.checkpoint  # so that the gradient, too, holds b2 r^2 numbers at a time
    def add(total: Array, given: tuple[Array, Array]) -> tuple[Array, None]:
        V, S = given  # [p, r] and [b2, r], of one input block
        inner = jnp.sum((V.T @ V)[None] * right * S[:, None, :], axis=-1)
        return total + jnp.sum(S * inner), None

    return jax.lax.scan(add, jnp.zeros((), V.dtype), (V, S))[0]


def project(weight: Float[Array, "i o"], spec: Spec, key: Array) -> Factors:
    """Find near factors by alternating solves (see `alternating`)."""
    return alternating.blast(weight, spec.blocks, spec.rank, key)[0]
