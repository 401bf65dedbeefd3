"""Low-rank layer as two matrix products of PyTorch.

Shapes: x [..., i], V [i, r], U [r, o], bias [o]; T = x V [n, r], rounded to the dtype of x.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import pack

__all__ = ["gradients", "linear", "pack"]


def linear(x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply, x [..., i] -> [..., o]; the bias joins the second product."""
    T = x.reshape(-1, V.shape[0]) @ V  # [n, r]
    y = T @ U if bias is None else torch.addmm(bias, T, U)
    return y.view(*x.shape[:-1], U.shape[1])


def gradients(grad: Tensor, x: Tensor, V: Tensor, U: Tensor, *, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Return the gradients of x [n, i], V and U for grad [n, o], or None where not needed."""
    dT = grad @ U.T  # [n, r]
    dx = dT @ V.T if needs[0] else None
    dV = x.T @ dT if needs[1] else None
    dU = (x @ V).T @ grad if needs[2] else None
    return dx, dV, dU
