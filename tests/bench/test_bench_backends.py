"""The backends: what they compute, and in which words they decline."""

import dataclasses
import importlib.util
import math
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import blrlab_ops
import pytest
import torch
from blrlab_ops import int8

from blrlab.bench import backends, paper, rows, suite
from blrlab.bench.backends import BACKENDS, backend, chosen, names, why_not
from blrlab.bench.gate import Judge
from blrlab.bench.problem import leaves, map_leaves
from blrlab.errors import InputError

FORMATS = ("dense", "low_rank", "monarch", "blast")
RUNS = [
    (impl, format)
    for impl in ("torch_eager", "torch_linear", "xla", "torch_bmm", "ref")
    for format in backend(impl).ops
]
each_run = pytest.mark.parametrize(("impl", "format"), RUNS)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch):
    """Let torch.compile hand functions back; return the list of what it is asked for."""
    asked: list[dict] = []

    def compile(function, **options):
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    backends._compile.cache_clear()
    yield asked
    backends._compile.cache_clear()


def output(impl: str, layer):
    run = backend(impl)
    return run.to_rows(layer, run.make(layer, layer.kernel)())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@each_run
def test_a_backend_computes_the_layer(problem, impl: str, format: str, dtype: str) -> None:
    layer = problem(format, dtype)
    y = output(impl, layer)
    assert (y.dtype, tuple(y.shape)) == (layer.x.dtype, (7, 36))
    assert Judge(layer).judge(y, None).passed
    assert why_not(impl, layer) is None, "what can run is not declined"


@each_run
def test_a_backend_leaves_the_problem_as_it_is(problem, impl: str, format: str) -> None:
    layer, before = problem(format), problem(format)
    call = backend(impl).make(layer, layer.kernel)
    first = backend(impl).to_rows(layer, call()).clone()
    assert torch.equal(first, backend(impl).to_rows(layer, call())), "and a call can be repeated"
    assert torch.equal(layer.x, before.x)
    assert all(map(torch.equal, leaves(layer.kernel), leaves(before.kernel)))


@each_run
def test_a_backend_runs_on_the_weights_it_is_given(problem, impl: str, format: str) -> None:
    """Timing goes round through copies of the weights: each call must read its own."""
    layer = problem(format)
    zeros = map_leaves(torch.zeros_like, layer.kernel)
    run = backend(impl)
    assert not run.to_rows(layer, run.make(layer, zeros)()).any()
    assert run.to_rows(layer, run.make(layer, layer.kernel)()).any()


@pytest.mark.parametrize(
    ("impl", "options"),
    [
        ("torch_compile", {"mode": None, "options": None}),
        ("torch_compile_max_autotune", {"mode": "max-autotune-no-cudagraphs", "options": None}),
    ],
)
@pytest.mark.parametrize("format", FORMATS)
def test_torch_compile_runs_what_torch_compiled_once_for_all_copies(problem, compiler, impl, format, options) -> None:
    layer = problem(format)
    calls = [backend(impl).make(layer, map_leaves(torch.clone, layer.kernel)) for _ in range(3)]
    for call in calls:
        assert Judge(layer).judge(call(), None).passed
    assert compiler == [{"fullgraph": True, "dynamic": False} | options]


def test_another_problem_is_compiled_anew_and_what_is_forgotten_too(problem, compiler) -> None:
    first, second = problem("low_rank"), problem("low_rank")
    for layer in (first, second, first, second):
        backend("torch_compile").make(layer, layer.kernel)
    assert len(compiler) == 2
    backends.forget_compiled()
    backend("torch_compile").make(first, first.kernel)
    assert len(compiler) == 3


@pytest.mark.skipif(not backends._compiler(), reason="no C++ compiler for torch.compile")
def test_what_torch_really_compiles_is_right(problem) -> None:
    layer = problem("monarch")
    with torch.no_grad():
        assert Judge(layer).judge(output("torch_compile", layer), None).passed
    backends.forget_compiled()


@pytest.mark.skipif(not backends._compiler(), reason="no C++ compiler for torch.compile")
@pytest.mark.parametrize(("dtype", "tokens"), [("bfloat16", 1), ("float32", 7)])
def test_the_compiled_int8_product_is_that_of_the_quantised_weights(problem, dtype: str, tokens: int) -> None:
    layer = problem("dense", dtype, tokens)
    with torch.no_grad():
        y = output("int8_weight_only", layer)
    assert Judge(layer).judge(y, None, backends.dequantised(layer.kernel)).passed
    backends.forget_compiled()


