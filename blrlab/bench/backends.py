"""The kernel backends: each a function (problem, kernel) -> zero-argument call that returns y [n, o].

One more backend is one function, one line in `BACKENDS` and one row in the tests. A backend that the table does not
list by name is an implementation of `blrlab_ops`, by its name there, or one of the source paper's own kernels
(`blrlab.bench.paper`). What a backend does to the weights beforehand (layout, quantisation) happens when the call is
made and is never timed.
"""

import dataclasses
import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blrlab_ops
import torch
from blrlab_ops import dispatch, int8
from torch import Tensor

from blrlab.bench import paper
from blrlab.bench.problem import OPS, Kernel, Problem, dense_weight
from blrlab.errors import InputError, did_you_mean

Call = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Backend:
    """How one contender runs a layer.

    Attributes:
      name: of the backend, the record's `impl`.
      ops: the formats it runs.
      make: (problem, kernel) -> call; the kernel is the problem's or a copy of it.
      own: whether it is a kernel of this project that computes the problem's own kernel, held to the closer budget.
      to_rows: (problem, what a call returned) -> y [n, o] as a torch tensor; not timed.
      truth: the kernel it is to compute, where that is not the problem's (quantised weights).
      quantisation_error: of the weights it runs on, the relative Frobenius error of the whole matrix.
      tunes: (implementation, dtype of its weights or None for the problem's) that `blrlab_ops.tuning` keeps tiles of.
    """

    name: str
    ops: tuple[str, ...]
    make: Callable[[Problem, Kernel], Call]
    own: bool = False
    to_rows: Callable[[Problem, Any], Tensor] = lambda problem, y: y
    truth: Callable[[Kernel], Kernel] | None = None
    quantisation_error: Callable[[Any], float] | None = None
    tunes: tuple[str, str | None] | None = None


def torch_eager(problem: Problem, kernel: Kernel) -> Call:
    """Run plain PyTorch: cuBLAS's product for dense, a chain of einsums for the formats."""
    x = problem.x
    return lambda: plain(x, kernel)


def torch_linear(problem: Problem, kernel: Kernel) -> Call:
    """Run a dense layer as `torch.nn.Linear` does, its weight stored [o, i]: cuBLAS has other kernels for that."""
    assert isinstance(kernel, Tensor)
    x, rows = problem.x, kernel.T.contiguous()
    return lambda: torch.nn.functional.linear(x, rows)


def torch_compile(problem: Problem, kernel: Kernel) -> Call:
    """Run plain PyTorch under `torch.compile`, without graph breaks."""
    return _compiled(problem, kernel, None)


def torch_compile_max_autotune(problem: Problem, kernel: Kernel) -> Call:
    """Run plain PyTorch under `torch.compile(mode="max-autotune")`; the benchmark captures the CUDA graph itself."""
    return _compiled(problem, kernel, "max-autotune-no-cudagraphs")


def xla(problem: Problem, kernel: Kernel) -> Call:
    """Run the layer as JAX einsums under `jax.jit`."""
    from blrlab.bench import xla as through_xla

    return through_xla.call(problem, kernel)


def int8_weight_only(problem: Problem, kernel: Kernel) -> Call:
    """Run a dense layer on int8 weights with a scale a column, as a compiled product that widens them on the way.

    For one token `coordinate_descent_tuning` makes PyTorch write the product as one reduction that reads int8; for
    more it widens the weights in memory first.
    """
    assert isinstance(kernel, Tensor)
    columns, scale = quantise(kernel)
    options = (("coordinate_descent_tuning", problem.case.tokens == 1),)
    rows, x, run = columns.T.contiguous(), problem.x, _compile(_int8_product, None, problem, options)
    return lambda: run(x, rows, scale)


def int8_streaming(problem: Problem, kernel: Kernel) -> Call:
    """Run a factored layer on int8 factors with a scale a column, by the streaming kernels that widen them."""
    assert isinstance(kernel, dict)
    x, small = problem.x, int8.quantise(kernel)
    return lambda: int8.linear(x, small, impl="triton_streaming")


