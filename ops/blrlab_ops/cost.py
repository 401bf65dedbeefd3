"""What a layer costs: parameters, floating-point operations, bytes, and the time no kernel can beat.

Pure functions of plain ints; nothing but Python is needed. n tokens, W [i, o] in b1 x b2 blocks [p, q],
`rank` is r for low_rank and blast and r' (of one block) for monarch:

| format | parameters | tensor-core flops | CUDA-core flops |
|---|---|---|---|
| dense | i o | 2 n i o | 0 |
| low_rank | r (i + o) | 2 n r (i + o) | 0 |
| monarch | r' (b2 i + b1 o) | 2 n r' (b2 i + b1 o) | 0 |
| blast | r (i + o + b1 b2) | 2 n r (i + o) | 2 n r b1 b2 |

A multiply-add counts as two operations. The diagonal S of blast is counted apart: it multiplies b1 x b2 numbers for
each rank, on CUDA cores or as a product batched over ranks. `algorithms` counts what one way of computing a layer does.
"""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .devices import Device

FORMATS = ("dense", "low_rank", "monarch", "blast")


class Flops(NamedTuple):
    """Operations of a layer by where they run: tensor cores (matrix products), CUDA cores (the rest)."""

    tensor: int
    cuda: int


class Cost(NamedTuple):
    """Operations of one call of a layer, and its compulsory bytes: x and the parameters read and y written once."""

    tensor_flops: int
    cuda_flops: int
    bytes_compulsory: int


class Bound(NamedTuple):
    """The least time of a call in us, and the `term` that sets it: "tensor" or "dram"."""

    us: float
    term: str


def params(format: str, in_features: int, out_features: int, blocks: tuple[int, int] = (1, 1), rank: int = 0) -> int:
    """Count the parameters of a layer without its bias.

    >>> params("monarch", 768, 2304, (4, 4), 48)
    589824

    Raises:
      ValueError: for an unknown format, blocks that do not divide the features, or a rank below 1.
    """
    _check(format, in_features, out_features, blocks, rank)
    b1, b2 = blocks
    if format == "dense":
        return in_features * out_features
    if format == "low_rank":
        return rank * (in_features + out_features)
    if format == "monarch":
        return rank * (b2 * in_features + b1 * out_features)
    return rank * (in_features + out_features + b1 * b2)


def flops(
    format: str,
    tokens: int,
    in_features: int,
    out_features: int,
    blocks: tuple[int, int] = (1, 1),
    rank: int = 0,
) -> Flops:
    """Count the operations of a forward call, two for each multiply-add; the bias is not counted.

    >>> flops("blast", 384, 768, 2304, (6, 6), 192)
    Flops(tensor=452984832, cuda=5308416)
    """
    parameters = params(format, in_features, out_features, blocks, rank)
    mixing = rank * blocks[0] * blocks[1] if format == "blast" else 0
    return Flops(2 * tokens * (parameters - mixing), 2 * tokens * mixing)


def cost(
    format: str,
    tokens: int,
    in_features: int,
    out_features: int,
    blocks: tuple[int, int] = (1, 1),
    rank: int = 0,
    *,
    itemsize: int = 2,
) -> Cost:
    """Count the operations and bytes of a forward call; `itemsize` is the bytes of one element."""
    parameters = params(format, in_features, out_features, blocks, rank)
    tensor, cuda = flops(format, tokens, in_features, out_features, blocks, rank)
    compulsory = itemsize * (tokens * in_features + parameters + tokens * out_features)
    return Cost(tensor, cuda, compulsory)


def bound_us(cost: Cost, device: "Device", dtype: str = "bfloat16") -> Bound:
    """Return the least time of a call on a device, for any algorithm: its slower of two terms, each at full speed.

    The terms are the operations, products on tensor cores and the diagonal S of blast there (as a product batched over
    ranks) or on CUDA cores or on both at once, and the compulsory bytes at DRAM. Caches, launches and intermediates
    take time on top: `algorithms`.
    """
    matrix = device.matrix_flops(dtype)
    everywhere = matrix + (0 if dtype == "float32" else device.cuda_flops)  # products in float32 run on CUDA cores
    terms = {
        "tensor": max(cost.tensor_flops / matrix, (cost.tensor_flops + cost.cuda_flops) / everywhere),
        "dram": cost.bytes_compulsory / device.dram_bytes_per_s,
    }
    term = max(terms, key=lambda name: terms[name])
    return Bound(1e6 * terms[term], term)


def _check(format: str, in_features: int, out_features: int, blocks: tuple[int, int], rank: int) -> None:
    if _known(format) == "dense":
        return
    if rank < 1:
        raise ValueError(f"rank must be at least 1 for {format}, it is {rank}")
    if format != "low_rank" and (min(blocks) < 1 or in_features % blocks[0] or out_features % blocks[1]):
        raise ValueError(f"blocks {blocks} must divide the features ({in_features}, {out_features})")


def _known(format: str) -> str:
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is not one of {FORMATS}")
    return format
