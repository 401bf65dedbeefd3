"""Low-rank layer for a few tokens: the input cut in parts so that V is read by enough programs.

Shapes: x [..., i], V [i, r], U [r, o], bias [o].

Stage one cuts i into `parts` and stores the product of each, T [parts, n, r]; stage two sums the parts as it reads
them, in a fixed order and without atomics. What must move is V and U, r (i + o) numbers; T is small and stays in the
L2, where every program of stage two reads all of it. The launches overlap as in `monarch.triton_streaming`.
"""

from torch import Tensor

from blrlab_ops import configs, launching, triton_streaming
from blrlab_ops.configs import Config
from blrlab_ops.custom_ops import operator
from blrlab_ops.epilogue import NOTHING, Epilogue
from blrlab_ops.launching import Launch
from blrlab_ops.triton_streaming import Scales, Tiles, stream, sum_parts

from .layout import pack
from .torch_bmm import gradients
from .triton_two_stage import tuned

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
    """Describe the launches that fill y [n, o] from x [n, i]; scales [1, r], [1, o] are of int8 factors."""
    early, rank = launching.overlaps(x.device), V.shape[1]
    found = tuned("triton_streaming", x, V, U) if config is None else config
    parts = parts_of(V.shape[0])
    T = x.new_empty(parts, x.shape[0], rank)
    x_parts = x.unflatten(1, (parts, -1)).transpose(0, 1)[None]  # [1, parts, n, i / parts]
    V_parts = V.unflatten(0, (parts, -1))
    size, scale = configs.size(found, "first", Tiles), scales[0]
    V_scale = None if scale is None else scale.expand(parts, -1)
    first = stream(x_parts, V_parts, T[:, :, None], size=size, right_scale=V_scale, signal=early)
    bias_row, size = None if bias is None else bias[None], configs.size(found, "second", Tiles)
    if x.shape[0] <= 1 or parts == 1:
        return [
            first,
            stream(T[:, None], U[None], y[None, :, None], bias_row, epilogue, size, right_scale=scales[1], wait=early),
        ]
    summed = x.new_empty(x.shape[0], rank)
    last = stream(
        summed[None, None], U[None], y[None, :, None], bias_row, epilogue, size, right_scale=scales[1], wait=early
    )
    return [first, sum_parts(T, summed, early), last]


def parts_of(in_features: int, most: int = 8) -> int:
    """Return into how many equal parts the input is cut: at most `most`, each of 16 numbers or more.

    >>> parts_of(4096), parts_of(30)
    (8, 1)
    """
    fitting = (parts for parts in range(most, 0, -1) if in_features % parts == 0 and in_features // parts >= 16)
    return next(fitting, 1)


def candidates(x: Tensor, V: Tensor, U: Tensor) -> dict[str, list[Tiles]]:
    """List the tiles worth a measurement, by launch."""
    tokens, rank, itemsize = x.shape[0], V.shape[1], V.element_size()
    parts = parts_of(V.shape[0])
    first = triton_streaming.candidates(tokens, rank, V.shape[0] // parts, itemsize)
    alone = tokens <= 1 or parts == 1
    second = triton_streaming.candidates(tokens, U.shape[1], rank, itemsize, parts if alone else 1)
    return {"first": first, "second": second} if alone else {"first": first, "middle": [], "second": second}


linear = operator("low_rank", "streaming", "VU", lambda V, U: U.shape[1], launches, gradients)
