"""BLAST layer as two Triton launches, the mixing done on CUDA cores as the second one reads what the first one left.

Shapes: x [..., b1 p], V [b1, p, r], S [b1, b2, r], U [b2, r, q], bias [b2 q].

Stage one is Z[l] = x[l] V[l], stored at [n, b1, r] in the dtype of x: a product, which streams V for up to 16 tokens.
A program of stage two owns a tile of one output block: it sums S[l,k] Z[l] over l in float32 and multiplies by U[k],
with bias and epilogue. So S is applied once for every tile of columns, n r b1 b2 times their number, and Z is read b2
times as often: good for few blocks (GPT-2, ViT) or few tokens, not for 16 blocks and many tokens.
"""

from torch import Tensor

from blrlab_ops import configs, launching, triton_product, triton_streaming
from blrlab_ops.configs import Config
from blrlab_ops.custom_ops import operator
from blrlab_ops.dispatch import STREAMED_TOKENS
from blrlab_ops.epilogue import NOTHING, Epilogue
from blrlab_ops.launching import Launch
from blrlab_ops.triton_product import product
from blrlab_ops.triton_streaming import stream

from .torch_bmm import gradients
from .triton_streaming import first as streamed_first
from .triton_two_stage import bias_of_blocks, blocks_of, pack, tuned

__all__ = ["launches", "linear", "pack"]


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
    b1, p, rank = V.shape
    found = tuned("triton_late_mixing", x, V, U) if config is None else config
    Z = x.new_empty(x.shape[0], b1, rank)
    if x.shape[0] <= STREAMED_TOKENS:
        return [streamed_first(x, V, Z, found), second(Z, S, U, bias, y, epilogue, found)]
    x_blocks, Z_blocks = x.unflatten(1, (b1, p)).transpose(0, 1), Z.transpose(0, 1)[:, :, None]  # [b1, n, .]
    size, early = configs.size(found, "first", triton_product.Tiles), launching.overlaps(x.device)
    return [product(x_blocks, V, Z_blocks, size=size, signal=early), second(Z, S, U, bias, y, epilogue, found)]


def second(
    Z: Tensor, S: Tensor, U: Tensor, bias: Tensor | None, y: Tensor, epilogue: Epilogue, config: Config
) -> Launch:
    """Describe the launch that mixes Z [n, b1, r] and fills y [n, o]."""
    mixed = Z.transpose(0, 1)[:, None].expand(-1, U.shape[0], -1, -1)  # [b1, b2, n, r]
    size, early = configs.size(config, "second", triton_streaming.Tiles), launching.overlaps(Z.device)
    return stream(mixed, U, blocks_of(y, U), bias_of_blocks(bias, U), epilogue, size, scale=S, wait=early)


def candidates(x: Tensor, V: Tensor, S: Tensor, U: Tensor) -> dict[str, list]:
    """List the tiles worth a measurement, by launch."""
    (b1, p, rank), tokens, itemsize = V.shape, x.shape[0], x.element_size()
    kind = triton_streaming if tokens <= STREAMED_TOKENS else triton_product
    first = kind.candidates(tokens, rank, p, itemsize)
    return {"first": first, "second": triton_streaming.candidates(tokens, U.shape[2], rank, itemsize, b1)}


linear = operator("blast", "late_mixing", "VSU", lambda V, S, U: U.shape[0] * U.shape[2], launches, gradients)
