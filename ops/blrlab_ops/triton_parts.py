"""Parts that the Triton kernels share: what follows a product, and what lets one launch begin before the last ends.

Programmatic dependent launch (compute capability 9 and up): a kernel that calls `gdc_launch_dependents` lets the next
launch start while it runs; the next one calls `gdc_wait` before it touches what it was handed. Weights need no waiting:
they are asked for beforehand.
"""

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Read when @triton.jit reads it: the kernels stay interpreted, or not, whatever is set later.
INTERPRETED: bool = knobs.runtime.interpret


@triton.jit
def begin(SIGNAL: tl.constexpr):
    """Let the next launch start."""
    if SIGNAL:
        gdc_launch_dependents()


@triton.jit
def batch_offset(batch, outer, inner, INNER: tl.constexpr):
    """Return where a batch lies: `inner` apart, or with INNER of them to each of `outer` apart."""
    if INNER > 0:
        return batch // INNER * outer + batch % INNER * inner
    return batch * inner


@triton.jit
def wait(WAIT: tl.constexpr):
    """Wait until the launch before has written what it writes."""
    if WAIT:
        gdc_wait()


@triton.jit
def prefetch_tile(
    right,
    first_column,
    right_depth,
    right_column,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    LINE: tl.constexpr,
    ALONG_DEPTH: tl.constexpr,
):
    """Ask for all rows of BC columns of a matrix [DEPTH, COLUMNS] into the L2.

    LINE numbers share a line of the cache: of a column where ALONG_DEPTH, else of a row.
    """
    if ALONG_DEPTH:
        columns = tl.minimum(first_column + tl.arange(0, BC), COLUMNS - 1).to(tl.int64)
        for step in range(0, DEPTH, BD):
            lines = tl.minimum(step + tl.arange(0, BD // LINE) * LINE, DEPTH - 1)
            prefetch(right + lines[:, None] * right_depth + columns[None, :] * right_column)
    else:
        lines = tl.minimum(first_column + tl.arange(0, BC // LINE) * LINE, COLUMNS - 1)
        for step in range(0, DEPTH, BD):
            row = tl.minimum(step + tl.arange(0, BD), DEPTH - 1).to(tl.int64)
            prefetch(right + row[:, None] * right_depth + lines[None, :] * right_column)


@triton.jit
def prefetch(addresses):
    """Ask for the lines at these addresses into the L2, and do not wait for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [addresses.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def add_product(total, left, right):
    """Return total + left @ right, in float32.

    float32 tiles are summed by themselves first: one chain of additions down the whole depth loses twice the digits.
    """
    if left.dtype == tl.float32:
        # The last argument keeps Triton from making one chain of the two; for float32 it says nothing else.
        return total + tl.dot(left, right, input_precision="ieee", max_num_imprecise_acc=1)
    return tl.dot(left, right, total)


@triton.jit
def activate(total, ACTIVATION: tl.constexpr):
    """Apply an activation to float32 sums."""
    if ACTIVATION == "silu":
        total = total * tl.sigmoid(total)
    elif ACTIVATION == "gelu":
        total = 0.5 * total * (1.0 + tl.erf(total * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh z) = sigmoid(2 z)
        total = total * tl.sigmoid(1.5957691216057308 * (total + 0.044715 * total * total * total))
    return total


@triton.jit
def store_tile(
    total,
    out,
    bias,
    multiply,
    residual,
    batch,
    rows,
    rows_mask,
    columns,
    columns_mask,
    out_batch,
    out_row,
    out_group,
    out_column,
    bias_batch,
    bias_column,
    COLUMN_GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Store float32 sums [BN, BC] of one batch, after the epilogue; batch and rows are 64-bit.

    Columns of `out` lie in groups, such as (k, r') of a Monarch intermediate.
    """
    groups = (columns // COLUMN_GROUP).to(tl.int64) * out_group + (columns % COLUMN_GROUP) * out_column
    offsets = batch * out_batch + rows[:, None] * out_row + groups[None, :]
    mask = rows_mask[:, None] & columns_mask[None, :]
    bias_offsets = batch * bias_batch + columns * bias_column
    total = finish(total, bias, multiply, residual, offsets, mask, bias_offsets, columns_mask, ACTIVATION)
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def finish(total, bias, multiply, residual, offsets, mask, bias_offsets, bias_mask, ACTIVATION: tl.constexpr):
    """Return activation(total + bias) * multiply + residual, of float32 sums [BN, BC].

    `offsets` lead into multiply and residual, which are stored as the result is.
    """
    if bias is not None:
        total += tl.load(bias + bias_offsets, mask=bias_mask, other=0.0).to(tl.float32)[None, :]
    total = activate(total, ACTIVATION)
    if multiply is not None:
        total *= tl.load(multiply + offsets, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        total += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    return total
