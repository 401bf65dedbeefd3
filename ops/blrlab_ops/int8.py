"""Factored layers whose V and U are stored as int8, for a few tokens: half the bytes of 16-bit weights again.

>>> import torch
>>> from blrlab_ops import int8, testing
>>> factors = testing.random_factors("monarch", 64, 96, (4, 4), 8)
>>> small = int8.quantise(factors)
>>> small["V"].dtype, int8.error(factors, small) < 0.02
(torch.int8, True)
>>> int8.linear(torch.randn(2, 64), small).shape
torch.Size([2, 96])

Weights only: x, S and every sum keep their type. A column of a factor, as the products see it, has one scale:
- V: monarch [b1, b2, r'], blast [b1, r], low_rank [r], over the p (or i) rows of a block;
- U: monarch and blast [b2, q], low_rank [o], over all of the ranks that are summed.

Two things keep the error small. Before rounding, the rows of U are brought to one size and what they lose goes into the
columns of V (of S, for blast), which have scales of their own: the product is the same. And every scale is calibrated:
of a few that clip the largest numbers more or less, the one of the least squared error is taken.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch, factored
from . import epilogue as after
from .epilogue import Epilogue

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)  # of the largest number of a column
SCALES = ("V_scale", "U_scale")
_U_DEPTH = {"low_rank": (0,), "monarch": (0, 2), "blast": (1,)}  # axes of U that are summed over


def quantise(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Round factors of any format to int8 with a scale a column.

    Returns:
      {"V", "U"} as int8 of the same shapes, "S" as it is for blast, and "V_scale", "U_scale" in the factors' dtype.

    Raises:
      ValueError: for factors of no known format.
    """
    format = factored.recognise(factors)
    wide = _balanced(format, {name: factor.detach().float() for name, factor in factors.items()})
    dtype = factors["V"].dtype
    V, V_scale = _rounded(wide["V"], (-2,), dtype)
    U, U_scale = _rounded(wide["U"], _U_DEPTH[format], dtype)
    S = {"S": wide["S"].to(dtype)} if "S" in wide else {}
    return {**factored.pack({"V": V, **S, "U": U}), "V_scale": V_scale, "U_scale": U_scale}


