"""Parts of Hopper kernels: what Triton's versions call alike, tiles as TMA takes them, what follows.

Hopper kernels (compute capability 9.0) are written in Gluon, the lower level of Triton, from its version 3.6: one warp
loads tiles with TMA, the unit that copies boxes of a tensor into shared memory by itself, and warpgroups multiply them.
Gluon has no interpreter.
"""

# Kernels are Gluon, which reads as Python of other types.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .triton_product import power_of_two

SHARED_BYTES = 227 * 1024  # that one program may take of a multiprocessor's shared memory
BARRIER_BYTES = 1024  # of them, more than barriers and padding take
SMS = 132  # of an H100 and an H200, where no GPU is there to ask
LINE = 16  # bytes: where TMA reads, rows begin at multiples of it
ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}

# Triton 3.8 renamed it.
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


def descriptor(tensor: Tensor, tile: list[int]) -> TensorDescriptor:
    """Describe a tensor, `aligned`, to TMA, which copies tiles of it; what a tile has outside of it is zeros."""
    strides = [*tensor.stride()[:-1], 1]
    for dim, size in enumerate(tensor.shape[:-1]):
        if size == 1:  # whose stride PyTorch chooses freely
            strides[dim] = lanes(tensor)
    layout = gl.NVMMASharedLayout.get_default_for(tile, ELEMENTS[tensor.dtype])
    return TensorDescriptor(tensor, list(tensor.shape), strides, tile, layout)


def is_aligned(tensor: Tensor) -> bool:
    """Say whether TMA can find a tensor's rows: numbers adjacent, rows apart by multiples of 16 bytes."""
    rows = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if size != 1]
    adjacent = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    apart = all(stride and stride % lanes(tensor) == 0 for stride in rows)
    return adjacent and apart and tensor.data_ptr() % LINE == 0


def aligned(tensor: Tensor) -> Tensor:
    """Return a tensor whose rows TMA can find: the same, or a copy of it."""
    if is_aligned(tensor):
        return tensor
    width = round_up(tensor.shape[-1], lanes(tensor))
    return tensor.new_empty(*tensor.shape[:-1], width)[..., : tensor.shape[-1]].copy_(tensor)


def lanes(tensor: Tensor) -> int:
    """Return of how many numbers rows must be multiples."""
    return LINE // tensor.element_size()


def round_up(size: int, unit: int) -> int:
    """Return the least multiple of `unit` that is at least `size`."""
    return -(-size // unit) * unit


def side(size: int, most: int) -> int:
    """Return the side of a tile for so many numbers: a power of two, 16 at least."""
    return min(most, max(16, power_of_two(size)))


def multiprocessors(device: torch.device) -> int:
    """Return how many programs run at once, each of which fills a multiprocessor."""
    return _multiprocessors(device) if device.type == "cuda" else SMS


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """Make barriers in shared memory, each of whose phases ends with so many arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for number in gl.static_range(COUNT):
        mbarrier.init(made.index(number), count=ARRIVALS)
    return made


@gluon.jit
def sigmoid(value):
    """Return 1 / (1 + exp(-value))."""
    return 1.0 / (1.0 + gl.exp(-value))


@gluon.jit
def finish(
    total, bias, multiply, residual, offsets, mask, bias_offsets, bias_mask, ACTIVATION: gl.constexpr
):  # fmt: skip
    """Return activation(total + bias) * multiply + residual, of float32 sums, as `triton_parts.finish` does."""
    if bias is not None:
        total += gl.load(bias + bias_offsets, mask=bias_mask, other=0.0).to(gl.float32)[None, :]
    if ACTIVATION == "silu":
        total = total * sigmoid(total)
    elif ACTIVATION == "gelu":
        total = 0.5 * total * (1.0 + gl.erf(total * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh z) = sigmoid(2 z)
        total = total * sigmoid(1.5957691216057308 * (total + 0.044715 * total * total * total))
    if multiply is not None:
        total *= gl.load(multiply + offsets, mask=mask, other=0.0).to(gl.float32)
    if residual is not None:
        total += gl.load(residual + offsets, mask=mask, other=0.0).to(gl.float32)
    return total
