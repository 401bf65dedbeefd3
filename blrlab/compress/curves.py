"""What a layer would lose, by format, blocks and rank: known before anything is compressed.

The loss is the share of the layer's energy, ||W - W'||^2 / ||W||^2, or of its output's on calibration inputs. Low rank
and, without inputs, Monarch have it from singular values, exactly and for all ranks at once (Eckart and Young, 1936).
BLAST, and Monarch on inputs, are fitted at a few ranks by a few sweeps; in between, what they lose over what low rank
(or Monarch without inputs) loses at the same rank is interpolated, its logarithm linear in the rank.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from blrlab.compress import statistics as sums
from blrlab.compress.lean import lean
from blrlab.compress.statistics import Statistics
from blrlab.factors import alternating, descent, low_rank

ANCHORS, SWEEPS = 4, 40  # ranks that are fitted, and for how long
LEAST = 1e-12  # of the energy; what is lost less is taken for that


class Curve(NamedTuple):
    """Shares of the energy that are lost, falling, at rising ranks of which the first is 0 and loses all."""

    ranks: tuple[int, ...]
    lost: tuple[float, ...]

    def at(self, rank: int) -> float:
        """Return the share that is lost at a rank, the last one's above that.

        >>> Curve((0, 10, 20), (1.0, 0.1, 0.01)).at(15)
        0.0316...
        """
        return float(np.exp(np.interp(rank, self.ranks, np.log(np.maximum(self.lost, LEAST)))))


def curve(
    weight: Float[Array, "i o"],
    format: str,
    blocks: tuple[int, int],
    ranks: Sequence[int],
    key: Array,
    statistics: Statistics | None = None,
    has_bias: bool = False,
) -> Curve:
    """Measure what a format of given blocks loses of a weight.

    Args:
      weight: [i, o], finite.
      format: low_rank, monarch or blast.
      blocks: (b1, b2).
      ranks: those of interest, rising; for monarch r', of one block.
      key: the noise of BLAST's start.
      statistics: of the layer's inputs, whose output's loss is measured then; None: the weight's.
      has_bias: the layer has a bias that takes up the mean of what is lost.
    """
    exact, _ = descent.normalised(weight.astype(jnp.float64 if weight.dtype == jnp.float64 else jnp.float32))
    gram = None if statistics is None else sums.damped(statistics, centred=has_bias).astype(exact.dtype)
    closed = format == "low_rank" or (format == "monarch" and gram is None)
    shape = _spectral(exact, blocks if format == "monarch" else (1, 1), None if format == "monarch" else gram)
    lost = np.maximum(np.asarray(shape, np.float64), LEAST)
    lost = lost[np.minimum(ranks, len(lost) - 1)]
    if not closed:
        few = anchors(ranks, ANCHORS)
        fitted = [float(_error(exact, format, blocks, ranks[-1], jnp.asarray(rank), key, gram)) ** 2 for rank in few]
        over = np.log(np.maximum(fitted, LEAST)) - np.log(lost[np.searchsorted(ranks, few)])
        lost = lost * np.exp(np.interp(ranks, few, over))
    if statistics is not None and has_bias:
        lost = lost * _varying(exact, statistics)
    known = np.minimum.accumulate(np.nan_to_num([1.0, *lost], nan=1.0))
    return Curve((0, *ranks), tuple(np.minimum(known, 1.0).tolist()))


def _varying(weight: Array, statistics: Statistics) -> float:
    """Return the share of the output's energy that a bias cannot give: what can be lost at most."""
    varying, whole = (
        jnp.vdot(weight, statistics.moments(centred).astype(weight.dtype) @ weight) for centred in (True, False)
    )
    return float(varying / jnp.where(whole > 0, whole, 1))


def anchors(ranks: Sequence[int], most: int) -> list[int]:
    """Pick a few of rising ranks, the first and the last among them, about as far apart by ratio.

    >>> anchors([16, 32, 48, 64, 80, 96, 112, 128], 4)
    [16, 32, 64, 128]
    """
    wanted = np.geomspace(ranks[0], ranks[-1], min(most, len(ranks)))
    return sorted({min(ranks, key=lambda rank, near=near: abs(rank - near)) for near in wanted})


@functools.partial(jax.jit, static_argnames="blocks")
@jax.default_matmul_precision("highest")
def _spectral(weight: Array, blocks: tuple[int, int], gram: Array | None) -> Array:
    """Return the share of the energy beyond the first r singular values of every block, for r = 0, 1, ..."""
    whitened = weight if gram is None else jnp.linalg.cholesky(gram).T @ weight
    cut = rearrange(whitened, "(l p) (k q) -> (l k) p q", l=blocks[0], k=blocks[1])
    energies = jax.vmap(low_rank.energies)(cut).sum(0)
    beyond = jnp.concatenate([jnp.cumsum(energies[::-1])[::-1], jnp.zeros(1, energies.dtype)])
    return beyond / jnp.where(beyond[0] > 0, beyond[0], 1)


@jax.default_matmul_precision("highest")
def _fitted(
    weight: Array, format: str, blocks: tuple[int, int], most: int, rank: Array, key: Array, gram: Array | None
) -> Array:
    """Return the relative error after a few sweeps; one program for all ranks up to `most`."""
    if format == "blast":
        return alternating.blast(weight, blocks, most, key, gram, SWEEPS, used=rank)[1].errors[-1]
    assert gram is not None
    return alternating.monarch(weight, blocks, most, gram, SWEEPS, used=rank)[1].errors[-1]


_error = lean(_fitted, "format", "blocks", "most")
