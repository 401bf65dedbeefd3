"""BLAST layer for many tokens: PyTorch's batched products by V and U, and a Triton kernel that mixes between them.

Shapes: x [..., b1 p], V [b1, p, r], S [b1, b2, r], U [b2, r, q], bias [b2 q].

Tokens are last in memory throughout. The kernel computes W[:, rho, :] = S[:, :, rho]^T Z[:, rho, :] for every rank
rho, [b2, b1] x [b1, n], from Z [b1, r, n] into W [b2, r, n]: a product on tensor cores of two matrices whose rows are
adjacent in memory, so nothing is permuted, not even within a tile. b1 and b2 are padded to 16 there, in registers
alone. It moves Z and W once, n r (b1 + b2) numbers, which binds it; PyTorch's product batched over ranks moves as
much, in r small matrices.
"""

# Kernels are Triton's language, which reads as Python of other types.
# pyright: reportGeneralTypeIssues=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from blrlab_ops import batched, launching
from blrlab_ops import epilogue as after
from blrlab_ops.custom_ops import operator
from blrlab_ops.epilogue import Epilogue
from blrlab_ops.launching import Launch
from blrlab_ops.triton_product import ceil_div, power_of_two, strides

from .layout import pack
from .torch_bmm import gradients

__all__ = ["linear", "pack"]


class Tiles(NamedTuple):
    """What one program mixes: `tokens` of `ranks` ranks, one rank after another, all blocks."""

    tokens: int = 128
    ranks: int = 1
    warps: int = 2
    stages: int = 1


@triton.jit
def token_mix_kernel(
    Z,
    S,
    W,
    tokens,
    Z_block,
    Z_rank,
    S_from,
    S_to,
    S_rank,
    W_block,
    W_rank,
    B1: tl.constexpr,
    B2: tl.constexpr,
    RANK: tl.constexpr,
    BB1: tl.constexpr,
    BB2: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute W[:, rho, n] for BR ranks and BN tokens, which are adjacent in memory."""
    rank_tiles: tl.constexpr = (RANK + BR - 1) // BR
    program = tl.program_id(0)
    first_rank = program % rank_tiles * BR
    columns = program // rank_tiles * BN + tl.arange(0, BN)
    sources, targets = tl.arange(0, BB1), tl.arange(0, BB2)
    columns_mask = columns[None, :] < tokens
    Z_tile = Z + sources[:, None].to(tl.int64) * Z_block + columns[None, :]
    W_tile = W + targets[:, None].to(tl.int64) * W_block + columns[None, :]
    S_tile = S + targets[:, None] * S_to + sources[None, :] * S_from
    for step in tl.range(0, BR, num_stages=STAGES):
        rank = (first_rank + step).to(tl.int64)
        from_blocks, to_blocks = tl.where(rank < RANK, B1, 0), tl.where(rank < RANK, B2, 0)
        S_mask = (targets[:, None] < to_blocks) & (sources[None, :] < from_blocks)
        scale = tl.load(S_tile + rank * S_rank, mask=S_mask, other=0.0)
        values = tl.load(Z_tile + rank * Z_rank, mask=(sources[:, None] < from_blocks) & columns_mask, other=0.0)
        mixed = tl.dot(scale, values, input_precision="ieee")  # [BB2, BN]
        mask = (targets[:, None] < to_blocks) & columns_mask
        tl.store(W_tile + rank * W_rank, mixed.to(W.dtype.element_ty), mask=mask)


def mix(Z: Tensor, S: Tensor, W: Tensor, size: Tiles | None = None) -> Launch:
    """Describe the launch that fills W [b2, r, n] from Z [b1, r, n] and S [b1, b2, r]; tokens are adjacent."""
    b1, rank, tokens = Z.shape
    b2 = W.shape[0]
    size = size or tiles(tokens, b1, b2)
    constants = {"B1": b1, "B2": b2, "RANK": rank, "BN": size.tokens, "BR": size.ranks, "STAGES": size.stages}
    constants |= {"BB1": max(16, power_of_two(b1)), "BB2": max(16, power_of_two(b2))}
    arguments = {"Z": Z, "S": S, "W": W, "tokens": tokens}
    arguments |= {"Z_block": Z.stride(0), "Z_rank": Z.stride(1), "W_block": W.stride(0), "W_rank": W.stride(1)}
    arguments |= strides("S", ("from", "to", "rank"), S)
    programs = ceil_div(rank, size.ranks) * ceil_div(tokens, size.tokens)
    return Launch(token_mix_kernel, programs, arguments, constants, size.warps, size.stages)


def tiles(tokens: int, b1: int, b2: int) -> Tiles:
    """Choose the tile sizes by fixed rules: 2048 numbers of Z and of W, of one rank."""
    widest = max(16, 2048 // max(16, power_of_two(b1), power_of_two(b2)))
    return Tiles(min(widest, max(16, power_of_two(tokens))))


def _compute(x: Tensor, V: Tensor, S: Tensor, U: Tensor, bias: Tensor | None, epilogue: Epilogue) -> Tensor:
    b1, p, rank = V.shape
    with torch.no_grad():
        Z = batched.to_columns(V.transpose(1, 2), x.unflatten(1, (b1, p)).permute(1, 2, 0))  # [b1, r, n]
        spare = batched.spare(x, bias, V, S, U, tokens=x.shape[0], columns=U.shape[0] * U.shape[2], depth=rank)
        W = batched.columns(x, S.shape[1], rank + spare, x.shape[0])  # [b2, r + spare, n]
        launching.run([mix(Z, S, W[:, :rank])], x.device)
        return after.apply(batched.to_rows(W.transpose(1, 2), U, bias), epilogue)


linear = operator("blast", "mixing", "VSU", lambda V, S, U: U.shape[0] * U.shape[2], None, gradients, _compute)
