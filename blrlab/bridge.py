"""JAX arrays as torch tensors over the same memory, by DLPack, one way.

The contract, each point tested:

- Same memory: the tensor's data pointer is the array's; nothing is copied, on a CPU or on a CUDA device.
- Lifetime: the tensor keeps the memory alive, also after the array is gone.
- Read only: JAX takes arrays as immutable, so writing into a tensor in place changes an array behind JAX's back.
  torch cannot forbid it; `clone()` first.
- Order: the array is finished before the tensor is handed over, so torch never reads it half-computed.
- Layout: a transposed array keeps its values; its tensor may have other strides.
- Sharded arrays lie in more than one memory and are refused.
- Donation: while a tensor lives, a jitted function that donates the array copies it instead.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from blrlab.errors import InputError


def to_torch(tree: Any) -> Any:
    """Map a tree of JAX arrays to torch tensors over the same memory.

    >>> import jax.numpy as jnp
    >>> to_torch({"V": jnp.ones((2, 3))})["V"].shape
    torch.Size([2, 3])

    Raises:
      InputError: torch is not installed, a leaf is no JAX array, is sharded, or lies on a device torch cannot use.
    """
    try:
        import torch
    except ImportError:
        raise InputError("the bridge needs PyTorch: pip install torch.") from None

    def one(path: Any, array: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "the array"
        _check(name, array, torch)
        try:
            return torch.from_dlpack(array.block_until_ready())
        except (RuntimeError, BufferError, TypeError) as error:
            raise InputError(f"torch cannot take {name}, a {array.dtype} array: {error}") from None

    return jax.tree_util.tree_map_with_path(one, tree)


def _check(name: str, array: Any, torch: Any) -> None:
    if not isinstance(array, jax.Array) or isinstance(array, Tracer):
        raise InputError(f"{name} is a {type(array).__name__}, not a JAX array with values.")
    devices = array.devices()
    if len(devices) > 1:
        raise InputError(f"{name} is sharded over {len(devices)} devices: gather it on one with jax.device_put.")
    platform = next(iter(devices)).platform
    if platform == "gpu" and not torch.cuda.is_available():
        raise InputError(f"{name} is on a GPU, but this PyTorch finds none: install a build with CUDA.")
    if platform not in ("cpu", "gpu"):
        raise InputError(f"{name} is on a {platform} device, which torch cannot use: move it to the CPU first.")
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        raise InputError(f"{name} holds random keys, which torch does not have.")
