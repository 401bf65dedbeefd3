"""Rows of a benchmark: complete, JSON, in order; and no speed for what is wrong or cannot run."""

import dataclasses
import itertools
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blrlab import roofline
from blrlab.bench import backends, bench_layers, layer
from blrlab.bench.backends import BACKENDS, Contender

pytest.importorskip("torch", reason="PyTorch is not installed")

FIELDS = {
    "kind", "op", "impl", "net", "layer", "in_features", "out_features", "blocks", "rank", "block_rank",
    "tokens", "dtype", "unit", "p20", "p50", "p80", "method", "bound_us", "flops", "bytes", "error",
    "error_max", "error_budget", "error_max_budget", "passed", "device", "torch", "triton", "jax", "driver",
    "commit", "time",
}  # fmt: skip


def bench(layers, settings) -> tuple[list[list[dict]], list[str]]:
    said: list[str] = []
    found = list(bench_layers(layers, settings, said.append))
    assert len(said) == sum(map(len, found)), "a line a row"
    json.dumps(found, allow_nan=False)
    return found, said


def assert_timed(row: dict) -> None:
    assert row["passed"] is True
    assert 0 < row["p20"] <= row["p50"] <= row["p80"]
    assert 0 <= row["error"] <= row["error_budget"]
    assert 0 <= row["error_max"] <= row["error_max_budget"]
    assert row["method"]
    assert "reason" not in row