def triton_gemv(problem: Problem, kernel: Kernel) -> Call:
    """Run a dense layer by the streaming kernels of this project: what they make of weights that are not factored."""
    from blrlab.bench import gemv

    assert isinstance(kernel, Tensor)
    return gemv.call(problem, kernel)


def own_kernel(impl: str) -> Callable[[Problem, Kernel], Call]:
    """Return the backend that runs an implementation of `blrlab_ops`."""

    def make(problem: Problem, kernel: Kernel) -> Call:
        assert isinstance(kernel, dict)
        x, packed = problem.x, blrlab_ops.pack(kernel, impl=impl)
        return lambda: blrlab_ops.linear(x, packed, impl=impl)

    return make


def plain(x: Tensor, kernel: Kernel) -> Tensor:
    """Multiply x [n, i] by a kernel as a user of PyTorch would write it down."""
    if isinstance(kernel, Tensor):
        return x @ kernel
    V, U = kernel["V"], kernel["U"]
    if V.ndim == 2:
        return (x @ V) @ U
    blocks = x.unflatten(1, (V.shape[0], -1))
    if "S" in kernel:
        mixed = torch.einsum("nlr,lkr->nkr", torch.einsum("nlp,lpr->nlr", blocks, V), kernel["S"])
        return torch.einsum("nkr,krq->nkq", mixed, U).flatten(1)
    return torch.einsum("nlkr,lkrq->nkq", torch.einsum("nlp,lkpr->nlkr", blocks, V), U).flatten(1)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round W [i, o] to int8 with one scale a column: (W8 [i, o], scale [o] in the weight's dtype)."""
    scale = (weight.float().abs().amax(0).clamp_min(1e-12) / 127).to(weight.dtype)
    return (weight.float() / scale.float()).round().clamp(-127, 127).to(torch.int8), scale


def dequantised(weight: Kernel) -> Tensor:
    """Return the weight that `quantise` stands for, in float64."""
    assert isinstance(weight, Tensor)
    columns, scale = quantise(weight)
    return columns.double() * scale.double()


def quantisation_error(weight: Tensor) -> float:
    """Return the relative Frobenius error of a weight's rounding to int8."""
    return float((dequantised(weight) - dense_weight(weight)).norm() / dense_weight(weight).norm())


def _factors(kernel: Kernel) -> dict[str, Tensor]:
    assert isinstance(kernel, dict)
    return kernel


def _int8_product(x: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, rows.to(x.dtype)) * scale


def _compiled(problem: Problem, kernel: Kernel, mode: str | None) -> Call:
    run, x = _compile(plain, mode, problem), problem.x
    return lambda: run(x, kernel)


@functools.lru_cache(maxsize=8)
def _compile(
    function: Callable[..., Tensor], mode: str | None, problem: Problem, options: tuple[tuple[str, Any], ...] = ()
) -> Callable[..., Tensor]:
    """Compile once for a problem, whatever the number of its copies."""
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode, options=dict(options) or None)


def forget_compiled() -> None:
    """Drop what was compiled: PyTorch limits how often it compiles one function anew."""
    _compile.cache_clear()
    torch.compiler.reset()


def _from_jax(problem: Problem, y: Any) -> Tensor:
    from blrlab.bench import xla as through_xla

    return through_xla.to_torch(y)


FACTORED = OPS[1:]
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("torch_eager", OPS, torch_eager),
        Backend("torch_linear", ("dense",), torch_linear),
        Backend("torch_compile", OPS, torch_compile),
        Backend("torch_compile_max_autotune", OPS, torch_compile_max_autotune),
        Backend("xla", OPS, xla, to_rows=_from_jax),
        Backend(
            "int8_weight_only",
            ("dense",),
            int8_weight_only,
            truth=dequantised,
            quantisation_error=quantisation_error,
        ),
        Backend(
            "int8_streaming",
            FACTORED,
            int8_streaming,
            truth=lambda kernel: int8.dequantise(int8.quantise(_factors(kernel)), torch.float64),
            quantisation_error=lambda kernel: int8.error(kernel, int8.quantise(kernel)),
            tunes=("triton_streaming", "int8"),
        ),
        Backend("triton_gemv", ("dense",), triton_gemv, own=True),
    )
}
STREAMED = ("int8_streaming", "triton_gemv")  # which need what `triton_streaming` needs
# Slow to tune or to run, and so only where named.
NAMED_ONLY = ("torch_compile_max_autotune", "ref")


