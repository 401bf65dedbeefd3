"""BLAST layer for a few tokens: overlapping launches that read every weight once.

Shapes: x [..., b1 p], V [b1, p, r], S [b1, b2, r], U [b2, r, q], bias [b2 q].

Stage one streams V, Z[l] = x[l] V[l]; the last stage streams U. For one token the last stage mixes Z as it reads it,
as `triton_late_mixing` does: every program reads all of Z, b1 r numbers. More tokens take a stage of their own for it,
that of `triton_three_stage`. What must move is V, S and U, r (i + o + b1 b2) numbers; Z and W are small and stay in
the L2. The launches overlap as in `monarch.triton_streaming`, so that U comes while V is multiplied and mixed.
"""

from torch import Tensor

from blrlab_ops import configs, launching, triton_streaming
from blrlab_ops.configs import Config
from blrlab_ops.custom_ops import operator
from blrlab_ops.epilogue import NOTHING, Epilogue
from blrlab_ops.launching import Launch
from blrlab_ops.triton_streaming import Scales, Tiles, stream

from .torch_bmm import gradients
from .triton_late_mixing import second
from .triton_three_stage import MixTiles, mix, mix_candidates
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
    scales: Scales = (None, None),
) -> list[Launch]:
    """Describe the two launches that fill y [n, o] from x [n, i]; scales [b1, r], [b2, q] are of int8 factors."""
    b1, p, rank = V.shape
    found = tuned("triton_streaming", x, V, U) if config is None else config
    tokens, early = x.shape[0], launching.overlaps(x.device)
    Z = x.new_empty(tokens, b1, rank)
    x_blocks, Z_blocks = x.unflatten(1, (b1, p)).transpose(0, 1)[None], Z.transpose(0, 1)  # [1, b1, n, p], [b1, n, r]
    first = stream(
        x_blocks, V, Z_blocks[:, :, None], size=configs.size(found, "first", Tiles), right_scale=scales[0], signal=early
    )
    if tokens <= 1:
        return [first, second(Z_blocks, S, U, bias, y, epilogue, found, scales[1])]
    W = x.new_empty(tokens, U.shape[0], rank)
    blocks, size = W.transpose(0, 1)[None], configs.size(found, "second", Tiles)  # [1, b2, n, r]
    last = stream(
        blocks, U, blocks_of(y, U), bias_of_blocks(bias, U), epilogue, size, right_scale=scales[1], wait=early
    )
    return [first, mix(Z, S, W, configs.size(found, "middle", MixTiles), early), last]


def candidates(x: Tensor, V: Tensor, S: Tensor, U: Tensor) -> dict[str, list]:
    """List the tiles worth a measurement, by launch; one token has no middle one."""
    (b1, p, rank), tokens, itemsize = V.shape, x.shape[0], x.element_size()
    first = triton_streaming.candidates(tokens, rank, p, itemsize)
    if tokens <= 1:
        return {"first": first, "second": triton_streaming.candidates(1, U.shape[2], rank, itemsize, b1)}
    last = triton_streaming.candidates(tokens, U.shape[2], rank, itemsize)
    return {"first": first, "middle": mix_candidates(tokens, rank), "second": last}


linear = operator("blast", "streaming", "VSU", lambda V, S, U: U.shape[0] * U.shape[2], launches, gradients)
