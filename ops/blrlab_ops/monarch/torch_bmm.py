"""Monarch layer as two batched products of PyTorch, without moving an activation.

Shapes: x [..., b1 p], V [b1, b2, p, r'], U [b1, b2, r', q], bias [b2 q].

The first product is batched over input blocks l and the second over output blocks k, so the result of the
first must be readable both ways. Ranks before blocks and tokens last does it: T [b1, r', b2, n] is [b1, (r'
b2), n] to the first product and, for the second, T[:, :, k] is a matrix [(b1 r'), n] of row stride b2 n. For
that V must lie in memory as [b1, r', b2, p] and b1 r' of U as one dimension; `pack` stores U as [b2, q, b1, r']
(shapes stay), and a V stored otherwise is copied in every call. T is rounded to the dtype of x.
"""

from collections.abc import Sequence

from torch import Tensor

from blrlab_ops import batched

from .layout import pack

__all__ = ["gradients", "linear", "pack"]


def linear(x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply, x [..., i] -> [..., o]; the bias joins the second product."""
    b1, b2, p, rank = V.shape
    x_blocks = x.reshape(-1, b1, p).permute(1, 2, 0)  # [b1, p, n]
    spare = batched.spare(x, bias, V, U, tokens=x_blocks.shape[2], columns=b2 * U.shape[3], depth=b1 * rank)
    T = _first_stage(x_blocks, V, spare)  # [b2, b1 r' + spare, n]
    y = batched.to_rows(T.transpose(1, 2), _second_factor(U), bias)
    return y.view(*x.shape[:-1], b2 * U.shape[3])


def gradients(grad: Tensor, x: Tensor, V: Tensor, U: Tensor, *, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Return the gradients of x [n, i], V and U for grad [n, o], or None where not needed."""
    b1, b2, p, rank = V.shape
    x_blocks = x.unflatten(1, (b1, p)).transpose(0, 1)  # [b1, n, p]
    grad_blocks = grad.unflatten(1, (b2, -1)).transpose(0, 1)  # [b2, n, q]
    U_rows = U.permute(1, 2, 0, 3).reshape(b2, rank * b1, -1)  # [b2, r' b1, q]
    dT = batched.to_columns(U_rows, grad_blocks.transpose(1, 2))  # [b2, r' b1, n]
    dT = dT.unflatten(1, (rank, b1)).permute(2, 0, 1, 3).flatten(1, 2)  # [b1, b2 r', n]
    dx = dV = dU = None
    if needs[0]:
        dx = batched.to_rows(dT.transpose(1, 2), V.transpose(2, 3).reshape(b1, b2 * rank, p))
    if needs[1]:
        dV = (dT @ x_blocks).unflatten(1, (b2, rank)).transpose(2, 3)
    if needs[2]:
        T = _first_stage(x_blocks.transpose(1, 2), V)
        dU = (T @ grad_blocks).unflatten(1, (b1, rank)).transpose(0, 1)
    return dx, dV, dU


def _first_stage(x_blocks: Tensor, V: Tensor, spare: int = 0) -> Tensor:
    """Multiply x_blocks [b1, p, n] by V -> T [b2, b1 r' + spare, n], a view of ranks before blocks."""
    b1, b2, p, rank = V.shape
    V_rows = V.permute(0, 3, 1, 2).reshape(b1, rank * b2, p)
    if spare:
        rows = batched.columns(x_blocks, b1 * rank + spare, b2, x_blocks.shape[2])
        own = rows.flatten(0, 1)[: b1 * rank * b2].unflatten(0, (b1, rank * b2))
        batched.to_columns(V_rows, x_blocks, own)
        return rows.transpose(0, 1)
    T = batched.to_columns(V_rows, x_blocks)  # [b1, r' b2, n]
    return T.unflatten(1, (rank, b2)).permute(2, 0, 1, 3).flatten(1, 2)


def _second_factor(U: Tensor) -> Tensor:
    """View U as [b2, b1 r', q]."""
    b1, b2, rank, q = U.shape
    return U.transpose(0, 1).reshape(b2, b1 * rank, q)
