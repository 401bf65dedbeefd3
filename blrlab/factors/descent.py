"""Alternating solves joined by conjugate gradients: how factors are fitted where no closed form is known.

Minimises ||X (W - W')||^2 = tr (W - W')^T G (W - W') over factors of W', G = X^T X [i, i]; without G it is
||W - W'||^2. A sweep solves for every factor in turn with the others fixed. Swept alone, factors creep along narrow
valleys; so the change that a sweep makes is taken for a preconditioned direction of descent, and nonlinear conjugate
gradients (Polak and Ribiere, 1969) join the directions. W' is a polynomial in the step along one, of a degree d that is
the number of factors, so the error is one of degree 2 d, which d products give exactly: the step is the best of a
fine grid. No step is taken that raises the error or is not a number.

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
SWEEPS = 300
PATIENCE, GAIN = 10, 3e-4  # so many sweeps must together lower the error by so large a part of it
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
    """What is fitted: the weight's blocks [b1, b2, p, q], and those of G [b1, b1, p, p] or None."""

    target: Array
    gram: Array | None = None

    def pull(self, residual: Array) -> Array:
        """Return G residual, of which gradients are made."""
        return residual if self.gram is None else jnp.einsum("lmpu,mkuq->lkpq", self.gram, residual)

    def loss(self, residual: Array) -> Array:
        """Return tr residual^T G residual."""
        return jnp.vdot(residual, self.pull(residual))


class _State(NamedTuple):
    parts: Parts
    loss: Array
    gradient: Parts
    change: Parts
    direction: Parts
    losses: Array
    index: Array


def in_blocks(weight: Float[Array, "i o"], blocks: tuple[int, int], gram: Float[Array, "i i"] | None) -> Problem:
    """Cut a weight and a Gram matrix into blocks."""
    target = rearrange(weight, "(l p) (k q) -> l k p q", l=blocks[0], k=blocks[1])
    if gram is None:
        return Problem(target)
    return Problem(target, rearrange(gram, "(l p) (m u) -> l m p u", l=blocks[0], m=blocks[0]))


def normalised(weight: Array) -> tuple[Array, Array]:
    """Return a weight over the root mean square of its entries, and that; a weight of zeros as it is, and 0."""
    peak = jnp.abs(weight).max()  # divided out before squaring, which overflows early
    scale = peak * jnp.sqrt(jnp.mean(jnp.square(weight / jnp.where(peak > 0, peak, 1))))
    return weight / jnp.where(scale > 0, scale, 1), scale


def minimise(
    problem: Problem,
    start: Parts,
    product: Callable[[Parts], Array],
    sweep: Callable[[Parts], Parts],
    sweeps: int = SWEEPS,
    gain: float = GAIN,
) -> tuple[Parts, Progress]:
    """Fit factors from a start.

    Args:
      problem: the weight and the Gram matrix.
      start: the factors to begin with.
      product: (factors) -> the blocks of W' [b1, b2, p, q], linear in every factor.
      sweep: (factors) -> factors, a solve for every one.
      sweeps: the most that are made.
      gain: it stops where ten sweeps lower the error by less than this part of it.

    Returns:
      The best factors seen, and how it went.
    """
    loss, size = problem.loss(problem.target - product(start)), problem.loss(problem.target)
    zeros = jax.tree.map(jnp.zeros_like, start)
    losses = jnp.full(sweeps + 1, jnp.inf, problem.target.dtype).at[0].set(loss)

    def goes_on(state: _State) -> Array:
        before = state.losses[jnp.maximum(state.index - PATIENCE, 0)]
        stalled = (state.index >= PATIENCE) & (state.loss >= (1 - gain) ** 2 * before)
        return (state.index < sweeps) & ~stalled & (state.loss > 0)

    def advance(state: _State) -> _State:
        return _advance(problem, product, sweep, state)

    state = _State(start, loss, zeros, zeros, zeros, losses, jnp.zeros((), jnp.int32))
    state = jax.lax.while_loop(goes_on, advance, state)
    reached = state.losses[jnp.minimum(jnp.arange(sweeps + 1), state.index)]
    return state.parts, Progress(jnp.sqrt(jnp.maximum(reached, 0) / jnp.where(size > 0, size, 1)), state.index)


def _advance(
    problem: Problem, product: Callable[[Parts], Array], sweep: Callable[[Parts], Parts], state: _State
) -> _State:
    """Make one sweep, and go along the direction that it joins."""
    parts = state.parts
    blocks, backwards = jax.vjp(product, parts)
    residual = problem.target - blocks
    (descent,) = backwards(problem.pull(residual))
    gradient = jax.tree.map(jnp.negative, descent)
    swept = sweep(parts)
    change = _minus(swept, parts)
    slope = _dot(state.change, state.gradient)
    beta = _dot(change, _minus(gradient, state.gradient)) / jnp.where(slope == 0, 1, slope)
    beta = jnp.where(slope == 0, 0, jnp.clip(beta, 0, 5))
    direction = _along(change, beta, state.direction)
    steps = [float(step) for step in range(1, len(parts) + 1)]
    residuals = [residual] + [problem.target - product(_along(parts, step / 2, direction)) for step in steps]
    step = _best_step(problem, residuals, np.array([0.0, *steps]) / 2)
    best = parts, direction, state.loss
    for candidate, way in ((swept, change), (_along(parts, step, direction), direction)):
        loss = problem.loss(problem.target - product(candidate))
        lower = loss < best[2]  # not where it is no number
        best = jax.tree.map(lambda new, old, lower=lower: jnp.where(lower, new, old), (candidate, way, loss), best)
    index = state.index + 1
    return _State(best[0], best[2], gradient, change, best[1], state.losses.at[index].set(best[2]), index)


def _best_step(problem: Problem, residuals: list[Array], at: np.ndarray) -> Array:
    """Return the step of the least error, from the residuals at as many steps as a polynomial has coefficients.

    The first is at 0. What the error changes by is summed, not what it is: near the end the two differ by more digits
    than float32 has.
    """
    first, *others = residuals
    changes = [each - first for each in others]
    pulled = [problem.pull(each) for each in changes]
    inner = jnp.array([[jnp.vdot(left, right) for right in pulled] for left in changes])
    across = jnp.array([jnp.vdot(first, each) for each in pulled])
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
