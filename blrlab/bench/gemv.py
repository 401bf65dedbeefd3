"""The dense layer by this project's streaming kernels: the yardstick of what factors gain over the best dense kernel.

y = x W, where W is stored as [o, i] and its depth may be cut in parts that are summed by a second launch. The tiles and
the number of parts are the fastest of what `triton_streaming` lists, measured on random weights.
"""

import functools
import math
from collections.abc import Callable

import torch
from blrlab_ops import launching, triton_streaming
from blrlab_ops.launching import Launch
from blrlab_ops.testing import Case
from blrlab_ops.triton_streaming import Tiles
from blrlab_ops.tuning import search
from torch import Tensor

from blrlab.bench.problem import Problem

PARTS = (1, 2, 4)
COLD_BYTES = 2 * 10**8  # of weights that the calls which are measured go round through


def call(problem: Problem, kernel: Tensor) -> Callable[[], Tensor]:
    """Return the call that multiplies the problem's x by W [i, o]."""
    x, columns = problem.x, _rows_stored(kernel)
    size, parts = _fastest(problem.case, x.dtype, x.device)

    def run() -> Tensor:
        y = x.new_empty(x.shape[0], columns.shape[1])
        launching.run(launches(x, columns, y, size, parts), x.device)
        return y

    return run


def launches(x: Tensor, W: Tensor, y: Tensor, size: Tiles | None, parts: int) -> list[Launch]:
    """Describe the launches that fill y [n, o] from x [n, i] and W [i, o]."""
    x_parts = x.unflatten(1, (parts, -1)).transpose(0, 1)[None]  # [1, parts, n, i / parts]
    W_parts = W.unflatten(0, (parts, -1))
    if parts == 1:
        return [triton_streaming.stream(x_parts, W_parts, y[None, :, None], size=size)]
    early = launching.overlaps(x.device)
    sums = x.new_empty(parts, *y.shape)
    first = triton_streaming.stream(x_parts, W_parts, sums[:, :, None], size=size, signal=early)
    return [first, triton_streaming.sum_parts(sums, y, early)]


@functools.lru_cache(maxsize=64)
def _fastest(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Tiles | None, int]:
    """Return the fastest tiles and number of parts on random weights; the rules' where nothing can be measured."""
    if device.type != "cuda":
        return None, 1
    count = max(2, math.ceil(COLD_BYTES / (case.in_features * case.out_features * dtype.itemsize)))
    x = torch.randn(case.tokens, case.in_features, dtype=dtype, device=device)
    size = (case.out_features, case.in_features)
    weights = [torch.randn(size, dtype=dtype, device=device).T for _ in range(count)]
    y = x.new_empty(case.tokens, case.out_features)
    timed: list[tuple[float, int, Tiles | None, int]] = [(math.inf, 0, None, 1)]
    for parts in (each for each in PARTS if case.in_features % each == 0):
        options = triton_streaming.candidates(case.tokens, case.out_features, case.in_features // parts, dtype.itemsize)
        for tiles in options:
            calls = [functools.partial(launching.run, launches(x, W, y, tiles, parts), device) for W in weights]
            timed.append((search.microseconds(calls), len(timed), tiles, parts))
    _, _, tiles, parts = min(timed)
    return tiles, parts


def _rows_stored(weight: Tensor) -> Tensor:
    """Store W [i, o] as [o, i]; its shape stays."""
    return weight.T.contiguous().T
