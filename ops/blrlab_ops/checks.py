"""Checks shared by all formats: one clear sentence before anything runs."""

from collections.abc import Mapping

from torch import Tensor

from . import epilogue as after
from .epilogue import NOTHING, Epilogue


def operands(
    format: str,
    x: Tensor,
    factors: Mapping[str, Tensor],
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    epilogue: Epilogue = NOTHING,
) -> None:
    """Check x [..., i], the factors, bias [o] and epilogue of one layer against each other.

    Raises:
      ValueError: when a size is zero, shapes disagree, or the tensors differ in dtype or device.
    """
    for name, factor in factors.items():
        if min(factor.shape) < 1:
            raise ValueError(f"{format}: every size of {name} must be at least 1, not {list(factor.shape)}")
    if x.ndim < 1 or x.shape[-1] != in_features:
        raise ValueError(f"{format}: x must be [..., {in_features}] for these factors, not {list(x.shape)}")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"{format}: bias must be [{out_features}] for these factors, not {list(bias.shape)}")
    others = dict(factors) if bias is None else {**factors, "bias": bias}
    for name, other in others.items():
        if other.dtype != x.dtype or other.device != x.device:
            raise ValueError(
                f"{format}: x is {x.dtype} on {x.device} and {name} is {other.dtype} on {other.device}; "
                "they must agree, cast or move one of them"
            )
    if not epilogue.is_empty:
        after.check(format, epilogue, (*x.shape[:-1], out_features), x)
