"""BLAST and Monarch factors by alternating exact solves, plain or on calibration inputs.

A sweep solves for the factors in turn, each with the others fixed (BLAST's S nearly); `descent` joins the sweeps.
Calibration inputs couple the rows of blocks through G = X^T X: V[l] (and S[l]) are solved for one l after another then,
and U[k] jointly over all l.

BLAST's published PrecGD (see `precgd`) takes damped gradient steps from near zero. Here BLAST starts from the truncated
SVD, sketched for a large weight, with noise on S that lets the blocks part. Monarch has a closed form without inputs
(see `monarch`); with them it starts from the whitened SVD of every block, which knows of its own inputs only.

Shapes: W [i, o] in blocks [b1, b2, p, q], G in blocks [b1, b1, p, p]; factors as in `blast` and `monarch`.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, Float

from blrlab.factors import descent, low_rank
from blrlab.factors.descent import RIDGE, Parts, Problem, Progress, downhill, inverse, solve

NOISE = 0.1
SKETCHED_FROM = 1024  # the smaller side of weights whose start is sketched
MIDDLE_STEPS = 2  # of conjugate gradients, for S; more of them save few sweeps

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
    sketched: bool | None = None,
    used: Array | None = None,
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
      sketched: start from a sketch of the truncated SVD instead of itself; None: where the smaller side is 1,024 or
        more and the rank less than half of it.
      used: how much of the rank is used, the rest being zeros, so that one program fits any rank; None: all of it.

    Returns:
      {"V": [b1, p, r], "S": [b1, b2, r], "U": [b2, r, q]} and how it went.
    """
    unit, scale = descent.normalised(weight)
    problem = descent.in_blocks(unit, blocks, gram)
    if gram is not None and problem.own is not None:
        gram = descent.after(problem.own, gram)
    small = min(weight.shape)
    if sketched if sketched is not None else small >= SKETCHED_FROM and 2 * rank < small:
        V, U = low_rank.sketch(unit, rank, jax.random.fold_in(key, 1), gram, coarse=True)
    else:
        V, U = low_rank.truncate(unit, rank, gram)
    S = 1 + NOISE * jax.random.normal(key, (*blocks, rank), weight.dtype)
    start = rearrange(V, "(l p) r -> l p r", l=blocks[0]), S, rearrange(U, "r (k q) -> k r q", k=blocks[1])
    if used is not None:  # what is zero in all factors stays so: no solve gives it anything
        kept = jnp.arange(rank) < used
        start = start[0] * kept[None, None], start[1] * kept[None, None], start[2] * kept[None, :, None]
    (V, S, U), progress = descent.minimise(
        problem, start, _blast_product, lambda *given: _blast_sweep(problem, *given), sweeps, gain
    )
    return {"V": V, "S": S * scale, "U": U}, progress


def monarch(
    weight: Weight,
    blocks: tuple[int, int],
    rank: int,
    gram: Gram,
    sweeps: int = descent.SWEEPS,
    gain: float = descent.GAIN,
    used: Array | None = None,
) -> tuple[Factors, Progress]:
    """Factor a weight [i, o] into Monarch factors on calibration inputs.

    Args:
      weight: [i, o], float32 or float64.
      blocks: (b1, b2), dividing (i, o).
      rank: r', of one block.
      gram: X^T X of calibration inputs, positive definite.
      sweeps: the most that are made.
      gain: it stops where ten sweeps lower the error by less than this part of it.
      used: as for `blast`.

    Returns:
      {"V": [b1, b2, p, r'], "U": [b1, b2, r', q]} and how it went.
    """
    unit, scale = descent.normalised(weight)
    problem = descent.in_blocks(unit, blocks, gram)
    assert problem.own is not None
    own = descent.diagonal(descent.cut(descent.after(problem.own, gram), blocks[0], blocks[0]))
    of_block = jax.vmap(low_rank.truncate, in_axes=(0, None, None))  # over output blocks
    start = jax.vmap(lambda row, gram: of_block(row, rank, gram))(problem.target, own)
    if used is not None:
        kept = jnp.arange(rank) < used
        start = start[0] * kept[None, None, None], start[1] * kept[None, None, :, None]
    (V, U), progress = descent.minimise(
        problem, start, _monarch_product, lambda *given: _monarch_sweep(problem, *given), sweeps, gain
    )
    return {"V": V, "U": U * scale}, progress


