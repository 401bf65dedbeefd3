"""XLA in a process of its own: the same rows, and a crash that costs only them."""

from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

from blrlab.bench import beside, suite
from blrlab.bench.beside import Beside

pytest.importorskip("jax", reason="JAX is not installed")


def test_a_second_process_gives_the_rows_in_their_places(group, settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "needed", lambda settings: "torch_eager" in settings.impls)
    asked = settings("xla", "torch_eager")
    given = {"monarch": {"V": torch.randn(3, 2, 8, 4), "U": torch.randn(3, 2, 4, 18)}}
    (rows,) = suite.bench_layers([group("dense", "monarch", kernels=given)], asked)
    assert [(row["op"], row["impl"]) for row in rows] == suite.planned(group("dense", "monarch"), asked)
    for row in rows:
        assert row["passed"], row
        assert row["p20"] <= row["p50"] <= row["p80"]


def test_a_crash_costs_only_the_rows_of_xla(group, settings, monkeypatch: pytest.MonkeyPatch) -> None:
    class Crashing:
        def __init__(self, *_: object, **__: object):
            self.closed = False

        def submit(self, *_: object):
            return self

        def result(self):
            raise BrokenProcessPool

        def shutdown(self, **_: object) -> None:
            self.closed = True

    monkeypatch.setattr(beside, "ProcessPoolExecutor", Crashing)
    monkeypatch.setattr(beside, "needed", lambda settings: True)
    (rows,) = suite.bench_layers([group("dense")], settings("xla", "torch_eager"))
    found = {row["impl"]: row for row in rows}
    assert found["torch_eager"]["passed"] is True
    assert (found["xla"]["passed"], found["xla"]["p50"]) == (None, None)
    assert "crashed" in found["xla"]["reason"]


def test_after_a_crash_the_process_starts_anew(settings) -> None:
    other = Beside(settings("xla", "torch_eager"))
    assert other._settings.impls == ("xla",)
    other.close()
    other.close()


def test_xla_stays_where_it_is_alone_or_on_a_cpu(settings) -> None:
    assert not beside.needed(settings("xla"))
    assert not beside.needed(settings("xla", "torch_eager"))


def test_layers_compiled_together_are_those_that_run(problem) -> None:
    from blrlab.bench import xla
    from blrlab.bench.gate import Judge

    problems = [problem(op) for op in ("dense", "low_rank", "monarch", "blast")]
    found = xla.compile_together(problems)
    assert set(found) == {"dense", "low_rank", "monarch", "blast"}
    assert all(seconds > 0 for seconds in found.values())
    for each in problems:
        assert xla._layer(each) is xla._COMPILED[each]
        assert Judge(each).judge(xla.to_torch(xla.call(each, each.kernel)()), None).passed
    xla.forget()
    assert not xla._COMPILED


def test_a_trace_whose_marks_or_kernels_do_not_fit_gives_no_times() -> None:
    from blrlab.bench import xla

    mark = ("wrapped_popcnt", 1.0)
    with pytest.raises(RuntimeError, match="1 marks where 3"):
        xla.calls_of([mark, ("a", 2.0), ("a", 2.0)], [1, 1])
    with pytest.raises(RuntimeError, match="3 kernels in 2 calls"):
        xla.calls_of([mark, ("a", 2.0), ("b", 2.0), ("a", 2.0), mark], [2])
    with pytest.raises(RuntimeError, match="0 kernels"):
        xla.calls_of([mark, mark], [2])
    with pytest.raises(RuntimeError, match="no kernels"):
        xla.calls_of([], [2])
