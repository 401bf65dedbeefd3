"""BLAST and Monarch factors by alternating exact solves, plain or on calibration inputs.

A sweep solves for the factors in turn, each with the others fixed (BLAST's S nearly); `descent` joins the sweeps.
Calibration inputs couple the rows of blocks through G = X^T X: V[l] (and S[l]) are solved for one l after another then,
and U[k] jointly over all l.

BLAST's published PrecGD (see `precgd`) takes damped gradient steps from near zero. Here BLAST starts from the truncated
SVD, with noise on S that lets the blocks part. Monarch has a closed form without inputs (see `monarch`); with them it
starts from the whitened SVD of every block, which knows of its own inputs only.

Shapes: W [i, o] in blocks [b1, b2, p, q], G in blocks [b1, b1, p, p]; factors as in `blast` and `monarch`.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, Float

from blrlab.factors import descent, low_rank
from blrlab.factors.descent import RIDGE, Parts, Problem, Progress, solve

NOISE = 0.1
MIDDLE_STEPS = 8  # of conjugate gradients, for S

Weight = Float[Array, "i o"]
Gram = Float[Array, "i i"]
Factors = dict[str, Array]


def blast(
    weight: Weight,
    blocks: tuple[int, int],
    rank: int,
    key: Array,
    gram: Gram | None = None,
    sweeps: int = descent.SWEEPS,
    gain: float = descent.GAIN,
) -> tuple[Factors, Progress]:
    """Factor a weight [i, o] into BLAST factors.

    Args:
      weight: [i, o], float32 or float64.
      blocks: (b1, b2), dividing (i, o).
      rank: r.
      key: the noise of the start.
      gram: X^T X of calibration inputs, positive definite, or None for the weight's own error.
      sweeps: the most that are made.
      gain: it stops where ten sweeps lower the error by less than this part of it.

    Returns:
      {"V": [b1, p, r], "S": [b1, b2, r], "U": [b2, r, q]} and how it went.
    """
    unit, scale = descent.normalised(weight)
    problem = descent.in_blocks(unit, blocks, gram)
    V, U = low_rank.truncate(unit, rank, gram)
    S = 1 + NOISE * jax.random.normal(key, (*blocks, rank), weight.dtype)
    start = rearrange(V, "(l p) r -> l p r", l=blocks[0]), S, rearrange(U, "r (k q) -> k r q", k=blocks[1])
    (V, S, U), progress = descent.minimise(
        problem, start, _blast_product, lambda parts: _blast_sweep(problem, *parts), sweeps, gain
    )
    return {"V": V, "S": S * scale, "U": U}, progress


def monarch(
    weight: Weight,
    blocks: tuple[int, int],
    rank: int,
    gram: Gram,
    sweeps: int = descent.SWEEPS,
    gain: float = descent.GAIN,
) -> tuple[Factors, Progress]:
    """Factor a weight [i, o] into Monarch factors on calibration inputs.

    Args:
      weight: [i, o], float32 or float64.
      blocks: (b1, b2), dividing (i, o).
      rank: r', of one block.
      gram: X^T X of calibration inputs, positive definite.
      sweeps: the most that are made.
      gain: it stops where ten sweeps lower the error by less than this part of it.

    Returns:
      {"V": [b1, b2, p, r'], "U": [b1, b2, r', q]} and how it went.
    """
    unit, scale = descent.normalised(weight)
    problem = descent.in_blocks(unit, blocks, gram)
    assert problem.gram is not None
    own = jnp.einsum("llpu->lpu", problem.gram)
    of_block = jax.vmap(low_rank.truncate, in_axes=(0, None, None))  # over output blocks
    start = jax.vmap(lambda row, gram: of_block(row, rank, gram))(problem.target, own)
    (V, U), progress = descent.minimise(
        problem, start, _monarch_product, lambda parts: _monarch_sweep(problem, *parts), sweeps, gain
    )
    return {"V": V, "U": U * scale}, progress


def last_factor(weight: Weight, kernel: Factors, blocks: tuple[int, int], gram: Gram | None = None) -> Array:
    """Solve for U with the other factors of a kernel of any format fixed, such as rounded ones.

    Twice, the second time for what the first has left, which takes the bias of the solve's ridge away.
    """
    unit, scale = descent.normalised(weight)
    problem = descent.in_blocks(unit, blocks, gram)
    V = kernel["V"]
    if "S" in kernel:
        S = kernel["S"]
        normal, sides = _blast_normal(problem, V, S), "lkr,lpr,lkpq->krq"
        U = solve(normal, jnp.einsum(sides, S, V, problem.pull(problem.target)))
        left = problem.pull(problem.target - _blast_product((V, S, U)))
        return scale * (U + solve(normal, jnp.einsum(sides, S, V, left)))
    blocked = V if V.ndim == 4 else V[None, None]
    U = _monarch_last(problem, blocked, problem.pull(problem.target))
    U = U + _monarch_last(problem, blocked, problem.pull(problem.target - blocked @ U))
    return scale * (U if V.ndim == 4 else U[0, 0])


def _blast_product(parts: Parts) -> Array:
    return jnp.einsum("lpr,lkr,krq->lkpq", *parts)


def _blast_sweep(problem: Problem, V: Array, S: Array, U: Array) -> Parts:
    """Solve for V and S, then for U, with what the ones before became."""
    right = jnp.einsum("krq,ksq->krs", U, U)
    pull = problem.pull(problem.target - _blast_product((V, S, U)))
    if problem.gram is None:
        V = V + _of_left(pull, S, U, right)
        left = jnp.einsum("lpr,lps->lrs", V, V)
        S = S + _of_middle(problem.target - _blast_product((V, S, U)), V, left, U, right)
        pull = problem.target - _blast_product((V, S, U))
    else:
        V, S, pull = _row_by_row(problem.gram, V, S, U, right, pull)
    return V, S, U + solve(_blast_normal(problem, V, S), jnp.einsum("lkr,lpr,lkpq->krq", S, V, pull))


def _blast_normal(problem: Problem, V: Array, S: Array) -> Array:
    """Return what U [k, r, q] is solved against, [k, r, r]."""
    if problem.gram is None:
        return jnp.einsum("lkr,lrs,lks->krs", S, jnp.einsum("lpr,lps->lrs", V, V), S)
    inner = jnp.einsum("lpr,lmpu,mus->lmrs", V, problem.gram, V)
    return jnp.einsum("lkr,lmrs,mks->krs", S, inner, S)


def _row_by_row(gram: Array, V: Array, S: Array, U: Array, right: Array, pull: Array) -> tuple[Array, Array, Array]:
    """Solve for V[l], then S[l], one l after another; return them and G times the residual that is left."""

    def one(row: Array, given: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        V, S, pull = given
        own, column = gram[row, row], gram[:, row]
        change = solve(own, _of_left(pull[row][None], S[row][None], U, right)[0])
        pull = pull - jnp.einsum("mpu,ukq->mkpq", column, jnp.einsum("ur,kr,krq->ukq", change, S[row], U))
        V = V.at[row].add(change)
        left = V[row].T @ own @ V[row]
        change = _of_middle(pull[row][None], V[row][None], left[None], U, right)[0]
        pull = pull - jnp.einsum("mpu,ukq->mkpq", column, jnp.einsum("ur,kr,krq->ukq", V[row], change, U))
        return V, S.at[row].add(change), pull

    return jax.lax.fori_loop(0, V.shape[0], one, (V, S, pull))


def _of_left(pull: Array, S: Array, U: Array, right: Array) -> Array:
    """Return the change of V [l, p, r] that its solve makes; a block of G is still to be divided out."""
    normal = jnp.einsum("lkr,krs,lks->lrs", S, right, S)
    return solve(normal, jnp.einsum("lkpq,krq,lkr->lrp", pull, U, S)).mT


def _of_middle(pull: Array, V: Array, left: Array, U: Array, right: Array) -> Array:
    """Return the change of S [l, k, r] that its solve makes; left and right are the Gram matrices of V and U.

    Every block's system is their elementwise product, r x r. A few steps of conjugate gradients do for a direction,
    where b1 b2 factorisations would take most of the time and memory of a sweep.
    """
    descents = jnp.einsum("lpr,lkpq,krq->lkr", V, pull, U)

    def of_block(left: Array, right: Array, descent: Array) -> Array:
        diagonal = jnp.diagonal(left) * jnp.diagonal(right)
        ridge = RIDGE * diagonal.mean() + jnp.finfo(left.dtype).tiny

        def product(s: Array) -> Array:
            return jnp.sum(left * right * s[None], axis=1) + ridge * s  # summed as it is multiplied, not stored

        return cg(product, descent, tol=1e-6, maxiter=MIDDLE_STEPS, M=lambda s: s / (diagonal + ridge))[0]

    return jax.vmap(jax.vmap(of_block, (None, 0, 0)), (0, None, 0))(left, right, descents)


def _monarch_product(parts: Parts) -> Array:
    return parts[0] @ parts[1]


def _monarch_sweep(problem: Problem, V: Array, U: Array) -> Parts:
    """Solve for V[l], one l after another, then for U[:, k] jointly."""
    gram = problem.gram
    assert gram is not None
    right = U @ U.mT  # [l, k, r, r]

    def one(row: Array, given: tuple[Array, Array]) -> tuple[Array, Array]:
        V, pull = given
        change = solve(right[row], (pull[row] @ U[row].mT).mT).mT  # [k, p, r]
        change = solve(gram[row, row], rearrange(change, "k p r -> p (k r)"))
        change = rearrange(change, "p (k r) -> k p r", k=U.shape[1])
        pull = pull - jnp.einsum("mpu,kuq->mkpq", gram[:, row], change @ U[row])
        return V.at[row].add(change), pull

    V, pull = jax.lax.fori_loop(0, V.shape[0], one, (V, problem.pull(problem.target - _monarch_product((V, U)))))
    return V, U + _monarch_last(problem, V, pull)


def _monarch_last(problem: Problem, V: Array, pull: Array) -> Array:
    """Solve for U [l, k, r, q] against V, given G times what it is to make up for."""
    right = V.mT @ pull  # [l, k, r, q]
    if problem.gram is None:
        return solve(V.mT @ V, right)
    b1, _, _, rank = V.shape
    normal = jnp.einsum("lkpr,lmpu,mkus->klrms", V, problem.gram, V)
    normal = rearrange(normal, "k l r m s -> k (l r) (m s)")
    solved = solve(normal, rearrange(right, "l k r q -> k (l r) q"))
    return rearrange(solved, "k (l r) q -> l k r q", l=b1, r=rank)
