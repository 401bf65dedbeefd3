"""Monarch layer as two batched Triton products, the permutation between them folded into the stores.

Shapes: x [..., b1 p], V [b1, b2, p, r'], U [b1, b2, r', q], bias [b2 q].

Stage one runs over input blocks, x[l] [n, p] @ V[l] [p, (b2 r')], and stores its columns (k, r') at T [b2, n, b1, r'].
Stage two runs over output blocks, T[k] [n, (b1 r')] @ U[:, k] [(b1 r'), q], with bias and epilogue. T is accumulated
in float32 and stored in the dtype of x: n b1 b2 r' numbers, written once and read q / BC times. Where launches can
overlap, stage two starts with stage one and asks for its weights while it waits.
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
    b1, b2, p, rank = V.shape
    tokens, q, early = x.shape[0], U.shape[3], launching.overlaps(x.device)
    found = tuned("triton_two_stage", x, V, U) if config is None else config
    T = x.new_empty(b2, tokens, b1, rank)
    x_blocks = x.unflatten(1, (b1, p)).transpose(0, 1)  # [b1, n, p]
    size = configs.size(found, "first", Tiles)
    first = product(x_blocks, first_factor(V), T.permute(2, 1, 0, 3), size=size, signal=early)
    y_blocks, bias_blocks = y.view(tokens, b2, 1, q).transpose(0, 1), bias_of_blocks(bias, b2)
    size = configs.size(found, "second", Tiles)
    return [first, product(T.flatten(2), second_factor(U), y_blocks, bias_blocks, epilogue, size, wait=early)]


def tuned(impl: str, x: Tensor, V: Tensor, U: Tensor) -> Config:
    """Look up what tuning found for a Monarch layer."""
    b1, b2, p, rank = V.shape
    features = (b1 * p, b2 * U.shape[3])
    return configs.tuned("monarch", impl, x.shape[0], features, (b1, b2), rank, configs.dtype_of(x, V), x.device)


def first_factor(V: Tensor) -> Tensor:
    """View V as [b1, p, b2, r']."""
    return V.transpose(1, 2)


def second_factor(U: Tensor) -> Tensor:
    """View U as [b2, b1 r', q]; a copy where it is not packed."""
    b1, b2, rank, q = U.shape
    return U.transpose(0, 1).reshape(b2, b1 * rank, q)


def bias_of_blocks(bias: Tensor | None, b2: int) -> Tensor | None:
    """View a bias [o] as [b2, q]."""
    return None if bias is None else bias.unflatten(0, (b2, -1))


def candidates(x: Tensor, V: Tensor, U: Tensor) -> dict[str, list[Tiles]]:
    """List the tiles worth a measurement, by launch."""
    b1, b2, p, rank = V.shape
    tokens, itemsize = x.shape[0], x.element_size()
    first = triton_product.candidates(tokens, b2 * rank, p, itemsize)
    return {"first": first, "second": triton_product.candidates(tokens, U.shape[3], b1 * rank, itemsize)}


linear = operator("monarch", "two_stage", "VU", lambda V, U: V.shape[1] * U.shape[3], launches, gradients)
