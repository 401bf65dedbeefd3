"""BLAST layer as two Triton launches: project and mix, then a batched product.

Shapes: x [..., b1 p], V [b1, p, r], S [b1, b2, r], U [b2, r, q], bias [b2 q].

Stage one owns a tile of tokens and ranks and all input blocks: it makes z_l = x[l] V[l] for one l after the
other and adds S[l,k] z_l to the sums of up to 16 output blocks, all in float32 and in registers. So every
multiplication by S is done once, z never reaches memory, and W [b2, n, r] = sum_l S[l,k] z_l is the one
intermediate, stored in the dtype of x. Stage two is y[k] = W[k] U[k] + bias[k]. More than 16 output blocks
take several programs, each with its own z.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from blrlab_ops import configs, launching, triton_product
from blrlab_ops.configs import Config
from blrlab_ops.custom_ops import operator
from blrlab_ops.epilogue import NOTHING, Epilogue
from blrlab_ops.launching import Launch
from blrlab_ops.triton_parts import INTERPRETED, add_product, begin
from blrlab_ops.triton_product import Tiles, ceil_div, power_of_two, product, strides

from . import layout
from .torch_bmm import gradients

__all__ = ["launches", "linear", "pack"]


class MixTiles(NamedTuple):
    """What one program of the mixing stage computes: sums of `blocks` x `rows` x `ranks`, `depth` at a time."""

    blocks: int
    rows: int
    ranks: int
    depth: int
    warps: int
    stages: int


@triton.jit
def mix_kernel(
    x,
    V,
    S,
    W,
    tokens,
    x_block,
    x_row,
    x_column,
    V_block,
    V_row,
    V_rank,
    S_from,
    S_to,
    S_rank,
    W_block,
    W_row,
    W_rank,
    B1: tl.constexpr,
    B2: tl.constexpr,
    P: tl.constexpr,
    RANK: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
    SIGNAL: tl.constexpr,
):
    """Compute W[k, n, r] for BK output blocks, BN tokens and BR ranks."""
    begin(SIGNAL)
    program = tl.program_id(0)
    rank_tiles: tl.constexpr = (RANK + BR - 1) // BR
    block_tiles: tl.constexpr = (B2 + BK - 1) // BK
    ranks = (program % rank_tiles) * BR + tl.arange(0, BR)
    blocks = (program // rank_tiles % block_tiles) * BK + tl.arange(0, BK)
    rows = (program // rank_tiles // block_tiles) * BN + tl.arange(0, BN)
    rank_offsets = ranks.to(tl.int64)
    row_offsets = rows.to(tl.int64)
    block_offsets = blocks.to(tl.int64)

    S_mask = (blocks[:, None] < B2) & (ranks[None, :] < RANK)
    S_tile = S + block_offsets[:, None] * S_to + rank_offsets[None, :] * S_rank
    x_rows = x + row_offsets[:, None] * x_row
    V_ranks = V + rank_offsets[None, :] * V_rank
    mixed = tl.zeros((BK, BN, BR), dtype=tl.float32)
    for _ in range(B1):
        z = tl.zeros((BN, BR), dtype=tl.float32)
        for start in range(0, P, BP):
            depth = start + tl.arange(0, BP)
            depth_offsets = depth.to(tl.int64)
            x_mask = (rows[:, None] < tokens) & (depth[None, :] < P)
            V_mask = (depth[:, None] < P) & (ranks[None, :] < RANK)
            x_tile = tl.load(x_rows + depth_offsets[None, :] * x_column, mask=x_mask, other=0.0)  # [BN, BP]
            V_tile = tl.load(V_ranks + depth_offsets[:, None] * V_row, mask=V_mask, other=0.0)  # [BP, BR]
            z = add_product(z, x_tile, V_tile)
        scale = tl.load(S_tile, mask=S_mask, other=0.0).to(tl.float32)  # [BK, BR]
        mixed += scale[:, None, :] * z[None, :, :]
        x_rows += x_block
        V_ranks += V_block
        S_tile += S_from

    W_tile = W + block_offsets[:, None, None] * W_block + row_offsets[None, :, None] * W_row
    W_tile += rank_offsets[None, None, :] * W_rank
    W_mask = (blocks[:, None, None] < B2) & (rows[None, :, None] < tokens) & (ranks[None, None, :] < RANK)
    tl.store(W_tile, mixed.to(W.dtype.element_ty), mask=W_mask)


def launches(
    x: Tensor,
    V: Tensor,
    S: Tensor,
    U: Tensor,
    bias: Tensor | None,
    y: Tensor,
    epilogue: Epilogue = NOTHING,
    config: Config | None = None,
) -> list[Launch]:
    """Describe the two launches that fill y [n, o] from x [n, i]."""
    tokens, rank, early = x.shape[0], U.shape[1], launching.overlaps(x.device)
    found = tuned("triton_two_stage", x, V, U) if config is None else config
    W = x.new_empty(U.shape[0], tokens, rank)
    first = _mix(x, V, S, W, configs.size(found, "first", MixTiles), early)
    size = configs.size(found, "second", Tiles)
    return [first, product(W, U, blocks_of(y, U), bias_of_blocks(bias, U), epilogue, size, wait=early)]


def tuned(impl: str, x: Tensor, V: Tensor, U: Tensor) -> Config:
    """Look up what tuning found for a BLAST layer."""
    features, blocks = (V.shape[0] * V.shape[1], U.shape[0] * U.shape[2]), (V.shape[0], U.shape[0])
    return configs.tuned("blast", impl, x.shape[0], features, blocks, V.shape[2], configs.dtype_of(x, V), x.device)


def blocks_of(y: Tensor, U: Tensor) -> Tensor:
    """View y [n, o] as [b2, n, 1, q]."""
    return y.view(y.shape[0], U.shape[0], 1, U.shape[2]).transpose(0, 1)


def bias_of_blocks(bias: Tensor | None, U: Tensor) -> Tensor | None:
    """View a bias [o] as [b2, q]."""
    return None if bias is None else bias.unflatten(0, (U.shape[0], -1))


def tiles(tokens: int, blocks: int, rank: int, depth: int, interpreted: bool = False) -> MixTiles:
    """Choose the tile sizes of the mixing kernel: fixed rules, powers of two.

    The sums of BK output blocks stay in registers, 16384 floats a program at most; BK alone may be under 16.
    """
    BK = min(16, power_of_two(blocks))
    side = 64 if interpreted or BK <= 4 else 32
    BN, BR = (min(side, max(16, power_of_two(size))) for size in (tokens, rank))
    deepest = 128 if interpreted else 32
    return MixTiles(BK, BN, BR, min(deepest, max(16, power_of_two(depth))), warps=8, stages=3)


def pack(V: Tensor, S: Tensor, U: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Store V as [b1, r, p] and U as [b2, q, r] in memory, and S contiguously; shapes and values stay."""
    return layout.rows(V), S.contiguous(), layout.rows(U)


