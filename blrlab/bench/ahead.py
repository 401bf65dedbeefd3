"""Compile what many groups will run before any of them is timed, in several processes at once.

The processes fill the caches on disk of Triton and of `torch.compile`; the benchmark then finds everything there. What
measures to choose by (XLA, max-autotune, int8's tiles, the dense product's, the paper's kernels) is left to the
benchmark itself, where nothing else uses the GPU.
"""

import contextlib
import io
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from blrlab_ops import dispatch

from blrlab.bench.beside import quiet
from blrlab.bench.problem import Group
from blrlab.bench.rows import Settings

Seconds = dict[tuple[int, str, str], float]


def compiles(impl: str, tokens: int) -> bool:
    """Say whether a backend's first call compiles, for a cache on disk, and measures nothing to choose by."""
    if impl == "int8_weight_only":
        return tokens > 1
    if impl == "triton_gemv":
        return False
    return impl in ("torch_compile", "int8_streaming") or dispatch.needs_triton(impl)


def compile_all(groups: Sequence[Group], how: Settings, workers: int) -> Seconds:
    """Run every compiled backend of every group once; return {(number of the group, op, impl): seconds of it}.

    What fails here fails again, and is told, where it is verified.
    """
    tokens = {group.tokens for group in groups}
    impls = tuple(impl for impl in how.impls if any(compiles(impl, count) for count in tokens))
    if not (workers and impls and how.card.is_gpu):
        return {}
    device = str(how.card.device)
    shares = [list(enumerate(groups))[start::workers] for start in range(workers)]
    # spawned, since a process that has used CUDA cannot be forked
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_begin) as pool:
        found = [pool.submit(_compile_share, (share, impls, device, how.clone)) for share in shares if share]
        done = [each.result() for each in found if not each.exception()]
    return {key: seconds for each in done for key, seconds in each.items()}


def _begin() -> None:
    """Start a worker, which is to compile by itself rather than with `torch.compile`'s own pool of processes."""
    quiet()
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"


def _compile_share(work: tuple[list[tuple[int, Group]], tuple[str, ...], str, Path | None]) -> Seconds:
    share, impls, device, clone = work
    found: Seconds = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for number, group in share:
            with contextlib.suppress(Exception):  # no room for the tensors, say
                found |= {(number, *key): seconds for key, seconds in _compile_group(group, impls, device, clone)}
    return found


def _compile_group(
    group: Group, impls: Sequence[str], device: str, clone: Path | None
) -> Iterator[tuple[tuple[str, str], float]]:
    import torch

    from blrlab.bench import backends

    for each in group.problems(torch.device(device)):
        for impl in impls:
            backend = backends.backend(impl, clone)
            if each.op not in backend.ops or not compiles(impl, group.tokens) or backends.why_not(impl, each):
                continue
            started = time.perf_counter()
            with contextlib.suppress(Exception), torch.no_grad():
                backend.make(each, each.kernel)()
                torch.cuda.synchronize()
            yield (each.op, impl), time.perf_counter() - started
    backends.forget_compiled()
    torch.cuda.empty_cache()
