"""A batch of products on Hopper in Gluon: C[g] = A[g] B[g], loaded by TMA, warp-specialised, persistent.

One warp loads, two warpgroups multiply: each owns 64 rows of a tile of 128 rows and all its columns. A cluster of CTAs
takes as many tiles below one another and shares the loads of B by multicast. The columns of B have two coordinates,
an output block and a rank (or 0 and a column), so that a tile may hold the same ranks of several blocks. What stays of
A in shared memory while all tiles of columns go by is loaded once (`RESIDENT`). Needs Triton 3.9.

Descriptors, tiles in brackets: a [batches, rows, depth] (1, rows, BK), b [batches, blocks, columns, depth] (1, KB, RB,
BK), c [blocks, panels, rows, columns] (KB, 1, rows, RB), which may be the same memory in any order.
"""

# Kernels are Gluon, which reads as Python of other types.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    cluster,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import _CachePolicy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@gluon.constexpr_function
def split_rows(ctas, rank, dim):
    """Return how a cluster's CTAs share a tensor of a rank: along one dimension."""
    return [[(1 << bit) if d == dim else 0 for d in range(rank)] for bit in range(ctas.bit_length() - 1)]


@gluon.constexpr_function
def one_for_all(ctas):
    """Return the layout of a barrier that a whole cluster shares."""
    return [[0] for _ in range(ctas.bit_length() - 1)]


@gluon.constexpr_function
def policy(number):
    """Return what becomes of a line in the L2: 0 as usual, 1 evicted first, 2 evicted last."""
    return _CachePolicy(eviction_policy=("evict_normal", "evict_first", "evict_last")[number])


@gluon.jit
def unit_of(unit, row_tiles, chunks):
    """Return batch, chunk of columns and tile of rows of a unit of work; rows go fastest."""
    return unit // (row_tiles * chunks), (unit // row_tiles) % chunks, unit % row_tiles


