"""Low-rank layer as two Triton products.

Shapes: x [..., i], V [i, r], U [r, o], bias [o]. T = x V [n, r] is accumulated in float32, stored in the
dtype of x and read again by y = T U + bias. Factors may have any strides.
"""

import torch
from torch import Tensor

from blrlab_ops.custom_ops import register
from blrlab_ops.launching import Launch, run
from blrlab_ops.triton_product import product

from .torch_bmm import gradients, pack

__all__ = ["launches", "linear", "pack"]


def linear(x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply, x [..., i] -> [..., o]."""
    return _two_stage(x.reshape(-1, V.shape[0]), V, U, bias).view(*x.shape[:-1], U.shape[1])


def launches(x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None, y: Tensor) -> list[Launch]:
    """Describe the two launches that fill y [n, o] from x [n, i]."""
    tokens, rank = x.shape[0], V.shape[1]
    T = x.new_empty(tokens, rank)
    first = product(x[None], V[None, None, :, None], T[None, :, None])
    bias_row = None if bias is None else bias[None]
    return [first, product(T[None], U[None, None, :, None], y[None, :, None], bias_row)]


@torch.library.custom_op(
    "blrlab_ops::low_rank_two_stage",
    mutates_args=(),
    schema="(Tensor x, Tensor V, Tensor U, Tensor? bias) -> Tensor",
)
def _two_stage(x, V, U, bias):
    y = x.new_empty(x.shape[0], U.shape[1])
    run(launches(x, V, U, bias, y), x.device)
    return y


register(_two_stage, lambda V, U: U.shape[1], gradients)
