"""Deal work out to devices: a thread for each, results in the order in which they are done."""

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

import jax

Device = Any  # a jax.Device, which type checkers take for a variable
Job = TypeVar("Job")
Result = TypeVar("Result")

THREADS = "blrlab.compress.deal"  # the name of every thread that works on a device


def deal(
    jobs: Sequence[Job], work: Callable[[Job, Device], Result], devices: Sequence[Device]
) -> Generator[Result, None, None]:
    """Yield the result of every job.

    The caller takes results in its own thread, which an interrupt reaches at once; a device then finishes what it is
    at, and its result is dropped. Each device has one job under way and one result waiting at most.

    Args:
      jobs: what to do, in this order.
      work: (job, device) -> result.
      devices: where.

    Raises:
      Exception: whatever `work` raises, once.
    """
    todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
    done: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=len(devices))
    stop = threading.Event()
    for job in jobs:
        todo.put(job)

    def hand_over(result: Any, problem: BaseException | None) -> None:
        while not stop.is_set():
            try:
                return done.put((result, problem), timeout=0.1)
            except queue.Full:
                continue

    def run(device: Device) -> None:
        while not stop.is_set():
            try:
                job = todo.get_nowait()
            except queue.Empty:
                return
            try:
                with jax.default_device(device):
                    hand_over(work(job, device), None)
            except BaseException as problem:
                return hand_over(None, problem)

    for device in devices:
        threading.Thread(target=run, args=(device,), name=THREADS, daemon=True).start()
    try:
        for _ in jobs:
            result, problem = done.get()
            if problem is not None:
                raise problem
            yield result
    finally:
        stop.set()
