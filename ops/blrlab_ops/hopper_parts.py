"""Parts that the Hopper kernels share: what Triton's versions call alike, tiles as TMA takes them, what follows.

Hopper kernels (compute capability 9.0) are written in Gluon, the lower level of Triton, from its version 3.6: one warp
loads tiles with TMA, the unit that copies boxes of a tensor into shared memory by itself, and warpgroups multiply them.
Gluon has no interpreter.
"""

# Kernels are Gluon, which reads as Python of other types.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false

import functools
import inspect

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

FENCE = gl.constexpr("fence.proxy.async; mov.u32 $0, $1;")  # between TMA's accesses to memory and others
STORES_DONE = gl.constexpr("cp.async.bulk.wait_group 0; fence.proxy.async; mov.u32 $0, $1;")

# Triton 3.8 renamed them.
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
async_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


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


thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier

try:  # from Triton 3.9 a copy can say what the L2 is to do with its lines
    from triton.language.core import _CachePolicy
except ImportError:
    _CachePolicy = None

if _CachePolicy is not None and "cache_policy" in inspect.signature(async_load).parameters:
    FIRST = gl.constexpr(_CachePolicy(eviction_policy="evict_first"))

    @gluon.jit
    def load_once(tensor, corner, ready, into):
        """Copy a tile into shared memory; its lines in the L2 are the first to go."""
        async_load(tensor, corner, ready, into, cache_policy=FIRST)

    @gluon.jit
    def store_once(tensor, corner, source):
        """Copy a tile from shared memory; its lines in the L2 are the first to go."""
        async_store(tensor, corner, source, cache_policy=FIRST)

else:
    load_once, store_once = async_load, async_store

if hasattr(gl.shared_memory_descriptor, "reinterpret"):

    @gluon.jit
    def seen_as(memory, described):
        """Return shared memory, at a multiple of 1024 bytes, as a tile of what is described, whatever lay there."""
        return memory.reinterpret(described.dtype, described.block_shape, described.layout)

else:  # before Triton 3.9

    @gluon.jit
    def seen_as(memory, described):
        """Return shared memory, at a multiple of 1024 bytes, as a tile of what is described, whatever lay there."""
        return memory._reinterpret(described.dtype, described.block_shape, described.layout)


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


@gluon.jit
def clear_kernel(flags, count, MOST: gl.constexpr):
    """Set counts to zero."""
    number = gl.arange(0, MOST, gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(flags + number, gl.zeros_like(number), mask=number < count)


@gluon.jit
def wait_for_stores():
    """Wait until all that this warpgroup has stored by TMA can be read by others."""
    gl.inline_asm_elementwise(STORES_DONE, "=r,r", [0], dtype=gl.int32, is_pure=False, pack=1)
    thread_barrier()  # a wide tile is stored by a thread of every warp, each of which has waited; another counts


@gluon.jit
def count_up(flag):
    """Add one to a count that other programs wait for."""
    gl.atomic_add(flag, 1, sem="release", scope="gpu")


@gluon.jit
def wait_for_count(flag, least):
    """Wait until a count has come so far; TMA then reads what was stored before."""
    while gl.atomic_add(flag, 0, sem="acquire", scope="gpu") < least:
        pass
    gl.inline_asm_elementwise(FENCE, "=r,r", [0], dtype=gl.int32, is_pure=False, pack=1)
