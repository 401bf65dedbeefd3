"""Monarch layer in one launch: both products chained in registers, no intermediate in memory.

Shapes: x [..., b1 p], V [b1, b2, p, r'], U [b1, b2, r', q], bias [b2 q].

A program owns BN tokens and BC columns of one output block k, and goes along the input once: for every chunk d of
input block l, y += (x[l,d] V[l,k,d]) U[l,k], which is linear in the chunks, so that the loop has one body and every
load of it can be on its way early. V[l,k,d] x is rounded to the dtype of x between the products. A rank that is no
power of two is cut in two that are, 48 = 32 + 16, and one over 128 in chunks, for each of which x is read again.

Recomputed is the first product, q / BC times; the second is done once for every chunk. Read at the L2: x once for
every tile of columns, V once for every tile of tokens and columns, U once for every tile of tokens and chunk. One
launch and no intermediate make it the choice for small layers (GPT-2, ViT), where launches and waiting take most of
the time; with many tokens the recomputation and the traffic at the L2 cost more than an intermediate.
"""

# Kernels are Triton's language, which reads as Python of other types.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false

import itertools
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from blrlab_ops import configs
from blrlab_ops.configs import Config
from blrlab_ops.custom_ops import operator
from blrlab_ops.epilogue import NOTHING, Epilogue
from blrlab_ops.launching import Launch
from blrlab_ops.triton_parts import add_product, finish
from blrlab_ops.triton_product import FLOAT32_DEPTH, ceil_div, halves, power_of_two, strides

from .layout import pack
from .torch_bmm import gradients
from .triton_two_stage import bias_of_blocks, tuned

__all__ = ["launches", "linear", "pack"]

MOST_RANK = 128  # of a block that one program takes at a time


