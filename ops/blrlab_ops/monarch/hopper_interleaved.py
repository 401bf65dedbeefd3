"""Monarch layer on Hopper in one launch of two stages, interleaved so that what lies between them stays in the L2.

Shapes: x [..., b1 p], V [b1, b2, p, r'], U [b1, b2, r', q], bias [b2 q].

The layer is cut in chunks of tokens and output blocks. Programs, one on every multiprocessor, take tiles in turn: of
the first stage of a chunk, T[k] from x[l] V[l,k], then of the second stage of the chunk before it, y[k] from T[k] U[k].
A tile of the second stage waits for a count of its chunk's first ones, which by then were started a chunk ago. So T is
read soon after it was written, and no launch ends or begins between the stages. Three chunks of T take turns in the
same memory: the first stage of a chunk waits for the second of the third before it. Compared with `hopper_chained`
nothing is computed twice, whatever q is, and a tile may hold a few ranks of many blocks, so that no rank is padded.

Two counts a chunk are the protocol: of first-stage tiles whose T can be read, and of second-stage tiles that have read
it; each counts a tile twice, once a warpgroup. Every program takes its tiles in the order F0 F1 S0 F2 S1 F3 S2 ... of
chunks, of which each wait is for earlier ones, so nobody waits for himself.

A program's tile is 128 rows by BC columns of one product, A [128, depth] B [depth, BC]: one warp loads both with TMA
ahead of two warpgroups, 64 rows each, which hand their results to a warp each that stores and counts them. T is rounded
to the dtype of x; its ranks are rounded up to 8, of zeros. All programs must run at once, which a cooperative launch
makes sure of.
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
MOST_COLUMNS, MOST_DEPTH, MOST_SLOTS = 256, 64, 8
RING = gl.constexpr(3)  # chunks of T
CHUNK_BYTES = 4 * 2**20  # of T, so that all of it and what goes by stay in an L2 of 50 MB, of which each half has its own


class Tiles(NamedTuple):
    """How the layer is cut.

    Attributes:
      columns: of a tile.
      ranks: of each block in a tile of the first stage, which holds `columns / ranks` blocks.
      depth: of a tile of either stage.
      slots: tiles of A and of B that wait in shared memory.
      places: of tiles in shared memory that are being stored, in halves where tiles are 256 columns wide.
      rows: tiles of tokens in a chunk, at most.
      blocks: output blocks of a chunk, at most.
    """

    columns: int
    ranks: int
    depth: int
    slots: int
    places: int
    rows: int
    blocks: int

    def parts(self) -> int:
        """Return in how many parts a tile is stored, one after another."""
        return 2 if self.columns == MOST_COLUMNS else 1

    def shared_bytes(self) -> int:
        """Return the bytes of shared memory that a program takes, of 16-bit numbers."""
        rings = self.slots * self.depth * (ROWS + self.columns)
        return 2 * (rings + self.places * ROWS * self.columns // self.parts()) + BARRIER_BYTES

    def runs(self) -> bool:
        """Say whether a program fits; a tile is given back only after the next was taken, so two must."""
        holds = self.columns // self.ranks >= self.parts()
        return holds and self.places >= 1 and self.slots >= 2 and self.shared_bytes() <= SHARED_BYTES

    def chunk_of(self, b2: int) -> int:
        """Return how many output blocks a chunk has room for: a divisor of b2 in whole tiles, or all of them."""
        held = self.columns // self.ranks
        found = [blocks for blocks in range(held, self.blocks + 1, held) if b2 % blocks == 0]
        return max(found) if found else round_up(b2, held)


@gluon.jit
def tile_at(f, s, firsts, seconds, chunks):
    """Return whether a program's next tile is of the second stage, its chunk, its number there, and what comes after.

    Of the first stage come the tiles f and on, of the second s and on, each of which counts through all chunks, with
    `firsts` or `seconds` tiles in one; of what is left, the first stage of a chunk comes before the second of the one
    before it.
    """
    second = (f >= firsts * chunks) | ((s < seconds * chunks) & (f // firsts > s // seconds + 1))
    chunk = gl.where(second, s // seconds, f // firsts)
    unit = gl.where(second, s % seconds, f % firsts)
    step = gl.num_programs(0)
    return second, chunk, unit, gl.where(second, f, f + step), gl.where(second, s + step, s)


@gluon.jit
def tiles_of_program(firsts, seconds, chunks):
    """Return a program's first tiles of either stage, and how many it has; where one has more, it has less of others."""
    f, s = gl.program_id(0), gl.num_programs(0) - 1 - gl.program_id(0)
    most = gl.num_programs(0) - 1
    return f, s, (firsts * chunks - f + most) // (most + 1) + (seconds * chunks - s + most) // (most + 1)


