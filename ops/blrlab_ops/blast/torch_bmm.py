"""BLAST layer as three batched products of PyTorch, without moving an activation.

Shapes: x [..., b1 p], V [b1, p, r], S [b1, b2, r], U [b2, r, q], bias [b2 q].

Z[l] = x[l] V[l] is batched over input blocks, the mixing W[:, k] = sum_l S[l,k] Z[l] over ranks, and y[k] =
W[k] U[k] over output blocks. With tokens last in memory, Z [b1, r, n] is a matrix [b1, n] of row stride r n
for each rank, and W [r, b2, n] a matrix [r, n] of row stride b2 n for each output block: nothing is permuted.
S is read as [r, b2, b1]; `pack` stores it so (its shape stays), and an S stored otherwise, small as it is, is
copied in every call. Z and W are rounded to the dtype of x.
"""

from collections.abc import Sequence

from torch import Tensor

from blrlab_ops import batched

from . import layout


def linear(x: Tensor, V: Tensor, S: Tensor, U: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply, x [..., i] -> [..., o]; the bias joins the last product."""
    b1, p, rank = V.shape
    x_blocks = x.reshape(-1, b1, p).permute(1, 2, 0)  # [b1, p, n]
    Z = batched.to_columns(V.transpose(1, 2), x_blocks)  # [b1, r, n]
    S_ranks, tokens = S.permute(2, 1, 0).contiguous(), x_blocks.shape[2]
    spare = batched.spare(x, bias, V, S, U, tokens=tokens, columns=U.shape[0] * U.shape[2], depth=rank)
    if spare:
        W = batched.columns(x, rank + spare, U.shape[0], tokens)
        batched.to_columns(S_ranks, Z.transpose(0, 1), W[:rank])
    else:
        W = batched.to_columns(S_ranks, Z.transpose(0, 1))  # [r, b2, n]
    y = batched.to_rows(W.permute(1, 2, 0), U, bias)
    return y.view(*x.shape[:-1], U.shape[0] * U.shape[2])


def gradients(
    grad: Tensor, x: Tensor, V: Tensor, S: Tensor, U: Tensor, *, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x [n, i], V, S and U for grad [n, o], or None where not needed."""
    b1, p, _ = V.shape
    x_blocks = x.unflatten(1, (b1, p)).transpose(0, 1)  # [b1, n, p]
    grad_blocks = grad.unflatten(1, (U.shape[0], -1)).transpose(0, 1)  # [b2, n, q]
    S_ranks = S.permute(2, 0, 1).contiguous()  # [r, b1, b2]
    dW = batched.to_columns(U, grad_blocks.transpose(1, 2)).transpose(0, 1)  # [r, b2, n]
    dx = dV = dS = dU = None
    if needs[2] or needs[3]:
        Z = batched.to_columns(V.transpose(1, 2), x_blocks.transpose(1, 2)).transpose(0, 1)  # [r, b1, n]
        if needs[2]:
            dS = (Z @ dW.transpose(1, 2)).permute(1, 2, 0)
        if needs[3]:
            dU = batched.to_columns(S_ranks.transpose(1, 2), Z).transpose(0, 1) @ grad_blocks
    if needs[0] or needs[1]:
        dZ = batched.to_columns(S_ranks, dW).permute(1, 2, 0)  # [b1, n, r]
        dx = batched.to_rows(dZ, V.transpose(1, 2)) if needs[0] else None
        dV = x_blocks.transpose(1, 2) @ dZ if needs[1] else None
    return dx, dV, dS, dU


def pack(V: Tensor, S: Tensor, U: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Store V as [b1, r, p], S as [r, b2, b1] and U as [b2, q, r] in memory; shapes and values stay."""
    return layout.rows(V), layout.ranks_first(S), layout.rows(U)