def last_factor(weight: Weight, kernel: Factors, blocks: tuple[int, int], gram: Gram | None = None) -> Array:
    """Solve for U with the other factors of a kernel of any format fixed, such as rounded ones.

    Twice, the second time for what the first has left, which takes the bias of the solve's ridge away.
    """
    unit, scale = descent.normalised(weight)
    grams = None if gram is None else descent.cut(gram, blocks[0], blocks[0])
    problem, V = Problem(descent.cut(unit, *blocks), grams), kernel["V"]
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


def _blast_sweep(problem: Problem, parts: Parts, pull: Array) -> tuple[Parts, Parts]:
    """Solve for V and S, then for U, with what the ones before became; return them, and the descent before."""
    V, S, U = parts
    right = jnp.einsum("krq,ksq->krs", U, U)
    if problem.gram is None:
        return _plain_sweep(V, S, U, right, pull)
    assert problem.own is not None
    descent = downhill(_blast_product, parts, pull)
    V, S, pull = _row_by_row(problem.gram, problem.own, V, S, U, right, pull)
    U = U + solve(_blast_normal(problem, V, S), jnp.einsum("lkr,lpr,lkpq->krq", S, V, pull))
    return (V, S, U), descent


def _plain_sweep(V: Array, S: Array, U: Array, right: Array, residual: Array) -> tuple[Parts, Parts]:
    """Make a sweep without inputs.

    The residual is multiplied by U, and by V S once they are solved for. What new V and S take from these products
    follows from Gram matrices of the factors, so that the factors need not be multiplied out again. Of U the descent is
    what its solve met: that of before would cost another product, and joins the sweeps less well.
    """
    seen = jnp.einsum("lkpq,krq->lkpr", residual, U)
    of_left, of_right = jnp.einsum("lkpr,lkr->lpr", seen, S), "lkr,lpr,lkpq->krq"
    of_middle = jnp.einsum("lkpr,lpr->lkr", seen, V)
    change = solve(_left_normal(S, right), of_left.mT).mT
    V = V + change
    left, moved = jnp.einsum("lpr,lps->lrs", V, V), jnp.einsum("lpr,lps->lrs", V, change)
    taken = jax.vmap(jax.vmap(_masked, (None, 0, 0)), (0, None, 0))
    new = S + _of_middle(jnp.einsum("lkpr,lpr->lkr", seen, V) - taken(moved, right, S), left, right)
    grown = _right_normal(new, moved, S) + _right_normal(new, left, new - S)  # (V S)^T by what V S gained
    pull = jnp.einsum(of_right, new, V, residual) - grown @ U
    return (V, new, U + solve(_right_normal(new, left, new), pull)), (of_left, of_middle, pull)


def _left_normal(S: Array, right: Array) -> Array:
    """Return what V [l, p, r] is solved against, [l, r, r]; right [k, r, r] is the Gram matrix of U."""
    return _summed(S.swapaxes(0, 1), right, S.swapaxes(0, 1))


def _right_normal(S: Array, left: Array, other: Array) -> Array:
    """Return (V S)^T (V' S') [k, r, r] of S, other [l, k, r] and left = V^T V' [l, r, r]."""
    return _summed(S, left, other)


def _summed(one: Array, grams: Array, other: Array) -> Array:
    """Return the sum over n of diag(one[n, m]) grams[n] diag(other[n, m]), [m, r, r], no term of it kept."""

    def add(total: Array, given: tuple[Array, Array, Array]) -> tuple[Array, None]:
        one, gram, other = given
        return total + one[:, :, None] * gram[None] * other[:, None, :], None

    zeros = jnp.zeros((one.shape[1], *grams.shape[1:]), grams.dtype)
    return jax.lax.scan(add, zeros, (one, grams, other), unroll=8)[0]  # the sum is read and written once for eight


