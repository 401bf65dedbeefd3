"""Times: taken in turn, of one call, within bounds; on a GPU of graphs over cold weights."""

import gc
import itertools
import weakref

import numpy as np
import pytest
import torch

from blrlab.bench import timing
from blrlab.bench.timing import Contender, copies_to_be_cold

MIB = 2**20


class Clock:
    """A clock that only contenders move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        self.ran: list[str] = []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def contender(self, name: str, seconds: list[float], every: int = 1, times: int = 1) -> Contender:
        """Make one whose samples take these seconds in turn, each the time of so many calls."""
        taken = itertools.cycle(seconds)

        def sample() -> list[float]:
            spent = next(taken)
            self.now += spent
            self.ran.append(name)
            return [1e6 * spent / times] * times

        return Contender(name, sample, "a clock", every)


def test_contenders_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    found = timing.time_contenders([clock.contender(name, [1.0]) for name in "abc"], seconds=1e-9)
    assert list(found) == ["a", "b", "c"]
    assert "".join(clock.ran) == "abc" * timing.LEAST
    assert {times.samples for times in found.values()} == {timing.LEAST}


def test_a_dear_contender_is_sampled_in_some_rounds_and_gives_many_times(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    pair = [clock.contender("a", [1.0]), clock.contender("dear", [1.0], every=6, times=100)]
    found = timing.time_contenders(pair, seconds=1e-9)
    rounds = -(-timing.LEAST // 6)
    assert clock.ran.count("dear") == rounds
    assert (found["a"].samples, found["dear"].samples) == (timing.LEAST, 100 * rounds)
    assert "".join(clock.ran).startswith("adear" + 5 * "a" + "adear")


def test_percentiles_are_those_of_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    # 1 to 11 ms in some order
    order = np.random.default_rng(0).permutation(np.arange(1, timing.LEAST + 1))
    seconds = (order * 1e-3).tolist()
    (found,) = timing.time_contenders([clock.contender("a", seconds)], seconds=1e-9).values()
    assert found == pytest.approx((3000.0, 6000.0, 9000.0, 11))
    assert found.p20 <= found.p50 <= found.p80


@pytest.mark.parametrize(
    ("run", "seconds", "rounds"),
    [(1.0, 1e-9, timing.LEAST), (1e-9, 100.0, timing.MOST), (0.1, 2.0, 20), (0.1, 5.0, 50)],
    ids=["least", "most", "as long as asked", "longer"],
)
def test_there_are_as_many_samples_as_time_allows(run: float, seconds: float, rounds: int, monkeypatch) -> None:
    clock = Clock(monkeypatch)
    found = timing.time_contenders([clock.contender("a", [run]), clock.contender("b", [run])], seconds)
    assert clock.ran.count("a") == clock.ran.count("b") == found["a"].samples
    assert found["a"].samples == pytest.approx(rounds, abs=1)


def test_nothing_to_time_is_no_time() -> None:
    assert timing.time_contenders([], 10.0) == {}


def test_a_contender_that_gives_no_sample_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    silent = Contender("silent", lambda: (), "none")
    assert list(timing.time_contenders([silent, clock.contender("a", [1.0])], seconds=1e-9)) == ["a"]


@pytest.mark.parametrize(("megabytes", "copies"), [(0.001, 200_000), (1, 200), (10, 20), (60, 4), (100, 2), (1000, 2)])
def test_the_copies_of_the_weights_are_four_times_the_cache(megabytes: float, copies: int) -> None:
    assert copies_to_be_cold(int(megabytes * 1000), 50_000) == copies


def test_weights_of_no_bytes_are_no_crash() -> None:
    assert copies_to_be_cold(0, 0) == 2


def test_on_the_host_a_sample_is_the_time_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def call() -> None:
        clock.now += 2e-3

    assert timing.on_host(call)() == pytest.approx((2000.0,))


class Graphs:
    """Graphs that only count: a call takes `us`, and their replays are noted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, us: float):
        self.captured: list[list[int]] = []
        self.replayed: list[int] = []
        self._us = us
        monkeypatch.setattr(timing.torch.cuda, "graph_pool_handle", lambda: "shared")
        monkeypatch.setattr(timing, "capture", self._capture)
        monkeypatch.setattr(timing, "replay_us", self._replay)
        monkeypatch.setattr(timing, "_estimate_us", lambda calls: us)

    def _capture(self, calls, pool: str = "shared") -> int:
        assert pool == "shared"
        self.captured.append([call() for call in calls])
        return len(self.captured) - 1

    def _replay(self, graph: int) -> float:
        self.replayed.append(graph)
        return self._us * len(self.captured[graph])


def numbered(count: int) -> list:
    return [lambda number=number: number for number in range(count)]