def names(clone: Path | None = None) -> tuple[str, ...]:
    """List every backend: of the table, of `blrlab_ops`, and of the source paper's clone where one is given."""
    own = dict.fromkeys(impl for op in FACTORED for impl in dispatch.impls(op))
    return (*BACKENDS, *own, *(paper.VARIANTS if clone else ()))


def chosen(words: str, clone: Path | None = None) -> tuple[str, ...]:
    """Read names with commas between; `all` is every backend but those that only run where named.

    Raises:
      InputError: a name is unknown.
    """
    known, picked = names(clone), []
    for word in filter(None, map(str.strip, words.split(","))):
        if word == "all":
            picked += [name for name in known if name not in NAMED_ONLY]
        elif word in known:
            picked.append(word)
        elif word in paper.VARIANTS:
            raise InputError(f'impl "{word}" needs --paper=FOLDER, a clone of {paper.REPOSITORY}.')
        else:
            raise InputError(f'unknown impl "{word}": it is one of all, {", ".join(known)}.{did_you_mean(word, known)}')
    if not picked:
        raise InputError(f"no impl is named: give all, or some of {', '.join(known)}.")
    return tuple(dict.fromkeys(picked))


def backend(name: str, clone: Path | None = None) -> Backend:
    """Return a backend by its name, one of `names(clone)`."""
    if name in BACKENDS:
        return BACKENDS[name]
    if name in paper.VARIANTS:
        variant = paper.VARIANTS[name]
        return Backend(name, (variant.op,), functools.partial(paper.call, variant, clone), to_rows=paper.to_rows)
    ops = tuple(op for op in FACTORED if name in dispatch.impls(op))
    tunes = (name, None) if dispatch.is_triton(name) else None
    return Backend(name, ops, own_kernel(name), own=dispatch.needs_triton(name), tunes=tunes)


def why_not(name: str, problem: Problem) -> str | None:
    """Say in one sentence why a backend cannot run or time a problem here; None where it can."""
    device = problem.x.device.type
    if name == "xla":
        if not has_jax():
            return "JAX is not installed: pip install jax"
        from blrlab.bench import xla as through_xla

        return through_xla.why_not(device)
    if (name == "int8_weight_only" or name.startswith("torch_compile")) and device == "cpu" and not _compiler():
        return "torch.compile needs a C++ compiler on a CPU, and there is none"
    if name in paper.VARIANTS:
        return paper.why_not(problem)
    if name in STREAMED:
        return _why_not_streamed(problem)
    if name not in BACKENDS:
        reason = blrlab_ops.why_not(problem.op, name, problem.x.device, problem.x.dtype)
        return reason or dispatch.unsuited(name, dispatch.Layer(*problem.case[1:]))
    return None


def _why_not_streamed(problem: Problem) -> str | None:
    device = problem.x.device.type
    if device != "cuda":
        return f"device {device!r} is not a CUDA device, which the streaming kernels need"
    format = problem.op if problem.op in FACTORED else "low_rank"
    reason = blrlab_ops.why_not(format, "triton_streaming", problem.x.device, problem.x.dtype)
    return reason or dispatch.unsuited("triton_streaming", dispatch.Layer(*problem.case[1:]))


@functools.cache
def _compiler() -> str | None:
    """Return the C++ compiler that torch.compile would find."""
    named = os.environ.get("CXX")
    return next(filter(shutil.which, filter(None, (named, "g++", "clang++"))), None)


def has_jax() -> bool:
    """Say whether JAX is installed, without loading it."""
    return importlib.util.find_spec("jax") is not None
