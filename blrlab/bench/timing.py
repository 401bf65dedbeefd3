"""Times of contenders, taken in turn so that a drifting clock or temperature meets all of them alike."""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from blrlab.bench.backends import Contender

LEAST, MOST = 11, 400


class Times(NamedTuple):
    """Percentiles of the time of one layer call, in us."""

    p20: float
    p50: float
    p80: float


def time_contenders(contenders: Sequence[Contender], seconds: float) -> Mapping[str, Times]:
    """Return {impl: times} of contenders that have run before.

    Args:
      contenders: whose runs are interleaved, one sample of each a round.
      seconds: of measuring for each, within 11 to 400 samples.
    """
    samples: dict[str, list[float]] = {contender.impl: [] for contender in contenders}
    for contender in contenders:
        contender.run()
        _sample(contender)
    started, rounds = time.perf_counter(), 0
    while rounds < LEAST or (time.perf_counter() - started < seconds * len(contenders) and rounds < MOST):
        for contender in contenders:
            samples[contender.impl].append(_sample(contender))
        rounds += 1
    return {impl: Times(*np.percentile(taken, (20, 50, 80)).tolist()) for impl, taken in samples.items()}


def _sample(contender: Contender) -> float:
    """Time one run, in us a call."""
    if contender.waits:
        started = time.perf_counter()
        contender.run()
        return 1e6 * (time.perf_counter() - started) / contender.calls
    import torch

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    contender.run()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end) / contender.calls
