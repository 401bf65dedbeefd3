"""Which implementation runs: the one place that knows the implementations and what each needs.

An implementation called `name` of a format is the module `blrlab_ops.<format>.<name>`, with `linear(x,
*factors, bias)` and `pack(*factors)`; names that start with `triton_` need Triton. `impl=None` takes the last
one in the table that can run, and never the interpreter.
"""

import difflib
import functools
import importlib
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import epilogue as after
from .epilogue import Epilogue


class CannotRun(RuntimeError):
    """An implementation was asked for by name and cannot run here."""


# From the plainest to the preferred.
IMPLS = {
    "low_rank": ("ref", "torch_bmm", "triton_streaming", "triton_two_stage"),
    "monarch": ("ref", "torch_bmm", "triton_fused", "triton_streaming", "triton_two_stage"),
    "blast": (
        "ref",
        "torch_bmm",
        "triton_three_stage",
        "triton_late_mixing",
        "triton_streaming",
        "triton_two_stage",
    ),
}
DTYPES = ("float64", "float32", "float16", "bfloat16")
TRITON_DTYPES = ("float32", "float16", "bfloat16")


def impls(format: str) -> tuple[str, ...]:
    """List the implementations of a format, from the plainest to the preferred."""
    if format not in IMPLS:
        raise ValueError(f"format {format!r} is not one of {tuple(IMPLS)}{_did_you_mean(format, IMPLS)}")
    return IMPLS[format]


def why_not(format: str, impl: str, device: torch.device | str, dtype: torch.dtype | str) -> str | None:
    """Say in one sentence why `impl` cannot run on this device and dtype; None when it can. Launches nothing.

    Raises:
      ValueError: for an unknown format or implementation.
    """
    if impl not in impls(format):
        raise ValueError(f"impl {impl!r} of {format} is not one of {impls(format)}{_did_you_mean(impl, impls(format))}")
    return _why_not(impl, str(device), str(dtype).removeprefix("torch."))


def implementation(format: str, impl: str | None, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """Return the module of the chosen implementation; raises as `choose` does."""
    if torch.compiler.is_compiling():
        # Tracers take the name as a constant. Imported here because it loads the compiler, for over a second.
        from .tracing import choose_as_constant

        name = choose_as_constant(format, impl, device, dtype)
    else:
        name = choose(format, impl, device, dtype)
    return sys.modules[f"blrlab_ops.{format}.{name}"]


def run(
    format: str,
    impl: str | None,
    x: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor | None,
    epilogue: Epilogue,
) -> Tensor:
    """Run the chosen implementation; what follows the product is done by PyTorch where it is not fused."""
    module = implementation(format, impl, x.device, x.dtype)
    if epilogue.is_empty:
        return module.linear(x, *factors, bias)
    if is_triton(module.__name__.rpartition(".")[2]):
        return module.linear(x, *factors, bias, epilogue=epilogue)
    return after.apply(module.linear(x, *factors, bias), epilogue)


def is_triton(impl: str) -> bool:
    """Say whether an implementation is a Triton kernel of this package: it fuses an epilogue, and is tuned."""
    return impl.startswith(("triton_", "hopper_"))


def choose(format: str, impl: str | None, device: torch.device | str, dtype: torch.dtype | str) -> str:
    """Check a named implementation, or pick the best that can run without the interpreter; load its module.

    Raises:
      ValueError: for an unknown format or implementation.
      CannotRun: when the implementation cannot run here.
    """
    return _choose(format, impl, str(device), str(dtype))


@functools.cache
def _choose(format: str, impl: str | None, device: str, dtype: str) -> str:
    impl = impl or _best(format, device, dtype)
    reason = why_not(format, impl, device, dtype)
    if reason:
        raise CannotRun(f"impl {impl!r} of {format} cannot run: {reason}")
    importlib.import_module(f"blrlab_ops.{format}.{impl}")
    return impl


def _best(format: str, device: str, dtype: str) -> str:
    for impl in reversed(impls(format)):
        natively = not impl.startswith("triton_") or (device.startswith("cuda") and not _interprets())
        if natively and why_not(format, impl, device, dtype) is None:
            return impl
    return impls(format)[0]


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else ""


@functools.cache
def _why_not(impl: str, device: str, dtype: str) -> str | None:
    is_triton = impl.startswith("triton_")
    allowed = TRITON_DTYPES if is_triton else DTYPES
    if dtype not in allowed:
        return f"dtype {dtype} is not one of {allowed}: cast x and the factors to one of these"
    return _why_not_triton(device, dtype) if is_triton else None


def _why_not_triton(device: str, dtype: str) -> str | None:
    missing = _triton_problem()
    if missing:
        return missing
    if _interprets():
        if dtype == "bfloat16":
            return "dtype bfloat16 is wrong in Triton's interpreter, use one of ('float32', 'float16') there"
        return None
    if not device.startswith("cuda"):
        return (
            f"device {device!r} is not a CUDA device: move x and the factors to one, use impl='torch_bmm', "
            "or set TRITON_INTERPRET=1 before Python starts to interpret the kernel (slow, for tests)"
        )
    return _why_not_cuda(device)


def _why_not_cuda(device: str) -> str | None:
    if not torch.cuda.is_available():
        return f"device {device!r} is no device that PyTorch finds: check the driver, or use the CPU"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"compute capability {major}.{minor} is below the 8.0 that is needed: use impl='torch_bmm'"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "Triton needs a C compiler to build its launcher and finds none: install gcc or set CC"
    return None


@functools.cache
def _triton_problem() -> str | None:
    try:
        importlib.import_module("triton.knobs")
    except ImportError as error:
        return f"Triton 3.4 or newer cannot be imported ({error}): pip install 'blrlab-ops[triton]'"
    return None


def _interprets() -> bool:
    return _triton_problem() is None and importlib.import_module("blrlab_ops.triton_parts").INTERPRETED
