"""A kernel launch as a value: run it, or compile it ahead of time for a GPU that is not here.

Holding the kernel, its grid and its arguments in one value lets the same code that launches a kernel also
tell, from tensors on the "meta" device, what it would launch.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """One launch of a Triton kernel on a one-dimensional grid."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]  # tensors, their descriptors, ints and None, as the kernel names them
    constants: dict[str, Any]  # the kernel's tl.constexpr arguments
    warps: int
    stages: int
    early: bool = False  # may start before the launch before it has ended, whose results the kernel waits for

    def options(self) -> dict[str, Any]:
        """Return what Triton calls the options of a launch."""
        return {"num_warps": self.warps, "num_stages": self.stages, "launch_pdl": self.early}


def overlaps(device: torch.device) -> bool:
    """Say whether launches on a device can overlap (programmatic dependent launch, compute capability 9 and up)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def on(device: torch.device) -> torch.cuda.device:
    """Return the context that makes a device current, where it is a GPU."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def run(launches: Sequence[Launch], device: torch.device) -> list[Any]:
    """Run launches in order on the current stream of `device`, and return the compiled kernels.

    A launch of no programs is left out, and its kernel is None.
    """
    kernels = []
    with on(device):
        for launch in launches:
            kernel = None
            if launch.programs:
                kernel = launch.kernel[(launch.programs,)](**launch.arguments, **launch.constants, **launch.options())
            kernels.append(kernel)
    return kernels


def warm(launch: Launch) -> None:
    """Compile a launch for the current device without running it."""
    grid = (max(launch.programs, 1),)
    launch.kernel.warmup(**launch.arguments, **launch.constants, **launch.options(), grid=grid)


def compile_for(launch: Launch, capability: int) -> int:
    """Compile for a CUDA capability such as 86, without a GPU; return the bytes of shared memory it takes.

    Arguments are specialised as at run time (1 is a constant; multiples of 16 and the addresses of tensors
    are marked as such), because alignment decides which loads are asynchronous and so how much shared memory
    is taken. Needs a process in which Triton's interpreter is off.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    signature, attributes = {}, {}
    constants = dict(launch.constants)
    for name in launch.kernel.arg_names:
        value = {**launch.arguments, **launch.constants}[name]
        signature[name] = "constexpr" if name in constants else _type_of(value)
        if signature[name] == "constexpr":
            constants[name] = value
        elif isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(launch.kernel.arg_names.index(name),)] = [["tt.divisibility", 16]]
    if launch.kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options()).metadata.shared


def tensor_of(value: Any) -> Tensor | None:
    """Return the tensor that an argument points into: itself, or what its descriptor describes; None of others."""
    value = getattr(value, "base", value)
    return value if isinstance(value, Tensor) else None


def moved(descriptor: Any, address: int) -> Any:
    """Return the descriptor of a tensor like the one described, at another address."""
    found = copy.copy(descriptor)
    found.base = _Address(address)
    return found


class _Address:
    """Stands for a tensor where only its address is asked for."""

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


def _type_of(value: Any) -> str:
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int8: "i8"}
    if isinstance(value, Tensor):
        return f"*{names[value.dtype]}"
    if tensor_of(value) is not None:
        tile = ",".join(map(str, value.block_shape))
        return f"tensordesc<{names[value.base.dtype]}[{tile}],{value.layout!r}>"
    if value is None or value == 1:
        return "constexpr"
    return "i32" if abs(value) < 2**31 else "i64"
