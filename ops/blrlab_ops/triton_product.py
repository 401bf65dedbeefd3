"""The batched matrix product that the Triton implementations share, for many tokens.

out[b] = f(left[b] @ right[b] + bias[b]) for every batch b, accumulated in float32, where f is an epilogue. Operands are
strided views, so that cutting x into blocks and permuting an intermediate happen in the addresses, never in memory:
- left   [b, n, depth], or [b1, b2, n, depth] of b = b1 b2 batches;
- right  [b, depth, columns], or with columns in groups, such as (k, r') of a Monarch V;
- out    [b, n, column groups, columns of a group], such as (k, r') of Monarch's intermediate;
- bias   [b, columns] or None.

A program computes one tile [BN, BC]. Neighbours share rows of `left`. Traffic at the L2, b tiles of every batch:
left is read columns / BC times, right n / BN times, out written once. Offsets are 64-bit.
float32 is multiplied as IEEE float32, never as tf32, and summed 32 products at a time: one chain of additions down the
whole depth would lose twice the digits that a library's product loses.
"""

import itertools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .epilogue import NOTHING, Epilogue
from .launching import Launch
from .triton_parts import INTERPRETED, add_product, batch_offset, begin, prefetch_tile, store_tile, wait

LINE_BYTES = 128  # of a cache
MOST_HELD, HELD_BYTES = 512, 256  # of depth, and of the right side in a thread's registers
FLOAT32_DEPTH = 32  # the longest chain of additions in float32, but for tiles that are held


