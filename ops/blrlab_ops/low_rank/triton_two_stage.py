"""Low-rank layer as two Triton products.

Shapes: x [..., i], V [i, r], U [r, o], bias [o]. T = x V [n, r] is accumulated in float32, stored in the dtype of x and
read again by y = T U, with bias and epilogue. Where launches can overlap, the second starts with the first.
"""

from torch import Tensor

from blrlab_ops import configs, launching, triton_product
from blrlab_ops.configs import Config
from blrlab_ops.custom_ops import operator
from blrlab_ops.epilogue import NOTHING, Epilogue
from blrlab_ops.launching import Launch
from blrlab_ops.triton_product import Tiles, product

from .layout import pack
from .torch_bmm import gradients

__all__ = ["launches", "linear", "pack"]


def launches(
    x: Tensor,
    V: Tensor,
    U: Tensor,
    bias: Tensor | None,
    y: Tensor,
    epilogue: Epilogue = NOTHING,
    config: Config | None = None,
) -> list[Launch]:
    """Describe the two launches that fill y [n, o] from x [n, i]."""
    early = launching.overlaps(x.device)
    found = tuned("triton_two_stage", x, V, U) if config is None else config
    T = x.new_empty(x.shape[0], V.shape[1])
    first = product(x[None], V[None], T[None, :, None], size=configs.size(found, "first", Tiles), signal=early)
    bias_row, size = None if bias is None else bias[None], configs.size(found, "second", Tiles)
    return [first, product(T[None], U[None], y[None, :, None], bias_row, epilogue, size, wait=early)]


def tuned(impl: str, x: Tensor, V: Tensor, U: Tensor) -> Config:
    """Look up what tuning found for a low-rank layer."""
    features = (V.shape[0], U.shape[1])
    return configs.tuned("low_rank", impl, x.shape[0], features, (1, 1), V.shape[1], configs.dtype_of(x, V), x.device)


def candidates(x: Tensor, V: Tensor, U: Tensor) -> dict[str, list[Tiles]]:
    """List the tiles worth a measurement, by launch."""
    tokens, itemsize = x.shape[0], x.element_size()
    first = triton_product.candidates(tokens, V.shape[1], V.shape[0], itemsize)
    return {"first": first, "second": triton_product.candidates(tokens, U.shape[1], V.shape[1], itemsize)}


linear = operator("low_rank", "two_stage", "VU", lambda V, U: U.shape[1], launches, gradients)
