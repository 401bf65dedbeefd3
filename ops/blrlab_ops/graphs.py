"""CUDA graphs of calls, as benchmarks and tuning time them.

All graphs of a process are recorded on one stream: on an H100 every overlapping launch of a graph takes 0.4 us more
once four streams have been used in the process, whatever runs on them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], Any]


def capture(calls: Sequence[Call], pool: Any = None) -> torch.cuda.CUDAGraph:
    """Record calls one after another, once the first two have run on the stream that records.

    Args:
      calls: work on the current device.
      pool: the memory that graphs share, from `torch.cuda.graph_pool_handle`; None: its own.
    """
    side = _side_stream(torch.cuda.current_device())
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as PyTorch asks: first calls may set things up that cannot be recorded
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=side):
        for call in calls:
            call()
    return graph


def replay_us(graph: torch.cuda.CUDAGraph) -> float:
    """Time one replay by events, in us."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end)


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
