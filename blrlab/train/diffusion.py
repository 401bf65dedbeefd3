"""What a denoiser is trained for: to tell the noise, and its variance by the variational bound.

Sources: Peebles and Xie, arXiv 2212.09748 (section 3.1), who train as Nichol and Dhariwal, arXiv 2102.09672 (eq. 16),
on the terms of Ho et al., arXiv 2006.11239 (eq. 5); labels are dropped as in Ho and Salimans, arXiv 2207.12598. Shapes:
B examples, h height and width, C channels; a model gives [B, h, h, 2 C], noise and then what tells its variance.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jaxtyping import Array, Float, Int

from blrlab.models import noise as noises
from blrlab.models.noise import Schedule, Tables
from blrlab.train.objective import Batch, Objective

LEVEL = 1 / 255  # half the distance of two of the 256 values that a pixel has between -1 and 1


def divergence(
    mean: Float[Array, "..."], log_variance: Float[Array, "..."], other: Float[Array, "..."], other_log: Array
) -> Float[Array, "..."]:
    """Return KL(N(mean, exp(log_variance)) || N(other, exp(other_log))) of every value, in nats."""
    squares = (mean - other) ** 2 * jnp.exp(-other_log)
    return 0.5 * (other_log - log_variance - 1 + jnp.exp(log_variance - other_log) + squares)


def log_likelihood(
    images: Float[Array, "..."], mean: Float[Array, "..."], log_variance: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Return the log of what N(mean, exp(log_variance)) gives to a pixel's own one of 256 values, in nats.

    The outermost values have all that lies beyond them (arXiv 2006.11239, eq. 13).
    """
    deviation = jnp.exp(0.5 * log_variance)
    upper, lower = (images - mean + LEVEL) / deviation, (images - mean - LEVEL) / deviation
    # Of two numbers near 1 the difference would be lost: the smaller tails are taken instead.
    flipped = lower > 0
    high, low = jnp.where(flipped, -lower, upper), jnp.where(flipped, -upper, lower)
    normal = jax.scipy.stats.norm
    inside = jnp.log(jnp.maximum(normal.cdf(high) - normal.cdf(low), 1e-12))
    ends = jnp.where(images > 0.999, normal.logsf(lower), inside)
    return jnp.where(images < -0.999, normal.logcdf(upper), ends)


def bound(
    found: Tables,
    output: Float[Array, "B h h E"],
    images: Float[Array, "B h h C"],
    x: Float[Array, "B h h C"],
    places: Int[Array, "B"],
) -> Float[Array, "B"]:
    """Return the term of the variational bound that a time has, in bits a value; x is x_t.

    Only the variance learns from it: no gradient goes to the mean (arXiv 2102.09672, section 3.1).
    """
    noise, told = jnp.split(output, 2, axis=-1)
    noise = jax.lax.stop_gradient(noise)
    mean = noises.mean_before(found, noises.told_image(found, x, noise, places), x, places)
    variance = noises.log_variance(found, told, places)
    wanted = noises.mean_before(found, images, x, places)
    later = divergence(wanted, noises.at(found.least, places), mean, variance)
    last = -log_likelihood(images, mean, variance)
    nats = jnp.where((places == 0)[:, None, None, None], last, later)
    return nats.mean(axis=(1, 2, 3)) / math.log(2)


def squared_error(output: Float[Array, "B h h E"], noise: Float[Array, "B h h C"]) -> Float[Array, "B"]:
    """Return the mean squared error of the noise that a model tells."""
    return ((output[..., : noise.shape[-1]] - noise) ** 2).mean(axis=(1, 2, 3))


def denoising(schedule: Schedule, classes: int, dropped: float = 0.0) -> Objective:
    """Return the objective of telling noise: a batch is {"image": [B, h, h, C], "label": [B]}.

    A time and noise are drawn for every image; a batch that has "time" [B] and "noise" [B, h, h, C] is given those, and
    can be measured. The loss is the squared error of the noise and T / 1000 times the bound.

    Args:
      schedule: of the noise.
      classes: the label that stands for none.
      dropped: the share of labels that become it, for guidance.
    """
    found = noises.tables(schedule)

    def drawn(batch: Batch, key: Array) -> tuple[Array, Array]:
        if "time" in batch:
            return batch["time"], batch["noise"]
        of_time, of_noise, _ = jax.random.split(key, 3)
        images = batch["image"]
        times = jax.random.randint(of_time, (len(images),), 0, schedule.steps)
        return times, jax.random.normal(of_noise, images.shape, images.dtype)

    def inputs(batch: Batch, key: Array) -> tuple[Array, Array, Array]:
        times, noise = drawn(batch, key)
        none = jax.random.bernoulli(jax.random.split(key, 3)[2], dropped, batch["label"].shape)
        x = noises.noised(found, batch["image"], noise, times)
        return x, times, jnp.where(none, classes, batch["label"])

    def terms(output: Array, batch: Batch, key: Array) -> tuple[Array, Array]:
        times, noise = drawn(batch, key)
        x = noises.noised(found, batch["image"], noise, times)
        return squared_error(output, noise), bound(found, output, batch["image"], x, times)

    def losses(output: Any, batch: Batch, key: Array) -> Float[Array, "B"]:
        error, variational = terms(output, batch, key)
        return error + schedule.steps / 1000 * variational

    unused = jax.random.key(0)  # what is measured draws nothing
    measures = {
        "mse": lambda output, batch: terms(output, batch, unused)[0],
        "vb": lambda output, batch: terms(output, batch, unused)[1],
    }
    return Objective(inputs, losses, FrozenDict(measures))
