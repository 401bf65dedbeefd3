"""What a layer's fit knows of its inputs: their second moments, accumulated batch by batch.

G = X^T X and the sum of the rows of X [n, i], in float32 or better, whatever the dtype of X. Sums of many batches are
the same as of one large one, but for rounding.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

DAMPING = 1e-3


class Statistics(NamedTuple):
    """Sums over the rows that a layer has met.

    Attributes:
      gram: X^T X, [i, i].
      total: the sum of the rows, [i].
      count: how many rows.
    """

    gram: Float[Array, "i i"]
    total: Float[Array, " i"]
    count: Float[Array, ""]

    @property
    def mean(self) -> Float[Array, " i"]:
        """The mean row."""
        return self.total / jnp.maximum(self.count, 1)

    def moments(self, centred: bool = False) -> Float[Array, "i i"]:
        """Return the mean of x x^T over the rows; centred: their covariance."""
        raw = self.gram / jnp.maximum(self.count, 1)
        return raw - jnp.outer(self.mean, self.mean) if centred else raw


def empty(features: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Statistics:
    """Return the statistics of no rows."""
    return Statistics(jnp.zeros((features, features), dtype), jnp.zeros(features, dtype), jnp.zeros((), dtype))


def add(statistics: Statistics, x: Float[Array, "*n i"]) -> Statistics:
    """Add rows x [..., i]; layers that share a weight add the rows of all of them."""
    rows = x.reshape(-1, x.shape[-1]).astype(statistics.gram.dtype)
    gram = jnp.matmul(rows.T, rows, precision="highest")
    return Statistics(statistics.gram + gram, statistics.total + rows.sum(0), statistics.count + len(rows))


def damped(moments: Float[Array, "i i"], damping: float = DAMPING) -> Float[Array, "i i"]:
    """Add a part of the mean diagonal to the diagonal: positive definite, of mean diagonal 1.

    Inputs that are rarely or never hit then count by the error of their weights, instead of not at all.
    """
    size = moments.shape[0]
    mean = jnp.trace(moments) / size
    scaled = moments / jnp.where(mean > 0, mean, 1)
    return scaled + damping * jnp.eye(size, dtype=moments.dtype)
