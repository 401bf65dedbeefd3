"""What a layer's fit knows of its inputs: their mean and their scatter, accumulated batch by batch.

Both are kept in float32 or better, whatever the dtype of the inputs. The scatter is about the mean of the rows met so
far (Chan, Golub and LeVeque, 1983), since a covariance that is left of a difference of raw moments may be none.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

DAMPING = 1e-3
SMALLEST = 1e-6  # of the raw moments, where the inputs hardly vary


class Statistics(NamedTuple):
    """What is known of the rows x that a layer has met.

    Attributes:
      scatter: the sum of (x - mean)(x - mean)^T, [i, i].
      mean: [i].
      count: how many rows.
    """

    scatter: Float[Array, "i i"]
    mean: Float[Array, " i"]
    count: Float[Array, ""]

    def moments(self, centred: bool = False) -> Float[Array, "i i"]:
        """Return the mean of x x^T over the rows; centred: their covariance."""
        covariance = self.scatter / jnp.maximum(self.count, 1)
        return covariance if centred else covariance + jnp.outer(self.mean, self.mean)


def empty(features: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Statistics:
    """Return the statistics of no rows."""
    return Statistics(jnp.zeros((features, features), dtype), jnp.zeros(features, dtype), jnp.zeros((), dtype))


def add(statistics: Statistics, x: Float[Array, "*n i"]) -> Statistics:
    """Add rows x [..., i]; layers that share a weight add the rows of all of them."""
    rows = x.reshape(-1, x.shape[-1]).astype(statistics.scatter.dtype)
    mean = rows.mean(0)
    apart = rows - mean[None]
    count = statistics.count + len(rows)
    share, gap = len(rows) / count, mean - statistics.mean
    scatter = statistics.scatter + jnp.matmul(apart.T, apart, precision="highest")
    scatter = scatter + statistics.count * share * jnp.outer(gap, gap)
    return Statistics(scatter, statistics.mean + share * gap, count)


def damped(statistics: Statistics, centred: bool = False, damping: float = DAMPING) -> Float[Array, "i i"]:
    """Return the moments over their mean diagonal, and a part of that more on the diagonal: positive definite.

    Inputs that are rarely or never hit then count by the error of their weights, instead of not at all.
    """
    moments, whole = statistics.moments(centred), statistics.moments()
    size = moments.shape[0]
    mean = jnp.maximum(jnp.trace(moments), SMALLEST * jnp.trace(whole)) / size
    scaled = moments / jnp.where(mean > 0, mean, 1)
    return scaled + damping * jnp.eye(size, dtype=moments.dtype)
