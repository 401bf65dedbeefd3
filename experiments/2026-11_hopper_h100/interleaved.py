"""Both stages of a Monarch layer in one launch, interleaved.

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
to the dtype of x; its ranks are multiples of 8. All programs must run at once, which a cooperative launch
makes sure of.
"""

# Kernels are Gluon, which reads as Python of other types.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false

from typing import Any, NamedTuple

import torch
from blrlab_ops.hopper_parts import SHARED_BYTES, async_load, barriers, descriptor
from problems import Problem
from torch import Tensor
from triton import cdiv
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

ROWS, SMS = 128, 132
RING = gl.constexpr(3)  # chunks of T
FENCE = gl.constexpr("fence.proxy.async; mov.u32 $0, $1;")  # between TMA's accesses to memory and others
STORES_DONE = gl.constexpr("cp.async.bulk.wait_group 0; fence.proxy.async; mov.u32 $0, $1;")
async_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier


if hasattr(gl.shared_memory_descriptor, "reinterpret"):

    @gluon.jit
    def seen_as(memory, described):
        """Return shared memory, at a multiple of 1024 bytes, as a tile of what is described, whatever lay there."""
        return memory.reinterpret(described.dtype, described.block_shape, described.layout)

else:  # before Triton 3.9

    @gluon.jit
    def seen_as(memory, described):
        """Return shared memory, at a multiple of 1024 bytes, as a tile of what is described, whatever lay there."""
        return memory._reinterpret(described.dtype, described.block_shape, described.layout)


@gluon.jit
def wait_for_stores():
    """Wait until all that this warpgroup has stored by TMA can be read by others."""
    gl.inline_asm_elementwise(STORES_DONE, "=r,r", [0], dtype=gl.int32, is_pure=False, pack=1)
    thread_barrier()  # a wide tile is stored by a thread of every warp, each of which has waited; another counts


@gluon.jit
def count_up(flag):
    """Add one to a count that other programs wait for."""
    gl.atomic_add(flag, 1, sem="release", scope="gpu")


