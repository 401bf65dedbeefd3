"""Which implementation runs: the one place that knows the implementations and what each needs.

An implementation called `name` of a format is the module `blrlab_ops.<format>.<name>`, with `linear(x, *factors,
bias)` and `pack(*factors)`; names that start with `triton_` are kernels alone, which `launches` describes, and so are
those that start with `hopper_`, for compute capability 9.0 only. `impl=None` takes what tuning measured fastest for the
layer on this GPU, where it is not measured what `likely` says, and never the interpreter.
"""

import difflib
import functools
import importlib
import os
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import epilogue as after
from . import tuning
from .epilogue import Epilogue


class CannotRun(RuntimeError):
    """An implementation was asked for by name and cannot run here."""


# From the plainest to the preferred.
IMPLS = {
    "low_rank": ("ref", "torch_bmm", "triton_streaming", "triton_two_stage"),
    "monarch": (
        "ref",
        "torch_bmm",
        "hopper_chained",
        "triton_fused",
        "triton_streaming",
        "triton_two_stage",
    ),
    "blast": (
        "ref",
        "torch_bmm",
        "bmm_mixing",
        "triton_two_stage",
        "triton_late_mixing",
        "triton_streaming",
        "triton_three_stage",
    ),
}
# What reads an S of many blocks otherwise than `pack(impl=None)` stores it (`blast.layout`) is taken by name only: it
# would be several times slower than measured.
OWN_LAYOUT = {"blast": ("triton_late_mixing", "triton_two_stage")}
MANY_BLOCKS = 12
STREAMED_TOKENS = 16
MOST_STREAMED, FEW_BLOCKS, MOST_MIXED = 64, 8, 64
LARGE_WORK = 2 * 10**9  # tokens x in_features x out_features
DTYPES = ("float64", "float32", "float16", "bfloat16")
TRITON_DTYPES = ("float32", "float16", "bfloat16")
HOPPER_DTYPES = ("float16", "bfloat16")
HOPPER_TRITON = (3, 6)


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


class Layer(NamedTuple):
    """A factored layer at a number of tokens: what the choice of an implementation depends on."""

    tokens: int
    in_features: int
    out_features: int
    blocks: tuple[int, int]
    rank: int


def layer(format: str, tokens: int, factors: Sequence[Tensor]) -> Layer:
    """Return the sizes of a layer from its factors in order; monarch: the rank r' of a block."""
    V, U = factors[0], factors[-1]
    b1, b2 = {"low_rank": (1, 1), "monarch": (V.shape[0], U.shape[1]), "blast": (V.shape[0], U.shape[0])}[format]
    return Layer(tokens, b1 * V.shape[-2], b2 * U.shape[-1], (b1, b2), V.shape[-1])


def implementation(
    format: str, impl: str | None, device: torch.device, dtype: torch.dtype, sizes: Layer | None = None
) -> ModuleType:
    """Return the module of the chosen implementation; raises as `choose` does."""
    return sys.modules[f"blrlab_ops.{format}.{choose(format, impl, device, dtype, sizes)}"]


def run(
    format: str,
    impl: str | None,
    x: Tensor,
    factors: Sequence[Tensor],
    bias: Tensor | None,
    epilogue: Epilogue,
) -> Tensor:
    """Run the chosen implementation; what follows the product is done by PyTorch where it is not fused."""
    if torch.compiler.is_compiling():
        # Tracers take the name as a constant. Imported here because it loads the compiler, for over a second.
        from .tracing import choose_as_constant

        name = choose_as_constant(format, impl, x.device, x.dtype)
        if impl is None and is_triton(name):  # chosen by the number of tokens, when it runs
            return sys.modules["blrlab_ops.best"].LINEARS[format](x, *factors, bias, epilogue=epilogue)
    else:
        tokens = x.numel() // max(x.shape[-1], 1)
        name = choose(format, impl, x.device, x.dtype, None if impl else layer(format, tokens, factors))
    module = sys.modules[f"blrlab_ops.{format}.{name}"]
    if epilogue.is_empty:
        return module.linear(x, *factors, bias)
    if is_triton(name):
        return module.linear(x, *factors, bias, epilogue=epilogue)
    return after.apply(module.linear(x, *factors, bias), epilogue)


def is_triton(impl: str) -> bool:
    """Say whether an implementation is a Triton kernel of this package: it fuses an epilogue, and is tuned."""
    return impl.startswith(("triton_", "hopper_"))


