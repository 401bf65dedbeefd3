"""How low-rank factors lie in memory for every implementation."""

from torch import Tensor


def pack(V: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
    """Store V as [r, i] and U as [o, r] in memory, as `torch.nn.Linear` does; shapes and values stay."""
    return V.T.contiguous().T, U.T.contiguous().T
