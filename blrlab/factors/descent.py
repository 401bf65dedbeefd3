"""Alternating solves joined by conjugate gradients: how factors are fitted where no closed form is known.

Minimises ||X (W - W')||^2 = tr (W - W')^T G (W - W') over factors of W', G = X^T X [i, i]; without G it is
||W - W'||^2. A sweep solves for every factor in turn with the others fixed. Swept alone, factors creep along narrow
valleys; so the change that a sweep makes is taken for a preconditioned direction of descent, and nonlinear conjugate
gradients (Polak and Ribiere, 1969) join the directions. W' is a polynomial in the step along one, of a degree d that is
the number of factors, so the error is one of degree 2 d, which d products give exactly: the step is the best of a
fine grid. No step is taken that raises the error or is not a number; the next direction then is the sweep's alone.
Multiplying the factors out is most of the work; what is left of W is therefore kept from one sweep to the next, and
handed to it.

Shapes: W [i, o] in blocks [b1, b2, p, q], G in blocks [b1, b1, p, p].
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

Parts = tuple[Array, ...]
Sweep = Callable[[Parts, Array], tuple[Parts, Parts]]
SWEEPS = 300
PATIENCE, GAIN = 10, 1.5e-3  # so many sweeps must together lower the error by so large a part of it
RIDGE = 1e-6
LONGEST, PLACES = 10.0, 401  # of steps that are looked at


class Progress(NamedTuple):
    """How a fit went.

    Attributes:
      errors: [sweeps + 1] relative error of the start and after every sweep; the last is repeated once it stopped.
      sweeps: how many were made.
    """

    errors: Array
    sweeps: Array


class Problem(NamedTuple):
    """What is fitted: the weight's blocks [b1, b2, p, q], and those of G [b1, b1, p, p] or None.

    With G, own [b1, p, p] are the inverses of its blocks on the diagonal.
    """

    target: Array
    gram: Array | None = None
    own: Array | None = None

    def pull(self, residual: Array) -> Array:
        """Return G residual."""
        return residual if self.gram is None else jnp.einsum("lmpu,mkuq->lkpq", self.gram, residual)

    def left(self, product: Array) -> "Left":
        """Return what a product of factors leaves."""
        residual = self.target - product
        pulled = None if self.gram is None else self.pull(residual)
        return Left(residual, pulled, jnp.vdot(residual, residual if pulled is None else pulled))


class Left(NamedTuple):
    """What factors leave of the weight: W - W' [b1, b2, p, q], G times it (None without G), and its error."""

    residual: Array
    pulled: Array | None
    loss: Array

    @property
    def pull(self) -> Array:
        """G (W - W'), of which gradients are made."""
        return self.residual if self.pulled is None else self.pulled


class _State(NamedTuple):
    parts: Parts
    left: Left
    gradient: Parts
    change: Parts
    direction: Parts
    losses: Array
    index: Array
    stuck: Array


def cut(matrix: Float[Array, "m n"], rows: int, columns: int) -> Float[Array, "rows columns p q"]:
    """Cut a matrix into blocks."""
    return rearrange(matrix, "(l p) (k q) -> l k p q", l=rows, k=columns)


def in_blocks(weight: Float[Array, "i o"], blocks: tuple[int, int], gram: Float[Array, "i i"] | None) -> Problem:
    """Cut a weight and a Gram matrix into blocks."""
    target = cut(weight, *blocks)
    if gram is None:
        return Problem(target)
    grams = cut(gram, blocks[0], blocks[0])
    return Problem(target, grams, inverse(diagonal(grams)))


def diagonal(grams: Float[Array, "l l p p"]) -> Float[Array, "l p p"]:
    """Return the blocks on the diagonal."""
    return jnp.einsum("llpu->lpu", grams)


def after(first: Array, value: Array) -> Array:
    """Return a value that is there only once `first` is.

    On few cores, jaxlib 0.10 waits for ever where two batched decompositions that know nothing of each other run at
    once.
    """
    return value + 0 * first.ravel()[0]  # which XLA keeps: the number might be infinite


def normalised(weight: Array) -> tuple[Array, Array]:
    """Return a weight over the root mean square of its entries, and that; a weight of zeros as it is, and 0."""
    peak = jnp.abs(weight).max()  # divided out before squaring, which overflows early
    scale = peak * jnp.sqrt(jnp.mean(jnp.square(weight / jnp.where(peak > 0, peak, 1))))
    return weight / jnp.where(scale > 0, scale, 1), scale


