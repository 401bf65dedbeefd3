"""Monarch layer on Hopper in one launch: both products of a tile chained in registers, nothing between in memory.

Shapes: x [..., b1 p], V [b1, b2, p, r'], U [b1, b2, r', q], bias [b2 q].

A program owns 128 tokens and up to 256 columns of one output block k, of which two warpgroups take 64 tokens each. For
every input block l they sum T = x[l] V[l,k] over chunks of p, round it to the dtype of x and add T U[l,k]; one warp
loads ahead of both with TMA, into rings of tiles in shared memory. A rank over `ranks` is cut in parts, for each of
which x is read again. The first product is made again for every tile of columns, so it is the choice where q is at most
256 and r' (nearly) a power of two; elsewhere an intermediate in memory costs less.

Each of the two warpgroups waits for every product: with one in flight while the registers of its operand are written
again, the compiler would wait after every one. The tensor cores turn to the other warpgroup meanwhile.
"""

# Kernels are Gluon, which reads as Python of other types.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false

import itertools
from typing import NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from blrlab_ops import configs
from blrlab_ops.configs import Config
from blrlab_ops.custom_ops import operator
from blrlab_ops.epilogue import NOTHING, Epilogue
from blrlab_ops.hopper_parts import (
    BARRIER_BYTES,
    SHARED_BYTES,
    aligned,
    async_load,
    barriers,
    descriptor,
    finish,
    multiprocessors,
    side,
)
from blrlab_ops.launching import Launch
from blrlab_ops.triton_product import ceil_div

from .layout import pack
from .torch_bmm import gradients
from .triton_two_stage import tuned

__all__ = ["launches", "linear", "pack"]

ROWS = 128  # tokens of a program, half of them a warpgroup's
GROUP = gl.constexpr(8)  # tiles of so many tokens that all output blocks are taken of before others
MOST_COLUMNS, MOST_RANKS, MOST_DEPTH = 256, 128, 64
MOST_SUMS = 320  # float32 of a token, that a warpgroup of 128 threads and 64 tokens has registers for


class Tiles(NamedTuple):
    """What a program holds: columns of the result, ranks and depth of the first product, and how many tiles ahead.

    Attributes:
      columns: of the result.
      ranks: of a block that are taken at a time.
      depth: of the input at a time.
      slots: tiles of x and V that wait in shared memory.
      U_slots: tiles of U.
    """

    columns: int
    ranks: int
    depth: int
    slots: int
    U_slots: int

    def shared_bytes(self) -> int:
        """Return the bytes of shared memory that a program takes, of 16-bit numbers."""
        of_x_and_V = self.slots * (ROWS + self.ranks) * self.depth
        return 2 * (of_x_and_V + self.U_slots * self.columns * self.ranks) + BARRIER_BYTES

    def runs(self) -> bool:
        """Say whether a program fits; a tile is given back only after the next was taken, so two must."""
        return min(self.slots, self.U_slots) >= 2 and self.shared_bytes() <= SHARED_BYTES


@gluon.jit
def tile_at(number, row_tiles, column_tiles, B2: gl.constexpr):
    """Return output block, tile of columns and tile of rows.

    Rows go fastest, so that programs share weights, but a group of them at a time, whose x then stays in the L2 while
    all output blocks read it.
    """
    in_group = GROUP * B2 * column_tiles
    first = number // in_group * GROUP
    rows, inside = gl.minimum(GROUP, row_tiles - first), number % in_group
    rest = inside // rows
    return rest // column_tiles, rest % column_tiles, first + inside % rows