def is_hopper(impl: str) -> bool:
    """Say whether an implementation is for compute capability 9.0 alone (H100, H200), and not interpreted."""
    return impl.startswith("hopper_")


def is_portable(impl: str) -> bool:
    """Say whether an implementation is a Triton kernel of this package for every GPU, and for the interpreter."""
    return is_triton(impl) and not is_hopper(impl)


def needs_triton(impl: str) -> bool:
    """Say whether an implementation launches a Triton kernel of this package, alone or between PyTorch's products."""
    return is_triton(impl) or impl == "bmm_mixing"


def choose(
    format: str,
    impl: str | None,
    device: torch.device | str,
    dtype: torch.dtype | str,
    sizes: Layer | None = None,
) -> str:
    """Check a named implementation, or pick the best that can run without the interpreter; load its module.

    Args:
      format: of the factors.
      impl: a name, or None.
      device: where it is to run.
      dtype: of everything.
      sizes: of the layer, for the best; None: the best where nothing is known of it.

    Raises:
      ValueError: for an unknown format or implementation.
      CannotRun: when the implementation cannot run here.
    """
    return _choose(format, impl, str(device), str(dtype), sizes, tuning.version())


@functools.lru_cache(maxsize=4096)
def _choose(format: str, impl: str | None, device: str, dtype: str, sizes: Layer | None, version: int) -> str:
    impl = impl or best(format, device, dtype, sizes).impl
    reason = why_not(format, impl, device, dtype)
    if reason:
        raise CannotRun(f"impl {impl!r} of {format} cannot run: {reason}")
    importlib.import_module(f"blrlab_ops.{format}.{impl}")
    return impl


class Best(NamedTuple):
    """The implementation that `impl=None` takes, why, and the entries of tuning for the layer, fastest first."""

    impl: str
    reason: str
    measured: tuple[tuning.Entry, ...] = ()


def best(format: str, device: torch.device | str, dtype: torch.dtype | str, sizes: Layer | None = None) -> Best:
    """Return what `impl=None` takes, and why."""
    device, dtype = str(device), str(dtype)
    able = [impl for impl in usual(format, sizes) if impl != "ref" and runs_natively(format, impl, device, dtype)]
    if not able:
        return Best("ref", f"nothing else runs {dtype.removeprefix('torch.')} on {device}")
    found = tuple(entry for entry in measured(format, device, dtype, sizes) if entry.impl in able)
    if found:
        return Best(found[0].impl, "measured fastest on this GPU", found)
    choice, reason = likely(format, sizes)
    return Best(choice, reason) if choice in able else Best(able[-1], "the only one that can run here")


def usual(format: str, sizes: Layer | None) -> tuple[str, ...]:
    """List the implementations that read factors as `pack(impl=None)` stores them, of which `impl=None` takes one."""
    if sizes is not None and min(sizes.blocks) < MANY_BLOCKS:
        return impls(format)
    return tuple(impl for impl in impls(format) if impl not in OWN_LAYOUT.get(format, ()))


def measured(format: str, device: str, dtype: str, sizes: Layer | None) -> tuple[tuning.Entry, ...]:
    """Return what tuning found for a layer on a CUDA device, fastest first."""
    if sizes is None or not device.startswith("cuda") or not torch.cuda.is_available():
        return ()
    name = dtype.removeprefix("torch.")
    key = tuning.Key(format, tuning.bucket(sizes.tokens), *sizes[1:], name)
    return tuple(tuning.lookup(torch.cuda.get_device_name(device), key).values())


def likely(format: str, sizes: Layer | None) -> tuple[str, str]:
    """Return what is likely fastest on a GPU where the layer is not measured, and why.

    The rules are what tuning found for the layers of Llama-7B, GPT2-S and ViT-B on an H100: streaming kernels for few
    tokens, two overlapping launches for small layers, PyTorch's batched products for much work, between which BLAST
    mixes by a kernel of this package.
    """
    if sizes is None:
        return impls(format)[-1], "nothing is known of the layer"
    if sizes.tokens <= STREAMED_TOKENS:
        return "triton_streaming", f"not measured; up to {STREAMED_TOKENS} tokens the weights' bytes bind"
    work = sizes.tokens * sizes.in_features * sizes.out_features
    if work > LARGE_WORK:
        mixes = format == "blast" and unsuited("bmm_mixing", sizes) is None
        impl = "bmm_mixing" if mixes else "torch_bmm"
        return impl, "not measured; with so much work PyTorch's batched products are likely fastest"
    small = {"low_rank": "triton_two_stage", "monarch": "triton_two_stage", "blast": "triton_three_stage"}
    return small[format], "not measured; in so small a layer starting and waiting bind"


