"""Which format, blocks and ranks are predicted to beat a dense layer, and by how much.

Two readings of every choice, both against the dense layer's predicted time: `algorithm`, the fastest of the known
algorithms on this device; `bound`, the least time of any. Both are ratios of least times, so they are estimates, not
limits: real times lie above, and dense's may lie further above its least time than a factored layer's.
Ranks are total ranks r, multiples of 16 (for Monarch also of its blocks), as long as the layer is smaller than dense.
Both readings fall as the rank grows, so the widest rank that still wins is found by bisection.
"""

import bisect
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from blrlab_ops import cost
from blrlab_ops.devices import Device
from blrlab_ops.shapes import Layer

from blrlab.records import Record
from blrlab.roofline.predict import Factored, bound, dense_us, fastest, identity

BLOCKS = (2, 3, 4, 6, 8, 9, 12, 16, 24, 32, 64)
TOKENS = tuple(2**power for power in range(15))
RANK_STEP = 16
MOST_RANKS = 16  # of a record's grid: a heat map has as many columns
FACTORS = (2, 4)  # of the layer, at which the speed-up is told


class Reading(NamedTuple):
    """Speed-ups over dense by one reading.

    Attributes:
      widest: the widest rank that is faster than dense, or None.
      at: by layer compression factor, at the widest rank that is as small; None where no rank is.
      most: at the narrowest rank.
    """

    widest: int | None
    at: dict[int, float | None]
    most: float


class Advice(NamedTuple):
    """One choice of format and blocks for a layer at a token count, by both readings.

    Attributes:
      op: low_rank, monarch or blast.
      blocks: b, on both sides.
      algorithm: by the fastest known algorithm.
      bound: by the bound.
      factor: dense parameters over factored ones at the widest rank of `algorithm`, or None.
    """

    op: str
    blocks: int
    algorithm: Reading
    bound: Reading
    factor: float | None


def candidates(layer: Layer, ops: Sequence[str] = cost.FORMATS) -> list[tuple[str, int]]:
    """Return (format, blocks) that a layer could take: blocks that divide both of its sides."""
    fitting = [b for b in BLOCKS if layer.in_features % b == 0 and layer.out_features % b == 0]
    blocks = {"low_rank": [1], "monarch": fitting, "blast": fitting}
    return [(op, b) for op in ops if op != "dense" for b in blocks[op] if ranks(layer, op, b)]


def ranks(layer: Layer, op: str, blocks: int, most: int | None = None) -> range:
    """Return the ranks at which a layer is smaller than dense, evenly spaced; at most `most` of them, if given.

    >>> ranks(Layer("own", "c_fc", 768, 3072, 384, 0, 1, 0, 1), "monarch", 24)
    range(48, 577, 48)
    """
    unit = math.lcm(RANK_STEP, blocks) if op == "monarch" else RANK_STEP
    parameters = params(layer, Factored(op, blocks, unit))
    count = (layer.in_features * layer.out_features - 1) // parameters
    step = -(-count // most) if most else 1
    return range(unit * step, unit * count + 1, unit * step) if count else range(0)


def params(layer: Layer, factored: Factored) -> int:
    """Return the parameters of a factored layer."""
    return cost.params(factored.op, layer.in_features, layer.out_features, factored.pair, factored.kernel_rank)


def layer_factor(layer: Layer, factored: Factored) -> float:
    """Return dense parameters over factored ones."""
    return layer.in_features * layer.out_features / params(layer, factored)


def advise(device: Device, layer: Layer, tokens: int, dtype: str, ops: Sequence[str] = cost.FORMATS) -> list[Advice]:
    """Return what every format and block count is predicted to win, the most at half the size first."""
    dense = dense_us(device, layer, tokens, dtype)
    found = [_advice(device, layer, op, blocks, tokens, dtype, dense) for op, blocks in candidates(layer, ops)]
    return sorted(found, key=lambda each: round(each.algorithm.at[2] or 0.0, 2), reverse=True)


def records(device: Device, layer: Layer, dtype: str, ops: Sequence[str] = cost.FORMATS) -> list[Record]:
    """Return an "advice" record for every format and block count: speed-ups over ranks and token counts."""
    dense = {tokens: dense_us(device, layer, tokens, dtype) for tokens in TOKENS}
    return [_record(device, layer, op, blocks, dtype, dense) for op, blocks in candidates(layer, ops)]


def _advice(device: Device, layer: Layer, op: str, blocks: int, tokens: int, dtype: str, dense: float) -> Advice:
    def known(rank: int) -> float:
        return dense / fastest(device, layer, Factored(op, blocks, rank), tokens, dtype)[1].us

    def least(rank: int) -> float:
        return dense / bound(device, layer, Factored(op, blocks, rank), tokens, dtype).us

    every = ranks(layer, op, blocks)
    at = {factor: _widest(every, lambda rank, f=factor: _fits(layer, op, blocks, rank, f)) for factor in FACTORS}
    algorithm, least_of_all = (
        Reading(
            _widest(every, lambda rank, s=speedup: s(rank) > 1),
            {factor: None if rank is None else speedup(rank) for factor, rank in at.items()},
            speedup(every[0]),
        )
        for speedup in (known, least)
    )
    widest = algorithm.widest
    factor = None if widest is None else layer_factor(layer, Factored(op, blocks, widest))
    return Advice(op, blocks, algorithm, least_of_all, factor)


def _fits(layer: Layer, op: str, blocks: int, rank: int, factor: float) -> bool:
    return layer_factor(layer, Factored(op, blocks, rank)) >= factor


def _widest(every: range, good: Callable[[int], bool]) -> int | None:
    """Return the widest rank that is good, where every narrower one is good too."""
    count = bisect.bisect_left(every, True, key=lambda rank: not good(rank))
    return every[count - 1] if count else None


def _record(device: Device, layer: Layer, op: str, blocks: int, dtype: str, dense: dict[int, float]) -> Record:
    grid = ranks(layer, op, blocks, MOST_RANKS)
    choices = [Factored(op, blocks, rank) for rank in grid]
    times = [[fastest(device, layer, choice, tokens, dtype) for choice in choices] for tokens in dense]
    least = [[bound(device, layer, choice, tokens, dtype).us for choice in choices] for tokens in dense]

    def wins(rank: int, tokens: int) -> bool:
        return dense[tokens] > fastest(device, layer, Factored(op, blocks, rank), tokens, dtype)[1].us

    every = ranks(layer, op, blocks)
    return {
        **identity("advice", device, layer, choices[0], dtype),
        "tokens": list(dense),
        "ranks": list(grid),
        "layer_factor": [_short(layer_factor(layer, choice)) for choice in choices],
        "speedup": [[_short(us / each.us) for _, each in row] for us, row in zip(dense.values(), times, strict=True)],
        "bound_speedup": [[_short(us / each) for each in row] for us, row in zip(dense.values(), least, strict=True)],
        "algorithm": [[name for name, _ in row] for row in times],
        "widest_rank": [_widest(every, lambda rank, n=tokens: wins(rank, n)) for tokens in dense],
    }


def _short(number: float) -> float:
    """Return a number of four digits: files stay small."""
    return float(f"{number:.4g}")
