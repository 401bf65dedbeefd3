"""The batched product for a few tokens (1 to 16), whose time is that of reading the right side once.

out[b] = f(left[b] @ right[b] + bias[b]), shapes as in `triton_product`, or with parts: left [parts, b, n, depth] is the
sum of its parts, each times a row of `scale` [parts, b, depth] where that is given. So a stage whose depth was cut in
parts for want of programs, or blast's mixing of its input blocks, is finished as the next stage reads it.

What must move is `right`, b depth columns numbers; left is small and in the L2. One program owns BC columns, all their
depth and all tokens, so that nothing is reduced between programs: the order of every sum is fixed. One token
may be multiplied on CUDA cores; else rows are padded to the 16 of a tensor-core product.
"""

# Kernels are Triton's language, which reads as Python of other types.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .epilogue import NOTHING, Epilogue
from .launching import Launch
from .triton_parts import add_product, batch_offset, begin, prefetch_tile, store_tile, wait
from .triton_product import FLOAT32_DEPTH, ceil_div, grouped, parameters, power_of_two, strides

Scales = tuple[Tensor | None, Tensor | None]  # of the columns of int8 factors V and U


class Tiles(NamedTuple):
    """What one program of a streaming product computes.

    Attributes:
      columns: of the result.
      depth: of the sum, at a time; of float32 32 at most unless `vector`.
      rows: of the result, tokens: 1 for `vector`, else at least 16.
      warps: of 32 threads.
      stages: loads in flight, in steps of depth.
      vector: multiplies on CUDA cores, for rows of 1.
      prefetch: in a launch that overlaps the one before, asks for the right side before it waits.
    """

    columns: int
    depth: int
    rows: int
    warps: int
    stages: int
    vector: bool = False
    prefetch: bool = False


@triton.jit
def summed(left, mask, left_part, scale, scale_offsets, scale_mask, scale_part, PARTS: tl.constexpr):
    """Sum the parts of a tile of the left side, each times its scale, in float32."""
    total = tl.load(left, mask=mask, other=0.0).to(tl.float32)
    if scale is not None:
        total *= tl.load(scale + scale_offsets, mask=scale_mask, other=0.0).to(tl.float32)
    for _ in tl.static_range(1, PARTS):
        left += left_part  # pointers are 64-bit, and a part's offset from the first may not fit 32
        values = tl.load(left, mask=mask, other=0.0).to(tl.float32)
        if scale is not None:
            scale += scale_part
            values *= tl.load(scale + scale_offsets, mask=scale_mask, other=0.0).to(tl.float32)
        total += values
    return total