@pytest.mark.parametrize(
    ("copies", "us"), [(2, 5.0), (7, 5.0), (200, 3.0), (450, 1.0), (513, 3.0), (5000, 1.0), (3, 4000.0), (600, 4000.0)]
)
def test_replays_go_round_through_every_copy_before_one_comes_again(copies: int, us: float, monkeypatch) -> None:
    graphs = Graphs(monkeypatch, us)
    sample = timing.in_graphs(numbered(copies))
    windows = len(graphs.captured)
    assert all(len(window) <= timing.GRAPH_CALLS for window in graphs.captured), "no graph grows without end"
    assert {number for window in graphs.captured for number in window} == set(range(copies))
    assert graphs.replayed == list(range(windows)), "each once beforehand: the first brings it to the device as well"
    for _ in range(2 * windows):
        assert sample() == pytest.approx((us,)), "a sample is the mean of one call"
    assert graphs.replayed == list(range(windows)) * 3
    stream = [number for graph in graphs.replayed for number in graphs.captured[graph]]
    assert len(stream) >= 2 * copies
    for number, again in zip(stream, stream[copies:], strict=False):
        assert number == again, "each comes again when all the others have run, at the end of a graph too"


@pytest.mark.parametrize("copies", [2, 7, 100])
def test_a_replay_is_long_enough_for_its_own_start_not_to_count(copies: int, monkeypatch) -> None:
    for us in (0.5, 5.0, 100.0, 5000.0):
        graphs = Graphs(monkeypatch, us)
        timing.in_graphs(numbered(copies))
        for window in graphs.captured:
            assert us * len(window) > timing.SAMPLE_US / 2 or len(window) > timing.GRAPH_CALLS - copies
            assert len(window) <= timing.GRAPH_CALLS
            # nor is one much longer: slow layers would take minutes
            assert us * (len(window) - 1) < 2 * timing.SAMPLE_US or len(graphs.captured) == 1


def test_a_sampler_keeps_the_calls_and_so_their_weights_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph knows its tensors by address only: weights that are freed are another's memory."""

    class Call:
        def __call__(self) -> int:
            return 0

    Graphs(monkeypatch, 100.0)
    calls = [Call() for _ in range(3)]
    kept = [weakref.ref(call) for call in calls]
    sample = timing.in_graphs(calls)
    del calls
    gc.collect()
    assert all(each() is not None for each in kept)
    del sample
    gc.collect()
    assert all(each() is None for each in kept)


@pytest.mark.parametrize("cold_us", [0.1, 8.0, 700.0, 50_000.0])
def test_a_warm_time_is_of_one_call_on_the_same_weights(cold_us: float, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = Graphs(monkeypatch, 3.0)
    assert timing.warm_us(lambda: 17, cold_us) == pytest.approx(3.0)
    ((*calls,),) = graphs.captured
    assert set(calls) == {17}
    assert 2 <= len(calls) <= timing.GRAPH_CALLS
    assert len(graphs.replayed) >= 4, "one to warm up, and a median"


@pytest.mark.parametrize("cold_us", [1.0, 1e3, 1e6])
def test_a_time_from_python_waits_before_and_after_and_is_of_one_call(cold_us: float, monkeypatch) -> None:
    clock, queued = Clock(monkeypatch), []

    def wait() -> None:
        clock.now += 1e-6 * sum(queued)
        queued.clear()

    def call(us: float) -> None:
        queued.append(us)

    queued.append(1e9)  # what was there before
    found = timing.launch_us([lambda: call(3.0), lambda: call(5.0)], wait, cold_us)
    assert found == pytest.approx(4.0)
    assert queued == []


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("copies", [3, 700])
def test_on_a_gpu_every_copy_is_run_and_every_sample_is_a_time(copies: int) -> None:
    counts = [torch.zeros(1, device="cuda") for _ in range(copies)]
    sample = timing.in_graphs([lambda count=count: count.add_(1) for count in counts])
    torch.cuda.synchronize()
    for count in counts:
        count.zero_()
    samples = list(itertools.chain(*(sample() for _ in range(4))))
    torch.cuda.synchronize()
    assert all(0 < us < 1e4 for us in samples)
    assert all(float(count) > 0 for count in counts)


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_the_weights_outlive_everything_but_their_sampler() -> None:
    x, y = torch.ones(1, 512, device="cuda"), torch.zeros(1, 512, device="cuda")
    weights = [torch.full((512, 512), float(number), device="cuda") for number in range(3)]
    sample = timing.in_graphs([lambda w=w: y.add_(x @ w) for w in weights])
    del weights
    gc.collect()
    spoiled = [torch.full((512, 512), float("nan"), device="cuda") for _ in range(8)]
    torch.cuda.synchronize()
    y.zero_()
    sample()
    torch.cuda.synchronize()
    assert len(spoiled) == 8
    assert bool(y.isfinite().all())
    assert bool((y > 0).all())


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_warm_weights_are_no_slower_than_cold_ones() -> None:
    """A quarter of the L2 in weights stays in it when they come again at once, and not when all copies are between."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    side = int((l2 / 4 / 2) ** 0.5)
    x = torch.randn(1, side, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(side, side, device="cuda").bfloat16() for _ in range(copies_to_be_cold(2 * side**2, l2))]
    calls = [lambda w=w: x @ w for w in weights]
    sample = timing.in_graphs(calls)
    cold = float(np.median([sample()[0] for _ in range(timing.LEAST)]))
    assert 0 < timing.warm_us(calls[0], cold) <= cold


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_small_calls_from_python_cost_more_than_in_a_graph() -> None:
    x = torch.zeros(16, device="cuda")
    calls = [lambda: x.add_(1)] * 4
    sample = timing.in_graphs(calls)
    inside = float(np.median([sample()[0] for _ in range(timing.LEAST)]))
    assert timing.launch_us(calls, torch.cuda.synchronize, inside) > inside > 0
