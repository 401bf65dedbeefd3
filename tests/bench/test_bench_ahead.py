"""Compiling ahead: what is compiled, on what, and what comes of it."""

import dataclasses

import pytest

from blrlab.bench import ahead, backends
from blrlab.bench.problem import Group, custom_case

OPS = ("dense", "monarch")
GROUP = Group("custom", "24x36", "float32", tuple(custom_case(op, 3, 24, 36, (3, 3), 12) for op in OPS))


def test_what_measures_to_choose_is_left_to_the_benchmark() -> None:
    assert ahead.compiles("torch_compile", 1)
    assert ahead.compiles("triton_two_stage", 1)
    assert ahead.compiles("int8_weight_only", 16)
    assert not ahead.compiles("int8_weight_only", 1)
    for impl in ("xla", "torch_compile_max_autotune", "torch_eager", "torch_bmm", "ref"):
        assert not ahead.compiles(impl, 16)


def test_every_share_runs_its_groups_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, str]] = []

    def make(problem, kernel):
        return lambda: made.append((problem.case.tokens, problem.op))

    counted = dataclasses.replace(backends.BACKENDS["torch_eager"], make=make)
    monkeypatch.setitem(backends.BACKENDS, "torch_eager", counted)
    monkeypatch.setattr(ahead, "compiles", lambda impl, tokens: True)
    monkeypatch.setattr(ahead.contextlib, "suppress", lambda *_: ahead.contextlib.nullcontext())
    import torch

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = ahead._compile_share(([(5, GROUP)], ("torch_eager", "torch_bmm"), "cpu", None))
    assert made == [(3, "dense"), (3, "monarch")]
    assert set(found) == {(5, "dense", "torch_eager"), (5, "monarch", "torch_eager"), (5, "monarch", "torch_bmm")}
    assert all(seconds >= 0 for seconds in found.values())


def test_what_fails_is_left_to_be_told_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(problem, kernel):
        raise RuntimeError("no")

    monkeypatch.setitem(
        backends.BACKENDS, "torch_eager", dataclasses.replace(backends.BACKENDS["torch_eager"], make=fail)
    )
    monkeypatch.setattr(ahead, "compiles", lambda impl, tokens: True)
    assert len(ahead._compile_share(([(0, GROUP)], ("torch_eager",), "cpu", None))) == 2


def test_without_a_gpu_or_workers_nothing_is_compiled_ahead(settings) -> None:
    assert ahead.compile_all([GROUP], settings("torch_compile"), 4) == {}