@triton.jit
def stream_kernel(
    left,
    scale,
    right,
    right_scale,
    out,
    bias,
    multiply,
    residual,
    tokens,
    batches,
    left_part,
    left_outer,
    left_batch,
    left_row,
    left_depth,
    scale_part,
    scale_batch,
    scale_depth,
    right_batch,
    right_depth,
    right_group,
    right_column,
    right_scale_batch,
    right_scale_column,
    out_batch,
    out_row,
    out_group,
    out_column,
    bias_batch,
    bias_column,
    PARTS: tl.constexpr,
    INNER: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    RIGHT_GROUP: tl.constexpr,
    COLUMN_GROUP: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    STAGES: tl.constexpr,
    VECTOR: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SIGNAL: tl.constexpr,
    WAIT: tl.constexpr,
    PREFETCH: tl.constexpr,
    LINE: tl.constexpr,
    ALONG_DEPTH: tl.constexpr,
):
    """Compute BC columns of one batch for BN tokens."""
    begin(SIGNAL)
    program = tl.program_id(0)
    column_tiles: tl.constexpr = (COLUMNS + BC - 1) // BC
    batch = (program // column_tiles % batches).to(tl.int64)
    rows = ((program // column_tiles // batches) * BN + tl.arange(0, BN)).to(tl.int64)
    rows_mask = rows < tokens
    first_column = (program % column_tiles) * BC
    columns = first_column + tl.arange(0, BC)
    columns_mask = columns < COLUMNS
    depth = tl.arange(0, BD).to(tl.int64)
    left += batch_offset(batch, left_outer, left_batch, INNER)
    left_rows = left + rows[:, None] * left_row  # [BN, 1]
    scale_batches = batch * scale_batch
    right += batch * right_batch
    right_columns = (columns // RIGHT_GROUP).to(tl.int64) * right_group
    right_columns += (columns % RIGHT_GROUP).to(tl.int64) * right_column
    right_tile = right + depth[:, None] * right_depth + right_columns[None, :]  # [BD, BC]

    right_step = tl.full((), BD, tl.int64) * right_depth
    ONCE: tl.constexpr = DEPTH <= BD
    inside = depth < DEPTH
    if ONCE:
        # The weights are asked for before the wait; they fill registers meanwhile.
        weights = tl.load(right_tile, mask=inside[:, None] & columns_mask[None, :], other=0.0)
    elif PREFETCH:
        prefetch_tile(right, first_column, right_depth, right_column, DEPTH, COLUMNS, BC, BD, LINE, ALONG_DEPTH)
    wait(WAIT)

    if VECTOR:  # x [BD], of one token
        left += (program // column_tiles // batches).to(tl.int64) * left_row
        if ONCE:
            offsets = scale_batches + depth * scale_depth
            x = summed(left + depth * left_depth, inside, left_part, scale, offsets, inside, scale_part, PARTS)
            sums = tl.sum(x[:, None] * weights.to(tl.float32), axis=0)  # [BC]
        else:
            products = tl.zeros((BD, BC), dtype=tl.float32)
            for step in tl.range(0, DEPTH, BD, num_stages=STAGES):
                at = step + depth
                within = at < DEPTH
                weights = tl.load(right_tile, mask=within[:, None] & columns_mask[None, :], other=0.0)
                offsets = scale_batches + at * scale_depth
                x = summed(left + at * left_depth, within, left_part, scale, offsets, within, scale_part, PARTS)
                products += x[:, None] * weights.to(tl.float32)
                right_tile += right_step
            sums = tl.sum(products, axis=0)
        total = sums[None, :]  # [1, BC]
    else:  # x [BN, BD]
        kind: tl.constexpr = out.dtype.element_ty
        total = tl.zeros((BN, BC), dtype=tl.float32)
        if ONCE:
            mask = rows_mask[:, None] & inside[None, :]
            offsets = scale_batches + depth[None, :] * scale_depth
            ranks_mask = inside[None, :]
            left_tile = left_rows + depth[None, :] * left_depth
            x = summed(left_tile, mask, left_part, scale, offsets, ranks_mask, scale_part, PARTS)
            total = add_product(total, x.to(kind), weights.to(kind))
        else:
            for step in tl.range(0, DEPTH, BD, num_stages=STAGES):
                at = step + depth
                within = at < DEPTH
                weights = tl.load(right_tile, mask=within[:, None] & columns_mask[None, :], other=0.0)
                mask = rows_mask[:, None] & within[None, :]
                offsets = scale_batches + at[None, :] * scale_depth
                ranks_mask = within[None, :]
                left_tile = left_rows + at[None, :] * left_depth
                x = summed(left_tile, mask, left_part, scale, offsets, ranks_mask, scale_part, PARTS)
                total = add_product(total, x.to(kind), weights.to(kind))
                right_tile += right_step

    if right_scale is not None:
        column_scale = right_scale + batch * right_scale_batch + columns * right_scale_column
        total *= tl.load(column_scale, mask=columns_mask, other=0.0).to(tl.float32)[None, :]
    store_tile(
        total, out, bias, multiply, residual, batch, rows, rows_mask, columns, columns_mask,
        out_batch, out_row, out_group, out_column, bias_batch, bias_column, COLUMN_GROUP, ACTIVATION,
    )  # fmt: skip


def stream(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    epilogue: Epilogue = NOTHING,
    size: Tiles | None = None,
    *,
    scale: Tensor | None = None,
    right_scale: Tensor | None = None,
    signal: bool = False,
    wait: bool = False,
) -> Launch:
    """Describe the launch that fills `out`.

    Args:
      left: [parts, b, n, depth], or [parts, b1, b2, n, depth] of b = b1 b2 batches.
      right: [b, depth, columns], or [b, depth, column groups, columns of a group].
      out: [b, n, column groups, columns of a group].
      bias: [b, columns] or None.
      epilogue: what follows; its operands lie in memory as `out` does.
      size: the tiles; None: by fixed rules.
      scale: [parts, b, depth], or None for 1.
      right_scale: [b, columns], by which the columns of an int8 `right` are multiplied, or None for 1.
      signal: lets the next launch start early.
      wait: starts early itself, and waits before it reads `left`.
    """
    parts, tokens, depth = left.shape[0], *left.shape[-2:]
    right = grouped(right)
    columns = right.shape[2] * right.shape[3]
    itemsize = right.element_size() if tokens == 1 else max(left.element_size(), right.element_size())
    size = size or tiles(right.shape[0], tokens, columns, depth, itemsize, parts)
    if out.dtype == torch.float32 and not size.vector:
        size = size._replace(depth=min(size.depth, FLOAT32_DEPTH))
    arguments, constants, programs = parameters(left, right, out, bias, epilogue, size, signal=signal, wait=wait)
    arguments |= {"scale": scale, "right_scale": right_scale}
    arguments |= strides("left", ("part", "outer", "batch", "row", "depth"), left if left.ndim == 5 else left[:, None])
    no_scale = dict.fromkeys(("scale_part", "scale_batch", "scale_depth"), 0)
    arguments |= no_scale if scale is None else strides("scale", ("part", "batch", "depth"), scale)
    unscaled = {"right_scale_batch": 0, "right_scale_column": 0}
    arguments |= unscaled if right_scale is None else strides("right_scale", ("batch", "column"), right_scale)
    constants |= {"PARTS": parts, "STAGES": size.stages, "VECTOR": size.vector}
    return Launch(stream_kernel, programs, arguments, constants, size.warps, size.stages, early=wait)


def tiles(batches: int, tokens: int, columns: int, depth: int, itemsize: int, parts: int = 1) -> Tiles:
    """Choose the tile sizes of a streaming product by fixed rules: 16 KiB of the right side a step.

    One token takes up to 2 KiB of a column at once, several 512 bytes (128 of float32); columns are halved until there
    are 256 programs, enough to ask for memory from every multiprocessor.
    """
    alone = tokens == 1
    rows = 1 if alone else min(64, max(16, power_of_two(tokens)))
    crowding = (2 if rows > 16 else 1) * (2 if rows > 32 else 1)  # shared memory holds the left side as well
    several = FLOAT32_DEPTH if itemsize == 4 else min(256, 512 // itemsize) // crowding
    deepest = 2048 // itemsize if alone else several
    step, narrowest = min(deepest, max(16, power_of_two(depth))), 8 if alone else 16
    width = min(128, max(narrowest, 2**14 // (step * itemsize) // (2 if rows > 32 else 1)))
    while width > narrowest and batches * ceil_div(columns, width) < 256:
        width //= 2
    # the parts of a tile of several tokens are not kept in shared memory, and those of one token as few as may be
    stages = 4 if parts == 1 else 2 if alone else 1
    return Tiles(width, step, rows, warps=4, stages=stages, vector=alone)


def candidates(tokens: int, columns: int, depth: int, itemsize: int, parts: int = 1) -> list[Tiles]:
    """List the tile sizes that are worth a measurement: those that were among the best for some layer on an H100.

    One token takes narrow tiles and long pieces of every column, several take tiles that tensor cores share.
    """
    whole, widest = max(16, power_of_two(depth)), max(16, power_of_two(columns))
    widths, steps = ((8, 16, 32), (256, 512, 1024, 2048)) if tokens == 1 else ((32, 64, 128), (128, 256, 512))
    steps = (FLOAT32_DEPTH,) if itemsize == 4 and tokens > 1 else steps
    widths, steps = sorted({min(each, widest) for each in widths}), sorted({min(each, whole) for each in steps})
    found = []
    for width, step, warps in itertools.product(widths, steps, (4, 8)):
        held = step * width * itemsize
        if held > 2**15 or held // (32 * warps) > 256 or (held < 8 * 32 * warps and warps > 4):
            continue
        if tokens == 1:
            found.append(Tiles(width, step, 1, warps, 3, vector=True))
        else:
            rows = min(64, max(16, power_of_two(tokens)))
            found += [Tiles(width, step, rows, warps, stages) for stages in ((2, 4) if parts == 1 else (1,))]
    return found


@triton.jit
def sum_kernel(
    left, out, PARTS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, SIGNAL: tl.constexpr, WAIT: tl.constexpr
):
    """Sum BLOCK numbers over parts that lie SIZE apart, in float32."""
    begin(SIGNAL)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wait(WAIT)
    total = summed(left + at, at < SIZE, SIZE, None, at, at < SIZE, 0, PARTS)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < SIZE)


def sum_parts(left: Tensor, out: Tensor, early: bool) -> Launch:
    """Describe the launch that sums contiguous left [parts, ...] into out [...]."""
    constants = {"PARTS": left.shape[0], "SIZE": out.numel(), "BLOCK": 256, "SIGNAL": early, "WAIT": early}
    return Launch(sum_kernel, ceil_div(out.numel(), 256), {"left": left, "out": out}, constants, 2, 1, early=early)
