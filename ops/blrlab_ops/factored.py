"""Layers of any format, recognised from the names and dimensions of their factors.

{"V", "U"} of 2 dimensions are low_rank, of 4 monarch; {"V", "S", "U"} of 3 dimensions are blast.
"""

import importlib
from collections.abc import Mapping

from torch import Tensor

from . import blast, dispatch, low_rank, monarch
from .epilogue import Epilogue

_MODULES = {"low_rank": low_rank, "monarch": monarch, "blast": blast}
_NDIMS = {"low_rank": {"V": 2, "U": 2}, "monarch": {"V": 4, "U": 4}, "blast": {"V": 3, "S": 3, "U": 3}}


def linear(
    x: Tensor,
    factors: Mapping[str, Tensor],
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    multiply: Tensor | None = None,
    residual: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Multiply by factored weights of any format: y = activation(x W + bias) * multiply + residual.

    Args:
      x: input [..., i]; any leading shape and strides.
      factors: {"V", "U"} (2-D: low_rank, 4-D: monarch) or {"V", "S", "U"} (blast).
      bias: [o] or None.
      activation: "gelu" (exact), "gelu_tanh", "silu", or None.
      multiply: [..., o] or None, such as the up projection that a gate is multiplied by.
      residual: [..., o] or None, added last.
      impl: a name from `impls(format)`, or None for the best that can run.

    The Triton implementations fuse all of it; while autograd records, PyTorch does what follows x W + bias.

    Returns:
      y [..., o].

    Raises:
      ValueError: for factors of no known format, shapes that do not fit, or an unknown `impl` or activation.
      CannotRun: when the named `impl` cannot run on this device or dtype.
    """
    format, epilogue = recognise(factors), Epilogue(activation, multiply, residual)
    return _MODULES[format].linear(x, *_in_order(format, factors), bias=bias, epilogue=epilogue, impl=impl)


def to_dense(factors: Mapping[str, Tensor]) -> Tensor:
    """Build W [i, o] from factors of any format; raises ValueError for factors of no known format."""
    format = recognise(factors)
    return _MODULES[format].to_dense(*_in_order(format, factors))


def pack(factors: Mapping[str, Tensor], *, impl: str | None = None) -> dict[str, Tensor]:
    """Store factors the way `impl` reads them without a copy; names, shapes and values stay the same.

    None: a way that whatever `impl=None` takes reads well, since the best one depends on the number of tokens.

    Call it once when weights are loaded: a factor stored otherwise may be copied in every call.

    Raises:
      ValueError: for factors of no known format, or an unknown `impl`.
      CannotRun: when the named `impl` cannot run on this device or dtype.
    """
    format = recognise(factors)
    tensors = _in_order(format, factors)
    if impl is None:
        module = importlib.import_module(f"{__package__}.{format}.layout")
    else:
        module = dispatch.implementation(format, impl, tensors[0].device, tensors[0].dtype)
    packed = module.pack(*tensors)
    return dict(zip(_NDIMS[format], packed, strict=True))


def recognise(factors: Mapping[str, Tensor]) -> str:
    """Name the format of {name: tensor}; raises ValueError when it is none."""
    ndims = {name: tensor.ndim for name, tensor in factors.items()}
    for format, expected in _NDIMS.items():
        if ndims == expected:
            return format
    raise ValueError(f"factors of dimensions {ndims} are of no known format; the formats are {_NDIMS}")


def _in_order(format: str, factors: Mapping[str, Tensor]) -> list[Tensor]:
    return [factors[name] for name in _NDIMS[format]]
