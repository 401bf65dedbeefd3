"""Noise of diffusion models: how much of it an image has at a time, and what lies between two times.

Sources: Ho et al., arXiv 2006.11239 (linear betas, eqs. 4, 6 and 7); Nichol and Dhariwal, arXiv 2102.09672 (a variance
between two bounds, eq. 15; fewer steps, section 4), whose released code settles the details. Shapes: B batch, h height
and width, C channels, S times that are kept, in rising order.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from blrlab.errors import InputError


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Betas on a line.

    Attributes:
      steps: number of times, T.
      first: beta of time 0.
      last: beta of time T - 1.

    Raises:
      InputError: there is no step, or a beta does not lie between 0 and 1.
    """

    steps: int = 1000
    first: float = 1e-4
    last: float = 0.02

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"the noise has {self.steps} steps; it must have at least 1.")
        for beta in (self.first, self.last):
            if not 0 < beta < 1:
                raise InputError(f"a beta of the noise is {beta}; it must lie between 0 and 1.")


class Tables(NamedTuple):
    """What formulas need at every kept time, float32 [S]; places count kept times, from 0.

    Attributes:
      times: the times themselves, int32.
      signal: sqrt(abar), the share of the image.
      noise: sqrt(1 - abar), the share of the noise.
      signal_before: sqrt(abar) of the kept time before; 1 at the first.
      noise_before: sqrt(1 - abar) of the kept time before; 0 at the first.
      of_image: what the mean of q(x_before | x_t, x_0) takes of x_0.
      of_noised: what it takes of x_t.
      least: the log of its variance, the least there can be; at the first time, where that is 0, the second's.
      most: log(beta), the most that the variance can be.
    """

    times: np.ndarray
    signal: np.ndarray
    noise: np.ndarray
    signal_before: np.ndarray
    noise_before: np.ndarray
    of_image: np.ndarray
    of_noised: np.ndarray
    least: np.ndarray
    most: np.ndarray


def tables(schedule: Schedule, times: Sequence[int] | None = None) -> Tables:
    """Make the tables of a schedule, or of some of its times as a shorter one: computed in float64.

    Raises:
      InputError: the times do not rise, or lie outside the schedule.
    """
    kept = np.arange(schedule.steps) if times is None else np.asarray(times)
    if not len(kept) or kept[0] < 0 or kept[-1] >= schedule.steps or np.any(np.diff(kept) < 1):
        raise InputError(f"times must rise within 0 to {schedule.steps - 1}; they are {list(kept)}.")
    whole = np.cumprod(1 - np.linspace(schedule.first, schedule.last, schedule.steps, dtype=np.float64))
    signal = whole[kept]
    before = np.append(1.0, signal[:-1])
    betas = 1 - signal / before
    variance = betas * (1 - before) / (1 - signal)
    variance[0] = variance[1] if len(kept) > 1 else betas[0]
    made = (
        signal**0.5,
        (1 - signal) ** 0.5,
        before**0.5,
        (1 - before) ** 0.5,
        betas * before**0.5 / (1 - signal),
        (1 - betas) ** 0.5 * (1 - before) / (1 - signal),
        np.log(variance),
        np.log(betas),
    )
    return Tables(kept.astype(np.int32), *(each.astype(np.float32) for each in made))


def spread(schedule: Schedule, count: int) -> tuple[int, ...]:
    """Return `count` times, the first, the last and others evenly between them (arXiv 2102.09672, section 4).

    A single one is the last, which is nearly all noise.

    >>> spread(Schedule(10), 4)
    (0, 3, 6, 9)

    Raises:
      InputError: there are not so many.
    """
    if not 1 <= count <= schedule.steps:
        raise InputError(f"{count} steps cannot be taken from a noise of {schedule.steps}: give 1 to {schedule.steps}.")
    last = schedule.steps - 1
    return tuple(np.round(np.linspace(0 if count > 1 else last, last, count)).astype(int).tolist())


def at(table: np.ndarray, places: Int[Array, "B"]) -> Float[Array, "B 1 1 1"]:
    """Look up a table, for arrays [B, h, h, C]."""
    return jnp.asarray(table)[places][:, None, None, None]


def noised(
    found: Tables, images: Float[Array, "B h h C"], noise: Float[Array, "B h h C"], places: Int[Array, "B"]
) -> Float[Array, "B h h C"]:
    """Draw from q(x_t | x_0), with the noise given (arXiv 2006.11239, eq. 4)."""
    return at(found.signal, places) * images + at(found.noise, places) * noise


def told_image(
    found: Tables, x: Float[Array, "B h h C"], noise: Float[Array, "B h h C"], places: Int[Array, "B"]
) -> Float[Array, "B h h C"]:
    """Return the image that x_t holds if this is its noise: `noised` solved for x_0."""
    return (x - at(found.noise, places) * noise) / at(found.signal, places)


def mean_before(
    found: Tables, images: Float[Array, "B h h C"], x: Float[Array, "B h h C"], places: Int[Array, "B"]
) -> Float[Array, "B h h C"]:
    """Return the mean of q(x_before | x_t, x_0) (arXiv 2006.11239, eq. 7)."""
    return at(found.of_image, places) * images + at(found.of_noised, places) * x


def log_variance(found: Tables, told: Float[Array, "B h h C"], places: Int[Array, "B"]) -> Float[Array, "B h h C"]:
    """Return the log of a learned variance: -1 is the least there can be, 1 the most (arXiv 2102.09672, eq. 15)."""
    share = (told + 1) / 2
    return share * at(found.most, places) + (1 - share) * at(found.least, places)