@pytest.mark.parametrize("tokens", [1, 7])
def test_int8_reads_int8_and_asks_for_one_reduction_where_there_is_one_token(problem, compiler, tokens: int) -> None:
    layer = problem("dense", "float32", tokens)
    run = backend("int8_weight_only")
    y = run.make(layer, layer.kernel)()
    assert compiler == [
        {"fullgraph": True, "dynamic": False, "mode": None, "options": {"coordinate_descent_tuning": tokens == 1}}
    ]
    assert run.truth is not None
    judge = Judge(layer)
    assert judge.judge(y, None, run.truth(layer.kernel)).passed
    assert not judge.judge(y, None).passed, "the rounding of its weights is no error of its product"


STREAMED = """
import sys, torch
from blrlab_ops import launching, testing
from blrlab_ops.testing import Case
from blrlab.bench import backends, gemv
from blrlab.bench.gate import Judge
from blrlab.bench.problem import Problem

for tokens in (1, 5):
    case = Case("dense", tokens, 72, 36, (1, 1), 0)
    x, W = torch.randn(tokens, 72), torch.randn(72, 36)
    y = backends.BACKENDS["triton_gemv"].make(Problem("own", "a", case, W, x), W)()
    torch.testing.assert_close(y, x @ W)
    for parts in (1, 2, 4):
        cut = x.new_full((tokens, 36), float("nan"))
        launching.run(gemv.launches(x, W, cut, None, parts), x.device)
        torch.testing.assert_close(cut, x @ W, rtol=1e-4, atol=1e-4)
    for format, blocks, rank in (("low_rank", (1, 1), 8), ("monarch", (3, 3), 5), ("blast", (3, 3), 8)):
        case = Case(format, tokens, 72, 36, blocks, rank)
        each = Problem("own", "a", case, testing.random_factors(format, 72, 36, blocks, rank), x)
        run = backends.BACKENDS["int8_streaming"]
        y, judge = run.make(each, each.kernel)(), Judge(each)
        assert judge.judge(y, None, run.truth(each.kernel)).passed, (format, tokens)
        assert 1e-4 < run.quantisation_error(each.kernel) < 0.02
"""


