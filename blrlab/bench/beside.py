"""XLA's rows from a process of its own, on a GPU.

JAX's profiler, by which XLA is timed, tears CUDA's tracing library down at the end of every trace, and a process that
has CUDA graphs then crashes sooner or later (as PyTorch's own profiler notes of it). So XLA is verified and timed in a
second process, which makes the same tensors from the same seed, right after the others of a group and while they rest.
"""

import dataclasses
import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from blrlab.bench.problem import Group, map_leaves

XLA = "xla"
CRASHED = "the process that ran XLA crashed"
Row = dict[str, Any]


class Beside:
    """A second process that benchmarks `xla`; it starts with the first group, and anew after a crash."""

    def __init__(self, settings: Any):
        self._settings = dataclasses.replace(settings, impls=(XLA,))
        self._pool: ProcessPoolExecutor | None = None

    def rows(self, group: Group) -> list[Row] | str:
        """Return the rows of a group, or why there are none."""
        given = group.kernels
        if given:
            group = dataclasses.replace(
                group, kernels={op: map_leaves(lambda leaf: leaf.cpu(), kernel) for op, kernel in given.items()}
            )
        # spawned, since a process that has used CUDA cannot be forked
        spawn = multiprocessing.get_context("spawn")
        self._pool = self._pool or ProcessPoolExecutor(1, spawn, initializer=quiet)
        try:
            return self._pool.submit(_measured, group, self._settings).result()
        except BrokenProcessPool:
            self.close()
            return CRASHED
        except Exception as error:  # whatever a library raises there
            self.close()
            return f"the process that ran XLA failed: {type(error).__name__}: {error}"

    def close(self) -> None:
        """End the process."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
        self._pool = None


def needed(settings: Any) -> bool:
    """Say whether XLA must not share the process: on a GPU, with other backends."""
    return settings.card.is_gpu and XLA in settings.impls and len(settings.impls) > 1


def quiet() -> None:
    """Leave Ctrl-C to the main process, which ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _measured(group: Group, settings: Any) -> list[Row]:
    from blrlab.bench import suite

    (rows,) = suite.bench_layers([group], settings)
    return rows
