"""A whole Monarch layer on Hopper in Gluon: both products of a tile chained in registers, nothing between in memory.

A CTA owns 128 tokens and up to 256 columns of one output block k. For every input block l the two warpgroups, 64
tokens each, sum z = x[l] V[l,k] over chunks of the input that one warp loads ahead, round z to the dtype of x and add
z U[l,k].
Needs Triton 3.9. Ranks and columns of a tile are powers of two; TMA fills with zeros what lies outside.

Descriptors, tiles in brackets: x [n, i] (64, BK), V [b1, b2, r', p] (1, 1, R, BK), U [b2, q, b1, r'] (1, BQ, 1, R).
"""

# Kernels are Gluon, which reads as Python of other types.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false

from product import unit_of
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@gluon.jit
def load_tiles(
    x, V, U, low, high, V_ring, U_ring, full, empty, U_full, U_empty, tiles, row_tiles, column_tiles,
    B1: gl.constexpr, P: gl.constexpr, SLOTS: gl.constexpr, U_SLOTS: gl.constexpr,
):  # fmt: skip
    """Fill the rings: x and V chunk by chunk, U once for every input block."""
    BK: gl.constexpr = x.block_shape[1]
    CHUNKS: gl.constexpr = (P + BK - 1) // BK
    BQ: gl.constexpr = U.block_shape[1]
    gdc_wait()
    at = 0
    at_U = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        block, columns, rows = unit_of(tile, row_tiles, column_tiles)
        for source in range(B1):
            for chunk in range(CHUNKS):
                slot = at % SLOTS
                mbarrier.wait(empty.index(slot), (at // SLOTS & 1) ^ 1)
                mbarrier.expect(full.index(slot), 2 * x.nbytes_per_cta + V.nbytes_per_cta)
                tma.async_load(V, [source, block, 0, chunk * BK], full.index(slot), V_ring.index(slot))
                tma.async_load(x, [rows * 128, source * P + chunk * BK], full.index(slot), low.index(slot))
                tma.async_load(x, [rows * 128 + 64, source * P + chunk * BK], full.index(slot), high.index(slot))
                at += 1
            slot_U = at_U % U_SLOTS
            mbarrier.wait(U_empty.index(slot_U), (at_U // U_SLOTS & 1) ^ 1)
            mbarrier.expect(U_full.index(slot_U), U.nbytes_per_cta)
            tma.async_load(U, [block, columns * BQ, source, 0], U_full.index(slot_U), U_ring.index(slot_U))
            at_U += 1


@gluon.jit
def multiply(
    y, x_ring, V_ring, U_ring, full, empty, U_full, U_empty, tokens, tiles, row_tiles, column_tiles,
    B1: gl.constexpr, B2: gl.constexpr, P: gl.constexpr, Q: gl.constexpr, SLOTS: gl.constexpr, U_SLOTS: gl.constexpr,
    SECOND: gl.constexpr,
):  # fmt: skip
    """Chain the products of 64 tokens.

    Both are waited for: with one in flight while the registers of its operand are written again, ptxas would wait
    after every single one. The other warpgroup keeps the tensor cores busy.
    """
    R: gl.constexpr = V_ring.shape[3]
    BK: gl.constexpr = V_ring.shape[4]
    BQ: gl.constexpr = U_ring.shape[2]
    CHUNKS: gl.constexpr = (P + BK - 1) // BK
    inner: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, R, 16])
    outer: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BQ, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, outer, 2)
    at = 0
    at_U = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        block, columns, rows = unit_of(tile, row_tiles, column_tiles)
        total = gl.zeros([64, BQ], gl.float32, outer)
        for _ in range(B1):
            between = gl.zeros([64, R], gl.float32, inner)
            for chunk in range(CHUNKS):
                slot = at % SLOTS
                mbarrier.wait(full.index(slot), at // SLOTS & 1)
                right = V_ring.index(slot).reshape([R, BK]).permute([1, 0])
                flying = warpgroup_mma(x_ring.index(slot), right, between, is_async=True, use_acc=chunk > 0)
                between = warpgroup_mma_wait(1, deps=(flying,))
                if chunk > 0:
                    mbarrier.arrive(empty.index((at - 1) % SLOTS))
                at += 1
            between = warpgroup_mma_wait(0, deps=(between,))
            mbarrier.arrive(empty.index((at - 1) % SLOTS))
            left = gl.convert_layout(between.to(y.dtype.element_ty), operand)
            slot_U = at_U % U_SLOTS
            mbarrier.wait(U_full.index(slot_U), at_U // U_SLOTS & 1)
            right = U_ring.index(slot_U).reshape([BQ, R]).permute([1, 0])
            flying = warpgroup_mma(left, right, total, is_async=True)
            total = warpgroup_mma_wait(0, deps=(flying,))
            mbarrier.arrive(U_empty.index(slot_U))
            at_U += 1
        row = rows * 128 + SECOND * 64 + gl.arange(0, 64, gl.SliceLayout(1, outer))
        column = columns * BQ + gl.arange(0, BQ, gl.SliceLayout(0, outer))
        where = row.to(gl.int64)[:, None] * (B2 * Q) + (block * Q + column)[None, :]
        gl.store(y + where, total.to(y.dtype.element_ty), mask=(row < tokens)[:, None] & (column < Q)[None, :])


@gluon.jit
def chained_kernel(
    x, V, U, y, tokens, tiles, row_tiles, column_tiles, B1: gl.constexpr, B2: gl.constexpr, P: gl.constexpr,
    Q: gl.constexpr, SLOTS: gl.constexpr, U_SLOTS: gl.constexpr,
):  # fmt: skip
    """Compute y [n, b2 q], contiguous."""
    low = gl.allocate_shared_memory(x.dtype, [SLOTS] + x.block_shape, x.layout)  # noqa: RUF005
    high = gl.allocate_shared_memory(x.dtype, [SLOTS] + x.block_shape, x.layout)  # noqa: RUF005
    V_ring = gl.allocate_shared_memory(V.dtype, [SLOTS] + V.block_shape, V.layout)  # noqa: RUF005
    U_ring = gl.allocate_shared_memory(U.dtype, [U_SLOTS] + U.block_shape, U.layout)  # noqa: RUF005
    full = mbarrier.allocate_mbarrier(batch=SLOTS)
    empty = mbarrier.allocate_mbarrier(batch=SLOTS)
    U_full = mbarrier.allocate_mbarrier(batch=U_SLOTS)
    U_empty = mbarrier.allocate_mbarrier(batch=U_SLOTS)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    for slot in gl.static_range(U_SLOTS):
        mbarrier.init(U_full.index(slot), count=1)
        mbarrier.init(U_empty.index(slot), count=2)
    gdc_launch_dependents()
    gl.warp_specialize(
        [
            (multiply, (y, low, V_ring, U_ring, full, empty, U_full, U_empty, tokens, tiles, row_tiles, column_tiles,
                        B1, B2, P, Q, SLOTS, U_SLOTS, 0)),
            (multiply, (y, high, V_ring, U_ring, full, empty, U_full, U_empty, tokens, tiles, row_tiles, column_tiles,
                        B1, B2, P, Q, SLOTS, U_SLOTS, 1)),
            (load_tiles, (x, V, U, low, high, V_ring, U_ring, full, empty, U_full, U_empty, tiles, row_tiles,
                          column_tiles, B1, P, SLOTS, U_SLOTS)),
        ],
        [4, 1],
        [232, 24],
    )  # fmt: skip