@gluon.jit
def load_tiles(
    x, V, U, x_low, x_high, V_ring, U_ring, full, empty, U_full, U_empty, tiles, row_tiles, column_tiles,
    B1: gl.constexpr, B2: gl.constexpr, CHUNKS: gl.constexpr, PARTS: gl.constexpr, SLOTS: gl.constexpr,
    U_SLOTS: gl.constexpr,
):  # fmt: skip
    """Fill the rings: x and V chunk by chunk, U once for every input block and part of its rank."""
    HALF: gl.constexpr = x.block_shape[0]
    BD: gl.constexpr = x.block_shape[2]
    R: gl.constexpr = V.block_shape[2]
    BC: gl.constexpr = U.block_shape[1]
    step = 0
    link = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        block, columns, rows = tile_at(tile, row_tiles, column_tiles, B2)
        row = rows * (2 * HALF)
        for source in range(B1):
            for part in range(PARTS):
                for chunk in range(CHUNKS):
                    slot = step % SLOTS
                    ready = full.index(slot)
                    mbarrier.wait(empty.index(slot), (step // SLOTS & 1) ^ 1)
                    mbarrier.expect(ready, 2 * x.block_type.nbytes + V.block_type.nbytes)
                    async_load(V, [source, block, part * R, chunk * BD], ready, V_ring.index(slot))
                    async_load(x, [row, source, chunk * BD], ready, x_low.index(slot))
                    async_load(x, [row + HALF, source, chunk * BD], ready, x_high.index(slot))
                    step += 1
                slot_U = link % U_SLOTS
                mbarrier.wait(U_empty.index(slot_U), (link // U_SLOTS & 1) ^ 1)
                mbarrier.expect(U_full.index(slot_U), U.block_type.nbytes)
                async_load(U, [block, columns * BC, source, part * R], U_full.index(slot_U), U_ring.index(slot_U))
                link += 1


@gluon.jit
def chain(
    y, bias, multiply, residual, x_ring, V_ring, U_ring, full, empty, U_full, U_empty, tokens, tiles, row_tiles,
    column_tiles, B1: gl.constexpr, CHUNKS: gl.constexpr, PARTS: gl.constexpr, SLOTS: gl.constexpr,
    U_SLOTS: gl.constexpr, B2: gl.constexpr, Q: gl.constexpr, ACTIVATION: gl.constexpr, SECOND: gl.constexpr,
):  # fmt: skip
    """Compute the results of one warpgroup's tokens."""
    HALF: gl.constexpr = x_ring.shape[1]
    R: gl.constexpr = V_ring.shape[3]
    BD: gl.constexpr = V_ring.shape[4]
    BC: gl.constexpr = U_ring.shape[2]
    inner: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, R, 16])
    outer: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BC, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, outer, 2)
    step = 0
    link = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        block, columns, rows = tile_at(tile, row_tiles, column_tiles, B2)
        total = gl.zeros([HALF, BC], gl.float32, outer)
        for _ in range(B1 * PARTS):
            T = gl.zeros([HALF, R], gl.float32, inner)
            for chunk in range(CHUNKS):
                slot = step % SLOTS
                mbarrier.wait(full.index(slot), step // SLOTS & 1)
                left = x_ring.index(slot).reshape([HALF, BD])
                right = V_ring.index(slot).reshape([R, BD]).permute([1, 0])
                flying = warpgroup_mma(left, right, T, is_async=True, use_acc=chunk > 0)
                T = warpgroup_mma_wait(1, deps=(flying,))
                if chunk > 0:  # the product before this one is done with its tiles
                    mbarrier.arrive(empty.index((step - 1) % SLOTS))
                step += 1
            T = warpgroup_mma_wait(0, deps=(T,))
            mbarrier.arrive(empty.index((step - 1) % SLOTS))
            left = gl.convert_layout(T.to(y.dtype.element_ty), operand)
            slot_U = link % U_SLOTS
            mbarrier.wait(U_full.index(slot_U), link // U_SLOTS & 1)
            right = U_ring.index(slot_U).reshape([BC, R]).permute([1, 0])
            flying = warpgroup_mma(left, right, total, is_async=True)
            total = warpgroup_mma_wait(0, deps=(flying,))
            mbarrier.arrive(U_empty.index(slot_U))
            link += 1
        row = rows * (2 * HALF) + SECOND * HALF + gl.arange(0, HALF, gl.SliceLayout(1, outer))
        column = columns * BC + gl.arange(0, BC, gl.SliceLayout(0, outer))
        offsets = row.to(gl.int64)[:, None] * (B2 * Q) + (block * Q + column)[None, :]
        mask = (row < tokens)[:, None] & (column < Q)[None, :]
        total = finish(total, bias, multiply, residual, offsets, mask, block * Q + column, column < Q, ACTIVATION)
        gl.store(y + offsets, total.to(y.dtype.element_ty), mask=mask)


@gluon.jit
def hopper_chain_kernel(
    x, V, U, y, bias, multiply, residual, tokens, tiles, row_tiles, column_tiles, B1: gl.constexpr, B2: gl.constexpr,
    Q: gl.constexpr, CHUNKS: gl.constexpr, PARTS: gl.constexpr, SLOTS: gl.constexpr, U_SLOTS: gl.constexpr,
    ACTIVATION: gl.constexpr,
):  # fmt: skip
    """Compute y [n, b2 q], contiguous, tile by tile of x [n, b1, p], V [b1, b2, r', p] and U [b2, q, b1, r']."""
    x_low = gl.allocate_shared_memory(x.dtype, [SLOTS] + x.block_shape, x.layout)  # noqa: RUF005
    x_high = gl.allocate_shared_memory(x.dtype, [SLOTS] + x.block_shape, x.layout)  # noqa: RUF005
    V_ring = gl.allocate_shared_memory(V.dtype, [SLOTS] + V.block_shape, V.layout)  # noqa: RUF005
    U_ring = gl.allocate_shared_memory(U.dtype, [U_SLOTS] + U.block_shape, U.layout)  # noqa: RUF005
    full = barriers(SLOTS, 1)
    empty = barriers(SLOTS, 2)
    U_full = barriers(U_SLOTS, 1)
    U_empty = barriers(U_SLOTS, 2)
    gl.warp_specialize(
        [
            (chain, (y, bias, multiply, residual, x_low, V_ring, U_ring, full, empty, U_full, U_empty, tokens, tiles,
                     row_tiles, column_tiles, B1, CHUNKS, PARTS, SLOTS, U_SLOTS, B2, Q, ACTIVATION, 0)),
            (chain, (y, bias, multiply, residual, x_high, V_ring, U_ring, full, empty, U_full, U_empty, tokens, tiles,
                     row_tiles, column_tiles, B1, CHUNKS, PARTS, SLOTS, U_SLOTS, B2, Q, ACTIVATION, 1)),
            (load_tiles, (x, V, U, x_low, x_high, V_ring, U_ring, full, empty, U_full, U_empty, tiles, row_tiles,
                          column_tiles, B1, B2, CHUNKS, PARTS, SLOTS, U_SLOTS)),
        ],
        [4, 1],
        [232, 24],
    )  # fmt: skip


def launches(
    x: Tensor,
    V: Tensor,
    U: Tensor,
    bias: Tensor | None,
    y: Tensor,
    epilogue: Epilogue = NOTHING,
    config: Config | None = None,
) -> list[Launch]:
    """Describe the launch that fills y [n, o] from x [n, i]; operands that TMA cannot address are copied."""
    b1, b2, p, rank = V.shape
    tokens, q = x.shape[0], U.shape[3]
    if not tokens:
        return []
    found = tuned("hopper_chained", x, V, U) if config is None else config
    size = configs.size(found, "only", Tiles) or tiles(p, q, rank)
    arguments = {
        "x": descriptor(aligned(x.unflatten(1, (b1, p))), [ROWS // 2, 1, size.depth]),
        "V": descriptor(aligned(V.transpose(2, 3)), [1, 1, size.ranks, size.depth]),
        "U": descriptor(aligned(U.permute(1, 3, 0, 2)), [1, size.columns, 1, size.ranks]),
        **{"y": y, "bias": None if bias is None else bias.contiguous()},
        **{"multiply": epilogue.multiply, "residual": epilogue.residual},
    }
    row_tiles, column_tiles = ceil_div(tokens, ROWS), ceil_div(q, size.columns)
    count = b2 * row_tiles * column_tiles
    arguments |= {"tokens": tokens, "tiles": count, "row_tiles": row_tiles, "column_tiles": column_tiles}
    constants = {"B1": b1, "B2": b2, "Q": q, "CHUNKS": ceil_div(p, size.depth), "PARTS": ceil_div(rank, size.ranks)}
    constants |= {"SLOTS": size.slots, "U_SLOTS": size.U_slots, "ACTIVATION": epilogue.activation}
    return [Launch(hopper_chain_kernel, min(count, multiprocessors(x.device)), arguments, constants, 4, 1)]


def tiles(p: int, q: int, rank: int) -> Tiles:
    """Choose the tile sizes by fixed rules: the least padding, then as wide as q and r' are."""
    return _candidates(p, q, rank)[0]


def candidates(x: Tensor, V: Tensor, U: Tensor) -> dict[str, list[Tiles]]:
    """List the tiles worth a measurement, by launch."""
    return {"only": _candidates(V.shape[2], U.shape[3], V.shape[3])}


def _candidates(p: int, q: int, rank: int) -> list[Tiles]:
    widths = [size for size in (64, 128, MOST_COLUMNS) if size <= max(64, side(q, MOST_COLUMNS))]
    parts = [size for size in (16, 32, 64, MOST_RANKS) if size <= side(rank, MOST_RANKS)]
    depths = [size for size in (16, 32, MOST_DEPTH) if size <= side(p, MOST_DEPTH)]
    found = {}
    for columns, ranks, depth, U_slots in itertools.product(widths, parts, depths, (2, 3)):
        each = _ringed(columns, ranks, depth, U_slots)
        if columns + ranks <= MOST_SUMS and each.runs():
            found[each] = _padded(each, p, q, rank)
    return sorted(found, key=lambda each: (found[each], -each.columns, -each.depth, each.U_slots))


def _ringed(columns: int, ranks: int, depth: int, U_slots: int) -> Tiles:
    """Return tiles with as many of x and V ahead as fit, up to 8."""
    alone = Tiles(columns, ranks, depth, 0, U_slots)
    of_one = alone._replace(slots=1).shared_bytes() - alone.shared_bytes()
    return alone._replace(slots=min(8, (SHARED_BYTES - alone.shared_bytes()) // of_one))


def _padded(size: Tiles, p: int, q: int, rank: int) -> int:
    """Return the products of one token and pair of blocks that whole tiles take; reading x again counts as half."""
    parts, column_tiles = ceil_div(rank, size.ranks), ceil_div(q, size.columns)
    deep = ceil_div(p, size.depth) * size.depth
    first = column_tiles * parts * deep * (size.ranks + ROWS // 2)
    return first + column_tiles * size.columns * parts * size.ranks


linear = operator("monarch", "hopper_chained", "VU", lambda V, U: V.shape[1] * U.shape[3], launches, gradients)
