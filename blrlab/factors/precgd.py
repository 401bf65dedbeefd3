"""PrecGD: the factorisation of a dense weight into BLAST factors, as published.

Source: Lee et al., arXiv 2410.21262, algorithm 2, with the settings of its released code: the weight is divided
by the root mean square of its entries (their standard deviation, the mean being near 0); 300 sweeps, each one
stepping one side factor, then the other, then S; each step is a gradient of ||W - W'||^2 (its factor 2 kept, so a
step of 1 is over-relaxed) solved against Gram + eps I, with eps = 0.1 ||W - W'|| and a step that falls linearly
from 1 to 0. Here eps is kept above rounding, so that a weight that the factors can represent exactly, whose error
vanishes, does not make the solve singular.

Shapes as in `blast`: W [i, o] in blocks [b1, b2, p, q]; V [b1, p, r], S [b1, b2, r], U [b2, r, q].
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from blrlab.factors.descent import normalised

Factors = dict[str, Array]
SWEEPS = 300
DAMPING = 0.1
START = 1e-3


def factorize(
    weight: Float[Array, "i o"], blocks: tuple[int, int], rank: int, key: Array, sweeps: int = SWEEPS
) -> Factors:
    """Factor a weight [i, o] into BLAST factors, by PrecGD from a random start.

    Args:
      weight: [i, o], float32 or float64.
      blocks: (b1, b2), dividing (i, o).
      rank: r.
      key: the random start.
      sweeps: how often every factor is updated.

    Returns:
      {"V": [b1, p, r], "S": [b1, b2, r], "U": [b2, r, q]}.
    """
    unit, scale = normalised(weight)
    target = rearrange(unit, "(l p) (k q) -> l k p q", l=blocks[0], k=blocks[1])
    start = _start(key, target.shape, rank, weight.dtype)

    def sweep(index: Array, factors: Factors) -> Factors:
        return _sweep(target, factors, (1 - index / sweeps).astype(weight.dtype))

    factors = jax.lax.fori_loop(0, sweeps, sweep, start)
    return factors | {"S": factors["S"] * scale}  # a weight of zeros gives S = 0


def _start(key: Array, size: tuple[int, ...], rank: int, dtype: jax.typing.DTypeLike) -> Factors:
    b1, b2, p, q = size
    v, s, u = jax.random.split(key, 3)
    small = START * rank**-0.5
    return {
        "V": small * jax.random.normal(v, (b1, p, rank), dtype),
        "S": jax.random.normal(s, (b1, b2, rank), dtype),
        "U": small * jax.random.normal(u, (b2, rank, q), dtype),
    }


def _sweep(target: Array, factors: Factors, step: Array) -> Factors:
    """Update V, then U, then S, each with what the ones before it became."""
    V, S, U = factors["V"], factors["S"], factors["U"]
    V = V + 2 * step * _left_step(target, V, S, U)
    # The right side is the left side of the transposed problem.
    flipped = rearrange(target, "l k p q -> k l q p")
    right = _left_step(flipped, U.mT, rearrange(S, "l k r -> k l r"), V.mT)
    U = U + 2 * step * right.mT
    S = S + 2 * step * _middle_step(target, V, S, U)
    return {"V": V, "S": S, "U": U}


def _residual(target: Array, V: Array, S: Array, U: Array) -> Array:
    return target - jnp.einsum("lpr,lkr,krq->lkpq", V, S, U)


def _solve(gram: Array, right: Array, residual: Array) -> Array:
    """Solve (gram + eps I) z = right for every column, eps being proportional to the error."""
    rank, limits = gram.shape[-1], jnp.finfo(gram.dtype)
    rounding = rank * limits.eps * jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None] + limits.eps
    damping = jnp.maximum(DAMPING * jnp.linalg.norm(residual.ravel()), rounding)
    identity = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    damped = gram + damping * identity
    return jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(damped), True), right)


def _left_step(target: Array, V: Array, S: Array, U: Array) -> Array:
    """Return the preconditioned descent direction of V [b1, p, r]."""
    residual = _residual(target, V, S, U)
    cross = jnp.einsum("krq,ksq->krs", U, U)
    gram = jnp.einsum("lkr,krs,lks->lrs", S, cross, S)
    descent = jnp.einsum("lkpq,krq,lkr->lrp", residual, U, S)
    return _solve(gram, descent, residual).mT


def _middle_step(target: Array, V: Array, S: Array, U: Array) -> Array:
    """Return the preconditioned descent direction of S [b1, b2, r]."""
    residual = _residual(target, V, S, U)
    gram = jnp.einsum("lpr,lps->lrs", V, V)[:, None] * jnp.einsum("krq,ksq->krs", U, U)[None]
    descent = jnp.einsum("lpr,lkpq,krq->lkr", V, residual, U)
    return _solve(gram, descent[..., None], residual)[..., 0]