@gluon.jit
def wait_for_count(flag, least):
    """Wait until a count has come so far; TMA then reads what was stored before."""
    while gl.atomic_add(flag, 0, sem="acquire", scope="gpu") < least:
        pass
    gl.inline_asm_elementwise(FENCE, "=r,r", [0], dtype=gl.int32, is_pure=False, pack=1)


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
    """Return a program's first tiles of either stage, and how many it has in all."""
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
def multiply(
    T, Y, staging, staged, freed, A_ring, B_ring, full, empty, firsts, seconds, chunks, FIRST_STEPS: gl.constexpr,
    SECOND_STEPS: gl.constexpr, SLOTS: gl.constexpr, PLACES: gl.constexpr, SECOND: gl.constexpr,
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
        second, _, _, f, s = tile_at(f, s, firsts, seconds, chunks)
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
        for part in gl.static_range(PARTS):
            values = (low if part == 0 else high).to(T.dtype)
            if second:
                put = hand_over(values, staging, Y, staged, freed, put, PLACES)
            else:
                blocks = values.reshape([HALF, KB, PART // KB]).permute([1, 0, 2])
                put = hand_over(blocks, staging, T, staged, freed, put, PLACES)


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
                place = put % PLACES
                mbarrier.wait(staged.index(place), put // PLACES & 1)
                corner = [block, row + SECOND * HALF, 0, first + part * PART]
                async_store(Y, corner, seen_as(staging.index(place), Y))
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
    x, V, T_out, T, U, Y, flags, firsts, seconds, chunks, row_tiles, row_chunks, BLOCKS: gl.constexpr,
    FIRST_COLUMNS: gl.constexpr, SECOND_COLUMNS: gl.constexpr, FIRST_STEPS: gl.constexpr, SECOND_STEPS: gl.constexpr,
    SLOTS: gl.constexpr, PARTS: gl.constexpr, PLACES: gl.constexpr,
):  # fmt: skip
    """Compute y [n, b2 q] from x [b1, n, p], V [b1, b2, r', p] and U [b2, 1, q, b1 r'] by way of T.

    T_out is T as the first stage writes it, [3 k, m, b1, r'] for m tokens and k output blocks of three chunks, T as the
    second reads it, [3 k, m, b1 r'], and Y is y as [b2, n, 1, q].
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
            (multiply, (T_out, Y, low, low_staged, low_freed, A_ring, B_ring, full, empty, firsts, seconds, chunks,
                        FIRST_STEPS, SECOND_STEPS, SLOTS, PLACES, 0)),
            (multiply, (T_out, Y, high, high_staged, high_freed, A_ring, B_ring, full, empty, firsts, seconds, chunks,
                        FIRST_STEPS, SECOND_STEPS, SLOTS, PLACES, 1)),
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


class Tiles(NamedTuple):
    """How the layer is cut.

    Attributes:
      columns: of a tile, 128 or 256.
      ranks: of each block in a tile of the first stage, which holds `columns / ranks` blocks.
      depth: of a tile of either stage.
      slots: tiles of A and of B that wait in shared memory.
      places: of tiles in shared memory that are being stored, in halves where tiles are 256 columns wide.
      rows: tiles of tokens in a chunk.
      blocks: output blocks of a chunk.
    """

    columns: int
    ranks: int
    depth: int
    slots: int
    places: int
    rows: int
    blocks: int


def fitting(columns: int, ranks: int, depth: int, places: int, rows: int, blocks: int) -> Tiles:
    """Return tiles with as many slots as shared memory has room for, up to 8."""
    room = SHARED_BYTES - 1024 - 2 * places * ROWS * min(columns, 128)
    return Tiles(columns, ranks, depth, min(8, room // (2 * depth * (ROWS + columns))), places, rows, blocks)


def launch(problem: Problem, size: Tiles, copy: int, y: Tensor) -> Any:
    """Return the launch of a layer of square blocks, and what sets its counts to zero before."""
    (V, U), b, p, q, n = problem.weights[copy], problem.layer.blocks, problem.p, problem.q, problem.layer.tokens
    rank, half, held, parts = problem.layer.rank, ROWS // 2, size.columns // size.ranks, size.columns // 128
    row_chunks = cdiv(cdiv(n, ROWS), size.rows)
    chunks = row_chunks * (b // size.blocks)
    row_tiles = cdiv(cdiv(n, ROWS), row_chunks)
    first_columns, second_columns = size.blocks // held * cdiv(rank, size.ranks), cdiv(q, size.columns)
    firsts, seconds = b * first_columns * row_tiles, size.blocks * second_columns * row_tiles
    T = V.new_empty(min(chunks, RING.value) * size.blocks, row_tiles * ROWS, b, rank)
    flags = torch.zeros(2 * chunks, dtype=torch.int32, device=V.device)
    made = {
        "x": descriptor(problem.x.view(n, b, p).transpose(0, 1), [1, ROWS, size.depth]),
        "V": descriptor(V.transpose(1, 2), [1, held, size.ranks, size.depth]),
        "T_out": descriptor(T, [held // parts, half, 1, size.ranks]),
        "T": descriptor(T.flatten(2), [1, ROWS, size.depth]),
        "U": descriptor(U.reshape(b, 1, q, b * rank), [1, 1, size.columns, size.depth]),
        "Y": descriptor(y.view(n, b, 1, q).transpose(0, 1), [1, half, 1, 128]),
        **{"flags": flags, "firsts": firsts, "seconds": seconds, "chunks": chunks, "row_tiles": row_tiles},
        **{"row_chunks": row_chunks, "BLOCKS": size.blocks, "FIRST_COLUMNS": first_columns, "PARTS": parts},
        **{"SECOND_COLUMNS": second_columns, "FIRST_STEPS": cdiv(p, size.depth), "PLACES": size.places},
        **{"SECOND_STEPS": cdiv(b * rank, size.depth), "SLOTS": size.slots},
    }
    kernel = hopper_interleaved_kernel[(min(chunks * (firsts + seconds), SMS),)]

    def both() -> None:
        flags.zero_()
        kernel(**made, num_warps=4, launch_cooperative_grid=True)

    return both
