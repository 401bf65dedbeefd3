"""How Monarch factors lie in memory for every implementation."""

from torch import Tensor


def pack(V: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
    """Store V as [b1, r', b2, p] and U as [b2, q, b1, r'] in memory; shapes and values stay.

    As `torch.nn.Linear` stores its weight: what is summed over is adjacent, so that a kernel which owns a few columns
    reads long pieces of memory.
    """
    V_rows, U_rows = V.permute(0, 3, 1, 2).contiguous(), U.permute(1, 3, 0, 2).contiguous()
    return V_rows.permute(0, 2, 3, 1), U_rows.permute(2, 0, 3, 1)
