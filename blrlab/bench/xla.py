"""The XLA backend: the layer as JAX einsums under `jax.jit`, timed on the device by JAX's profiler.

JAX cannot be captured in a CUDA graph from outside, and calls from Python cost more than small layers take, so on a
GPU a call's time is that of its kernels, as the profiler saw them run. Gaps between the kernels of one call are not
counted, in XLA's favour. A program of several calls in one `jit` would not do: XLA removes those whose results
nothing reads, also behind an optimisation barrier, and then times nothing.
"""

import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import torch
from torch import Tensor

from blrlab import factors
from blrlab.bench import timing
from blrlab.bench.problem import Kernel, Problem

METHOD = "{copies} weight copies; JAX's profiler, the kernels' time on the device"


def call(problem: Problem, kernel: Kernel) -> Callable[[], jax.Array]:
    """Return a call of the jitted layer on JAX's own copies of kernel and input."""
    held, x, run = _held(kernel), _input(problem), _layer(problem)
    return lambda: run(held, x)


def compile_together(problems: Sequence[Problem]) -> dict[str, float]:
    """Compile the layers of several problems at the same time; return {op: seconds of it}.

    Compiling is the processor's work; where XLA measures products to choose among them, it takes turns on the GPU.
    """
    with ThreadPoolExecutor(max(len(problems), 1)) as pool:
        return dict(zip([each.op for each in problems], pool.map(_compile, problems), strict=True))


def _compile(problem: Problem) -> float:
    started = time.perf_counter()
    _COMPILED[problem] = _jitted().lower(_held(problem.kernel), _input(problem)).compile()
    return time.perf_counter() - started


_COMPILED: dict[Problem, Callable[..., jax.Array]] = {}  # until `forget`


def _layer(problem: Problem) -> Callable[..., jax.Array]:
    return _COMPILED.get(problem) or _COMPILED.setdefault(problem, _jitted())


def _jitted() -> Any:
    # float32 means IEEE on a GPU too, not tf32
    return jax.jit(jax.default_matmul_precision("highest")(factors.apply))


def _held(kernel: Kernel) -> Any:
    return {name: to_jax(leaf) for name, leaf in kernel.items()} if isinstance(kernel, dict) else to_jax(kernel)


@functools.lru_cache(maxsize=4)
def _input(problem: Problem) -> jax.Array:
    return to_jax(problem.x)


def to_jax(tensor: Tensor) -> jax.Array:
    """Copy a torch tensor to JAX's default device."""
    contiguous = tensor.detach().contiguous()
    if contiguous.device.type == "cuda":
        torch.cuda.current_stream().synchronize()  # JAX reads on a stream of its own
    return jax.numpy.array(jax.dlpack.from_dlpack(contiguous), copy=True)


def to_torch(y: jax.Array) -> Tensor:
    """Hand an output over to torch."""
    return torch.from_dlpack(y.block_until_ready())


def why_not(device: str) -> str | None:
    """Say in one sentence why XLA cannot run on torch's device; None where it can."""
    backend = jax.default_backend()
    if device == "cuda" and backend != "gpu":
        return f"JAX has no GPU here, it runs on the {backend}: install jax[cuda12] or jax[cuda13]"
    if device == "cpu" and backend != "cpu":
        return f"JAX runs on the {backend} and torch on the CPU: set JAX_PLATFORMS=cpu"
    return None


def profile(runs: Sequence[Sequence[Callable[[], Any]]]) -> list[list[float]]:
    """Run sequences of calls under the profiler; return the us that each call's kernels took on the device.

    Between the sequences runs a mark, a kernel that no layer has, since the profiler does not say which call a kernel
    belongs to; the calls of one sequence have the same number of kernels.

    Raises:
      RuntimeError: the profiler saw other marks than were set, no kernels, or a number that the calls do not divide.
    """
    bits = jax.numpy.arange(7, dtype="uint8")
    mark = jax.jit(jax.lax.population_count).lower(bits).compile()
    jax.block_until_ready([calls[0]() for calls in runs] + [mark(bits)])
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            last = mark(bits)
            for calls in runs:
                for run in calls:
                    last = run()  # the former result is freed; calls run in order
                last = mark(bits)
            jax.block_until_ready(last)
        return calls_of(_kernels(Path(folder)), [len(calls) for calls in runs])


def calls_of(kernels: Sequence[tuple[str, float]], counts: Sequence[int]) -> list[list[float]]:
    """Sort kernels (name, us), with a mark before, between and after sequences of calls, into those calls.

    >>> calls_of([("m", 1.0), ("a", 2.0), ("b", 3.0), ("m", 1.0), ("c", 4.0), ("c", 5.0), ("m", 1.0)], [1, 2])
    [[5.0], [4.0, 5.0]]
    """
    if not kernels:
        raise RuntimeError("JAX's profiler saw no kernels")
    marks = [place for place, (name, _) in enumerate(kernels) if name == kernels[0][0]]
    if len(marks) != len(counts) + 1:
        raise RuntimeError(f"JAX's profiler saw {len(marks)} marks where {len(counts) + 1} were set")
    found = []
    for begin, end, count in zip(marks, marks[1:], counts, strict=False):
        took = [duration for _, duration in kernels[begin + 1 : end]]
        if not took or len(took) % count:
            raise RuntimeError(f"JAX's profiler saw {len(took)} kernels in {count} calls")
        each = len(took) // count
        found.append([sum(took[start : start + each]) for start in range(0, len(took), each)])
    return found


def launch_us(calls: Sequence[Callable[[], jax.Array]], cold_us: float) -> float:
    """Time calls made one by one from Python, in us."""
    last: list[jax.Array] = [calls[0]()]

    def run(call: Callable[[], jax.Array]) -> None:
        last[0] = call()

    runs = [functools.partial(run, call) for call in calls]
    return timing.launch_us(runs, lambda: jax.block_until_ready(last), cold_us)


def _kernels(folder: Path) -> list[tuple[str, float]]:
    """Return name and us of every event on the GPU's streams, in the order they ran."""
    found: list[tuple[float, str, float]] = []
    for file in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    found += [(event.start_ns, event.name, event.duration_ns / 1e3) for event in line.events]
    return [(name, duration) for _, name, duration in sorted(found)]


def forget() -> None:
    """Free what the calls of a problem hold."""
    _COMPILED.clear()
    _input.cache_clear()
