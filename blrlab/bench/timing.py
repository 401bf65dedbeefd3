"""Times of contenders, taken in turn so that a drifting clock or temperature meets all of them alike.

On a CUDA GPU a sample is the replay of a CUDA graph of many calls, one after another on one stream, each on the next
of many copies of the weights: so many that the weights come from memory, as in a model, while the input stays in
cache. Graphs of small layers hold a window of the copies each, and replays go round through the windows.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from blrlab_ops.graphs import Call, capture, replay_us

LEAST, MOST = 11, 400
GRAPH_CALLS = 512  # in one graph
SAMPLE_US = 2000.0  # the least that one replay takes, so that its own start does not count
COLD = 4  # times the L2: the bytes of weights that calls go round through


class Times(NamedTuple):
    """Percentiles of the time of one layer call, in us, and the samples behind them."""

    p20: float
    p50: float
    p80: float
    samples: int


@dataclasses.dataclass(frozen=True)
class Contender:
    """What is timed.

    Attributes:
      name: unique among those timed together.
      sample: runs for a short while and returns times of one call, in us.
      method: how, for the record.
      every: sampled in every so many rounds only, where a sample is dear and holds many times.
    """

    name: str
    sample: Callable[[], Sequence[float]]
    method: str
    every: int = 1


def time_contenders(contenders: Sequence[Contender], seconds: float) -> Mapping[str, Times]:
    """Return {name: times} of contenders that have run before; without those that gave no sample.

    Args:
      contenders: sampled in turn, one sample of each a round.
      seconds: of measuring for each, within 11 to 400 rounds.
    """
    samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    started, rounds = time.perf_counter(), 0
    while rounds < LEAST or (time.perf_counter() - started < seconds * len(contenders) and rounds < MOST):
        for contender in contenders:
            if rounds % contender.every == 0:
                samples[contender.name] += contender.sample()
        rounds += 1
    return {name: summary(taken) for name, taken in samples.items() if taken}


def summary(samples: Sequence[float]) -> Times:
    """Return the percentiles of times."""
    p20, p50, p80 = np.percentile(samples, (20, 50, 80)).tolist()
    return Times(p20, p50, p80, len(samples))


def copies_to_be_cold(weight_bytes: int, l2_bytes: int) -> int:
    """Return how many copies of the weights make every call's cold.

    >>> copies_to_be_cold(2**25, 50 * 2**20)
    7
    """
    return max(2, math.ceil(COLD * l2_bytes / max(weight_bytes, 1)))


def on_host(call: Call) -> Callable[[], Sequence[float]]:
    """Sample a call that returns when its work is done, by the host's clock."""

    def sample() -> Sequence[float]:
        started = time.perf_counter()
        call()
        return (1e6 * (time.perf_counter() - started),)

    return sample


def in_graphs(calls: Sequence[Call]) -> Callable[[], Sequence[float]]:
    """Sample calls by replaying CUDA graphs of them, window by window; each sample is one replay's mean.

    The graphs know their tensors by address only: the sampler keeps the calls, and so their weights, alive.
    """
    turn = _estimate_us(calls) * len(calls)
    # whole turns: a graph that ended amid one would meet weights again that are still in cache
    turns = max(1, min(math.ceil(SAMPLE_US / turn), GRAPH_CALLS // len(calls)))
    windows = max(-(-len(calls) // GRAPH_CALLS), min(len(calls), int(turn / SAMPLE_US)), 1)
    rotation = [*calls] * turns
    pool = torch.cuda.graph_pool_handle()  # nothing reads the results, so that graphs may share their memory
    graphs = [(capture(part, pool), len(part)) for part in (rotation[start::windows] for start in range(windows))]
    for graph, _ in graphs:
        replay_us(graph)  # the first replay of a graph brings it to the device as well
    order = itertools.cycle(graphs)

    def sample(kept: Sequence[Call] = calls) -> Sequence[float]:
        graph, count = next(order)
        return (replay_us(graph) / count,)

    return sample


def warm_us(call: Call, cold_us: float) -> float:
    """Time a call on the same weights again and again, in us: what fits the cache stays in it."""
    count = min(max(4, math.ceil(SAMPLE_US / cold_us)), GRAPH_CALLS)
    graph = capture([call] * count)
    replay_us(graph)
    return float(np.median([replay_us(graph) for _ in range(7)])) / count


def launch_us(calls: Sequence[Call], wait: Callable[[], None], cold_us: float) -> float:
    """Time calls made one by one from Python, in us: for small layers the cost of the launches."""
    count = min(max(4, math.ceil(10 * SAMPLE_US / cold_us)), 50)
    calls = list(itertools.islice(itertools.cycle(calls), count))
    taken = []
    for _ in range(3):
        wait()
        started = time.perf_counter()
        for call in calls:
            call()
        wait()
        taken.append(1e6 * (time.perf_counter() - started) / len(calls))
    return float(np.median(taken))


def _estimate_us(calls: Sequence[Call]) -> float:
    """Return about the time of one call on the device, in us, by a graph: from Python it might be the launch's."""
    few = calls[:8]
    graph = capture(few)
    replay_us(graph)
    return replay_us(graph) / len(few)