def test_streaming_kernels_on_dense_and_int8_weights() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    done = subprocess.run(
        [sys.executable, "-c", STREAMED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("format", ["dense", "low_rank", "monarch", "blast"])
def test_streaming_kernels_decline_a_cpu_and_many_tokens(problem, monkeypatch, format: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    impl = "triton_gemv" if format == "dense" else "int8_streaming"
    sentence = why_not(impl, problem(format))
    assert sentence is not None
    assert "'cpu' is not a CUDA device" in sentence
    monkeypatch.setattr(blrlab_ops, "why_not", lambda *given: None)  # as on a GPU
    on_a_gpu = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    few, many = (dataclasses.replace(problem(format, tokens=tokens), x=on_a_gpu) for tokens in (7, 65))
    assert why_not(impl, few) is None
    assert "streaming is for up to 64 tokens" in (why_not(impl, many) or "")


def test_own_kernels_are_held_to_the_errors_of_the_same_products_by_pytorch(problem) -> None:
    for format in FORMATS:
        assert suite._yardstick(problem(format))[0] < 1e-5


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("format", FORMATS[1:])
def test_int8_factors_save_the_bytes_that_they_do(problem, format: str, itemsize: int) -> None:
    layer = problem(format, "float32" if itemsize == 4 else "bfloat16")
    small = int8.quantise(layer.kernel)
    saved = layer.weight_bytes - sum(each.numel() * each.element_size() for each in small.values())
    assert rows._saved_by_int8(layer.case, itemsize) == saved


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_rounded_to_int8_by_column(dtype: str) -> None:
    weight = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1.0, 0.0, 10.0])
    weight = weight.to(getattr(torch, dtype))
    columns, scale = backends.quantise(weight)
    assert (columns.dtype, scale.dtype) == (torch.int8, weight.dtype)
    assert (tuple(columns.shape), tuple(scale.shape)) == ((50, 4), (4,))
    assert columns[:, [0, 1, 3]].abs().amax(0).tolist() == [127] * 3, "every column uses the whole range"
    assert not columns[:, 2].any(), "zeros stay zeros"
    # half a step, and what the scale itself lost to its dtype
    step = scale.double() * (0.5 + 127 * torch.finfo(weight.dtype).eps)
    off = (backends.dequantised(weight) - weight.double()).abs()
    assert bool((off <= step).all())
    assert backends.quantisation_error(weight) == pytest.approx(float(off.norm() / weight.double().norm()))


def test_the_error_of_rounding_is_what_a_count_by_hand_gives() -> None:
    # steps of 1 by the largest; 0.5 rounds to the even 0, 1.25 to 1
    weight = torch.tensor([[127.0], [0.5], [1.25]])
    wanted = math.sqrt(0.5**2 + 0.25**2) / math.sqrt(127**2 + 0.5**2 + 1.25**2)
    assert backends.quantisation_error(weight) == pytest.approx(wanted)


def test_without_jax_xla_declines_and_the_rest_do_not(problem, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jax" else found(name))
    assert why_not("xla", problem("monarch")) == "JAX is not installed: pip install jax"
    assert why_not("torch_eager", problem("monarch")) is None


def test_jax_on_another_device_than_torch_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    from blrlab.bench import xla

    assert xla.why_not("cpu") is None
    assert "JAX has no GPU here, it runs on the cpu: install jax" in str(xla.why_not("cuda"))
    monkeypatch.setattr(xla.jax, "default_backend", lambda: "gpu")
    assert "JAX runs on the gpu and torch on the CPU: set JAX_PLATFORMS=cpu" in str(xla.why_not("cpu"))
    assert xla.why_not("cuda") is None


@pytest.mark.parametrize("compiler", ["g++", None])
@pytest.mark.parametrize("impl", ["torch_compile", "torch_compile_max_autotune", "int8_weight_only"])
def test_torch_compile_needs_a_compiler_on_a_cpu(problem, impl: str, compiler, monkeypatch) -> None:
    monkeypatch.setattr(backends, "_compiler", lambda: compiler)
    sentence = "torch.compile needs a C++ compiler on a CPU, and there is none"
    assert why_not(impl, problem("dense")) == (None if compiler else sentence)
    assert why_not("torch_eager", problem("dense")) is None


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
    sentence = why_not("triton_two_stage", problem(format, dtype))
    assert sentence is not None
    assert "'cpu' is not a CUDA device" in sentence
    assert "\n" not in sentence


def test_every_backend_has_its_formats_and_only_own_kernels_the_closer_budget() -> None:
    assert {name: backend(name).ops for name in names() if backend(name).ops != FORMATS} == {
        "torch_linear": ("dense",),
        "int8_weight_only": ("dense",),
        "triton_gemv": ("dense",),
        **dict.fromkeys(("int8_streaming", "ref", "torch_bmm", "triton_streaming", "triton_two_stage"), FORMATS[1:]),
        "triton_fused": ("monarch",),
        "hopper_chained": ("monarch",),
        "triton_late_mixing": ("blast",),
        "triton_three_stage": ("blast",),
        "bmm_mixing": ("blast",),
    }
    own = [name for name in names() if name.startswith(("triton_", "hopper_")) or name == "bmm_mixing"]
    assert [name for name in names() if backend(name).own] == own
    assert [backend(name).name for name in names()] == list(names())


def test_an_own_kernel_is_packed_once_for_its_weights(problem, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, packed = problem("monarch"), []
    pack = blrlab_ops.pack
    monkeypatch.setattr(blrlab_ops, "pack", lambda *given, **how: packed.append(how) or pack(*given, **how))
    call = backend("torch_bmm").make(layer, layer.kernel)
    call(), call()
    assert packed == [{"impl": "torch_bmm"}]


def test_all_is_every_backend_but_those_that_run_only_where_named() -> None:
    assert chosen("all") == tuple(name for name in names() if name not in ("torch_compile_max_autotune", "ref"))
    assert chosen("ref, all") == ("ref", *chosen("all"))
    assert chosen("torch_bmm,xla,torch_bmm,") == ("torch_bmm", "xla")
    assert not set(paper.VARIANTS) & set(chosen("all"))
    assert chosen("all", Path("a_clone"))[-len(paper.VARIANTS) :] == tuple(paper.VARIANTS)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("torch_egar", 'unknown impl "torch_egar": it is one of all, torch_eager, .*Did you mean "torch_eager"'),
        ("xla,triton_two_stages", 'unknown impl "triton_two_stages": .*Did you mean "triton_two_stage"'),
        ("paper_blast_bmm", 'impl "paper_blast_bmm" needs --paper=FOLDER, a clone of https://github.com/'),
        ("", "no impl is named: give all, or some of torch_eager"),
        (" , ", "no impl is named: give all, or some of torch_eager"),
    ],
)
def test_a_backend_that_is_not_known_is_told_the_nearest(words: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        chosen(words)


def test_every_backend_of_the_table_is_under_its_name() -> None:
    assert [each.name for each in BACKENDS.values()] == list(BACKENDS)
