"""Errors, error budgets and random layers: what tests, `blrlab_ops.verify` and benchmarks agree on.

Errors are taken against float64 and judged by `budgets`: `torch_bmm` and `ref` are PyTorch's products and held to what
arithmetic allows, every other implementation to twice the errors of `torch_bmm` (three times for gradients).
"""

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import budgets, factored

LIBRARY = ("ref", "torch_bmm")


class Case(NamedTuple):
    """One factored layer at one number of tokens; monarch: rank r' of a block; low_rank: blocks (1, 1)."""

    format: str
    tokens: int
    in_features: int
    out_features: int
    blocks: tuple[int, int]
    rank: int


class Verdict(NamedTuple):
    """Errors of one output with their budgets."""

    error: float
    error_max: float
    error_budget: float
    error_max_budget: float

    @property
    def passed(self) -> bool:
        return self.error <= self.error_budget and self.error_max <= self.error_max_budget


# No powers of two, b1 != b2, tails in every tile, several tiles on every axis, no tokens at all.
AWKWARD = (
    Case("low_rank", 0, 30, 42, (1, 1), 5),
    Case("low_rank", 1, 65, 130, (1, 1), 33),
    Case("low_rank", 63, 96, 80, (1, 1), 24),
    Case("low_rank", 197, 200, 300, (1, 1), 130),
    Case("low_rank", 1000, 33, 70, (1, 1), 7),
    Case("monarch", 0, 30, 42, (3, 2), 5),
    Case("monarch", 1, 66, 130, (2, 5), 7),
    Case("monarch", 63, 280, 96, (2, 3), 65),
    Case("monarch", 197, 150, 280, (3, 2), 48),
    Case("monarch", 1000, 30, 77, (5, 7), 3),
    Case("blast", 0, 30, 42, (3, 2), 5),
    Case("blast", 1, 66, 130, (2, 5), 7),
    Case("blast", 63, 280, 51, (2, 17), 70),
    Case("blast", 197, 150, 280, (3, 2), 100),
    Case("blast", 1000, 30, 77, (5, 7), 13),
)


def errors(out: Tensor, ref: Tensor) -> tuple[float, float]:
    """Return (relative Frobenius error, largest error over RMS of `ref`); zeros where nothing differs."""
    out, ref = out.detach().double(), ref.detach().double()
    difference = out - ref
    if not difference.any():  # also no elements at all, or a reference of zeros; NaN counts as a difference
        return 0.0, 0.0
    rms = ref.square().mean().sqrt()
    return float(difference.norm() / ref.norm()), float(difference.abs().max() / rms)