@gluon.jit
def load(
    a, b, low, high, b_ring, a_full, a_empty, b_full, b_empty, b_empty_all, units, row_tiles, chunks, n1_tiles,
    a_batch, a_panel, a_column,
    STEPS: gl.constexpr, PER_UNIT: gl.constexpr, RESIDENT: gl.constexpr, A_SLOTS: gl.constexpr, B_SLOTS: gl.constexpr,
    HALF: gl.constexpr, LOADS: gl.constexpr, A_POLICY: gl.constexpr, B_POLICY: gl.constexpr,
):  # fmt: skip
    """Fill the rings: A's two halves for each warpgroup, B for both, and for the whole cluster."""
    CTAS: gl.constexpr = gl.num_ctas()
    BK: gl.constexpr = a.block_shape[2]
    KB: gl.constexpr = b.block_shape[1]
    RB: gl.constexpr = b.block_shape[2]
    ia = 0
    ib = 0
    gdc_wait()
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        batch, chunk, rows = unit_of(unit, row_tiles, chunks)
        row = rows * (2 * HALF)
        for tile in range(PER_UNIT):
            column = chunk * PER_UNIT + tile
            n1 = (column % n1_tiles) * KB
            n2 = (column // n1_tiles) * RB
            for step in range(STEPS):
                fresh = (tile == 0) if RESIDENT else True
                if fresh:
                    slot = ia % A_SLOTS
                    full = a_full.index(slot)
                    mbarrier.wait(a_empty.index(slot), (ia // A_SLOTS & 1) ^ 1)
                    panel = batch * a_batch + step * a_panel
                    where = batch * a_column + step * BK * (1 - a_panel)
                    if LOADS:
                        mbarrier.expect(full, 2 * a.nbytes_per_cta)
                        tma.async_load(a, [panel, row, where], full, low.index(slot), cache_policy=policy(A_POLICY))
                        tma.async_load(
                            a, [panel, row + HALF, where], full, high.index(slot), cache_policy=policy(A_POLICY)
                        )
                    else:
                        mbarrier.arrive(full)
                    ia += 1
                slot = ib % B_SLOTS
                phase = (ib // B_SLOTS & 1) ^ 1
                mbarrier.wait(b_empty.index(slot), phase)
                if LOADS:
                    mbarrier.expect(b_full.index(slot), b.nbytes_per_cta)
                    if CTAS > 1:  # its first CTA, which alone loads, waits for all
                        mbarrier.wait(b_empty_all.index(slot), phase)
                    tma.async_load(
                        b, [batch, n1, n2, step * BK], b_full.index(slot), b_ring.index(slot),
                        multicast=CTAS > 1, cache_policy=policy(B_POLICY),
                    )  # fmt: skip
                else:
                    mbarrier.arrive(b_full.index(slot))
                ib += 1


@gluon.jit
def multiply(
    c, y, staging, a_ring, b_ring, a_full, a_empty, b_full, b_empty, b_empty_all, units, row_tiles, chunks, n1_tiles,
    c_block, c_column, rows_of_y, width_of_y, y_block, y_row,
    STEPS: gl.constexpr, PER_UNIT: gl.constexpr, RESIDENT: gl.constexpr, A_SLOTS: gl.constexpr, B_SLOTS: gl.constexpr,
    HALF: gl.constexpr, PANEL: gl.constexpr, PRODUCTS: gl.constexpr, STORES: gl.constexpr, C_POLICY: gl.constexpr,
    SECOND: gl.constexpr,
):  # fmt: skip
    """Multiply one half of the rows; STORES: 0 none, 1 by TMA, 2 by the threads."""
    CTAS: gl.constexpr = gl.num_ctas()
    KB: gl.constexpr = b_ring.shape[2]
    RB: gl.constexpr = b_ring.shape[3]
    BK: gl.constexpr = b_ring.shape[4]
    BN: gl.constexpr = KB * RB
    sums: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16], cga_layout=split_rows(CTAS, 2, 0)
    )
    ia = 0
    ib = 0
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        batch, chunk, rows = unit_of(unit, row_tiles, chunks)
        row = rows * (2 * HALF) + SECOND * HALF
        first = ia
        for tile in range(PER_UNIT):
            column = chunk * PER_UNIT + tile
            n1 = (column % n1_tiles) * KB
            n2 = (column // n1_tiles) * RB
            if RESIDENT:
                ia = first
            total = gl.zeros([HALF, BN], gl.float32, sums)
            for step in range(STEPS):
                slot = ia % A_SLOTS
                slot_b = ib % B_SLOTS
                if RESIDENT:
                    if tile == 0:
                        mbarrier.wait(a_full.index(slot), ia // A_SLOTS & 1)
                else:
                    mbarrier.wait(a_full.index(slot), ia // A_SLOTS & 1)
                mbarrier.wait(b_full.index(slot_b), ib // B_SLOTS & 1)
                left = a_ring.index(slot).reshape([HALF, BK])
                right = b_ring.index(slot_b).reshape([BN, BK]).permute([1, 0])
                if PRODUCTS:
                    flying = warpgroup_mma(left, right, total, is_async=True, use_acc=step > 0)
                    total = warpgroup_mma_wait(1, deps=(flying,))
                if step > 0:  # the product before this one is done with its operands
                    done = (ib - 1) % B_SLOTS
                    mbarrier.arrive(b_empty.index(done))
                    if CTAS > 1:
                        mbarrier.arrive(b_empty_all.index(done))
                    if not RESIDENT:
                        mbarrier.arrive(a_empty.index((ia - 1) % A_SLOTS))
                ia += 1
                ib += 1
            total = warpgroup_mma_wait(0, deps=(total,))
            last = (ib - 1) % B_SLOTS
            mbarrier.arrive(b_empty.index(last))
            if CTAS > 1:
                mbarrier.arrive(b_empty_all.index(last))
            if not RESIDENT:
                mbarrier.arrive(a_empty.index((ia - 1) % A_SLOTS))
            elif tile == PER_UNIT - 1:
                for each in gl.static_range(STEPS):
                    mbarrier.arrive(a_empty.index((first + each) % A_SLOTS))
            block = batch * c_block + n1
            at = batch * c_column + n2
            where = [block, at // PANEL, row, at % PANEL]
            result = total.to(c.dtype)
            if STORES == 1:
                tma.store_wait(0)
                staging.store(result.reshape([HALF, KB, RB]).permute([1, 0, 2]).reshape([KB, 1, HALF, RB]))
                fence_async_shared()
                tma.async_store(c, where, staging, cache_policy=policy(C_POLICY))
            elif STORES == 2:
                rows_here = row + gl.arange(0, HALF, gl.SliceLayout(1, sums))
                columns = gl.arange(0, BN, gl.SliceLayout(0, sums))
                panel = at // PANEL + (columns % RB + at % PANEL) // PANEL
                inside = (columns % RB + at % PANEL) % PANEL
                offsets = (block + columns // RB).to(gl.int64) * y_block + panel * (rows_of_y * PANEL) + inside
                mask = (rows_here < rows_of_y)[:, None] & (at + columns % RB < width_of_y)[None, :]
                gl.store(y + rows_here.to(gl.int64)[:, None] * y_row + offsets[None, :], result, mask=mask)
            else:  # something must use the sums
                if batch < 0:
                    staging.store(result.reshape([HALF, KB, RB]).permute([1, 0, 2]).reshape([KB, 1, HALF, RB]))
                    fence_async_shared()
                    tma.async_store(c, where, staging)
    tma.store_wait(0)


@gluon.jit
def product_kernel(
    a, b, c, y, units, row_tiles, chunks, n1_tiles, a_batch, a_panel, a_column, c_block, c_column, rows_of_y,
    width_of_y, y_block, y_row, STEPS: gl.constexpr, PER_UNIT: gl.constexpr, RESIDENT: gl.constexpr,
    A_SLOTS: gl.constexpr, B_SLOTS: gl.constexpr, PANEL: gl.constexpr, PRODUCTS: gl.constexpr, LOADS: gl.constexpr,
    STORES: gl.constexpr,
    A_POLICY: gl.constexpr, B_POLICY: gl.constexpr, C_POLICY: gl.constexpr,
):  # fmt: skip
    """Compute `units` units, each `PER_UNIT` tiles of columns of one tile of rows of one batch.

    A step reads A at [g a_batch + step a_panel, row, g a_column + (step BK unless a_panel is 1)], and a tile is written
    at column g c_column + n2 of block g c_block + n1, in panels of `PANEL` columns.
    """
    CTAS: gl.constexpr = gl.num_ctas()
    HALF: gl.constexpr = a.block_shape[1]
    low = gl.allocate_shared_memory(a.dtype, [A_SLOTS] + a.block_shape, a.layout)  # noqa: RUF005
    high = gl.allocate_shared_memory(a.dtype, [A_SLOTS] + a.block_shape, a.layout)  # noqa: RUF005
    b_ring = gl.allocate_shared_memory(b.dtype, [B_SLOTS] + b.block_shape, b.layout)  # noqa: RUF005
    c_low = gl.allocate_shared_memory(c.dtype, c.block_shape, c.layout)
    c_high = gl.allocate_shared_memory(c.dtype, c.block_shape, c.layout)
    a_full = mbarrier.allocate_mbarrier(batch=A_SLOTS)
    a_empty = mbarrier.allocate_mbarrier(batch=A_SLOTS)
    b_full = mbarrier.allocate_mbarrier(batch=B_SLOTS)
    b_empty = mbarrier.allocate_mbarrier(batch=B_SLOTS)
    b_empty_all = gl.allocate_shared_memory(gl.int64, [B_SLOTS, 1], mbarrier.MBarrierLayout(one_for_all(CTAS)))
    for slot in gl.static_range(A_SLOTS):
        mbarrier.init(a_full.index(slot), count=1)
        mbarrier.init(a_empty.index(slot), count=2)
    for slot in gl.static_range(B_SLOTS):
        mbarrier.init(b_full.index(slot), count=1)
        mbarrier.init(b_empty.index(slot), count=2)
        mbarrier.init(b_empty_all.index(slot), count=2)
    if CTAS > 1:
        cluster.barrier()
    gdc_launch_dependents()
    gl.warp_specialize(
        [
            (multiply, (
                c, y, c_low, low, b_ring, a_full, a_empty, b_full, b_empty, b_empty_all, units, row_tiles, chunks,
                n1_tiles, c_block, c_column, rows_of_y, width_of_y, y_block, y_row, STEPS, PER_UNIT, RESIDENT,
                A_SLOTS, B_SLOTS, HALF, PANEL, PRODUCTS, STORES, C_POLICY, 0)),
            (multiply, (
                c, y, c_high, high, b_ring, a_full, a_empty, b_full, b_empty, b_empty_all, units, row_tiles, chunks,
                n1_tiles, c_block, c_column, rows_of_y, width_of_y, y_block, y_row, STEPS, PER_UNIT, RESIDENT,
                A_SLOTS, B_SLOTS, HALF, PANEL, PRODUCTS, STORES, C_POLICY, 1)),
            (load, (
                a, b, low, high, b_ring, a_full, a_empty, b_full, b_empty, b_empty_all, units, row_tiles, chunks,
                n1_tiles, a_batch, a_panel, a_column, STEPS, PER_UNIT, RESIDENT, A_SLOTS, B_SLOTS, HALF, LOADS,
                A_POLICY, B_POLICY)),
        ],
        [4, 1],
        [232, 24],
    )  # fmt: skip
    if CTAS > 1:
        cluster.barrier()