def dequantise(quantised: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the factors that int8 ones stand for, in a dtype (None: that of the scales).

    Raises:
      ValueError: for factors of no known format, or without their scales.
    """
    format = recognise(quantised)
    kind = dtype or quantised["V_scale"].dtype
    U_scale = quantised["U_scale"].to(kind)
    for axis in _U_DEPTH[format]:
        U_scale = U_scale.unsqueeze(axis)
    V = quantised["V"].to(kind) * quantised["V_scale"].to(kind).unsqueeze(-2)
    S = {"S": quantised["S"].to(kind)} if "S" in quantised else {}
    return {"V": V, **S, "U": quantised["U"].to(kind) * U_scale}


def recognise(quantised: Mapping[str, Tensor]) -> str:
    """Name the format of int8 factors; raises ValueError where they are none, or lack their scales."""
    missing = [name for name in SCALES if name not in quantised]
    if missing:
        raise ValueError(f"int8 factors need {', '.join(missing)} beside {', '.join(quantised)}: see int8.quantise")
    return factored.recognise({name: each for name, each in quantised.items() if name not in SCALES})


def error(factors: Mapping[str, Tensor], quantised: Mapping[str, Tensor]) -> float:
    """Return the relative Frobenius error of the weight that int8 factors multiply out to."""
    exact = factored.to_dense({name: factor.double() for name, factor in factors.items()})
    return float((factored.to_dense(dequantise(quantised, torch.float64)) - exact).norm() / exact.norm())


def linear(
    x: Tensor,
    quantised: Mapping[str, Tensor],
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    multiply: Tensor | None = None,
    residual: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Multiply by int8 factors: y = activation(x W + bias) * multiply + residual.

    Args:
      x: [..., i].
      quantised: as `quantise` returns them.
      bias: [o] or None.
      activation: as in `blrlab_ops.linear`.
      multiply: [..., o] or None.
      residual: [..., o] or None.
      impl: "triton_streaming", which reads int8, or "torch_bmm", which widens the factors first; None: the former for
        up to 16 tokens where it can run and no gradient is recorded, else the latter.

    Raises:
      ValueError: for factors of no known format, shapes that do not fit, or an unknown `impl` or activation.
      CannotRun: when the named `impl` cannot run on this device or dtype.
    """
    format, epilogue = recognise(quantised), Epilogue(activation, multiply, residual)
    if impl not in (None, "torch_bmm", "triton_streaming"):
        raise ValueError(f"impl {impl!r} of int8 factors is not one of ('torch_bmm', 'triton_streaming')")
    if impl is None:
        impl = "triton_streaming" if _streams(format, x, bias, epilogue) else "torch_bmm"
    if impl == "torch_bmm":
        return factored.linear(
            x,
            dequantise(quantised, x.dtype),
            bias,
            activation=activation,
            multiply=multiply,
            residual=residual,
            impl="torch_bmm",
        )
    dispatch.choose(format, impl, x.device, x.dtype)
    weights = tuple((name, _Kind(each.shape, each.dtype, each.device)) for name, each in quantised.items())
    x_kind = _Kind(x.shape, x.dtype, x.device)
    _check(format, x_kind, weights, _kind(bias), activation, _kind(multiply), _kind(residual))
    from .int8_streaming import run

    return run(format, x, quantised, bias, epilogue)


def _streams(format: str, x: Tensor, bias: Tensor | None, epilogue: Epilogue) -> bool:
    tokens = x.numel() // max(x.shape[-1], 1)
    if tokens > dispatch.STREAMED_TOKENS or after.records_gradients(x, bias, *epilogue.tensors().values()):
        return False
    return dispatch.runs_natively(format, "triton_streaming", str(x.device), str(x.dtype))


class _Kind(NamedTuple):
    """What the checks need of an operand."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def _kind(tensor: Tensor | None) -> _Kind | None:
    return None if tensor is None else _Kind(tensor.shape, tensor.dtype, tensor.device)


@functools.lru_cache(maxsize=1024)
def _check(
    format: str, x: _Kind, weights: tuple[tuple[str, _Kind], ...], bias: _Kind | None, activation: str | None,
    multiply: _Kind | None, residual: _Kind | None,
) -> None:  # fmt: skip
    """Let the format's own checks see every operand, on a device where nothing is computed; once for each kind."""
    factors = dequantise({name: _on_meta(each) for name, each in weights}, x.dtype).values()
    multiplier, added = multiply and _on_meta(multiply), residual and _on_meta(residual)
    module = {"low_rank": factored.low_rank, "monarch": factored.monarch, "blast": factored.blast}[format]
    epilogue = Epilogue(activation, multiplier, added)
    module.linear(_on_meta(x), *factors, bias and _on_meta(bias), epilogue=epilogue, impl="torch_bmm")
    others = {"bias": bias, "multiply": multiply, "residual": residual}
    for name, each in (*weights, *others.items()):
        if each is not None and each.device != x.device:
            raise ValueError(f"{format}: x is on {x.device} and {name} on {each.device}; move one of them")


def _on_meta(kind: _Kind) -> Tensor:
    return torch.empty(kind.shape, dtype=kind.dtype, device="meta")


def _balanced(format: str, factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring the rows of U to one size without changing the product."""
    U = factors["U"]
    size = U.square().mean(-1).sqrt()  # low_rank [r], monarch [b1, b2, r'], blast [b2, r]
    size = torch.where(size > 0, size, 1.0)
    if format == "blast":
        return {"V": factors["V"], "S": factors["S"] * size, "U": U / size[..., None]}
    return {"V": factors["V"] * size.unsqueeze(-2), "U": U / size[..., None]}


def _rounded(weight: Tensor, depth: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round to int8 with one scale for all of `depth`, the best of a few clips: (int8, scale without those axes)."""
    largest = weight.abs().amax(depth, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    best, least = None, None
    for clip in CLIPS:
        scale = (clip * largest / 127).to(dtype).float().clamp_min(torch.finfo(dtype).tiny)
        found = (weight / scale).round().clamp(-127, 127)
        lost = (found * scale - weight).square().sum(depth, keepdim=True)
        if best is None or least is None:
            best, least = scale, lost
            continue
        best, least = torch.where(lost < least, scale, best), torch.minimum(lost, least)
    assert best is not None
    rounded = (weight / best).round().clamp(-127, 127).to(torch.int8)
    return rounded, best.squeeze(depth).to(dtype)
