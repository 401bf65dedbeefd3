"""The backends: what they compute, and in which words they decline."""

import importlib.util
import shutil

import jax
import numpy as np
import pytest

from blrlab.bench import backends, gate

FORMATS = ("dense", "low_rank", "monarch", "blast")
pytest.importorskip("torch", reason="PyTorch is not installed")


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("impl", ["xla", "torch"])
def test_a_backend_computes_the_layer(problem, impl: str, format: str, copies: int) -> None:
    layer = problem(format)
    contender = backends.BACKENDS[impl](layer, copies)
    output = contender.output()
    assert isinstance(output, np.ndarray)
    assert gate.judge(layer, output, None).passed
    contender.run()
    assert (contender.impl, contender.calls, contender.waits) == (impl, copies, True)
    assert "host clock" in contender.method


@pytest.mark.parametrize("impl", ["xla", "torch"])
def test_a_backend_works_on_copies_and_leaves_the_problem_as_it_is(problem, impl: str) -> None:
    layer = problem("monarch", "bfloat16")
    before = {name: np.array(factor) for name, factor in layer.kernel.items()}
    contender = backends.BACKENDS[impl](layer, 2)
    contender.run()
    first = contender.output()
    contender.run()
    assert np.array_equal(first, contender.output())
    for name, factor in layer.kernel.items():
        assert np.array_equal(factor, before[name])


def test_torch_compile_runs_what_torch_compiled(problem, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    asked: list[dict] = []

    def compile(function, **options):
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    layer = problem("blast")
    contender = backends.BACKENDS["torch_compile"](layer, 1)
    assert contender.impl == "torch_compile"
    assert gate.judge(layer, contender.output(), None).passed
    assert asked == [{"fullgraph": True, "dynamic": False}]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("impl", ["xla", "torch"])
def test_what_can_run_is_not_declined(problem, impl: str, format: str) -> None:
    assert backends.why_not(impl, problem(format)) is None


@pytest.mark.parametrize("impl", ["torch", "torch_compile", "triton"])
def test_without_torch_all_but_xla_decline(problem, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else found(name))
    assert backends.why_not(impl, problem("monarch")) == "PyTorch is not installed"
    assert backends.why_not("xla", problem("monarch")) is None


@pytest.mark.parametrize("compiler", ["g++", None])
def test_torch_compile_needs_a_compiler_on_a_cpu(problem, compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_compiler", lambda: compiler)
    sentence = "torch.compile needs a C++ compiler on a CPU, and there is none"
    assert backends.why_not("torch_compile", problem("monarch")) == (None if compiler else sentence)
    assert backends.why_not("torch", problem("monarch")) is None


@pytest.mark.parametrize(
    ("named", "there", "found"),
    [
        (None, {"g++", "clang++"}, "g++"),
        (None, {"clang++"}, "clang++"),
        (None, set(), None),
        ("my-cxx", {"my-cxx", "g++"}, "my-cxx"),
        ("my-cxx", {"g++"}, "g++"),
        ("my-cxx", set(), None),
        ("", {"g++"}, "g++"),
    ],
)
def test_the_compiler_is_the_one_named_or_a_known_one(named, there, found, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name in there else None)
    if named is None:
        monkeypatch.delenv("CXX", raising=False)
    else:
        monkeypatch.setenv("CXX", named)
    assert backends._compiler.__wrapped__() == found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("format", ["low_rank", "monarch", "blast"])
def test_triton_declines_a_cpu(problem, format: str, dtype: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    sentence = backends.why_not("triton", problem(format, dtype))
    assert sentence is not None
    assert "'cpu' is not a CUDA device" in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("impl", ["torch", "torch_compile", "triton"])
def test_a_gpu_that_only_jax_finds_is_said_to_be_one(problem, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    layer = problem("monarch")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backends.why_not(impl, layer) == "JAX is on a GPU, but this PyTorch finds none"
    assert backends.why_not("xla", layer) is None
