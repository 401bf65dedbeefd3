"""The gate before the clock: an output against float64, in the dtype and shape that is timed.

A library's product (XLA, PyTorch, torch.compile) is held to what the arithmetic allows: two epsilons of its dtype
plus what float32 sums of that length lose. This project's own kernels are held closer: to twice the error of
PyTorch's batched products on the same numbers, plus one epsilon.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

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
        sums = math.sqrt(problem.spec.in_features) * float(jnp.finfo(jnp.float32).eps)
        # Of n o values the largest error lies some standard deviations out; eight leave room for all of them.
        allowed = (2 * epsilon + sums, 8 * (2 * epsilon + sums))
    else:
        allowed = (2 * yardstick[0] + epsilon, 2 * yardstick[1] + epsilon)
    return Verdict(*errors(output, problem.reference), *allowed)