def _mix(x: Tensor, V: Tensor, S: Tensor, W: Tensor, size: MixTiles | None, signal: bool) -> Launch:
    b1, p, rank = V.shape
    b2, tokens, _ = W.shape
    size = size or tiles(tokens, b2, rank, p, INTERPRETED)
    constants = {"B1": b1, "B2": b2, "P": p, "RANK": rank, "SIGNAL": signal}
    constants |= {"BK": size.blocks, "BN": size.rows, "BR": size.ranks, "BP": size.depth}
    arguments = {"x": x, "V": V, "S": S, "W": W, "tokens": tokens}
    arguments |= strides("x", ("row", "block", "column"), x.unflatten(1, (b1, p)))
    arguments |= strides("V", ("block", "row", "rank"), V)
    arguments |= strides("S", ("from", "to", "rank"), S)
    arguments |= strides("W", ("block", "row", "rank"), W)
    programs = ceil_div(b2, size.blocks) * ceil_div(tokens, size.rows) * ceil_div(rank, size.ranks)
    return Launch(mix_kernel, programs, arguments, constants, size.warps, size.stages)


def candidates(x: Tensor, V: Tensor, S: Tensor, U: Tensor) -> dict[str, list]:
    """List the tiles worth a measurement, by launch."""
    tokens, (b2, rank, q), itemsize = x.shape[0], U.shape, x.element_size()
    usual = tiles(tokens, b2, rank, V.shape[1])
    first = [usual._replace(rows=rows, warps=warps) for rows in (16, 32, 64) for warps in (4, 8)]
    return {"first": first, "second": triton_product.candidates(tokens, q, rank, itemsize)}


linear = operator("blast", "two_stage", "VSU", lambda V, S, U: U.shape[0] * U.shape[2], launches, gradients)