def _blast_normal(problem: Problem, V: Array, S: Array) -> Array:
    """Return what U [k, r, q] is solved against, [k, r, r]."""
    if problem.gram is None:
        return _right_normal(S, jnp.einsum("lpr,lps->lrs", V, V), S)
    inner = jnp.einsum("lpr,lmpu,mus->lmrs", V, problem.gram, V)
    return jnp.einsum("lkr,lmrs,mks->krs", S, inner, S)


def _row_by_row(
    gram: Array, own: Array, V: Array, S: Array, U: Array, right: Array, pull: Array
) -> tuple[Array, Array, Array]:
    """Solve for V[l], then S[l], one l after another; return them and G times the residual that is left.

    What is divided by is inverted before, for all l at once: a GPU would spend most of a sweep on solves for one.
    """
    normal = inverse(_left_normal(S, right))

    def one(row: Array, given: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        V, S, pull = given
        within = gram[row, row]
        change = own[row] @ jnp.einsum("kpq,krq,kr->pr", pull[row], U, S[row]) @ normal[row]
        grown = jnp.einsum("ur,kr,krq->ukq", change, S[row], U)
        V = V.at[row].add(change)
        seen = jnp.einsum("pr,kpq,krq->kr", V[row], pull[row] - jnp.einsum("pu,ukq->kpq", within, grown), U)
        change = _of_middle(seen[None], (V[row].T @ within @ V[row])[None], right)[0]
        grown = grown + jnp.einsum("ur,kr,krq->ukq", V[row], change, U)
        pull = pull - jnp.einsum("mpu,ukq->mkpq", gram[:, row], grown)
        return V, S.at[row].add(change), pull

    return jax.lax.fori_loop(0, V.shape[0], one, (V, S, pull))


def _of_middle(descents: Array, left: Array, right: Array) -> Array:
    """Return the change of S that its solve against descents [l, k, r] makes; left, right: Gram matrices of V and U.

    Every block's system is their elementwise product, r x r. A few steps of conjugate gradients do for a direction,
    where b1 b2 factorisations would take most of the time and memory of a sweep.
    """

    def of_block(left: Array, right: Array, descent: Array) -> Array:
        diagonal = jnp.diagonal(left) * jnp.diagonal(right)
        ridge = RIDGE * diagonal.mean() + jnp.finfo(left.dtype).tiny

        def product(s: Array) -> Array:
            return _masked(left, right, s) + ridge * s

        return cg(product, descent, tol=1e-6, maxiter=MIDDLE_STEPS, M=lambda s: s / (diagonal + ridge))[0]

    return jax.vmap(jax.vmap(of_block, (None, 0, 0)), (0, None, 0))(left, right, descents)


def _masked(left: Array, right: Array, s: Array) -> Array:
    """Return (left * right) s, elementwise between the matrices: summed as it is multiplied, not stored."""
    return jnp.sum(left * right * s[None], axis=1)


def _monarch_product(parts: Parts) -> Array:
    return parts[0] @ parts[1]


def _monarch_sweep(problem: Problem, parts: Parts, pull: Array) -> tuple[Parts, Parts]:
    """Solve for V[l], one l after another, then for U[:, k] jointly; return them, and the descent before."""
    (V, U), gram, own = parts, problem.gram, problem.own
    assert gram is not None
    assert own is not None
    right = inverse(U @ U.mT)  # [l, k, r, r]

    def one(row: Array, given: tuple[Array, Array]) -> tuple[Array, Array]:
        V, pull = given
        change = own[row] @ (pull[row] @ U[row].mT) @ right[row]  # [k, p, r]
        pull = pull - jnp.einsum("mpu,kuq->mkpq", gram[:, row], change @ U[row])
        return V.at[row].add(change), pull

    descent = downhill(_monarch_product, parts, pull)
    V, pull = jax.lax.fori_loop(0, V.shape[0], one, (V, pull))
    return (V, U + _monarch_last(problem, V, pull)), descent


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
