"""Times: taken in turn, a call at a time, within bounds; and the machine's ceilings."""

import math

import numpy as np
import pytest

from blrlab.bench import measure_peaks, peaks, timing
from blrlab.bench.backends import Contender


class Clock:
    """A clock that only contenders move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        self.ran: list[str] = []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def contender(self, impl: str, seconds: list[float], calls: int = 1) -> Contender:
        """Make one whose runs take these seconds in turn."""
        runs = 0

        def run() -> None:
            nonlocal runs
            self.now += seconds[runs % len(seconds)]
            self.ran.append(impl)
            runs += 1

        return Contender(impl, lambda: np.zeros(1), run, calls, True, "a clock")


def test_contenders_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    found = timing.time_contenders([clock.contender(impl, [1.0]) for impl in "abc"], seconds=1e-9)
    assert list(found) == ["a", "b", "c"]
    assert "".join(clock.ran[-3 * timing.LEAST :]) == "abc" * timing.LEAST
    assert len(clock.ran) == 3 * (timing.LEAST + 2), "each ran twice before, not counted"


def test_a_time_is_that_of_one_call_in_microseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    pair = [clock.contender("one", [2e-3]), clock.contender("five", [2e-3], calls=5)]
    found = timing.time_contenders(pair, seconds=1e-9)
    assert found["one"] == pytest.approx((2000.0,) * 3)
    assert found["five"] == pytest.approx((400.0,) * 3)


def test_percentiles_are_those_of_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    # Two runs to warm up, then samples of 1 to 11 ms in some order.
    order = np.random.default_rng(0).permutation(np.arange(1, 12))
    seconds = [9.0, 9.0, *(order * 1e-3).tolist()]
    (found,) = timing.time_contenders([clock.contender("a", seconds)], seconds=1e-9).values()
    assert found == pytest.approx((3000.0, 6000.0, 9000.0))
    assert found.p20 <= found.p50 <= found.p80


@pytest.mark.parametrize(
    ("run", "seconds", "rounds"),
    [(1.0, 1e-9, 11), (1e-9, 100.0, 400), (0.1, 2.0, 20), (0.1, 5.0, 50)],
    ids=["least", "most", "as long as asked", "longer"],
)
def test_there_are_as_many_samples_as_time_allows(
    run: float, seconds: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    timing.time_contenders([clock.contender("a", [run]), clock.contender("b", [run])], seconds)
    assert clock.ran.count("a") == clock.ran.count("b")
    assert clock.ran.count("a") - 2 == pytest.approx(rounds, abs=1)


def test_nothing_to_time_is_no_time() -> None:
    assert timing.time_contenders([], 10.0) == {}


def test_peaks_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "SIZES", {"cpu": (64, 2**12), "gpu": (64, 2**12)})
    for dtype in ("float32", "bfloat16"):
        found = measure_peaks("a machine", dtype, seconds=0.01)
        assert (found.name, found.dtype, found.source) == ("a machine", dtype, "measured here")
        assert 1e6 < found.flops_per_s < 1e16
        assert 1e6 < found.bytes_per_s < 1e14


def test_a_peak_is_the_best_of_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    class Done:
        def block_until_ready(self) -> None:
            pass

    now, times, calls = 0.0, [9.0, *([0.5] * 10), *([0.2] * 10), *([0.4] * 10)], 0

    def call() -> Done:
        nonlocal now, calls
        now += times[calls]
        calls += 1
        return Done()

    monkeypatch.setattr(peaks.time, "perf_counter", lambda: now)
    assert math.isclose(peaks._best(call, 10.0), 0.2)
    assert calls == 31