@gluon.jit
def rows_at(chunk, unit, row_tiles, row_chunks, ROWS: gl.constexpr):
    """Return a tile's first row, that row's place in T, and what is left of its number."""
    inside = unit % row_tiles
    return (chunk % row_chunks * row_tiles + inside) * ROWS, inside * ROWS, unit // row_tiles


@gluon.jit
def load_tiles(
    x, V, T, U, flags, A_ring, B_ring, full, empty, firsts, seconds, chunks, row_tiles, row_chunks,
    BLOCKS: gl.constexpr, FIRST_COLUMNS: gl.constexpr, SECOND_COLUMNS: gl.constexpr, FIRST_STEPS: gl.constexpr,
    SECOND_STEPS: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Fill the rings."""
    ROWS: gl.constexpr = x.block_shape[1]
    BD: gl.constexpr = x.block_shape[2]
    KB: gl.constexpr = V.block_shape[1]
    RB: gl.constexpr = V.block_shape[2]
    BC: gl.constexpr = KB * RB
    BLOCK_TILES: gl.constexpr = BLOCKS // KB
    at = 0
    ready = -1  # the last chunk that T is known to be there of
    f, s, count = tiles_of_program(firsts, seconds, chunks)
    for _ in range(count):
        second, chunk, unit, f, s = tile_at(f, s, firsts, seconds, chunks)
        row, kept, rest = rows_at(chunk, unit, row_tiles, row_chunks, ROWS)
        block = chunk // row_chunks * BLOCKS
        if second:
            inside = rest // SECOND_COLUMNS
            column = rest % SECOND_COLUMNS * BC
            for step in range(SECOND_STEPS):
                slot = at % SLOTS
                mbarrier.wait(empty.index(slot), (at // SLOTS & 1) ^ 1)
                mbarrier.expect(full.index(slot), x.block_type.nbytes + U.block_type.nbytes)
                into = B_ring.index(slot).reshape([1, 1, BC, BD])
                async_load(U, [block + inside, 0, column, step * BD], full.index(slot), into)
                if chunk > ready:  # the weights need not wait
                    wait_for_count(flags + chunk, 2 * firsts)
                    ready = chunk
                async_load(T, [chunk % RING * BLOCKS + inside, kept, step * BD], full.index(slot), A_ring.index(slot))
                at += 1
        else:
            batch = rest // FIRST_COLUMNS
            place = rest % FIRST_COLUMNS
            for step in range(FIRST_STEPS):
                slot = at % SLOTS
                mbarrier.wait(empty.index(slot), (at // SLOTS & 1) ^ 1)
                mbarrier.expect(full.index(slot), x.block_type.nbytes + V.block_type.nbytes)
                corner = [batch, block + place % BLOCK_TILES * KB, place // BLOCK_TILES * RB, step * BD]
                async_load(V, corner, full.index(slot), B_ring.index(slot))
                async_load(x, [batch, row, step * BD], full.index(slot), A_ring.index(slot))
                at += 1


@gluon.jit
def hand_over(part, staging, described, staged, freed, put, PLACES: gl.constexpr):
    """Have a part of a tile stored, once what was there is; memory is seen as tiles of what is `described`."""
    place = put % PLACES
    mbarrier.wait(freed.index(place), (put // PLACES & 1) ^ 1)
    into = seen_as(staging.index(place), described)
    into.store(part.reshape(described.block_shape))
    fence_async_shared()
    mbarrier.arrive(staged.index(place))
    return put + 1


@gluon.jit
def finish_part(
    part, y, bias, multiplier, residual, tokens, row, block, first, Q: gl.constexpr, B2: gl.constexpr,
    ACTIVATION: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Return what follows the sums of some columns, and where in y they belong."""
    rows = row + gl.arange(0, part.shape[0], gl.SliceLayout(1, layout))
    columns = first + gl.arange(0, part.shape[1], gl.SliceLayout(0, layout))
    offsets = rows.to(gl.int64)[:, None] * (B2 * Q) + (block * Q + columns)[None, :]
    mask = (rows < tokens)[:, None] & (columns < Q)[None, :]
    done = finish(part, bias, multiplier, residual, offsets, mask, block * Q + columns, columns < Q, ACTIVATION)
    return done.to(y.dtype.element_ty), offsets, mask


@gluon.jit
def multiply(
    T, Y, y, bias, multiplier, residual, staging, staged, freed, A_ring, B_ring, full, empty, tokens, firsts, seconds,
    chunks, row_tiles, row_chunks, BLOCKS: gl.constexpr, SECOND_COLUMNS: gl.constexpr, FIRST_STEPS: gl.constexpr,
    SECOND_STEPS: gl.constexpr, SLOTS: gl.constexpr, PLACES: gl.constexpr, B2: gl.constexpr, Q: gl.constexpr,
    ACTIVATION: gl.constexpr, SECOND: gl.constexpr,
):  # fmt: skip
    """Compute one warpgroup's half of every tile, and hand it to what stores it, the first columns first."""
    ROWS: gl.constexpr = A_ring.shape[2]
    HALF: gl.constexpr = ROWS // 2
    BD: gl.constexpr = A_ring.shape[3]
    BC: gl.constexpr = B_ring.shape[2] * B_ring.shape[3]
    KB: gl.constexpr = T.block_shape[0]  # blocks of the first stage in a part of a tile
    PART: gl.constexpr = KB * T.block_shape[3]
    PARTS: gl.constexpr = BC // PART
    sums: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BC, 16])
    of_part: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, PART, 16])
    at = 0
    put = 0
    f, s, count = tiles_of_program(firsts, seconds, chunks)
    for _ in range(count):
        second, chunk, unit, f, s = tile_at(f, s, firsts, seconds, chunks)
        steps = gl.where(second, SECOND_STEPS, FIRST_STEPS)
        total = gl.zeros([HALF, BC], gl.float32, sums)
        for step in range(steps):
            slot = at % SLOTS
            mbarrier.wait(full.index(slot), at // SLOTS & 1)
            left = A_ring.index(slot).reshape([ROWS, BD]).slice(SECOND * HALF, HALF)
            right = B_ring.index(slot).reshape([BC, BD]).permute([1, 0])
            flying = warpgroup_mma(left, right, total, is_async=True, use_acc=step > 0)
            total = warpgroup_mma_wait(1, deps=(flying,))
            if step > 0:  # the product before this one is done with its tiles
                mbarrier.arrive(empty.index((at - 1) % SLOTS))
            at += 1
        total = warpgroup_mma_wait(0, deps=(total,))
        mbarrier.arrive(empty.index((at - 1) % SLOTS))
        if PARTS == 2:
            low, high = gl.split(total.reshape([HALF, 2, PART]).permute([0, 2, 1]))
            low = gl.convert_layout(low, of_part)
            high = gl.convert_layout(high, of_part)
        else:
            low = total
            high = total
        row, kept, rest = rows_at(chunk, unit, row_tiles, row_chunks, ROWS)
        if second:
            block = chunk // row_chunks * BLOCKS + rest // SECOND_COLUMNS
            first = rest % SECOND_COLUMNS * BC
            for part in gl.static_range(PARTS):
                done, offsets, mask = finish_part(
                    low if part == 0 else high, y, bias, multiplier, residual, tokens, row + SECOND * HALF, block,
                    first + part * PART, Q, B2, ACTIVATION, of_part,
                )  # fmt: skip
                if Y is None:
                    gl.store(y + offsets, done, mask=mask)
                else:
                    put = hand_over(done, staging, Y, staged, freed, put, PLACES)
            if Y is None:  # to let it be known that T has been read
                mbarrier.wait(freed.index(put % PLACES), (put // PLACES & 1) ^ 1)
                mbarrier.arrive(staged.index(put % PLACES))
                put += 1
        else:
            for part in gl.static_range(PARTS):
                values = (low if part == 0 else high).to(y.dtype.element_ty)
                values = values.reshape([HALF, KB, PART // KB]).permute([1, 0, 2])
                put = hand_over(values, staging, T, staged, freed, put, PLACES)


@gluon.jit
def store_tiles(
    T, Y, flags, staging, staged, freed, firsts, seconds, chunks, row_tiles, row_chunks, BLOCKS: gl.constexpr,
    FIRST_COLUMNS: gl.constexpr, SECOND_COLUMNS: gl.constexpr, PARTS: gl.constexpr, PLACES: gl.constexpr,
    SECOND: gl.constexpr,
):  # fmt: skip
    """Store what one warpgroup hands over, and count it once others can read it."""
    KB: gl.constexpr = T.block_shape[0]  # of a part
    HALF: gl.constexpr = T.block_shape[1]
    RB: gl.constexpr = T.block_shape[3]
    PART: gl.constexpr = KB * RB
    BLOCK_TILES: gl.constexpr = BLOCKS // (KB * PARTS)
    put = 0
    empty = RING - 1  # the last chunk that T is known to have room for
    f, s, count = tiles_of_program(firsts, seconds, chunks)
    for _ in range(count):
        second, chunk, unit, f, s = tile_at(f, s, firsts, seconds, chunks)
        row, kept, rest = rows_at(chunk, unit, row_tiles, row_chunks, 2 * HALF)
        if second:
            block = chunk // row_chunks * BLOCKS + rest // SECOND_COLUMNS
            first = rest % SECOND_COLUMNS * (PART * PARTS)
            for part in gl.static_range(PARTS):
                if part == 0 or Y is not None:
                    place = put % PLACES
                    mbarrier.wait(staged.index(place), put // PLACES & 1)
                    if Y is not None:
                        corner = [block, row + SECOND * HALF, 0, first + part * PART]
                        store_once(Y, corner, seen_as(staging.index(place), Y))
                    if part == 0:  # what became of T is here, so T has been read
                        count_up(flags + (chunks + chunk))
                    tma.store_wait(0)
                    mbarrier.arrive(freed.index(place))
                    put += 1
        else:
            if chunk > empty:
                wait_for_count(flags + (chunks + chunk - RING), 2 * seconds)
                empty = chunk
            inner = rest % FIRST_COLUMNS
            at = chunk % RING * BLOCKS + inner % BLOCK_TILES * (KB * PARTS)
            for part in gl.static_range(PARTS):
                place = put % PLACES
                mbarrier.wait(staged.index(place), put // PLACES & 1)
                corner = [at + part * KB, kept + SECOND * HALF, rest // FIRST_COLUMNS, inner // BLOCK_TILES * RB]
                async_store(T, corner, staging.index(place))
                tma.store_wait(0)
                mbarrier.arrive(freed.index(place))
                put += 1
            wait_for_stores()
            count_up(flags + chunk)
    wait_for_stores()


@gluon.jit
def hopper_interleaved_kernel(
    x, V, T_out, T, U, Y, y, bias, multiplier, residual, flags, tokens, firsts, seconds, chunks,
    row_tiles, row_chunks, BLOCKS: gl.constexpr, FIRST_COLUMNS: gl.constexpr, SECOND_COLUMNS: gl.constexpr,
    FIRST_STEPS: gl.constexpr, SECOND_STEPS: gl.constexpr, SLOTS: gl.constexpr, PARTS: gl.constexpr,
    PLACES: gl.constexpr, B2: gl.constexpr, Q: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """Compute y [n, b2 q] from x [b1, n, p], V [b1, b2, r', p] and U [b2, 1, q, b1 r'] by way of T.

    T_out is T as the first stage writes it, [3 k, m, b1, r'] for m tokens and k output blocks of three chunks, T as the
    second reads it, [3 k, m, b1 r'], and Y is y as [b2, n, 1, q], or None where TMA cannot address it.
    """
    A_ring = gl.allocate_shared_memory(x.dtype, [SLOTS] + x.block_shape, x.layout)  # noqa: RUF005
    B_ring = gl.allocate_shared_memory(V.dtype, [SLOTS] + V.block_shape, V.layout)  # noqa: RUF005
    low = gl.allocate_shared_memory(T_out.dtype, [PLACES] + T_out.block_shape, T_out.layout)  # noqa: RUF005
    high = gl.allocate_shared_memory(T_out.dtype, [PLACES] + T_out.block_shape, T_out.layout)  # noqa: RUF005
    full = barriers(SLOTS, 1)
    empty = barriers(SLOTS, 2)
    low_staged = barriers(PLACES, 1)
    low_freed = barriers(PLACES, 1)
    high_staged = barriers(PLACES, 1)
    high_freed = barriers(PLACES, 1)
    gl.warp_specialize(
        [
            (multiply, (T_out, Y, y, bias, multiplier, residual, low, low_staged, low_freed, A_ring, B_ring, full,
                        empty, tokens, firsts, seconds, chunks, row_tiles, row_chunks, BLOCKS, SECOND_COLUMNS,
                        FIRST_STEPS, SECOND_STEPS, SLOTS, PLACES, B2, Q, ACTIVATION, 0)),
            (multiply, (T_out, Y, y, bias, multiplier, residual, high, high_staged, high_freed, A_ring, B_ring, full,
                        empty, tokens, firsts, seconds, chunks, row_tiles, row_chunks, BLOCKS, SECOND_COLUMNS,
                        FIRST_STEPS, SECOND_STEPS, SLOTS, PLACES, B2, Q, ACTIVATION, 1)),
            (load_tiles, (x, V, T, U, flags, A_ring, B_ring, full, empty, firsts, seconds, chunks, row_tiles,
                          row_chunks, BLOCKS, FIRST_COLUMNS, SECOND_COLUMNS, FIRST_STEPS, SECOND_STEPS, SLOTS)),
            (store_tiles, (T_out, Y, flags, low, low_staged, low_freed, firsts, seconds, chunks, row_tiles, row_chunks,
                           BLOCKS, FIRST_COLUMNS, SECOND_COLUMNS, PARTS, PLACES, 0)),
            (store_tiles, (T_out, Y, flags, high, high_staged, high_freed, firsts, seconds, chunks, row_tiles,
                           row_chunks, BLOCKS, FIRST_COLUMNS, SECOND_COLUMNS, PARTS, PLACES, 1)),
        ],
        [4, 1, 1, 1],
        [232, 40, 40, 40],
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
    width, HALF, held = round_up(rank, lanes(x)), ROWS // 2, size.columns // size.ranks
    blocks, part = size.chunk_of(b2), size.columns // size.parts()
    row_tiles = ceil_div(tokens, ROWS)
    row_chunks = ceil_div(row_tiles, size.rows)
    row_tiles = ceil_div(row_tiles, row_chunks)  # of a chunk: nearly equal ones, none much larger than what is left
    chunks = row_chunks * ceil_div(b2, blocks)
    first_columns, second_columns = blocks // held * ceil_div(rank, size.ranks), ceil_div(q, size.columns)
    firsts, seconds = b1 * first_columns * row_tiles, min(blocks, b2) * second_columns * row_tiles
    T = x.new_empty(min(chunks, RING.value) * blocks, row_tiles * ROWS, b1, width)
    flags = x.new_empty(2 * chunks, dtype=torch.int32)  # of tiles of a chunk: written, read
    Y = y.view(tokens, b2, 1, q).permute(1, 0, 2, 3)
    if width > rank:
        U = torch.nn.functional.pad(U, (0, 0, 0, width - rank))
    columns = second_factor(U).transpose(1, 2).unsqueeze(1)  # [b2, 1, q, b1 r']
    arguments = {
        "x": descriptor(aligned(x.unflatten(1, (b1, p)).transpose(0, 1)), [1, ROWS, size.depth]),
        "V": descriptor(aligned(first_factor(V).permute(0, 2, 3, 1)), [1, held, size.ranks, size.depth]),
        "T_out": descriptor(T, [held // size.parts(), HALF, 1, size.ranks]),
        "T": descriptor(T.flatten(2), [1, ROWS, size.depth]),
        "U": descriptor(aligned(columns), [1, 1, size.columns, size.depth]),
        "Y": descriptor(Y, [1, HALF, 1, part]) if is_aligned(Y) and q % lanes(y) == 0 else None,
        **{"y": y, "bias": None if bias is None else bias.contiguous()},
        **{"multiplier": epilogue.multiply, "residual": epilogue.residual, "flags": flags, "tokens": tokens},
        **{"firsts": firsts, "seconds": seconds, "chunks": chunks, "row_tiles": row_tiles, "row_chunks": row_chunks},
    }
    constants = {
        **{"BLOCKS": blocks, "FIRST_COLUMNS": first_columns, "SECOND_COLUMNS": second_columns},
        **{"FIRST_STEPS": ceil_div(p, size.depth), "SECOND_STEPS": ceil_div(b1 * width, size.depth)},
        **{"SLOTS": size.slots, "PARTS": size.parts(), "PLACES": size.places},
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
    row_tiles, found = ceil_div(tokens, ROWS), {}
    for columns, ranks, depth in itertools.product((MOST_COLUMNS, 128), (16, 32, 64, 128), (64, 32)):
        if ranks > side(rank, 128) or columns > 128 >= side(q, MOST_COLUMNS) or depth > max(32, side(p, MOST_DEPTH)):
            continue
        for places, shared, rows in itertools.product((1, 2), (b2, columns // ranks), (8, 2)):
            each = _ringed(columns, ranks, depth, places, shared)
            each = each._replace(rows=min(row_tiles, rows), blocks=each.chunk_of(b2))
            if each.runs():
                found[each] = _padded(each, b2, p, q, rank, b1)
    return sorted(found, key=lambda each: (found[each], -each.columns, -each.ranks, -each.depth))


def _ringed(columns: int, ranks: int, depth: int, places: int, blocks: int) -> Tiles:
    """Return tiles with as many of A and B ahead as fit, up to 8."""
    alone = Tiles(columns, ranks, depth, 0, places, 1, blocks)
    of_one = alone._replace(slots=1).shared_bytes() - alone.shared_bytes()
    return alone._replace(slots=min(MOST_SLOTS, (SHARED_BYTES - alone.shared_bytes()) // of_one))


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