class Tiles(NamedTuple):
    """What one program of a product computes.

    Attributes:
      rows: of the result, tokens.
      columns: of the result.
      depth: of the sum, at a time; of float32 32 at most.
      warps: of 32 threads.
      stages: loads in flight, in steps of depth.
      prefetch: in a launch that overlaps the one before, asks for the right side before it waits.
      held: takes all of the depth at once, the right side before it waits; for depths that registers hold. `depth` and
        `stages` count for nothing then. Not a candidate for float32, whose sums it makes one chain.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    prefetch: bool = False
    held: bool = False


@triton.jit
def held_tile(right, depth, columns, columns_mask, right_depth, DEPTH: tl.constexpr):
    """Load rows `depth` of the right side at the offsets of its columns, [D, BC]."""
    tile = right + depth[:, None] * right_depth + columns[None, :]
    return tl.load(tile, mask=(depth[:, None] < DEPTH) & columns_mask[None, :], other=0.0)


@triton.jit
def product_kernel(
    left,
    right,
    out,
    bias,
    multiply,
    residual,
    tokens,
    batches,
    left_outer,
    left_batch,
    left_row,
    left_depth,
    right_batch,
    right_depth,
    right_group,
    right_column,
    out_batch,
    out_row,
    out_group,
    out_column,
    bias_batch,
    bias_column,
    INNER: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    RIGHT_GROUP: tl.constexpr,
    COLUMN_GROUP: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SIGNAL: tl.constexpr,
    WAIT: tl.constexpr,
    PREFETCH: tl.constexpr,
    LINE: tl.constexpr,
    ALONG_DEPTH: tl.constexpr,
    HELD1: tl.constexpr,
    HELD2: tl.constexpr,
):
    """Compute one [BN, BC] tile of one batch."""
    begin(SIGNAL)
    program = tl.program_id(0)
    column_tiles: tl.constexpr = (COLUMNS + BC - 1) // BC
    batch = ((program // column_tiles) % batches).to(tl.int64)
    rows = ((program // column_tiles // batches) * BN + tl.arange(0, BN)).to(tl.int64)
    rows_mask = rows < tokens
    first_column = (program % column_tiles) * BC
    columns = first_column + tl.arange(0, BC)
    columns_mask = columns < COLUMNS
    depth = tl.arange(0, BD).to(tl.int64)

    left += batch_offset(batch, left_outer, left_batch, INNER)
    left_rows = left + rows[:, None] * left_row
    right += batch * right_batch
    right_columns = (columns // RIGHT_GROUP).to(tl.int64) * right_group
    right_columns += (columns % RIGHT_GROUP).to(tl.int64) * right_column
    if HELD1 > 0:
        # All of the weights' tile is asked for before the wait, and held in registers meanwhile.
        first_depth = tl.arange(0, HELD1).to(tl.int64)
        rest_depth = first_depth
        right_values = held_tile(right, first_depth, right_columns, columns_mask, right_depth, DEPTH)
        right_rest = right_values
        if HELD2 > 0:
            rest_depth = HELD1 + tl.arange(0, HELD2).to(tl.int64)
            right_rest = held_tile(right, rest_depth, right_columns, columns_mask, right_depth, DEPTH)
        wait(WAIT)
        left_mask = rows_mask[:, None] & (first_depth[None, :] < DEPTH)
        left_values = tl.load(left_rows + first_depth[None, :] * left_depth, mask=left_mask, other=0.0)
        left_rest = left_values
        if HELD2 > 0:
            left_mask = rows_mask[:, None] & (rest_depth[None, :] < DEPTH)
            left_rest = tl.load(left_rows + rest_depth[None, :] * left_depth, mask=left_mask, other=0.0)
        total = tl.dot(left_values, right_values, input_precision="ieee")
        if HELD2 > 0:
            total = add_product(total, left_rest, right_rest)
    else:
        if PREFETCH:
            prefetch_tile(right, first_column, right_depth, right_column, DEPTH, COLUMNS, BC, BD, LINE, ALONG_DEPTH)
        wait(WAIT)
        left_tile = left_rows + depth[None, :] * left_depth  # [BN, BD]
        right_tile = right + depth[:, None] * right_depth + right_columns[None, :]  # [BD, BC]
        left_step = tl.full((), BD, tl.int64) * left_depth
        right_step = tl.full((), BD, tl.int64) * right_depth
        total = tl.zeros((BN, BC), dtype=tl.float32)
        for step in range(0, DEPTH, BD):
            # Both operands are zero past the end of the sum, so what lies in memory there never enters it.
            if DEPTH % BD == 0:
                left_mask = rows_mask[:, None]
            else:
                left_mask = rows_mask[:, None] & (step + depth[None, :] < DEPTH)
            if DEPTH % BD == 0 and COLUMNS % BC == 0:
                right_values = tl.load(right_tile)
            else:
                right_mask = (step + depth[:, None] < DEPTH) & columns_mask[None, :]
                right_values = tl.load(right_tile, mask=right_mask, other=0.0)
            left_values = tl.load(left_tile, mask=left_mask, other=0.0)
            total = add_product(total, left_values, right_values)
            left_tile += left_step
            right_tile += right_step

    store_tile(
        total, out, bias, multiply, residual, batch, rows, rows_mask, columns, columns_mask,
        out_batch, out_row, out_group, out_column, bias_batch, bias_column, COLUMN_GROUP, ACTIVATION,
    )  # fmt: skip


def product(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    epilogue: Epilogue = NOTHING,
    size: Tiles | None = None,
    *,
    signal: bool = False,
    wait: bool = False,
) -> Launch:
    """Describe the launch that fills `out`, for views shaped as in the module's docstring.

    Args:
      left: [b, n, depth], or [b1, b2, n, depth] of b = b1 b2 batches.
      right: [b, depth, columns], or [b, depth, column groups, columns of a group].
      out: [b, n, column groups, columns of a group].
      bias: [b, columns] or None.
      epilogue: what follows; its operands lie in memory as `out` does.
      size: the tiles; None: by fixed rules.
      signal: lets the next launch start early.
      wait: starts early itself, and waits before it reads `left`.
    """
    tokens, depth = left.shape[-2:]
    right = grouped(right)
    size = size or tiles(tokens, out.shape[2] * out.shape[3], depth, left.element_size(), INTERPRETED)
    if out.dtype == torch.float32:
        size = size._replace(depth=min(size.depth, FLOAT32_DEPTH))
    arguments, constants, programs = parameters(left, right, out, bias, epilogue, size, signal=signal, wait=wait)
    arguments |= strides("left", ("outer", "batch", "row", "depth"), left if left.ndim == 4 else left[None])
    constants |= dict(zip(("HELD1", "HELD2"), halves(depth) if size.held else (0, 0), strict=True))
    return Launch(product_kernel, programs, arguments, constants, size.warps, size.stages, early=wait)


def parameters(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    bias: Tensor | None,
    epilogue: Epilogue,
    size: Any,
    *,
    signal: bool,
    wait: bool,
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Return the arguments and constants that this kernel shares with the streaming one, and the programs.

    Args:
      left: [..., n, depth]; its strides are left to the caller.
      right: [b, depth, column groups, columns of a group].
      out: as in `product`.
      bias: as in `product`.
      epilogue: as in `product`.
      size: tiles of either kernel.
      signal: as in `product`.
      wait: as in `product`.
    """
    tokens, depth = left.shape[-2:]
    batches, columns = right.shape[0], right.shape[2] * right.shape[3]
    arguments = {"left": left, "right": right, "out": out, "bias": bias}
    arguments |= {"multiply": epilogue.multiply, "residual": epilogue.residual, "tokens": tokens, "batches": batches}
    arguments |= strides("right", ("batch", "depth", "group", "column"), right)
    arguments |= strides("out", ("batch", "row", "group", "column"), out)
    no_bias = {"bias_batch": 0, "bias_column": 0}
    arguments |= no_bias if bias is None else strides("bias", ("batch", "column"), bias)
    along_depth = right.stride(1) == 1
    inner = left.shape[-3] if left.shape[-3] < batches else 0
    constants = {"INNER": inner, "DEPTH": depth, "COLUMNS": columns, "COLUMN_GROUP": out.shape[3]}
    constants |= {"RIGHT_GROUP": right.shape[3], "BN": size.rows, "BC": size.columns, "BD": size.depth}
    constants |= {"ACTIVATION": epilogue.activation, "SIGNAL": signal, "WAIT": wait, "ALONG_DEPTH": along_depth}
    constants["PREFETCH"] = wait and size.prefetch and right.shape[2] == 1 and (along_depth or right.stride(3) == 1)
    constants["LINE"] = min(size.depth if along_depth else size.columns, LINE_BYTES // right.element_size())
    return arguments, constants, batches * ceil_div(tokens, size.rows) * ceil_div(columns, size.columns)


def grouped(right: Tensor) -> Tensor:
    """View a right side as [b, depth, column groups, columns of a group], with one group where that is possible."""
    if right.ndim == 3:
        return right[:, :, None]
    groups, width = right.shape[2:]
    if groups == 1 or right.stride(2) == width * right.stride(3):
        return right.flatten(2)[:, :, None]
    return right


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


def halves(depth: int) -> tuple[int, int]:
    """Cover a depth with one power of two or two, of at least 16, with the least padding.

    >>> halves(192), halves(128), halves(96), halves(5), halves(93)
    ((128, 64), (128, 0), (64, 32), (16, 0), (64, 32))
    """
    whole = max(16, power_of_two(depth))
    half, rest = whole // 2, max(16, power_of_two(depth - whole // 2))
    return (half, rest) if half >= 16 and half + rest < whole else (whole, 0)


def ceil_div(size: int, tile: int) -> int:
    """Count the tiles that cover `size`."""
    return -(-size // tile)


def power_of_two(size: int) -> int:
    """Return the least power of two that is at least `size`."""
    return 1 << max(0, size - 1).bit_length()


def _fit(size: int, limit: int) -> int:
    return min(limit, max(16, power_of_two(size)))


def candidates(tokens: int, columns: int, depth: int, itemsize: int) -> list[Tiles]:
    """List the tile sizes that are worth a measurement: those that were among the best for some layer on an H100."""
    rows = sorted({min(size, max(16, power_of_two(tokens))) for size in (32, 64, 128)})
    widths = sorted({min(size, max(16, power_of_two(columns))) for size in (32, 64, 128, 256)})
    deepest = max(16, power_of_two(depth))
    steps = sorted({min(size, deepest) for size in ((64, 128) if itemsize == 2 else (16, FLOAT32_DEPTH))})
    found = []
    for height, width, step in itertools.product(rows, widths, steps):
        for stages in sorted({min(each, ceil_div(depth, step) + 1) for each in (3, 4)}):
            shared = stages * step * (height + width) * itemsize
            if shared <= 160 * 1024 and 2**9 <= height * width <= 2**15:
                found += [Tiles(height, width, step, warps, stages) for warps in _warps(height * width)]
    if depth <= MOST_HELD and itemsize == 2:
        found += [
            Tiles(height, width, 16, warps, 1, held=True)
            for height, width in itertools.product(rows, widths)
            for warps in _warps(height * width)
            if sum(halves(depth)) * width * itemsize // (32 * warps) <= HELD_BYTES
            and sum(halves(depth)) * (height + width) * itemsize <= 160 * 1024
        ]
    return found


def _warps(numbers: int) -> list[int]:
    """Return the numbers of warps that a tile of the result suits: up to 128 of its numbers in a thread."""
    if numbers <= 2**12:
        return [4]
    return [4, 8] if numbers <= 2**14 else [8]