def random_factors(
    format: str,
    in_features: int,
    out_features: int,
    blocks: tuple[int, int] = (1, 1),
    rank: int = 1,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Draw factors whose W has entries of about 1/sqrt(i); a seed gives the same numbers on every device."""
    b1, b2 = blocks
    p, q = in_features // b1, out_features // b2
    shapes = {
        "low_rank": {"V": (in_features, rank), "U": (rank, out_features)},
        "monarch": {"V": (b1, b2, p, rank), "U": (b1, b2, rank, q)},
        "blast": {"V": (b1, p, rank), "S": (b1, b2, rank), "U": (b2, rank, q)},
    }[format]
    scales = {"V": 1 / math.sqrt(in_features), "S": 1.0, "U": 1 / math.sqrt(rank)}
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: _normal(shape, generator) * scales[name] for name, shape in shapes.items()}
    return {name: factor.to(device, dtype) for name, factor in drawn.items()}


def random_operands(
    layer: Case, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Draw x [n, i] and bias [o] of unit variance, and factors: (x, factors, bias)."""
    generator = torch.Generator().manual_seed(seed + 1)
    x = _normal((layer.tokens, layer.in_features), generator).to(device, dtype)
    bias = _normal((layer.out_features,), generator).to(device, dtype)
    return x, random_factors(layer.format, *layer[2:], seed=seed, dtype=dtype, device=device), bias


def check(impl: str, x: Tensor, factors: Mapping[str, Tensor], bias: Tensor | None = None) -> Verdict:
    """Hold the output of `impl` to its budget, its memory filled with NaN beforehand."""
    with poisoned():
        out = factored.linear(x, factors, bias, impl=impl)
    if impl in LIBRARY:
        return Verdict(*errors(out, _exact(x, factors, bias, {})), *_library_budget(x.dtype, x.shape[-1]))
    return judge(out, x, factors, bias)


def judge(
    out: Tensor,
    x: Tensor,
    factors: Mapping[str, Tensor],
    bias: Tensor | None = None,
    follows: Mapping[str, Any] | None = None,
    times: float = 2,
) -> Verdict:
    """Hold the output of a kernel to `times` the errors of `torch_bmm`; `follows`: its epilogue, as `linear` takes."""
    follows = follows or {}
    truth = _exact(x, factors, bias, follows)
    yardstick = errors(factored.linear(x, factors, bias, **follows, impl="torch_bmm"), truth)
    return Verdict(*errors(out, truth), *budgets.of_kernel(yardstick, torch.finfo(x.dtype).eps, peak(truth), times))


def _exact(x: Tensor, factors: Mapping[str, Tensor], bias: Tensor | None, follows: Mapping[str, Any]) -> Tensor:
    """Multiply in float64."""
    wide, widened = ({name: _double(each) for name, each in given.items()} for given in (factors, follows))
    return factored.linear(x.double(), wide, _double(bias), **widened, impl="ref")


def _double(given: Any) -> Any:
    return given.double() if isinstance(given, Tensor) else given


def check_gradients(impl: str, x: Tensor, factors: Mapping[str, Tensor], bias: Tensor) -> dict[str, Verdict]:
    """Hold the gradients of `impl` to their budgets, by operand: {"x": ..., "V": ..., "bias": ...}."""
    operands = {"x": x, **factors, "bias": bias}
    wide = {name: operand.double() for name, operand in operands.items()}
    weights = _normal((*x.shape[:-1], bias.shape[0]), torch.Generator().manual_seed(2)).to(x.device, x.dtype)
    truth = _gradients("ref", wide, weights.double())
    with poisoned():
        out = _gradients(impl, operands, weights)
    if impl in LIBRARY:
        terms = max(x.shape[-1], bias.shape[0], x.numel() // x.shape[-1])
        allowed = dict.fromkeys(operands, _library_budget(x.dtype, terms))
    else:
        yardstick, epsilon = _gradients("torch_bmm", operands, weights), torch.finfo(x.dtype).eps
        allowed = {
            name: budgets.of_kernel(errors(yardstick[name], truth[name]), epsilon, peak(truth[name]), times=3)
            for name in operands
        }
    return {name: Verdict(*errors(out[name], truth[name]), *allowed[name]) for name in operands}


def peak(ref: Tensor) -> float:
    """The largest element over the RMS; 1 where there are none but zeros."""
    return float(ref.abs().max() / ref.square().mean().sqrt()) if ref.numel() and ref.any() else 1.0


def _library_budget(dtype: torch.dtype, terms: int) -> budgets.Budget:
    """The budget of PyTorch's own products; in float64 there are no float32 sums."""
    if dtype == torch.float64:
        return budgets.Budget(1e-12, 1e-11)
    return budgets.of_library(torch.finfo(dtype).eps, terms)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill every tensor that PyTorch allocates uninitialised with NaN while this lasts."""
    on = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic  # its switch is a property that type checkers do not see
    fills = deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        # PyTorch ties the filling to its deterministic mode, whose warnings are of no interest here.
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(on, warn_only=warns)
            deterministic.fill_uninitialized_memory = fills


def _gradients(impl: str, operands: Mapping[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    leaves = {name: operand.detach().clone().requires_grad_() for name, operand in operands.items()}
    factors = {name: leaf for name, leaf in leaves.items() if name not in ("x", "bias")}
    y = factored.linear(leaves["x"], factors, leaves["bias"], impl=impl)
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), weights), strict=True))


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)
