"""The gate before the clock: an output against float64, in the dtype and shape that is timed.

The budgets are `blrlab_ops.budgets`: a library's product (XLA, PyTorch, torch.compile, another project's kernels) is
held to what arithmetic allows, this project's own kernels to twice the errors of PyTorch's batched products on the
same numbers.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from blrlab_ops import budgets
from torch import Tensor

from blrlab.bench.problem import Kernel, Problem, dense_weight

CHUNK_BYTES = 2**29  # of a reference held at once


class Errors(NamedTuple):
    """Relative Frobenius error, largest error over the reference's RMS, and its largest element over its RMS."""

    error: float
    error_max: float
    peak: float


class Verdict(NamedTuple):
    """Relative Frobenius error and largest error over the reference's RMS, each with its budget."""

    error: float
    error_max: float
    budget: float
    budget_max: float

    @property
    def passed(self) -> bool:
        """Whether both errors are within budget; NaN never is."""
        return self.error <= self.budget and self.error_max <= self.budget_max


class Judge:
    """Holds the float64 weight of one problem while its backends are judged."""

    def __init__(self, problem: Problem):
        self._problem = problem
        self._weights: dict[int, tuple[Kernel, Tensor]] = {}

    def errors(self, output: Tensor, kernel: Kernel | None = None) -> Errors:
        """Return the errors of an output [n, o].

        Args:
          output: of any floating dtype.
          kernel: what the backend is to compute, where it is not the problem's kernel (quantised weights).

        Raises:
          ValueError: the output has another shape.
        """
        case, x = self._problem.case, self._problem.x
        if tuple(output.shape) != (case.tokens, case.out_features):
            raise ValueError(f"its output is {list(output.shape)}, not {[case.tokens, case.out_features]}")
        weight = self._weight(self._problem.kernel if kernel is None else kernel)
        rows = max(1, CHUNK_BYTES // (8 * (case.in_features + 2 * case.out_features)))
        sums = torch.zeros(2, dtype=torch.float64, device=x.device)
        most = torch.zeros(2, dtype=torch.float64, device=x.device)
        for start in range(0, case.tokens, rows):
            wanted = x[start : start + rows].double() @ weight
            difference = output[start : start + rows].to(x.device).double() - wanted
            sums += torch.stack([difference.square().sum(), wanted.square().sum()])
            # torch.maximum keeps NaN
            most = torch.maximum(most, torch.stack([difference.abs().max(), wanted.abs().max()]))
        (lost, square), (worst, peak) = sums.tolist(), most.tolist()
        if square == 0:
            return Errors(*((0.0, 0.0) if lost == 0 else (math.inf, math.inf)), 1.0)
        rms = math.sqrt(square / output.numel())
        return Errors(math.sqrt(lost / square), worst / rms, peak / rms)

    def _weight(self, kernel: Kernel) -> Tensor:
        """Return a kernel's weight in float64; the latest is kept."""
        if id(kernel) not in self._weights:
            self._weights = {id(kernel): (kernel, dense_weight(kernel))}
        return self._weights[id(kernel)][1]

    def judge(self, output: Tensor, yardstick: Errors | None, kernel: Kernel | None = None) -> Verdict:
        """Judge an output [n, o].

        Args:
          output: what came out.
          yardstick: the errors of PyTorch's batched products for an own kernel; None for a library.
          kernel: as for `errors`.
        """
        found = self.errors(output, kernel)
        epsilon = torch.finfo(self._problem.x.dtype).eps
        if yardstick is None:
            allowed = budgets.of_library(epsilon, self._problem.case.in_features)
        else:
            allowed = budgets.of_kernel(yardstick[:2], epsilon, found.peak)
        return Verdict(found.error, found.error_max, *allowed)


def poison(sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """Leave NaN in memory that tensors of these numbers of elements are likely to get next.

    Freed memory still holds what was there, for outputs the right answer of the call before: what a kernel does not
    write would pass.
    """
    blocks = [torch.full((max(size, 1),), math.nan, dtype=dtype, device=device) for size in sizes]
    del blocks
