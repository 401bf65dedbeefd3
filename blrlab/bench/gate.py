"""The gate before the clock: an output against float64, in the dtype and shape that is timed.

The budgets are `blrlab_ops.budgets`: a library's product (XLA, PyTorch, torch.compile) is held to what arithmetic
allows, this project's own kernels to twice the errors of PyTorch's batched products on the same numbers.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from blrlab_ops import budgets

from blrlab.bench.problem import Problem


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


def errors(output: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Return (relative Frobenius error, largest error over the root mean square of the reference)."""
    difference = output.astype(np.float64) - reference
    if not reference.any():
        return (0.0, 0.0) if not difference.any() else (math.inf, math.inf)
    rms = math.sqrt(float(np.mean(reference**2)))
    relative = float(np.linalg.norm(difference) / np.linalg.norm(reference))
    return relative, float(np.abs(difference).max()) / rms


def judge(problem: Problem, output: np.ndarray, yardstick: tuple[float, float] | None) -> Verdict:
    """Judge an output [n, o].

    Args:
      problem: what was computed.
      output: what came out.
      yardstick: the errors of PyTorch's batched products for an own kernel; None for a library.
    """
    epsilon = float(jnp.finfo(problem.dtype).eps)
    if yardstick is None:
        allowed = budgets.of_library(epsilon, problem.spec.in_features)
    else:
        rms = math.sqrt(float(np.mean(problem.reference**2)))
        peak = float(np.abs(problem.reference).max()) / rms if rms else 1.0
        allowed = budgets.of_kernel(yardstick, epsilon, peak)
    return Verdict(*errors(output, problem.reference), *allowed)
