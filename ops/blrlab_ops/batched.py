"""Batched products that read and write strided views, so that no activation is permuted in memory.

cuBLAS takes matrices of any row stride as long as one of the last two strides is 1, and so does the output.
The block layouts of this package are chosen such that every product needs only that; `torch.bmm(out=view)`
then stores straight into its final place. While autograd records, or a compiler traces, `out=` is not
possible: the plain product is returned and the one permutation of the result is left to PyTorch.

Shapes: b batches, m rows, k depth, n tokens, q columns of a block.
"""

import torch
from torch import Tensor


def to_rows(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply [b, n, k] @ [b, k, q] into token rows [n, b q], plus bias [b q]."""
    batches, tokens, width = left.shape[0], left.shape[1], right.shape[2]
    start = None if bias is None else bias.view(batches, 1, width)
    if _functional(left, right, bias):
        blocks = torch.bmm(left, right) if start is None else torch.baddbmm(start, left, right)
        return blocks.transpose(0, 1).reshape(tokens, batches * width)
    rows = left.new_empty(tokens, batches, width)
    if start is None:
        torch.bmm(left, right, out=rows.transpose(0, 1))
    else:
        torch.baddbmm(start, left, right, out=rows.transpose(0, 1))
    return rows.view(tokens, batches * width)


def to_columns(left: Tensor, right: Tensor) -> Tensor:
    """Multiply [b, m, k] @ [b, k, n] -> [b, m, n], tokens adjacent in memory.

    Rows start at multiples of 16 bytes where that is ours to choose: at n = 197 unaligned rows would send the
    next product to a slower cuBLAS kernel.
    """
    if _functional(left, right):
        return torch.bmm(left, right)
    return torch.bmm(left, right, out=columns(left, left.shape[0], left.shape[1], right.shape[2]))


def columns(like: Tensor, batches: int, rows: int, tokens: int) -> Tensor:
    """Return memory for a result of `to_columns`, [b, m, n]."""
    lanes = 16 // like.element_size()
    return like.new_empty(batches, rows, -(-tokens // lanes) * lanes)[:, :, :tokens]


def _functional(*tensors: Tensor | None) -> bool:
    present = [tensor for tensor in tensors if tensor is not None]
    # Tracers hand in subclasses of Tensor, which do not keep the strides of `out`.
    plain = all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in present)
    if torch.compiler.is_compiling() or not plain:
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in present)
