"""Reference Monarch layer: build W, then multiply.

Any floating dtype does; in float64 it is the truth that the others are held to.

Shapes: x [..., b1 p], V [b1, b2, p, r'], U [b1, b2, r', q], bias [b2 q], W [b1 p, b2 q].
"""

import torch
from torch import Tensor


def to_dense(V: Tensor, U: Tensor) -> Tensor:
    """Build W [i, o] from its blocks W[l,k] = V[l,k] U[l,k]."""
    b1, b2, p, _ = V.shape
    blocks = torch.matmul(V, U)  # [b1, b2, p, q]
    return blocks.permute(0, 2, 1, 3).reshape(b1 * p, b2 * U.shape[3])


def linear(x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply, x [..., i] -> [..., o]."""
    y = x @ to_dense(V, U)
    return y if bias is None else y + bias


def pack(V: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors as they are: any strides do."""
    return V, U
