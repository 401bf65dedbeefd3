"""BLAST layer for a few tokens: three overlapping launches that read every weight once.

Shapes: x [..., b1 p], V [b1, p, r], S [b1, b2, r], U [b2, r, q], bias [b2 q].

Stage one streams V, Z[l] = x[l] V[l]; the middle one is that of `triton_three_stage`; the last streams U. What must
move is V, S and U, r (i + o + b1 b2) numbers; Z and W are small and stay in the L2. The launches overlap as in
`monarch.triton_streaming`, so that U comes while V is multiplied and mixed. `triton_late_mixing` has no middle launch.
Layers that share x (`blrlab_ops.joined`) have a U [g, b2, r, q], and their ranks side by side in V and S.
"""

from torch import Tensor

from blrlab_ops import configs, launching, triton_streaming
from blrlab_ops.configs import Config
from blrlab_ops.custom_ops import operator
from blrlab_ops.epilogue import NOTHING, Epilogue
from blrlab_ops.launching import Launch
from blrlab_ops.triton_streaming import Scales, Tiles, stream

from .layout import pack
from .torch_bmm import gradients
from .triton_three_stage import MixTiles, joined_blocks, mix, mix_candidates, out_features, ranks_of_groups
from .triton_two_stage import bias_of_blocks, blocks_of, tuned

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
    """Describe the three launches that fill y [n, o] from x [n, i]; scales [b1, r], [b2, q] are of int8 factors."""
    groups, U = joined_blocks(U)
    found = tuned("triton_streaming", x, V, U) if config is None else config
    tokens, early = x.shape[0], launching.overlaps(x.device)
    Z, W = x.new_empty(tokens, V.shape[0], V.shape[2]), x.new_empty(tokens, S.shape[1], V.shape[2])
    size, bias_blocks = configs.size(found, "second", Tiles), bias_of_blocks(bias, U)
    blocks = ranks_of_groups(W, groups)[None]  # [1, g, b2, n, r]
    return [
        first(x, V, Z, found, scales[0]),
        mix(Z, S, W, configs.size(found, "middle", MixTiles), early),
        stream(blocks, U, blocks_of(y, U), bias_blocks, epilogue, size, right_scale=scales[1], wait=early),
    ]


def first(x: Tensor, V: Tensor, Z: Tensor, config: Config, V_scale: Tensor | None = None) -> Launch:
    """Describe the launch that fills Z [n, b1, r] by streaming V."""
    b1, p, _ = V.shape
    x_blocks, Z_blocks = x.unflatten(1, (b1, p)).transpose(0, 1)[None], Z.transpose(0, 1)[:, :, None]
    size, early = configs.size(config, "first", Tiles), launching.overlaps(x.device)
    return stream(x_blocks, V, Z_blocks, size=size, right_scale=V_scale, signal=early)


def candidates(x: Tensor, V: Tensor, S: Tensor, U: Tensor) -> dict[str, list]:
    """List the tiles worth a measurement, by launch."""
    (_, p, rank), tokens, itemsize = V.shape, x.shape[0], V.element_size()
    first = triton_streaming.candidates(tokens, rank, p, itemsize)
    last = triton_streaming.candidates(tokens, U.shape[2], rank, itemsize)
    return {"first": first, "middle": mix_candidates(tokens, rank), "second": last}


linear = operator("blast", "streaming", "VSU", out_features, launches, gradients)
