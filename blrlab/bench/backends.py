"""The kernel backends: each a function (problem, copies) -> `Contender`, ready to be verified and timed.

A backend runs the layer on `copies` copies of the weights in turn, so that on a GPU the weights come from memory and
not from cache, as in a model. `why_not` says, before anything runs, why a backend cannot.
"""

import dataclasses
import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from blrlab import factors
from blrlab.bench.problem import Problem
from blrlab.bridge import to_torch

BMM, TRITON = "torch_bmm", "triton_two_stage"


@dataclasses.dataclass(frozen=True)
class Contender:
    """One backend on one problem.

    Attributes:
      impl: the backend's name.
      output: y [n, o] of one call, as a NumPy array.
      run: runs `calls` calls of the layer and waits for none of them, unless `waits`.
      calls: layer calls in one run.
      waits: whether `run` returns only when its work is done.
      method: how it is timed, for the record.
    """

    impl: str
    output: Callable[[], np.ndarray]
    run: Callable[[], Any]
    calls: int
    waits: bool
    method: str


def xla(problem: Problem, copies: int) -> Contender:
    """Run the layer as JAX einsums under `jax.jit`, one compiled call after another.

    Dispatch from Python is part of the time: several calls in one program would be cheaper, but XLA removes those
    whose results nothing reads, also behind an optimisation barrier, and then times nothing.
    """
    kernels = [jax.tree.map(lambda leaf: leaf + 0, problem.kernel) for _ in range(copies)]
    # float32 means IEEE on a GPU too, not tf32
    call = jax.jit(jax.default_matmul_precision("highest")(factors.apply))

    def every() -> None:
        results = [call(kernel, problem.x) for kernel in kernels]
        jax.block_until_ready(results)

    method = f"host clock, {copies} calls queued, dispatch included" if copies > 1 else "host clock, warm weights"
    return Contender("xla", lambda: np.asarray(call(kernels[0], problem.x)), every, copies, True, method)


def torch_eager(problem: Problem, copies: int) -> Contender:
    """Run the layer as PyTorch batched products, eagerly."""
    return _torch("torch", problem, copies, BMM, _torch_call(BMM))


def torch_compile(problem: Problem, copies: int) -> Contender:
    """Run the same products under `torch.compile`, without graph breaks."""
    import torch

    torch.compiler.reset()
    compiled = torch.compile(_torch_call(BMM), fullgraph=True, dynamic=False)
    return _torch("torch_compile", problem, copies, BMM, compiled)


def triton(problem: Problem, copies: int) -> Contender:
    """Run the layer on the Triton kernels."""
    return _torch("triton", problem, copies, TRITON, _torch_call(TRITON))


BACKENDS: dict[str, Callable[[Problem, int], Contender]] = {
    "xla": xla,
    "torch": torch_eager,
    "torch_compile": torch_compile,
    "triton": triton,
}


def _torch_call(impl: str) -> Callable[[Any, Any], Any]:
    import blrlab_ops

    def call(x: Any, kernel: Any) -> Any:
        return blrlab_ops.linear(x, kernel, impl=impl) if isinstance(kernel, dict) else x @ kernel

    return call


def _torch(name: str, problem: Problem, copies: int, impl: str, call: Callable[[Any, Any], Any]) -> Contender:
    """Make a contender of a torch function; the factors are laid out once as `impl` wants them, untimed."""
    import blrlab_ops
    import torch

    x, first = to_torch(problem.x), to_torch(problem.kernel)
    if isinstance(first, dict):
        first = blrlab_ops.pack(first, impl=impl)
    with torch.no_grad():
        kernels = [jax.tree.map(lambda leaf: leaf.clone(), first) for _ in range(copies)]

    def every() -> None:
        with torch.no_grad():
            for kernel in kernels:
                call(x, kernel)

    def output() -> np.ndarray:
        with torch.no_grad():
            return call(x, first).float().cpu().numpy()

    if x.device.type != "cuda":
        return Contender(name, output, every, copies, True, "host clock, warm weights")
    replay = _capture(every)
    method = f"CUDA graph of {copies} calls, each on its own weights; CUDA events"
    return Contender(name, output, replay, copies, False, method)


def _capture(run: Callable[[], None]) -> Callable[[], None]:
    """Record a run as a CUDA graph, after warming up on a side stream; return its replay."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(recorded: Any = run) -> None:
        """Replay; the default argument keeps the weights alive, which the graph knows by address only."""
        graph.replay()

    return replay


def why_not(impl: str, problem: Problem) -> str | None:
    """Say in one sentence why a backend cannot run or time a problem here; None where it can."""
    if impl == "xla":
        return None
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed"
    device = _device()
    if device == "cuda" and not _cuda():
        return "JAX is on a GPU, but this PyTorch finds none"
    if impl == "torch_compile" and device == "cpu" and not _compiler():
        return "torch.compile needs a C++ compiler on a CPU, and there is none"
    if impl == "triton":
        import blrlab_ops

        return blrlab_ops.why_not(problem.spec.format, TRITON, device, problem.dtype)
    return None


def _device() -> str:
    return "cpu" if jax.default_backend() == "cpu" else "cuda"


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@functools.cache
def _compiler() -> str | None:
    """Return the C++ compiler that torch.compile would find."""
    named = os.environ.get("CXX")
    return next(filter(shutil.which, filter(None, (named, "g++", "clang++"))), None)
