"""Monarch layer on Hopper in one launch of two stages, interleaved so that what lies between them stays in the L2.

Shapes: x [..., b1 p], V [b1, b2, p, r'], U [b1, b2, r', q], bias [b2 q].

Tokens are cut in chunks. Programs, one on every multiprocessor, take tiles in turn: of the first stage of a chunk, T
[b2, n, b1, r'] from x[l] V[l], then of the second stage of the chunk before it, y[k] from T[k] U[k]. A tile of the
second stage waits for a count of its chunk's first ones, which by then were started a chunk ago. So T is read soon
after it was written, and no launch ends or begins between the stages. Three chunks of T take turns in the same memory,
so that it is never written out of the L2: the first stage of a chunk waits for the second of the third before it.
Compared with `hopper_chained` nothing is computed twice, whatever q is, and a tile may hold a few ranks of many blocks,
so that no rank is padded.

Two counts a chunk are the protocol: of first-stage tiles whose T can be read, and of second-stage tiles that have read
it; each counts a tile twice, once a warpgroup. In the order of tiles, F0 F1 S0 F2 S1 F3 S2 ..., every wait is for
tiles before one's own, and what a warpgroup has stored is counted before it waits for another tile's T, so nobody waits
for himself.

A program's tile is 128 rows by BC columns of one product, A [128, depth] B [depth, BC]: one warp loads both with TMA
ahead of two warpgroups, 64 rows each, which store with TMA. T is rounded to the dtype of x; its ranks are rounded up to
8, of zeros. All programs must run at once, which a cooperative launch makes sure of.
"""

# Kernels are Gluon, which reads as Python of other types.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false

import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from blrlab_ops import configs
from blrlab_ops.configs import Config
from blrlab_ops.custom_ops import operator
from blrlab_ops.epilogue import NOTHING, Epilogue
from blrlab_ops.hopper_parts import (
    BARRIER_BYTES,
    SHARED_BYTES,
    aligned,
    async_load,
    async_store,
    barriers,
    clear_kernel,
    count_up,
    descriptor,
    finish,
    is_aligned,
    lanes,
    load_once,
    multiprocessors,
    round_up,
    seen_as,
    side,
    store_once,
    wait_for_count,
    wait_for_stores,
)
from blrlab_ops.launching import Launch
from blrlab_ops.triton_product import ceil_div, power_of_two

from .layout import pack
from .torch_bmm import gradients
from .triton_two_stage import first_factor, second_factor, tuned

__all__ = ["launches", "linear", "pack"]

ROWS = 128  # tokens of a tile, half of them a warpgroup's
MOST_COLUMNS, MOST_DEPTH = 256, 64
RING = gl.constexpr(3)  # chunks of T
CHUNK_BYTES = 8 * 2**20  # of T, so that all of it and what goes by stay in an L2 of 50 MB


class Tiles(NamedTuple):
    """How the layer is cut.

    Attributes:
      columns: of a tile.
      ranks: of each block in a tile of the first stage, which holds `columns / ranks` blocks.
      depth: of a tile of either stage.
      slots: tiles of A that wait in shared memory.
      B_slots: tiles of B.
      rows: tiles of tokens in a chunk, at most.
    """

    columns: int
    ranks: int
    depth: int
    slots: int
    B_slots: int
    rows: int

    def shared_bytes(self) -> int:
        """Return the bytes of shared memory that a program takes, of 16-bit numbers."""
        rings = self.depth * (self.slots * ROWS + self.B_slots * self.columns)
        return 2 * (rings + ROWS * self.columns) + BARRIER_BYTES

    def runs(self) -> bool:
        """Say whether a program fits; a tile is given back only after the next was taken, so two must."""
        return min(self.slots, self.B_slots) >= 2 and self.shared_bytes() <= SHARED_BYTES