def assert_no_speed(row: dict) -> None:
    assert (row["p20"], row["p50"], row["p80"], row["method"]) == (None,) * 4
    assert row["reason"]
    assert "\n" not in row["reason"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_complete_and_in_the_order_asked_for(problem, settings, dtype: str) -> None:
    asked = settings("xla", "torch")
    layers = [problem("monarch", dtype), problem("blast", dtype)]
    found, said = bench(layers, asked)
    wanted = [[(op, impl) for op in ("dense", format) for impl in ("xla", "torch")] for format in ("monarch", "blast")]
    assert [[(row["op"], row["impl"]) for row in rows] for rows in found] == wanted
    for rows, each in zip(found, layers, strict=True):
        for row in rows:
            assert set(row) == FIELDS
            assert_timed(row)
            assert (row["kind"], row["unit"], row["dtype"], row["tokens"]) == ("bench", "us", dtype, 7)
            assert {name: row[name] for name in asked.machine} == asked.machine
            spec = each.dense().spec if row["op"] == "dense" else each.spec
            assert row["bound_us"] == roofline.bound_us(spec, 7, each.x.dtype.itemsize, asked.peaks)
            assert (row["flops"], row["bytes"]) == roofline.work(spec, 7, each.x.dtype.itemsize)
    monarch, blast = found[0][-1], found[1][-1]
    assert (monarch["blocks"], monarch["rank"], monarch["block_rank"]) == ([3, 2], None, 4)
    assert (blast["blocks"], blast["rank"], blast["block_rank"]) == ([2, 3], 5, None)
    assert all(f"{row['p50']:.1f} us" in line for row, line in zip(itertools.chain(*found), said, strict=True))


def test_rows_come_layer_by_layer(problem, settings) -> None:
    rows = bench_layers([problem("low_rank"), problem("monarch")], settings("xla"), lambda line: None)
    assert {row["op"] for row in next(rows)} == {"dense", "low_rank"}
    assert {row["op"] for row in next(rows)} == {"dense", "monarch"}


def test_every_contender_of_a_layer_is_timed_in_the_same_rounds(problem, settings, monkeypatch) -> None:
    seen: list[list[tuple[str, int]]] = []
    timed = layer.time_contenders

    def watched(contenders, seconds):
        seen.append([(each.impl, each.calls) for each in contenders])
        return timed(contenders, seconds)

    monkeypatch.setattr(layer, "time_contenders", watched)
    bench([problem("monarch")], settings("xla", "torch"))
    assert len(seen) == 1
    assert len(seen[0]) == len({impl for impl, _ in seen[0]}) == 4


def changed(output: Callable[[np.ndarray], object]) -> Callable:
    """Make a backend whose output goes through a function."""

    def make(problem, copies: int) -> Contender:
        contender = backends.xla(problem, copies)
        return dataclasses.replace(contender, output=lambda: output(contender.output()))

    return make


WRONG = {
    "zeros": np.zeros_like,
    "NaN": lambda y: np.full_like(y, np.nan),
    "infinity": lambda y: np.full_like(y, np.inf),
    "a percent more": lambda y: y * 1.01,
}


@pytest.mark.parametrize("what", WRONG)
def test_a_backend_that_is_wrong_has_no_speed(problem, settings, what: str, monkeypatch) -> None:
    monkeypatch.setitem(BACKENDS, "xla", changed(WRONG[what]))
    (rows,), _ = bench([problem("monarch")], settings("xla", "torch"))
    for row in rows:
        if row["impl"] == "torch":
            assert_timed(row)
            continue
        assert row["passed"] is False
        assert_no_speed(row)
        assert "error" in row["reason"]
        if what in ("NaN", "infinity"):
            assert (row["error"], row["error_max"]) == (None, None)
        else:
            assert row["error"] > row["error_budget"]


def fail(*_: object) -> None:
    raise RuntimeError("out of memory\nwith a second line")


FAILING = {
    "setting up": fail,
    "computing": lambda problem, copies: dataclasses.replace(backends.xla(problem, copies), output=fail),
    "running": lambda problem, copies: dataclasses.replace(backends.xla(problem, copies), run=fail),
}


@pytest.mark.parametrize("where", FAILING)
def test_a_backend_that_fails_has_its_reason_in_its_row(problem, settings, where: str, monkeypatch) -> None:
    monkeypatch.setitem(BACKENDS, "xla", FAILING[where])
    (rows,), _ = bench([problem("monarch")], settings("xla", "torch"))
    for row in rows:
        if row["impl"] == "torch":
            assert_timed(row)
        else:
            assert_no_speed(row)
            assert row["reason"] == "RuntimeError: out of memory"


@pytest.mark.parametrize("shape", [(7, 35), (36, 7), (252,)], ids=str)
def test_an_output_of_another_shape_has_no_speed(problem, settings, shape, monkeypatch) -> None:
    monkeypatch.setitem(BACKENDS, "xla", changed(lambda y: np.resize(y, shape)))
    (rows,), _ = bench([problem("monarch")], settings("xla"))
    for row in rows:
        assert row["passed"] is False
        assert_no_speed(row)


def test_a_layer_of_zeros_is_benchmarked_or_declined_but_no_crash(problem, settings) -> None:
    zeros = dataclasses.replace(problem("monarch"), kernel=jax.tree.map(jnp.zeros_like, problem("monarch").kernel))
    bench([zeros], settings("xla", "torch"))


def test_a_declined_backend_keeps_its_row_with_the_reason(problem, settings, monkeypatch) -> None:
    monkeypatch.setattr(backends, "_compiler", lambda: None)
    (rows,), said = bench([problem("monarch")], settings("torch_compile", "xla"))
    assert [row["impl"] for row in rows] == ["torch_compile", "xla"] * 2
    for row in rows[::2]:
        assert set(row) == FIELDS | {"reason"}
        assert (row["passed"], row["error"]) == (None, None)
        assert_no_speed(row)
    assert "C++ compiler" in said[0]


FOUND = {"op": "monarch", "error": 1e-7, "error_max": 4e-7, "error_budget": 5e-7, "error_max_budget": 9e-7}


def test_triton_is_verified_without_a_gpu_in_one_go_and_never_timed(problem, settings, monkeypatch) -> None:
    asked: list[list[str]] = []

    def verify(problems, timeout=600.0):
        asked.append([each.spec.format for each in problems])
        return [FOUND | {"passed": True}, "Triton's interpreter took longer than 600 s"]

    monkeypatch.setattr("blrlab.bench.layer.interpreted.verify", verify)
    found, _ = bench([problem("monarch"), problem("blast")], settings("xla", "triton"))
    assert asked == [["monarch", "blast"]]
    assert [[(row["op"], row["impl"]) for row in rows] for rows in found] == [
        [("dense", "xla"), (format, "xla"), (format, "triton")] for format in ("monarch", "blast")
    ]
    passed, late = found[0][-1], found[1][-1]
    assert_no_speed(passed)
    assert_no_speed(late)
    assert {name: passed[name] for name in FOUND} == FOUND
    assert passed["passed"] is True
    assert "interpreter" in passed["reason"]
    assert late["passed"] is None
    assert late["reason"] == "no GPU; Triton's interpreter took longer than 600 s"


@pytest.mark.parametrize("error", [0.3, float("nan"), float("inf")])
def test_a_kernel_that_is_wrong_in_the_interpreter_did_not_pass(problem, settings, error: float, monkeypatch) -> None:
    found = FOUND | {"error": error, "error_max": error, "passed": False}
    monkeypatch.setattr("blrlab.bench.layer.interpreted.verify", lambda problems, timeout=600.0: [found])
    (rows,), _ = bench([problem("monarch")], settings("triton"))
    assert rows[-1]["passed"] is False
    assert rows[-1]["error"] == (error if np.isfinite(error) else None)
    assert_no_speed(rows[-1])


@pytest.mark.parametrize(("megabytes", "copies"), [(0.001, 1024), (1, 256), (10, 26), (60, 5), (200, 2), (1000, 2)])
def test_on_a_gpu_the_copies_of_the_weights_are_four_times_its_cache(megabytes, copies, monkeypatch) -> None:
    @dataclasses.dataclass
    class Leaf:
        nbytes: int

    @dataclasses.dataclass
    class Layer:
        kernel: dict

    half = Leaf(int(megabytes * 2**20 / 2))
    heavy = Layer({"V": half, "U": half})
    assert layer._copies(heavy) == 1, "on a CPU"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert layer._copies(heavy) == copies
