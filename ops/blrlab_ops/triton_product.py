"""The batched matrix product that the Triton implementations share, for many tokens.

out[b] = f(left[b] @ right[b] + bias[b]) for every batch b, accumulated in float32, where f is an epilogue. Operands are
strided views, so that cutting x into blocks and permuting an intermediate happen in the addresses, never in memory:
- left   [b, n, depth];
- right  [b, depth, columns], or with columns in groups, such as (k, r') of a Monarch V;
- out    [b, n, column groups, columns of a group], such as (k, r') of Monarch's intermediate;
- bias   [b, columns] or None.

A program computes one tile [BN, BC]. Neighbours share rows of `left`. Traffic at the L2, b tiles of every batch:
left is read columns / BC times, right n / BN times, out written once. Tile bases are 64-bit, offsets inside a tile
32-bit. float32 is multiplied as IEEE float32, never as tf32.
"""

import itertools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .epilogue import NOTHING, Epilogue
from .launching import Launch
from .triton_parts import INTERPRETED, begin, finish, prefetch, wait

LINE_BYTES = 128  # of a cache
MOST_HELD, HELD_BYTES = 512, 256  # of depth, and of the right side in a thread's registers


class Tiles(NamedTuple):
    """What one program of a product computes.

    Attributes:
      rows: of the result, tokens.
      columns: of the result.
      depth: of the sum, at a time.
      warps: of 32 threads.
      stages: loads in flight, in steps of depth.
      prefetch: in a launch that overlaps the one before, asks for the right side before it waits.
      held: takes all of the depth at once, the right side before it waits; for depths that registers hold. `depth` and
        `stages` count for nothing then.
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
    HELD1: tl.constexpr,
    HELD2: tl.constexpr,
):
    """Compute one [BN, BC] tile of one batch."""
    begin(SIGNAL)
    program = tl.program_id(0)
    column_tiles: tl.constexpr = (COLUMNS + BC - 1) // BC
    batch = ((program // column_tiles) % batches).to(tl.int64)
    first_row = (program // column_tiles // batches) * BN
    local_rows = tl.arange(0, BN)
    rows_mask = first_row + local_rows < tokens
    columns = (program % column_tiles) * BC + tl.arange(0, BC)
    columns_mask = columns < COLUMNS
    depth = tl.arange(0, BD)

    left_tile = left + batch * left_batch + first_row.to(tl.int64) * left_row
    left_tile = left_tile + local_rows[:, None] * left_row + depth[None, :] * left_depth  # [BN, BD]
    right_base = right + batch * right_batch
    right_columns = columns // RIGHT_GROUP * right_group + columns % RIGHT_GROUP * right_column
    right_tile = right_base + depth[:, None] * right_depth + right_columns[None, :]  # [BD, BC]
    if HELD1 > 0:
        # All of the weights' tile is asked for before the wait, and held in registers meanwhile.
        first_depth, rest_depth = tl.arange(0, HELD1), tl.arange(0, HELD1)
        right_values = held_tile(right_base, first_depth, right_columns, columns_mask, right_depth, DEPTH)
        right_rest = right_values
        if HELD2 > 0:
            rest_depth = HELD1 + tl.arange(0, HELD2)
            right_rest = held_tile(right_base, rest_depth, right_columns, columns_mask, right_depth, DEPTH)
        wait(WAIT)
        left_rows = left + batch * left_batch + first_row.to(tl.int64) * left_row + local_rows[:, None] * left_row
        left_mask = rows_mask[:, None] & (first_depth[None, :] < DEPTH)
        left_values = tl.load(left_rows + first_depth[None, :] * left_depth, mask=left_mask, other=0.0)
        left_rest = left_values
        if HELD2 > 0:
            left_mask = rows_mask[:, None] & (rest_depth[None, :] < DEPTH)
            left_rest = tl.load(left_rows + rest_depth[None, :] * left_depth, mask=left_mask, other=0.0)
        total = tl.dot(left_values, right_values, input_precision="ieee")
        if HELD2 > 0:
            total = tl.dot(left_rest, right_rest, total, input_precision="ieee")
    else:
        if PREFETCH:
            lines = (program % column_tiles) * BC + tl.arange(0, BC // LINE) * LINE
            for step in range(0, DEPTH, BD):
                row = tl.minimum(step + depth, DEPTH - 1)
                prefetch(right_base + row[:, None] * right_depth + tl.minimum(lines, COLUMNS - 1)[None, :])
        wait(WAIT)
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
            total = tl.dot(left_values, right_values, total, input_precision="ieee")
            left_tile += BD * left_depth
            right_tile += BD * right_depth

    groups = columns // COLUMN_GROUP
    offsets = batch * out_batch + first_row.to(tl.int64) * out_row + (groups.to(tl.int64) * out_group)[None, :]
    offsets += local_rows[:, None] * out_row + ((columns % COLUMN_GROUP) * out_column)[None, :]
    mask = rows_mask[:, None] & columns_mask[None, :]
    bias_offsets = batch * bias_batch + columns * bias_column
    total = finish(total, bias, multiply, residual, offsets, mask, bias_offsets, columns_mask, ACTIVATION)
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=mask)


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
      left: [b, n, depth].
      right: [b, depth, columns], or [b, depth, column groups, columns of a group].
      out: [b, n, column groups, columns of a group].
      bias: [b, columns] or None.
      epilogue: what follows; its operands lie in memory as `out` does.
      size: the tiles; None: by fixed rules.
      signal: lets the next launch start early.
      wait: starts early itself, and waits before it reads `left`.
    """
    batches, tokens, depth = left.shape
    right = grouped(right)
    columns = right.shape[2] * right.shape[3]
    size = size or tiles(tokens, columns, depth, left.element_size(), INTERPRETED)
    arguments = {"left": left, "right": right, "out": out, "bias": bias}
    arguments |= {"multiply": epilogue.multiply, "residual": epilogue.residual, "tokens": tokens, "batches": batches}
    arguments |= strides("left", ("batch", "row", "depth"), left)
    arguments |= strides("right", ("batch", "depth", "group", "column"), right)
    arguments |= strides("out", ("batch", "row", "group", "column"), out)
    no_bias = {"bias_batch": 0, "bias_column": 0}
    arguments |= no_bias if bias is None else strides("bias", ("batch", "column"), bias)
    constants = {"DEPTH": depth, "COLUMNS": columns, "COLUMN_GROUP": out.shape[3]}
    constants["RIGHT_GROUP"] = right.shape[3]
    constants |= {"BN": size.rows, "BC": size.columns, "BD": size.depth, "ACTIVATION": epilogue.activation}
    constants |= {
        "SIGNAL": signal,
        "WAIT": wait,
        "PREFETCH": wait and size.prefetch and right.shape[2] == 1 == right.stride(3),
    }
    constants |= dict(zip(("HELD1", "HELD2"), halves(depth) if size.held else (0, 0), strict=True))
    constants["LINE"] = min(size.columns, LINE_BYTES // left.element_size())
    programs = batches * ceil_div(tokens, size.rows) * ceil_div(columns, size.columns)
    return Launch(product_kernel, programs, arguments, constants, size.warps, size.stages, early=wait)


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
    """List the tile sizes that are worth a measurement."""
    rows = [size for size in (16, 32, 64, 128) if size <= max(16, power_of_two(tokens))]
    widths = [size for size in (16, 32, 64, 128, 256) if size <= max(16, power_of_two(columns))]
    steps = [size for size in (32, 64, 128, 256) if size <= max(32, power_of_two(depth))]
    found = []
    for height, width, step, stages in itertools.product(rows, widths, steps, (1, 2, 3, 4)):
        shared = stages * step * (height + width) * itemsize
        if shared > 160 * 1024 or height * width > 2**15 or (stages - 1) * step >= 2 * depth:
            continue
        for warps in (4, 8):
            if 8 <= height * width // (32 * warps) <= 128:
                found.append(Tiles(height, width, step, warps, stages))
    if depth <= MOST_HELD:
        found += [
            Tiles(height, width, 16, warps, 1, held=True)
            for height, width, warps in itertools.product(rows, widths, (4, 8))
            if 8 <= height * width // (32 * warps) <= 128
            and sum(halves(depth)) * width * itemsize // (32 * warps) <= HELD_BYTES
            and sum(halves(depth)) * (height + width) * itemsize <= 160 * 1024
        ]
    return found
