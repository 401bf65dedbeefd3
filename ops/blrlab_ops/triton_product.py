"""The batched matrix product that the Triton implementations share.

out[b] = left[b] @ right[b] + bias[b] for every batch b, accumulated in float32. All operands are strided
views, so that cutting x into blocks and permuting an intermediate happen in the addresses, never in memory:
- left   [b, n, depth];
- right  [b, depth groups, depth of a group, column groups, columns of a group];
- out    [b, n, column groups, columns of a group];
- bias   [b, columns] or None.

Groups let one axis of a matrix run over two axes of a factor, such as (k, r') of a Monarch V. Offsets are
64-bit. float32 is multiplied as IEEE float32, never as tf32.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from .launching import Launch

# Read when @triton.jit reads it: the kernels stay interpreted, or not, whatever is set later.
INTERPRETED: bool = knobs.runtime.interpret


class Tiles(NamedTuple):
    """What one program computes: rows x columns of the result, `depth` of the sum at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@triton.jit
def product_kernel(
    left,
    right,
    out,
    bias,
    tokens,
    batches,
    left_batch,
    left_row,
    left_depth,
    right_batch,
    right_depth_group,
    right_depth,
    right_column_group,
    right_column,
    out_batch,
    out_row,
    out_column_group,
    out_column,
    bias_batch,
    bias_column,
    DEPTH: tl.constexpr,
    DEPTH_GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    COLUMN_GROUP: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
):
    """Compute one [BN, BC] tile of one batch; neighbouring programs share their rows of `left`."""
    program = tl.program_id(0)
    column_tiles: tl.constexpr = (COLUMNS + BC - 1) // BC
    batch = ((program // column_tiles) % batches).to(tl.int64)
    rows = (program // column_tiles // batches) * BN + tl.arange(0, BN)
    columns = (program % column_tiles) * BC + tl.arange(0, BC)
    row_offsets = rows.to(tl.int64)
    column_groups = (columns // COLUMN_GROUP).to(tl.int64)
    column_offsets = (columns % COLUMN_GROUP).to(tl.int64)

    left_rows = left + batch * left_batch + row_offsets[:, None] * left_row  # [BN, 1]
    right_columns = column_groups * right_column_group + column_offsets * right_column
    right_columns = right + batch * right_batch + right_columns[None, :]  # [1, BC]
    total = tl.zeros((BN, BC), dtype=tl.float32)
    for start in range(0, DEPTH, BD):
        depth = start + tl.arange(0, BD)
        left_offsets = depth.to(tl.int64) * left_depth
        right_offsets = (depth // DEPTH_GROUP).to(tl.int64) * right_depth_group
        right_offsets += (depth % DEPTH_GROUP).to(tl.int64) * right_depth
        # Both operands are zero past the end of the sum, so what lies in memory there never enters it.
        left_mask = (rows[:, None] < tokens) & (depth[None, :] < DEPTH)
        right_mask = (depth[:, None] < DEPTH) & (columns[None, :] < COLUMNS)
        left_tile = tl.load(left_rows + left_offsets[None, :], mask=left_mask, other=0.0)  # [BN, BD]
        right_tile = tl.load(right_columns + right_offsets[:, None], mask=right_mask, other=0.0)  # [BD, BC]
        total = tl.dot(left_tile, right_tile, total, input_precision="ieee")

    if bias is not None:
        bias_columns = bias + batch * bias_batch + columns.to(tl.int64) * bias_column
        total += tl.load(bias_columns, mask=columns < COLUMNS, other=0.0).to(tl.float32)[None, :]
    out_columns = column_groups * out_column_group + column_offsets * out_column
    out_tile = out + batch * out_batch + row_offsets[:, None] * out_row + out_columns[None, :]
    out_mask = (rows[:, None] < tokens) & (columns[None, :] < COLUMNS)
    tl.store(out_tile, total.to(out.dtype.element_ty), mask=out_mask)


def product(left: Tensor, right: Tensor, out: Tensor, bias: Tensor | None = None) -> Launch:
    """Describe the launch that fills `out`, for views shaped as in the module's docstring."""
    batches, tokens, depth = left.shape
    _, _, depth_group, column_groups, column_group = right.shape
    columns = column_groups * column_group
    size = tiles(tokens, columns, depth, left.element_size(), INTERPRETED)
    arguments = {"left": left, "right": right, "out": out, "bias": bias, "tokens": tokens, "batches": batches}
    arguments |= strides("left", ("batch", "row", "depth"), left)
    arguments |= strides("right", ("batch", "depth_group", "depth", "column_group", "column"), right)
    arguments |= strides("out", ("batch", "row", "column_group", "column"), out)
    no_bias = {"bias_batch": 0, "bias_column": 0}
    arguments |= no_bias if bias is None else strides("bias", ("batch", "column"), bias)
    constants = {"DEPTH": depth, "DEPTH_GROUP": depth_group, "COLUMNS": columns, "COLUMN_GROUP": column_group}
    constants |= {"BN": size.rows, "BC": size.columns, "BD": size.depth}
    programs = batches * ceil_div(tokens, size.rows) * ceil_div(columns, size.columns)
    return Launch(product_kernel, programs, arguments, constants, size.warps, size.stages)


def strides(name: str, axes: tuple[str, ...], tensor: Tensor) -> dict[str, int]:
    """Name the strides of a tensor as the kernels do: {"left_row": 768, ...}."""
    return {f"{name}_{axis}": stride for axis, stride in zip(axes, tensor.stride(), strict=True)}


def tiles(tokens: int, columns: int, depth: int, itemsize: int, interpreted: bool = False) -> Tiles:
    """Choose the tile sizes of a product: fixed rules, powers of two of at least 16.

    64 KiB of shared memory at most, which every GPU since sm_80 has. float32 runs on CUDA cores and takes
    smaller tiles. The interpreter pays per program, so it takes the largest tiles that still cut a layer of a
    few hundred columns.
    """
    if interpreted:
        return Tiles(_fit(tokens, 128), _fit(columns, 128), _fit(depth, 128), warps=4, stages=1)
    widest = 64 if itemsize == 4 else 128
    rows, width = _fit(tokens, widest), _fit(columns, widest)
    warps = 8 if rows * width > 8192 else 4
    return Tiles(rows, width, _fit(depth, 32), warps, stages=3 if itemsize == 4 else 4)


def ceil_div(size: int, tile: int) -> int:
    """Count the tiles that cover `size`."""
    return -(-size // tile)


def power_of_two(size: int) -> int:
    """Return the least power of two that is at least `size`."""
    return 1 << max(0, size - 1).bit_length()


def _fit(size: int, limit: int) -> int:
    return min(limit, max(16, power_of_two(size)))
