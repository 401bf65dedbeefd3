"""The gate before a model's clock: logits against the same model in float64, and one optimiser step likewise.

The truth of a format is the PyTorch model in float64 with the weights that its factors, as rounded to the dtype,
multiply out to. Two errors are judged: the relative Frobenius error of the logits, and the largest one of a single
token, which a kernel that spoils one row of many does not escape.

How large an error may be follows from what the dtype itself costs. The yardstick is the dense PyTorch model with the
multiplied-out weights rounded to the dtype, on the same tokens: its error holds how this depth and these weights
amplify roundings. Per linear layer it rounds twice, the weight and the output; a factored layer rounds the output and
one intermediate (two for BLAST). Independent roundings add up as their root sum of squares, so a factored model may be
sqrt(3/2) times as wrong: it is allowed twice the yardstick plus one epsilon, as kernels are, and what the 6 L + 1
products in sequence lose where each sums in float32 in an order of its own, which only counts in float32. TF32 in the
place of IEEE is over that, and so is a layer without its bias; a layer that is one percent off in bfloat16 is not, and
is for the layers' own gate. An optimiser step, judged by its loss and by the norm of its gradient, is allowed three
times the yardstick, as gradients are. The dense PyTorch model cannot be its own yardstick: each of its products is
allowed what a library's is, and no yardstick counts for more than that.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from blrlab_ops import budgets
from torch import Tensor

from blrlab.bench import gpt2_torch
from blrlab.bench.gpt2_torch import Weights

if TYPE_CHECKING:
    from blrlab.models.gpt2 import Config

TIMES, TIMES_STEP = 2, 3


class Errors(NamedTuple):
    """Relative Frobenius error, and the largest relative error of one token."""

    error: float
    error_max: float


class Verdict(NamedTuple):
    """Errors with their budgets."""

    error: float
    error_max: float
    error_budget: float
    error_max_budget: float

    @property
    def passed(self) -> bool:
        """Whether both errors are within budget; NaN never is."""
        return self.error <= self.error_budget and self.error_max <= self.error_max_budget


def errors(logits: Tensor, truth: Tensor) -> Errors:
    """Compare logits [B, T, N] with the truth, sequence by sequence.

    Raises:
      ValueError: the shapes differ.
    """
    if logits.shape != truth.shape:
        raise ValueError(f"its logits are {list(logits.shape)}, not {list(truth.shape)}")
    pairs = zip(logits, truth, strict=True)
    squares = torch.stack([torch.stack([_squares(a.to(b.device).double() - b), _squares(b)]) for a, b in pairs])
    lost, wanted = squares.unbind(1)  # [B, T]
    # the maximum keeps NaN
    return Errors(float((lost.sum() / wanted.sum()).sqrt()), float((lost / wanted).sqrt().max()))


def _squares(difference: Tensor) -> Tensor:
    return difference.square().sum(-1)


class Allowed:
    """What programs may be wrong by, from what the dense PyTorch model is wrong by."""

    def __init__(self, layers: int, terms: int, dtype: torch.dtype, found: Errors):
        """Set the budgets.

        Args:
          layers: number of blocks, each of 6 products in sequence; there is an output layer too.
          terms: of the longest sum behind one element.
          dtype: that is judged.
          found: the errors of the dense PyTorch model with the multiplied-out weights.
        """
        self._sums, self._epsilon = in_sequence(layers, terms, 0), torch.finfo(dtype).eps
        allowed = in_sequence(layers, terms, self._epsilon)
        self.library = Errors(allowed, 2 * allowed)  # single tokens differ by less than that
        self.yardstick = Errors(*map(min, found, self.library))

    def times(self, count: float) -> Errors:
        """Return so many times the yardstick, one epsilon, and what float32 sums in another order lose."""
        return Errors(*(count * error + self._epsilon + self._sums for error in self.yardstick))


def in_sequence(layers: int, terms: int, epsilon: float) -> float:
    """Return what a library's products lose in sequence; with an epsilon of 0 by their float32 sums alone."""
    return math.sqrt(6 * layers + 1) * budgets.of_library(epsilon, terms).error


class Judge:
    """Holds the truth of one format on given tokens while the programs that run it are judged."""

    def __init__(self, sizes: "Config", weights: Weights, ids: Tensor):
        """Compute the truth of ids [B, T] for weights in the dtype that is judged."""
        self._sizes, self._weights, self._ids = sizes, weights, ids
        self._dtype = weights.others["wte/embedding"].dtype
        dense = weights.dense()
        with torch.no_grad():
            self.truth = self._logits(dense, torch.float64)
            found = errors(self._logits(dense, self._dtype), self.truth)
        self._allowed = Allowed(sizes.layers, 4 * sizes.width, self._dtype, found)

    def _logits(self, dense: Weights, dtype: torch.dtype) -> Tensor:
        model = gpt2_torch.build(self._sizes, dense.map(lambda leaf: leaf.to(dtype)))
        return gpt2_torch.call(model, "forward", self._ids)()

    def judge(self, logits: Tensor, is_yardstick: bool = False) -> Verdict:
        """Judge logits [B, T, N], or [B, 1, N] of the last token.

        Args:
          logits: what came out.
          is_yardstick: they are the dense PyTorch model's own.
        """
        found = errors(logits, self.truth[:, -logits.shape[1] :])
        return Verdict(*found, *(self._allowed.library if is_yardstick else self._allowed.times(TIMES)))

    def judge_step(self, metrics: Mapping[str, float], windows: Tensor) -> Verdict:
        """Judge {"loss", "grad_norm"} of an optimiser step on windows [B, T + 1] by the larger relative error."""
        wanted = step_truth(self._sizes, self._weights, windows)
        found = max(abs(metrics[name] - value) / abs(value) for name, value in wanted.items())
        if any(math.isnan(metrics[name]) for name in wanted):
            found = math.nan
        return Verdict(found, found, *self._allowed.times(TIMES_STEP))


def step_truth(sizes: "Config", weights: Weights, windows: Tensor) -> dict[str, float]:
    """Return the loss (nats a token) and the gradient's norm on windows [B, T + 1], in float64."""
    model = gpt2_torch.build(sizes, weights.map(lambda leaf: leaf.double()), impl="ref").requires_grad_(True)
    logits = gpt2_torch.call(model, "forward", windows[:, :-1])()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    return {"loss": loss.item(), "grad_norm": norm.item()}