def minimise(
    problem: Problem,
    start: Parts,
    product: Callable[[Parts], Array],
    sweep: Sweep,
    sweeps: int = SWEEPS,
    gain: float = GAIN,
) -> tuple[Parts, Progress]:
    """Fit factors from a start.

    Args:
      problem: the weight and the Gram matrix.
      start: the factors to begin with.
      product: (factors) -> the blocks of W' [b1, b2, p, q], linear in every factor.
      sweep: (factors, G (W - W')) -> the factors after a solve for every one, and the descent of the error (half of
        its negative gradient) before it, or nearly.
      sweeps: the most that are made.
      gain: it stops where ten sweeps lower the error by less than this part of it.

    Returns:
      The best factors seen, and how it went.
    """
    left, size = problem.left(product(start)), jnp.vdot(problem.target, problem.pull(problem.target))
    zeros = jax.tree.map(jnp.zeros_like, start)
    losses = jnp.full(sweeps + 1, jnp.inf, problem.target.dtype).at[0].set(left.loss)

    def goes_on(state: _State) -> Array:
        before = state.losses[jnp.maximum(state.index - PATIENCE, 0)]
        stalled = (state.index >= PATIENCE) & (state.left.loss >= (1 - gain) ** 2 * before)
        return (state.index < sweeps) & ~stalled & ~state.stuck & (state.left.loss > 0)

    def advance(state: _State) -> _State:
        return _advance(problem, product, sweep, state)

    state = _State(start, left, zeros, zeros, zeros, losses, jnp.zeros((), jnp.int32), jnp.zeros((), bool))
    state = jax.lax.while_loop(goes_on, advance, state)
    reached = state.losses[jnp.minimum(jnp.arange(sweeps + 1), state.index)]
    return state.parts, Progress(jnp.sqrt(jnp.maximum(reached, 0) / jnp.where(size > 0, size, 1)), state.index)


def downhill(product: Callable[[Parts], Array], parts: Parts, pull: Array) -> Parts:
    """Return the descent of the error: half of its negative gradient."""
    return jax.vjp(product, parts)[1](pull)[0]


def _advance(problem: Problem, product: Callable[[Parts], Array], sweep: Sweep, state: _State) -> _State:
    """Make one sweep, and go along the direction that it joins."""
    parts, left = state.parts, state.left
    swept, descent = sweep(parts, left.pull)
    gradient = jax.tree.map(jnp.negative, descent)
    change = _minus(swept, parts)
    slope = _dot(state.change, state.gradient)
    beta = _dot(change, _minus(gradient, state.gradient)) / jnp.where(slope == 0, 1, slope)
    beta = jnp.where(slope == 0, 0, jnp.clip(beta, 0, 5))
    direction = _along(change, beta, state.direction)
    steps = [float(step) for step in range(1, len(parts) + 1)]
    changes = [problem.target - product(_along(parts, step, direction)) - left.residual for step in steps]
    step = _best_step(problem, left, changes, np.array([0.0, *steps]))
    joined = _along(parts, step, direction)
    leaves = problem.left(product(joined))  # anew: a sum of large changes would leave their rounding behind
    lower = leaves.loss < left.loss  # not where it is no number
    nothing = jax.tree.map(jnp.zeros_like, direction)
    stay, go = (parts, nothing, nothing, left), (joined, direction, change, leaves)
    parts, direction, change, left = jax.tree.map(lambda new, old: jnp.where(lower, new, old), go, stay)
    index, stuck = state.index + 1, ~lower & (slope == 0)  # the same sweep again would be rejected again
    return _State(parts, left, gradient, change, direction, state.losses.at[index].set(left.loss), index, stuck)


def _best_step(problem: Problem, left: Left, changes: list[Array], at: np.ndarray) -> Array:
    """Return the step of the least error, from the residual's changes at all steps of `at` but the first.

    They are as many as a polynomial has coefficients, and the first is 0. What the error changes by is summed, not what
    it is: near the end the two differ by more digits than float32 has.
    """
    pulled = [problem.pull(each) for each in changes]
    inner = jnp.array([[jnp.vdot(one, other) for other in pulled] for one in changes])
    across = jnp.array([jnp.vdot(left.pull, each) for each in changes])
    steps = np.linspace(0, LONGEST, PLACES)
    shares = np.vander(steps, len(at), increasing=True) @ np.linalg.inv(np.vander(at, increasing=True))
    shares = jnp.asarray(shares[:, 1:], inner.dtype)  # of every change in that at a step
    gained = 2 * shares @ across + jnp.einsum("na,ab,nb->n", shares, inner, shares)
    return jnp.asarray(steps, inner.dtype)[jnp.argmin(gained)]


def _minus(left: Parts, right: Parts) -> Parts:
    return jax.tree.map(jnp.subtract, left, right)


def _along(parts: Parts, step: Array | float, direction: Parts) -> Parts:
    return jax.tree.map(lambda now, way: now + step * way, parts, direction)


def _dot(left: Parts, right: Parts) -> Array:
    return jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, left, right))


def solve(normal: Array, right: Array) -> Array:
    """Solve normal z = right for symmetric, positive semidefinite normal [..., r, r], with a small ridge."""
    size = normal.shape[-1]
    mean = jnp.trace(normal, axis1=-2, axis2=-1)[..., None, None] / size
    ridge = RIDGE * mean + jnp.finfo(normal.dtype).tiny
    identity = jnp.broadcast_to(jnp.eye(size, dtype=normal.dtype), normal.shape)
    return jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(normal + ridge * identity), True), right)


def inverse(normal: Array) -> Array:
    """Return what `solve` multiplies by, nearly: enough for a direction of descent."""
    return solve(normal, jnp.broadcast_to(jnp.eye(normal.shape[-1], dtype=normal.dtype), normal.shape))