@gluon.jit
def tile_at(number, firsts, seconds, chunks):
    """Return of a tile whether it is of the second stage, its chunk, and its number there.

    In order: the first stage of chunk 0, then for every chunk the first stage of the next and its own second, as F0 F1
    S0 F2 S1 S2 of three chunks, each of `firsts` or `seconds` tiles.
    """
    later = number - firsts
    chunk = gl.minimum(gl.maximum(later, 0) // (firsts + seconds), chunks - 1)
    inside = later - chunk * (firsts + seconds)
    ahead = gl.where(chunk == chunks - 1, 0, firsts)  # tiles of the next chunk's first stage
    second = inside >= ahead  # never of a number below `firsts`, which is less than 0 inside
    unit = gl.where(second, inside - ahead, gl.where(later < 0, number, inside))
    return second, gl.where(second | (later < 0), chunk, chunk + 1), unit


@gluon.jit
def rows_at(chunk, unit, row_tiles, RING: gl.constexpr, ROWS: gl.constexpr):
    """Return a tile's first row, that row's place in T, which holds RING chunks, and what is left of its number."""
    row = (chunk * row_tiles + unit % row_tiles) * ROWS
    return row, row - chunk // RING * (RING * row_tiles * ROWS), unit // row_tiles


@gluon.jit
def load_tiles(
    x, V, T, U, flags, low, high, B_ring, A_full, A_empty, B_full, B_empty, firsts, seconds, chunks, row_tiles,
    BLOCK_TILES: gl.constexpr, FIRST_COLUMNS: gl.constexpr, SECOND_COLUMNS: gl.constexpr,
    FIRST_STEPS: gl.constexpr, SECOND_STEPS: gl.constexpr, SLOTS: gl.constexpr, B_SLOTS: gl.constexpr,
):  # fmt: skip
    """Fill the rings: both halves of A for a warpgroup each, B for both."""
    HALF: gl.constexpr = x.block_shape[1]
    BD: gl.constexpr = x.block_shape[2]
    KB: gl.constexpr = V.block_shape[1]
    RB: gl.constexpr = V.block_shape[2]
    BC: gl.constexpr = KB * RB
    at = 0
    for number in range(gl.program_id(0), chunks * (firsts + seconds), gl.num_programs(0)):
        second, chunk, unit = tile_at(number, firsts, seconds, chunks)
        row, kept, rest = rows_at(chunk, unit, row_tiles, RING, 2 * HALF)
        if second:
            batch = rest // SECOND_COLUMNS
            column = rest % SECOND_COLUMNS * BC
            for step in range(SECOND_STEPS):
                slot_B = at % B_SLOTS
                mbarrier.wait(B_empty.index(slot_B), (at // B_SLOTS & 1) ^ 1)
                mbarrier.expect(B_full.index(slot_B), U.block_type.nbytes)
                into = B_ring.index(slot_B).reshape([1, 1, BC, BD])
                load_once(U, [batch, 0, column, step * BD], B_full.index(slot_B), into)
                if step == 0:  # the weights need not wait
                    wait_for_count(flags + chunk, 2 * firsts)
                slot = at % SLOTS
                mbarrier.wait(A_empty.index(slot), (at // SLOTS & 1) ^ 1)
                mbarrier.expect(A_full.index(slot), 2 * x.block_type.nbytes)
                async_load(T, [batch, kept, step * BD], A_full.index(slot), low.index(slot))
                async_load(T, [batch, kept + HALF, step * BD], A_full.index(slot), high.index(slot))
                at += 1
        else:
            batch = rest // FIRST_COLUMNS
            place = rest % FIRST_COLUMNS
            for step in range(FIRST_STEPS):
                slot_B = at % B_SLOTS
                mbarrier.wait(B_empty.index(slot_B), (at // B_SLOTS & 1) ^ 1)
                mbarrier.expect(B_full.index(slot_B), V.block_type.nbytes)
                corner = [batch, place % BLOCK_TILES * KB, place // BLOCK_TILES * RB, step * BD]
                load_once(V, corner, B_full.index(slot_B), B_ring.index(slot_B))
                slot = at % SLOTS
                mbarrier.wait(A_empty.index(slot), (at // SLOTS & 1) ^ 1)
                mbarrier.expect(A_full.index(slot), 2 * x.block_type.nbytes)
                load_once(x, [batch, row, step * BD], A_full.index(slot), low.index(slot))
                load_once(x, [batch, row + HALF, step * BD], A_full.index(slot), high.index(slot))
                at += 1


@gluon.jit
def multiply(
    T, Y, y, bias, multiplier, residual, flags, staging, A_ring, B_ring, A_full, A_empty, B_full, B_empty, tokens,
    firsts, seconds, chunks, row_tiles, BLOCK_TILES: gl.constexpr, FIRST_COLUMNS: gl.constexpr,
    SECOND_COLUMNS: gl.constexpr, FIRST_STEPS: gl.constexpr, SECOND_STEPS: gl.constexpr, SLOTS: gl.constexpr,
    B_SLOTS: gl.constexpr, B2: gl.constexpr, Q: gl.constexpr, ACTIVATION: gl.constexpr, SECOND: gl.constexpr,
):  # fmt: skip
    """Compute one warpgroup's half of every tile."""
    HALF: gl.constexpr = A_ring.shape[2]
    BD: gl.constexpr = A_ring.shape[3]
    KB: gl.constexpr = B_ring.shape[2]
    RB: gl.constexpr = B_ring.shape[3]
    BC: gl.constexpr = KB * RB
    sums: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BC, 16])
    at = 0
    owed = -1  # a chunk whose tile is stored, but not counted yet
    for number in range(gl.program_id(0), chunks * (firsts + seconds), gl.num_programs(0)):
        second, chunk, unit = tile_at(number, firsts, seconds, chunks)
        if second & (owed >= 0):  # somebody may wait for it, perhaps this program
            wait_for_stores()
            count_up(flags + owed)
            owed = -1
        steps = gl.where(second, SECOND_STEPS, FIRST_STEPS)
        total = gl.zeros([HALF, BC], gl.float32, sums)
        for step in range(steps):
            slot = at % SLOTS
            slot_B = at % B_SLOTS
            mbarrier.wait(B_full.index(slot_B), at // B_SLOTS & 1)
            mbarrier.wait(A_full.index(slot), at // SLOTS & 1)
            left = A_ring.index(slot).reshape([HALF, BD])
            right = B_ring.index(slot_B).reshape([BC, BD]).permute([1, 0])
            flying = warpgroup_mma(left, right, total, is_async=True, use_acc=step > 0)
            total = warpgroup_mma_wait(1, deps=(flying,))
            if step > 0:  # the product before this one is done with its tiles
                mbarrier.arrive(A_empty.index((at - 1) % SLOTS))
                mbarrier.arrive(B_empty.index((at - 1) % B_SLOTS))
            at += 1
        total = warpgroup_mma_wait(0, deps=(total,))
        mbarrier.arrive(A_empty.index((at - 1) % SLOTS))
        mbarrier.arrive(B_empty.index((at - 1) % B_SLOTS))
        row, kept, rest = rows_at(chunk, unit, row_tiles, RING, 2 * HALF)
        row += SECOND * HALF
        kept += SECOND * HALF
        if second:
            count_up(flags + (chunks + chunk))  # T has been read
            block = rest // SECOND_COLUMNS
            first = rest % SECOND_COLUMNS * BC
            rows = row + gl.arange(0, HALF, gl.SliceLayout(1, sums))
            columns = first + gl.arange(0, BC, gl.SliceLayout(0, sums))
            offsets = rows.to(gl.int64)[:, None] * (B2 * Q) + (block * Q + columns)[None, :]
            mask = (rows < tokens)[:, None] & (columns < Q)[None, :]
            done = finish(
                total, bias, multiplier, residual, offsets, mask, block * Q + columns, columns < Q, ACTIVATION
            )  # fmt: skip
            if Y is None:
                gl.store(y + offsets, done.to(y.dtype.element_ty), mask=mask)
            else:
                tma.store_wait(0)
                into = seen_as(staging, Y)
                into.store(done.to(Y.dtype).reshape([1, HALF, 1, BC]))
                fence_async_shared()
                store_once(Y, [block, row, 0, first], into)
        else:
            if owed >= 0:
                wait_for_stores()
                count_up(flags + owed)
            tma.store_wait(0)
            parts = total.to(T.dtype).reshape([HALF, KB, RB]).permute([1, 0, 2])
            staging.store(parts.reshape([KB, HALF, 1, RB]))
            fence_async_shared()
            source = rest // FIRST_COLUMNS
            place = rest % FIRST_COLUMNS
            if chunk >= RING:
                wait_for_count(flags + (chunks + chunk - RING), 2 * seconds)
            async_store(T, [place % BLOCK_TILES * KB, kept, source, place // BLOCK_TILES * RB], staging)
            owed = chunk
    if owed >= 0:
        wait_for_stores()
        count_up(flags + owed)
    tma.store_wait(0)


@gluon.jit
def hopper_interleaved_kernel(
    x, V, T_out, T, U, Y, y, bias, multiplier, residual, flags, tokens, firsts, seconds, chunks,
    row_tiles, BLOCK_TILES: gl.constexpr, FIRST_COLUMNS: gl.constexpr, SECOND_COLUMNS: gl.constexpr,
    FIRST_STEPS: gl.constexpr, SECOND_STEPS: gl.constexpr, SLOTS: gl.constexpr, B_SLOTS: gl.constexpr,
    B2: gl.constexpr, Q: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """Compute y [n, b2 q] from x [b1, n, p], V [b1, b2, r', p] and U [b2, 1, q, b1 r'] by way of T.

    T_out is T as the first stage writes it, [b2, m, b1, r'] for m tokens of three chunks, T as the second reads it,
    [b2, m, b1 r'], and Y is y as [b2, n, 1, q], or None where TMA cannot address it.
    """
    low = gl.allocate_shared_memory(x.dtype, [SLOTS] + x.block_shape, x.layout)  # noqa: RUF005
    high = gl.allocate_shared_memory(x.dtype, [SLOTS] + x.block_shape, x.layout)  # noqa: RUF005
    B_ring = gl.allocate_shared_memory(V.dtype, [B_SLOTS] + V.block_shape, V.layout)  # noqa: RUF005
    out_low = gl.allocate_shared_memory(T_out.dtype, T_out.block_shape, T_out.layout)
    out_high = gl.allocate_shared_memory(T_out.dtype, T_out.block_shape, T_out.layout)
    A_full = barriers(SLOTS, 1)
    A_empty = barriers(SLOTS, 2)
    B_full = barriers(B_SLOTS, 1)
    B_empty = barriers(B_SLOTS, 2)
    gl.warp_specialize(
        [
            (multiply, (T_out, Y, y, bias, multiplier, residual, flags, out_low, low, B_ring, A_full, A_empty, B_full,
                        B_empty, tokens, firsts, seconds, chunks, row_tiles, BLOCK_TILES, FIRST_COLUMNS,
                        SECOND_COLUMNS, FIRST_STEPS, SECOND_STEPS, SLOTS, B_SLOTS, B2, Q, ACTIVATION, 0)),
            (multiply, (T_out, Y, y, bias, multiplier, residual, flags, out_high, high, B_ring, A_full, A_empty, B_full,
                        B_empty, tokens, firsts, seconds, chunks, row_tiles, BLOCK_TILES, FIRST_COLUMNS,
                        SECOND_COLUMNS, FIRST_STEPS, SECOND_STEPS, SLOTS, B_SLOTS, B2, Q, ACTIVATION, 1)),
            (load_tiles, (x, V, T, U, flags, low, high, B_ring, A_full, A_empty, B_full, B_empty, firsts, seconds,
                          chunks, row_tiles, BLOCK_TILES, FIRST_COLUMNS, SECOND_COLUMNS, FIRST_STEPS, SECOND_STEPS,
                          SLOTS, B_SLOTS)),
        ],
        [4, 1],
        [232, 40],
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
    """Describe the launches that fill y [n, o] from x [n, i], of which the first sets the counts to zero.

    Operands that TMA cannot address are copied.
    """
    b1, b2, p, rank = V.shape
    tokens, q = x.shape[0], U.shape[3]
    if not tokens:
        return []
    found = tuned("hopper_interleaved", x, V, U) if config is None else config
    size = configs.size(found, "only", Tiles) or _candidates(tokens, (b1, b2), p, q, rank)[0]
    # TMA stores whole pieces of 16 bytes, so what it writes of T and y has rows of such pieces.
    width, HALF, blocks = round_up(rank, lanes(x)), ROWS // 2, size.columns // size.ranks
    row_tiles, block_tiles = ceil_div(tokens, ROWS), ceil_div(b2, blocks)
    first_columns, second_columns = block_tiles * ceil_div(rank, size.ranks), ceil_div(q, size.columns)
    chunks = ceil_div(row_tiles, size.rows)
    row_tiles = ceil_div(row_tiles, chunks)  # of a chunk: nearly equal ones, none much larger than what is left
    T = x.new_empty(b2, min(chunks, RING.value) * row_tiles * ROWS, b1, width)
    flags = x.new_empty(2 * chunks, dtype=torch.int32)  # of tiles of a chunk: written, read
    Y = y.view(tokens, b2, 1, q).permute(1, 0, 2, 3)
    if width > rank:
        U = torch.nn.functional.pad(U, (0, 0, 0, width - rank))
    rows = second_factor(U).transpose(1, 2).unsqueeze(1)  # [b2, 1, q, b1 r']
    firsts, seconds = b1 * first_columns * row_tiles, b2 * second_columns * row_tiles
    arguments = {
        "x": descriptor(aligned(x.unflatten(1, (b1, p)).transpose(0, 1)), [1, HALF, size.depth]),
        "V": descriptor(aligned(first_factor(V).permute(0, 2, 3, 1)), [1, blocks, size.ranks, size.depth]),
        "T_out": descriptor(T, [blocks, HALF, 1, size.ranks]),
        "T": descriptor(T.flatten(2), [1, HALF, size.depth]),
        "U": descriptor(aligned(rows), [1, 1, size.columns, size.depth]),
        "Y": descriptor(Y, [1, HALF, 1, size.columns]) if is_aligned(Y) and q % lanes(y) == 0 else None,
        **{"y": y, "bias": None if bias is None else bias.contiguous()},
        **{"multiplier": epilogue.multiply, "residual": epilogue.residual, "flags": flags, "tokens": tokens},
        **{"firsts": firsts, "seconds": seconds, "chunks": chunks, "row_tiles": row_tiles},
    }
    constants = {
        **{"BLOCK_TILES": block_tiles, "FIRST_COLUMNS": first_columns, "SECOND_COLUMNS": second_columns},
        **{"FIRST_STEPS": ceil_div(p, size.depth)},
        **{"SECOND_STEPS": ceil_div(b1 * width, size.depth), "SLOTS": size.slots, "B_SLOTS": size.B_slots},
        **{"B2": b2, "Q": q, "ACTIVATION": epilogue.activation},
    }
    programs = min(chunks * (firsts + seconds), multiprocessors(x.device))
    most = {"MOST": max(128, power_of_two(2 * chunks))}
    clear = Launch(clear_kernel, 1, {"flags": flags, "count": 2 * chunks}, most, 4, 1)
    return [clear, Launch(hopper_interleaved_kernel, programs, arguments, constants, 4, 1, cooperative=True)]


def candidates(x: Tensor, V: Tensor, U: Tensor) -> dict[str, list[Tiles]]:
    """List the tiles worth a measurement, by launch; what sets the counts to zero has none."""
    b1, b2, p, rank = V.shape
    return {"only": _candidates(x.shape[0], (b1, b2), p, U.shape[3], rank)}


def _candidates(tokens: int, blocks: tuple[int, int], p: int, q: int, rank: int) -> list[Tiles]:
    """List tiles, the least padded first."""
    b1, b2 = blocks
    a_row = 2 * ROWS * b1 * b2 * round_up(rank, 8)  # bytes of T of a tile of tokens
    usual = max(1, min(ceil_div(tokens, ROWS), CHUNK_BYTES // a_row))
    chunks = dict.fromkeys((usual, max(1, usual // 2), min(ceil_div(tokens, ROWS), 2 * usual)))
    found = {}
    for columns, ranks, depth, rows in itertools.product((MOST_COLUMNS, 128), (16, 32, 64, 128), (64, 32), chunks):
        if ranks > side(rank, 128) or columns > 128 >= side(q, MOST_COLUMNS) or depth > max(32, side(p, MOST_DEPTH)):
            continue
        slots = 3 if columns == MOST_COLUMNS and depth == MOST_DEPTH else 5
        each = Tiles(columns, ranks, depth, slots, slots, rows)
        if each.runs():
            found[each] = _padded(each, b2, p, q, rank, b1)
    return sorted(found, key=lambda each: (found[each], -each.columns, -each.ranks, -each.depth))


def _padded(size: Tiles, b2: int, p: int, q: int, rank: int, b1: int) -> int:
    """Return the products of one token that whole tiles take; a tile's A is read again, which counts as half."""
    first = ceil_div(b2, size.columns // size.ranks) * ceil_div(rank, size.ranks)
    second = ceil_div(q, size.columns)
    deep = (ceil_div(depth, size.depth) * size.depth for depth in (p, b1 * round_up(rank, 8)))
    return sum(
        batch * tiles * depth * (size.columns + ROWS // 2)
        for batch, tiles, depth in zip((b1, b2), (first, second), deep, strict=True)
    )


linear = operator("monarch", "hopper_interleaved", "VU", lambda V, U: V.shape[1] * U.shape[3], launches, gradients)
