"""BLAST layer as three Triton launches, the mixing as a product batched over ranks, on tensor cores.

Shapes: x [..., b1 p], V [b1, p, r], S [b1, b2, r], U [b2, r, q], bias [b2 q].

Stage one stores Z[l] = x[l] V[l] at [n, b1, r]; stage two is W[:, :, rho] = Z[:, :, rho] S[:, :, rho] for every rank
rho, [n, b1] x [b1, b2], stored at [n, b2, r]; stage three is W[k] U[k], with bias and epilogue. Z and W are rounded to
the dtype of x. S is padded to 16 x 16 there: b1 = b2 = 16 pays nothing for it, fewer blocks do. What the middle stage
moves is Z and W, 2 n r (b1 + b2) bytes of 16-bit numbers, from and to the L2 where it holds them.

Layers that share x (`blrlab_ops.joined`) have a U [g, b2, r, q], and their ranks side by side in V and S: three
launches for all of them.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from blrlab_ops import configs, launching, triton_product
from blrlab_ops.configs import Config
from blrlab_ops.custom_ops import operator
from blrlab_ops.dispatch import MANY_BLOCKS
from blrlab_ops.epilogue import NOTHING, Epilogue
from blrlab_ops.launching import Launch
from blrlab_ops.triton_parts import INTERPRETED, begin, wait
from blrlab_ops.triton_product import Tiles, ceil_div, power_of_two, product, strides
from blrlab_ops.triton_streaming import summed

from .layout import pack
from .torch_bmm import gradients
from .triton_two_stage import bias_of_blocks, blocks_of, tuned

__all__ = ["launches", "linear", "pack"]


class MixTiles(NamedTuple):
    """What one program of the middle stage computes: `rows` tokens of `ranks` ranks, all blocks.

    `tensor`: as a product batched over ranks, on tensor cores; else on CUDA cores.
    """

    rows: int
    ranks: int
    warps: int
    stages: int = 1
    tensor: bool = True


@triton.jit
def rank_mix_kernel(
    Z,
    S,
    W,
    tokens,
    Z_row,
    Z_block,
    Z_rank,
    S_from,
    S_to,
    S_rank,
    W_row,
    W_block,
    W_rank,
    B1: tl.constexpr,
    B2: tl.constexpr,
    RANK: tl.constexpr,
    BB1: tl.constexpr,
    BB2: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    SIGNAL: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Compute W[n, k, r] for BN tokens and BR ranks."""
    begin(SIGNAL)
    rank_tiles: tl.constexpr = (RANK + BR - 1) // BR
    program = tl.program_id(0)
    ranks = (program % rank_tiles) * BR + tl.arange(0, BR)
    first_row = program // rank_tiles * BN
    rows = tl.arange(0, BN)
    sources, targets = tl.arange(0, BB1), tl.arange(0, BB2)
    ranks_mask, rows_mask = ranks < RANK, first_row + rows < tokens

    S_tile = S + ranks[:, None, None] * S_rank + sources[None, :, None] * S_from + targets[None, None, :] * S_to
    S_mask = ranks_mask[:, None, None] & (sources[None, :, None] < B1) & (targets[None, None, :] < B2)
    scale = tl.load(S_tile, mask=S_mask, other=0.0)  # [BR, B1, B2]
    wait(WAIT)
    Z_tile = Z + first_row.to(tl.int64) * Z_row + rows[None, :, None] * Z_row
    Z_tile += ranks[:, None, None] * Z_rank + sources[None, None, :] * Z_block
    Z_mask = ranks_mask[:, None, None] & rows_mask[None, :, None] & (sources[None, None, :] < B1)
    values = tl.load(Z_tile, mask=Z_mask, other=0.0)  # [BR, BN, B1]
    mixed = tl.dot(values, scale, input_precision="ieee")  # [BR, BN, B2]
    W_tile = W + first_row.to(tl.int64) * W_row + rows[None, :, None] * W_row
    W_tile += ranks[:, None, None] * W_rank + targets[None, None, :] * W_block
    W_mask = ranks_mask[:, None, None] & rows_mask[None, :, None] & (targets[None, None, :] < B2)
    tl.store(W_tile, mixed.to(W.dtype.element_ty), mask=W_mask)