class Tiles(NamedTuple):
    """What one program computes: `rows` x `columns` of the result, `depth` of the input at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@triton.jit
def chained(x, V, U, total, rows_mask, depth_mask, columns_mask, ranks, RANK: tl.constexpr, WHOLE: tl.constexpr):
    """Add (x V) U to the sums, for one part of the rank and one chunk of the input."""
    ranks_mask = ranks < RANK
    if WHOLE:
        V_values = tl.load(V, mask=ranks_mask[None, :], other=0.0)
    else:
        V_values = tl.load(V, mask=depth_mask[:, None] & ranks_mask[None, :], other=0.0)  # [BD, R]
    U_values = tl.load(U, mask=ranks_mask[:, None] & columns_mask[None, :], other=0.0)  # [R, BC]
    product = tl.dot(x, V_values, input_precision="ieee")  # [BN, R]
    return add_product(total, product.to(x.dtype), U_values)


@triton.jit
def chain_kernel(
    x,
    V,
    U,
    y,
    bias,
    multiply,
    residual,
    tokens,
    x_block,
    x_row,
    x_column,
    V_from,
    V_to,
    V_row,
    V_rank,
    U_from,
    U_to,
    U_rank,
    U_column,
    y_block,
    y_row,
    bias_block,
    bias_column,
    B1: tl.constexpr,
    B2: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    RANK: tl.constexpr,
    RANK_CHUNKS: tl.constexpr,
    R1: tl.constexpr,
    R2: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Compute one [BN, BC] tile of one output block."""
    column_tiles: tl.constexpr = (Q + BC - 1) // BC
    chunks: tl.constexpr = (P + BD - 1) // BD
    program = tl.program_id(0)
    block = (program // column_tiles % B2).to(tl.int64)
    rows = ((program // (column_tiles * B2)) * BN + tl.arange(0, BN)).to(tl.int64)
    rows_mask = rows < tokens
    columns = (program % column_tiles) * BC + tl.arange(0, BC)
    columns_mask = columns < Q
    x_rows = x + rows[:, None] * x_row
    V += block * V_to
    U += block * U_to
    total = tl.zeros((BN, BC), dtype=tl.float32)
    wide = tl.full((), 0, tl.int64)
    for step in range(0, RANK_CHUNKS * B1 * chunks):
        first_rank = step // (B1 * chunks) * (R1 + R2)
        source = wide + step // chunks % B1
        depth = (step % chunks) * BD + tl.arange(0, BD).to(tl.int64)
        depth_mask = depth < P
        WHOLE: tl.constexpr = P % BD == 0
        if WHOLE:
            x_mask = rows_mask[:, None]
        else:
            x_mask = rows_mask[:, None] & depth_mask[None, :]
        x_values = tl.load(x_rows + source * x_block + depth[None, :] * x_column, mask=x_mask, other=0.0)  # [BN, BD]
        V_rows = V + source * V_from + depth[:, None] * V_row
        U_columns = U + source * U_from + columns[None, :] * U_column
        ranks1 = first_rank + tl.arange(0, R1)
        total = chained(
            x_values, V_rows + ranks1[None, :] * V_rank, U_columns + ranks1[:, None] * U_rank, total,
            rows_mask, depth_mask, columns_mask, ranks1, RANK, WHOLE,
        )  # fmt: skip
        if R2 > 0:
            ranks2 = first_rank + R1 + tl.arange(0, R2)
            total = chained(
                x_values, V_rows + ranks2[None, :] * V_rank, U_columns + ranks2[:, None] * U_rank, total,
                rows_mask, depth_mask, columns_mask, ranks2, RANK, WHOLE,
            )  # fmt: skip

    offsets = block * y_block + rows[:, None] * y_row + columns[None, :]
    mask = rows_mask[:, None] & columns_mask[None, :]
    bias_offsets = block * bias_block + columns * bias_column
    total = finish(total, bias, multiply, residual, offsets, mask, bias_offsets, columns_mask, ACTIVATION)
    tl.store(y + offsets, total.to(y.dtype.element_ty), mask=mask)


def launches(
    x: Tensor,
    V: Tensor,
    U: Tensor,
    bias: Tensor | None,
    y: Tensor,
    epilogue: Epilogue = NOTHING,
    config: Config | None = None,
) -> list[Launch]:
    """Describe the launch that fills y [n, o] from x [n, i]."""
    b1, b2, p, rank = V.shape
    tokens, q = x.shape[0], U.shape[3]
    found = tuned("triton_fused", x, V, U) if config is None else config
    size = configs.size(found, "only", Tiles) or tiles(tokens, p, q, rank, x.element_size())
    chunks, first, second = parts(rank)
    constants = {"B1": b1, "B2": b2, "P": p, "Q": q, "RANK": rank, "RANK_CHUNKS": chunks, "R1": first, "R2": second}
    constants |= {"BN": size.rows, "BC": size.columns, "BD": size.depth, "ACTIVATION": epilogue.activation}
    arguments = {"x": x, "V": V, "U": U, "y": y, "bias": bias, "tokens": tokens}
    arguments |= {"multiply": epilogue.multiply, "residual": epilogue.residual}
    arguments |= strides("x", ("row", "block", "column"), x.unflatten(1, (b1, p)))
    arguments |= strides("V", ("from", "to", "row", "rank"), V)
    arguments |= strides("U", ("from", "to", "rank", "column"), U)
    arguments |= {"y_block": q, "y_row": b2 * q}
    blocks = bias_of_blocks(bias, b2)
    arguments |= {"bias_block": 0, "bias_column": 0} if blocks is None else strides("bias", ("block", "column"), blocks)
    programs = ceil_div(tokens, size.rows) * b2 * ceil_div(q, size.columns)
    return [Launch(chain_kernel, programs, arguments, constants, size.warps, size.stages)]


def parts(rank: int) -> tuple[int, int, int]:
    """Cut a rank in equal chunks of one or two powers of two: (chunks, first part, second part or 0).

    >>> parts(48), parts(64), parts(96), parts(5), parts(384)
    ((1, 32, 16), (1, 64, 0), (1, 64, 32), (1, 16, 0), (3, 128, 0))
    """
    chunks = ceil_div(rank, MOST_RANK)
    return (chunks, *halves(ceil_div(rank, chunks)))


def tiles(tokens: int, p: int, q: int, rank: int, itemsize: int) -> Tiles:
    """Choose the tile sizes by fixed rules: 64 x 64 of the result, less where registers would overflow."""
    widest = 32 if itemsize == 4 or rank > 64 else 64
    rows = min(widest, max(16, power_of_two(tokens)))
    depth = 64 if p % 64 == 0 and itemsize == 2 and rank <= 64 else 32
    return Tiles(rows, min(widest, max(16, power_of_two(q))), min(depth, max(16, power_of_two(p))), 4, 3)


def candidates(x: Tensor, V: Tensor, U: Tensor) -> dict[str, list[Tiles]]:
    """List the tiles worth a measurement, by launch."""
    tokens, itemsize, (p, rank), q = x.shape[0], x.element_size(), V.shape[2:], U.shape[3]
    rows = [size for size in (16, 32, 64, 128) if size <= max(16, power_of_two(tokens))]
    widths = [size for size in (32, 64, 128, 256) if size <= max(32, power_of_two(q))]
    deepest = FLOAT32_DEPTH if itemsize == 4 else 256
    steps = [size for size in (32, 64, 128, 256) if size <= min(deepest, max(32, power_of_two(p)))]
    found = []
    for height, width, step, stages, warps in itertools.product(rows, widths, steps, (2, 3, 4), (4, 8)):
        shared = stages * (step * height + parts(rank)[1] * (step + width)) * itemsize
        if shared <= 160 * 1024 and 8 <= height * width // (32 * warps) <= 64:
            found.append(Tiles(height, width, step, warps, stages))
    return {"only": found}


linear = operator("monarch", "fused", "VU", lambda V, U: V.shape[1] * U.shape[3], launches, gradients)
