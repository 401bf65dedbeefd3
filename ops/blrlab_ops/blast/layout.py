"""How BLAST factors lie in memory: V and U as `torch.nn.Linear` stores its weight, S as the mixing reads it."""

from torch import Tensor

from blrlab_ops.dispatch import MANY_BLOCKS


def pack(V: Tensor, S: Tensor, U: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Store V as [b1, r, p] and U as [b2, q, r] in memory; shapes and values stay.

    S is stored as [r, b2, b1] for many blocks, which are mixed on tensor cores (16 x 16 of them are mostly used), and
    contiguously for few, which CUDA cores mix along the ranks. `torch_bmm` copies the latter, a small tensor, in every
    call.
    """
    many = min(S.shape[:2]) >= MANY_BLOCKS
    return rows(V), ranks_first(S) if many else S.contiguous(), rows(U)


def rows(factor: Tensor) -> Tensor:
    """Store what a factor [b, depth, columns] is summed over last."""
    return factor.transpose(1, 2).contiguous().transpose(1, 2)


def ranks_first(S: Tensor) -> Tensor:
    """Store S [b1, b2, r] as [r, b2, b1]."""
    return S.permute(2, 1, 0).contiguous().permute(2, 1, 0)