@triton.jit
def core_mix_kernel(
    Z,
    S,
    W,
    tokens,
    Z_row,
    Z_block,
    Z_rank,
    S_from,
    S_to,
    S_rank,
    W_row,
    W_block,
    W_rank,
    B1: tl.constexpr,
    B2: tl.constexpr,
    RANK: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    SIGNAL: tl.constexpr,
    WAIT: tl.constexpr,
):
    """Compute W[n, k, r] for one output block, BN tokens and BR ranks."""
    begin(SIGNAL)
    rank_tiles: tl.constexpr = (RANK + BR - 1) // BR
    program = tl.program_id(0)
    block = program % B2
    ranks = (program // B2 % rank_tiles) * BR + tl.arange(0, BR)
    first_row = program // B2 // rank_tiles * BN
    rows = tl.arange(0, BN)
    ranks_mask, rows_mask = ranks < RANK, first_row + rows < tokens
    mask = rows_mask[:, None] & ranks_mask[None, :]
    Z_tile = Z + first_row.to(tl.int64) * Z_row + rows[:, None] * Z_row + ranks[None, :] * Z_rank
    scale = block * S_to + ranks[None, :] * S_rank
    wait(WAIT)
    mixed = summed(Z_tile, mask, Z_block, S, scale, ranks_mask[None, :], S_from, B1)  # [BN, BR]
    W_tile = W + first_row.to(tl.int64) * W_row + rows[:, None] * W_row + ranks[None, :] * W_rank
    tl.store(W_tile + block * W_block, mixed.to(W.dtype.element_ty), mask=mask)


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
    """Describe the three launches that fill y [n, o] from x [n, i]."""
    groups, U = joined_blocks(U)
    b1, p, rank = V.shape
    tokens, b2, early = x.shape[0], S.shape[1], launching.overlaps(x.device)
    found = tuned("triton_three_stage", x, V, U) if config is None else config
    Z, W = x.new_empty(tokens, b1, rank), x.new_empty(tokens, b2, rank)
    x_blocks = x.unflatten(1, (b1, p)).transpose(0, 1)  # [b1, n, p]
    size = configs.size(found, "first", Tiles)
    first = product(x_blocks, V, Z.transpose(0, 1)[:, :, None], size=size, signal=early)
    middle = mix(Z, S, W, configs.size(found, "middle", MixTiles), early)
    blocks, size = ranks_of_groups(W, groups), configs.size(found, "second", Tiles)  # [g, b2, n, r]
    return [
        first,
        middle,
        product(blocks, U, blocks_of(y, U), bias_of_blocks(bias, U), epilogue, size, wait=early),
    ]


def joined_blocks(U: Tensor) -> tuple[int, Tensor]:
    """Return how many layers U is of, and the output blocks of all, [g b2, r, q]."""
    return (U.shape[0], U.flatten(0, 1)) if U.ndim == 4 else (1, U)


def ranks_of_groups(W: Tensor, groups: int) -> Tensor:
    """View W [n, b2, g r] as [g, b2, n, r]."""
    return W.unflatten(2, (groups, -1)).permute(2, 1, 0, 3)


def out_features(V: Tensor, S: Tensor, U: Tensor) -> int:
    """Return o, or g o of joined layers."""
    return U.shape[:-2].numel() * U.shape[-1]


def mix(Z: Tensor, S: Tensor, W: Tensor, size: MixTiles | None, early: bool) -> Launch:
    """Describe the launch that fills W [n, b2, r] from Z [n, b1, r] and S [b1, b2, r]."""
    tokens, b1, rank = Z.shape
    b2 = W.shape[1]
    size = size or tiles(tokens, b1, b2, rank)
    constants = {"B1": b1, "B2": b2, "RANK": rank, "BN": size.rows, "BR": size.ranks, "SIGNAL": early, "WAIT": early}
    arguments = {"Z": Z, "S": S, "W": W, "tokens": tokens}
    arguments |= strides("Z", ("row", "block", "rank"), Z)
    arguments |= strides("S", ("from", "to", "rank"), S)
    arguments |= strides("W", ("row", "block", "rank"), W)
    programs = ceil_div(tokens, size.rows) * ceil_div(rank, size.ranks)
    if not size.tensor:
        return Launch(core_mix_kernel, programs * b2, arguments, constants, size.warps, size.stages, early=early)
    constants |= {"BB1": max(16, power_of_two(b1)), "BB2": max(16, power_of_two(b2))}
    return Launch(rank_mix_kernel, programs, arguments, constants, size.warps, size.stages, early=early)


def tiles(tokens: int, b1: int, b2: int, rank: int) -> MixTiles:
    """Choose the tile of the middle stage by fixed rules: on tensor cores where 16 x 16 is mostly used."""
    if min(b1, b2) < MANY_BLOCKS:
        rows = max(1, min(16, power_of_two(tokens)))
        return MixTiles(rows, min(64, power_of_two(rank)), warps=4, tensor=False)
    rows = min(64 if INTERPRETED else 32, max(16, power_of_two(tokens)))
    return MixTiles(rows, min(32 if INTERPRETED else 8, power_of_two(rank)), warps=4)


def candidates(x: Tensor, V: Tensor, S: Tensor, U: Tensor) -> dict[str, list]:
    """List the tiles worth a measurement, by launch."""
    (_, p, rank), tokens, itemsize = V.shape, x.shape[0], x.element_size()
    first = triton_product.candidates(tokens, rank, p, itemsize)
    last = triton_product.candidates(tokens, U.shape[2], rank, itemsize)
    return {"first": first, "middle": mix_candidates(tokens, rank), "second": last}


def mix_candidates(tokens: int, rank: int) -> list[MixTiles]:
    """List the tiles of the middle stage worth a measurement."""
    rows = [size for size in (16, 32) if size <= max(16, power_of_two(tokens))]
    found = [MixTiles(size, ranks, warps) for size in rows for ranks in (4, 8) for warps in (2, 4)]
    rows = [size for size in (2, 4, 8, 16, 32) if size <= max(2, power_of_two(tokens))]
    widths = [size for size in (32, 64, 128) if size <= max(32, power_of_two(rank))]
    return found + [MixTiles(size, ranks, 4, tensor=False) for size in rows for ranks in widths if size * ranks <= 2048]


linear = operator("blast", "three_stage", "VSU", out_features, launches, gradients)