def unsuited(impl: str, sizes: Layer) -> str | None:
    """Say why an implementation is not worth a measurement at these sizes; None where it is. It still runs there."""
    work, blocks = sizes.tokens * sizes.in_features * sizes.out_features, max(sizes.blocks)
    if impl == "triton_streaming" and sizes.tokens > MOST_STREAMED:
        return f"streaming is for up to {MOST_STREAMED} tokens: every program takes all of the depth"
    if is_hopper(impl) and sizes.tokens <= MOST_STREAMED:
        return f"Hopper's kernels are for more than {MOST_STREAMED} tokens: a program takes 128"
    if impl == "triton_late_mixing" and sizes.tokens > 1 and blocks > FEW_BLOCKS:
        return f"late mixing is for up to {FEW_BLOCKS} blocks: the second launch reads the intermediate once a block"
    if impl == "bmm_mixing" and blocks > MOST_MIXED:
        return f"mixing between batched products is for up to {MOST_MIXED} blocks, which a program holds at a time"
    if impl == "bmm_mixing" and sizes.tokens <= MOST_STREAMED:
        return f"mixing between batched products is for more than {MOST_STREAMED} tokens, which lie side by side"
    if impl == "triton_fused" and work > LARGE_WORK:
        return "the fused launch is for small layers: every program multiplies by all of V's output block"
    return None


def runs_natively(format: str, impl: str, device: str, dtype: str) -> bool:
    """Say whether an implementation can run, and not only in Triton's interpreter."""
    natively = not needs_triton(impl) or (device.startswith("cuda") and not _interprets())
    return natively and why_not(format, impl, device, dtype) is None


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else ""


@functools.cache
def _why_not(impl: str, device: str, dtype: str) -> str | None:
    allowed = HOPPER_DTYPES if is_hopper(impl) else TRITON_DTYPES if needs_triton(impl) else DTYPES
    if dtype not in allowed:
        return f"dtype {dtype} is not one of {allowed}: cast x and the factors to one of these"
    if not needs_triton(impl):
        return None
    problem = _triton_problem() or _why_not_triton(device, dtype, hopper=is_hopper(impl))
    return problem or (gluon_problem() if is_hopper(impl) else None)  # last: it loads Gluon


def _why_not_triton(device: str, dtype: str, hopper: bool) -> str | None:
    if _interprets():
        if hopper:
            return "it is written in Gluon, which Triton's interpreter does not run: use impl='triton_two_stage' there"
        if dtype == "bfloat16":
            return "dtype bfloat16 is wrong in Triton's interpreter, use one of ('float32', 'float16') there"
        return None
    if not device.startswith("cuda"):
        fix = "move x and the factors to one, use impl='torch_bmm'"
        if not hopper:
            fix += ", or set TRITON_INTERPRET=1 before Python starts to interpret the kernel (slow, for tests)"
        return f"device {device!r} is not a CUDA device: {fix}"
    return _why_not_cuda(device, hopper)


def _why_not_cuda(device: str, hopper: bool) -> str | None:
    if not torch.cuda.is_available():
        return f"device {device!r} is no device that PyTorch finds: check the driver, or use the CPU"
    major, minor = torch.cuda.get_device_capability(device)
    if hopper and (major, minor) != (9, 0):
        return (
            f"it needs compute capability 9.0 (H100, H200) and this device has {major}.{minor}: leave impl out for the "
            "best that can run"
        )
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


@functools.cache
def gluon_problem() -> str | None:
    """Say why the Hopper kernels cannot be compiled by this Triton; None where they can."""
    version = importlib.import_module("triton").__version__
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < HOPPER_TRITON:
        return f"it needs Triton {'.'.join(map(str, HOPPER_TRITON))} or newer, and this is {version}"
    try:
        importlib.import_module("blrlab_ops.hopper_parts")
    except (ImportError, AttributeError) as error:  # Gluon is experimental, and changes
        return f"it is written for Triton 3.6 to 3.9, and this is {version} ({error})"
    return None


def _interprets() -> bool:
    return _triton_problem() is None and importlib.import_module("blrlab_ops.triton_parts").INTERPRETED
