"""Monarch layer as two batched Triton products, the permutation between them folded into the stores.

Shapes: x [..., b1 p], V [b1, b2, p, r'], U [b1, b2, r', q], bias [b2 q].

Stage one runs over input blocks, x[l] [n, p] @ V[l] [p, (b2 r')], and stores its columns (k, r') at T [b2, n,
b1, r']. Stage two runs over output blocks, T[k] [n, (b1 r')] @ U[:, k] [(b1 r'), q] + bias[k]. T is
accumulated in float32 and stored in the dtype of x. Factors may have any strides; contiguous ones are read
best.
"""

import torch
from torch import Tensor

from blrlab_ops.custom_ops import register
from blrlab_ops.launching import Launch, run
from blrlab_ops.triton_product import product

from .torch_bmm import gradients

__all__ = ["launches", "linear", "pack"]


def linear(x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply, x [..., i] -> [..., o]."""
    b1, b2, p, _ = V.shape
    return _two_stage(x.reshape(-1, b1 * p), V, U, bias).view(*x.shape[:-1], b2 * U.shape[3])


def launches(x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None, y: Tensor) -> list[Launch]:
    """Describe the two launches that fill y [n, o] from x [n, i]."""
    b1, b2, p, rank = V.shape
    tokens, q = x.shape[0], U.shape[3]
    T = x.new_empty(b2, tokens, b1, rank)
    x_blocks = x.unflatten(1, (b1, p)).transpose(0, 1)  # [b1, n, p]
    V_columns = V.transpose(1, 2)[:, None]  # [b1, 1, p, b2, r']
    first = product(x_blocks, V_columns, T.permute(2, 1, 0, 3))
    U_columns = U.transpose(0, 1)[:, :, :, None]  # [b2, b1, r', 1, q]
    y_blocks = y.view(tokens, b2, 1, q).transpose(0, 1)  # [b2, n, 1, q]
    bias_blocks = None if bias is None else bias.unflatten(0, (b2, q))
    return [first, product(T.flatten(2), U_columns, y_blocks, bias_blocks)]


def pack(V: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
    """Store both factors contiguously."""
    return V.contiguous(), U.contiguous()


@torch.library.custom_op(
    "blrlab_ops::monarch_two_stage",
    mutates_args=(),
    schema="(Tensor x, Tensor V, Tensor U, Tensor? bias) -> Tensor",
)
def _two_stage(x, V, U, bias):
    y = x.new_empty(x.shape[0], V.shape[1] * U.shape[3])
    run(launches(x, V, U, bias, y), x.device)
    return y


register(_two_stage, lambda V, U: V.shape[1] * U.shape[3], gradients)
