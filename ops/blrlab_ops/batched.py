"""Batched products that read and write strided views, so that no activation is permuted in memory.

cuBLAS takes matrices of any row stride as long as one of the last two strides is 1, and so does the output.
The block layouts of this package are chosen such that every product needs only that; `torch.bmm(out=view)`
then stores straight into its final place. While autograd records, or a compiler traces, `out=` is not
possible: the plain product is returned and the one permutation of the result is left to PyTorch.

A batched product has no bias of its own: PyTorch writes the bias to all of y before, which the product then reads.
On a GPU that takes as long as a product where y is large; `spare` says so, and whoever makes the left operand then
leaves depth for ones beyond its own, which the bias is multiplied by.

Shapes: b batches, m rows, k depth, n tokens, q columns of a block.
"""

import torch
from torch import Tensor

SPARE = 8  # depth beyond the operands' own, which keeps rows of 16-bit numbers at multiples of 16 bytes
LARGE = 2**23  # numbers of y from which on the bias is a part of the product


def to_rows(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply [b, n, k] @ [b, k, q] into token rows [n, b q], plus bias [b q].

    A left operand deeper than the right one has room for the bias, `spare`; what it has there is overwritten.
    """
    batches, tokens, width = left.shape[0], left.shape[1], right.shape[2]
    if bias is not None and left.shape[2] > right.shape[1]:
        left[:, :, right.shape[1] :].fill_(1)
        right, bias = _above(right, bias.view(batches, width), left.shape[2]), None
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


def spare(x: Tensor, bias: Tensor | None, *weights: Tensor, tokens: int, columns: int, depth: int) -> int:
    """Return the depth to leave for the bias beyond the last product's own: SPARE, or 0 where it is better added."""
    if bias is None or _functional(x, bias, *weights):
        return 0
    return SPARE if _pays(x, tokens, columns, depth) else 0


def _pays(x: Tensor, tokens: int, columns: int, depth: int) -> bool:
    """Say whether a pass over y costs more than a copy of the right operand with the bias above it.

    In float32 the bias would be rounded as operands are, to the 10 bits of TF32 where that is allowed.
    """
    return x.is_cuda and x.element_size() == 2 and tokens * columns >= LARGE and tokens >= depth


def to_columns(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply [b, m, k] @ [b, k, n] -> [b, m, n], tokens adjacent in memory: `out`, of eager calls, or new.

    Rows start at multiples of 16 bytes where that is ours to choose: at n = 197 unaligned rows would send the
    next product to a slower cuBLAS kernel.
    """
    if _functional(left, right):
        assert out is None  # which a product that is recorded would not fill
        return torch.bmm(left, right)
    made = columns(left, left.shape[0], left.shape[1], right.shape[2]) if out is None else out
    return torch.bmm(left, right, out=made)


def columns(like: Tensor, batches: int, rows: int, tokens: int) -> Tensor:
    """Return memory for a result of `to_columns`, [b, m, n]."""
    lanes = 16 // like.element_size()
    return like.new_empty(batches, rows, -(-tokens // lanes) * lanes)[:, :, :tokens]


def _above(right: Tensor, bias: Tensor, depth: int) -> Tensor:
    """Return [b, k, q] with the bias [b, q] as its next row, and zeros up to a depth, columns [q, k] in memory."""
    batches, own, width = right.shape
    deeper = right.new_empty(batches, width, depth).transpose(1, 2)
    deeper[:, :own] = right
    deeper[:, own] = bias
    deeper[:, own + 1 :] = 0
    return deeper


def _functional(*tensors: Tensor | None) -> bool:
    present = [tensor for tensor in tensors if tensor is not None]
    # Tracers hand in subclasses of Tensor, which do not keep the strides of `out`.
    plain = all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in present)
    if torch.compiler.is_compiling() or not plain:
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in present)
