"""Monarch layer for a few tokens: two overlapping launches that read every weight once, with no sum between programs.

Shapes: x [..., b1 p], V [b1, b2, p, r'], U [b1, b2, r', q], bias [b2 q]; stages and layouts as in `triton_two_stage`.

What must move is V and U, r' (b2 i + b1 o) numbers; T and y are small and stay in the L2. Stage two starts with stage
one (compute capability 9 and up) and asks for U while V still comes, so that memory is never idle between them.
"""

from torch import Tensor

from blrlab_ops import configs, launching, triton_streaming
from blrlab_ops.configs import Config
from blrlab_ops.custom_ops import operator
from blrlab_ops.epilogue import NOTHING, Epilogue
from blrlab_ops.launching import Launch
from blrlab_ops.triton_streaming import Scales, Tiles, stream

from .torch_bmm import gradients
from .triton_two_stage import bias_of_blocks, first_factor, pack, second_factor, tuned

__all__ = ["launches", "linear", "pack"]


def launches(
    x: Tensor,
    V: Tensor,
    U: Tensor,
    bias: Tensor | None,
    y: Tensor,
    epilogue: Epilogue = NOTHING,
    config: Config | None = None,
    scales: Scales = (None, None),
) -> list[Launch]:
    """Describe the two launches that fill y [n, o] from x [n, i]; scales [b1, b2 r'], [b2, q] are of int8 factors."""
    b1, b2, p, rank = V.shape
    tokens, q, early = x.shape[0], U.shape[3], launching.overlaps(x.device)
    found = tuned("triton_streaming", x, V, U) if config is None else config
    T = x.new_empty(b2, tokens, b1, rank)
    x_blocks = x.unflatten(1, (b1, p)).transpose(0, 1)[None]  # [1, b1, n, p]
    size = configs.size(found, "first", Tiles)
    first = stream(x_blocks, first_factor(V), T.permute(2, 1, 0, 3), size=size, right_scale=scales[0], signal=early)
    y_blocks, bias_blocks = y.view(tokens, b2, 1, q).transpose(0, 1), bias_of_blocks(bias, b2)
    size = configs.size(found, "second", Tiles)
    blocks, U_blocks = T.flatten(2)[None], second_factor(U)  # [1, b2, n, b1 r'], [b2, b1 r', q]
    last = stream(blocks, U_blocks, y_blocks, bias_blocks, epilogue, size, right_scale=scales[1], wait=early)
    return [first, last]


def candidates(x: Tensor, V: Tensor, U: Tensor) -> dict[str, list[Tiles]]:
    """List the tiles worth a measurement, by launch."""
    b1, b2, p, rank = V.shape
    tokens, itemsize = x.shape[0], V.element_size()
    first = triton_streaming.candidates(tokens, b2 * rank, p, itemsize)
    return {"first": first, "second": triton_streaming.candidates(tokens, U.shape[3], b1 * rank, itemsize)}


linear = operator("monarch", "streaming", "VU", lambda V, U: V.shape[1] * U.shape[3], launches, gradients)
