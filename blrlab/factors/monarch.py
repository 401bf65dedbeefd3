"""The Monarch format: every block of W is a product of its own two factors.

W [i, o] is cut into b1 x b2 blocks W[l, k] [p, q], and W[l, k] = V[l, k] U[l, k] of rank r'. The factors are
V [b1, b2, p, r'] and U [b1, b2, r', q]: r' (b2 i + b1 o) parameters. With b1 = b2 = b and r = b r', that is
r (i + o). Source: Dao et al., arXiv 2204.00595, in the rank-r' form of arXiv 2512.20861; here the outputs keep
their natural order, with no hidden permutation.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from blrlab.factors import low_rank
from blrlab.factors.spec import Spec

Factors = dict[str, Array]


def shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Return the shape of each factor."""
    p, q = spec.block_sizes
    return {"V": (*spec.blocks, p, spec.rank), "U": (*spec.blocks, spec.rank, q)}


def fans(spec: Spec) -> dict[str, tuple[int, int]]:
    """Return the fan-in and the fan-out of each factor; an output sums over the b1 blocks of its column."""
    p, q = spec.block_sizes
    return {"V": (p, spec.blocks[1] * spec.rank), "U": (spec.blocks[0] * spec.rank, q)}


def init(key: Array, spec: Spec, dtype: jax.typing.DTypeLike) -> Factors:
    """Draw each factor with variance 1 / its fan-in: 1 / p for V, 1 / (b1 r') for U."""
    v, u = jax.random.split(key)
    size, fan = shapes(spec), fans(spec)
    return {
        "V": jax.random.normal(v, size["V"], dtype) * fan["V"][0] ** -0.5,
        "U": jax.random.normal(u, size["U"], dtype) * fan["U"][0] ** -0.5,
    }


def apply(factors: Factors, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
    """Multiply: x [..., i] -> [..., o]. Output block k sums x[l] V[l, k] U[l, k] over l."""
    blocks = rearrange(x, "... (l p) -> ... l p", l=factors["V"].shape[0])
    inner = jnp.einsum("...lp,lkpr->...lkr", blocks, factors["V"])
    return rearrange(jnp.einsum("...lkr,lkrq->...kq", inner, factors["U"]), "... k q -> ... (k q)")


def to_dense(factors: Factors) -> Float[Array, "i o"]:
    """Multiply the factors out."""
    return rearrange(factors["V"] @ factors["U"], "l k p q -> (l p) (k q)")


def squared_norm(factors: Factors) -> Float[Array, ""]:
    """Return ||W||_F^2, the sum over the blocks of tr((V^T V) (U U^T))."""
    V, U = factors["V"], factors["U"]
    return jnp.sum((V.mT @ V) * (U @ U.mT))


def project(weight: Float[Array, "i o"], spec: Spec, key: Array) -> Factors:
    """Find the nearest factors in the Frobenius norm: a truncated SVD of every block.

    Blocks do not share factors, so the best of each is the best of all.
    """
    b1, b2 = spec.blocks
    blocks = rearrange(weight, "(l p) (k q) -> (l k) p q", l=b1, k=b2)
    factors = jax.vmap(lambda block: low_rank.project(block, spec, key))(blocks)
    return {name: rearrange(factor, "(l k) ... -> l k ...", l=b1, k=b2) for name, factor in factors.items()}
