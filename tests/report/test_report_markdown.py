"""Tables for the READMEs of studies."""

from __future__ import annotations

import json

import pytest

from blrlab.errors import InputError
from blrlab.report.__main__ import main
from blrlab.report.markdown import KINDS, grid, markdown


def test_latency_is_a_table_per_device_and_tokens(build):
    rows = [
        build.bench_row("dense", "torch_eager", "own", "c_fc", 100.0, bound_us=40.0),
        build.bench_row("monarch", "triton_x", "own", "c_fc", 50.0, bound_us=10.0),
        build.bench_row("dense", "torch_eager", "own", "c_proj", 200.0, bound_us=40.0),
        build.bench_row("monarch", "triton_x", "own", "c_proj", 400.0, bound_us=10.0),
    ]
    assert markdown([*rows, {**rows[0], "tokens": 1}]).split("\n\n") == [
        "**AMD EPYC 7B13, 2 cores, 1 token, float32: p50 in us**",
        "| layer | dense PyTorch | bound of dense |\n| --- | ---: | ---: |\n| own c_fc | **100** | 40.0 |",
        "**AMD EPYC 7B13, 2 cores, 256 tokens, float32: p50 in us**",
        "| layer | dense PyTorch | Monarch Triton x | bound of dense | bound of Monarch |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| own c_fc | 100 | **50.0** | 40.0 | 10.0 |\n"
        "| own c_proj | **200** | 400 | 40.0 | 10.0 |\n"
        "| geometric mean of layers, x dense | - | 1.00x | - | - |",
    ]


def test_dtypes_are_tables_of_their_own_and_uneven_means_count_their_layers(build):
    rows = [
        build.bench_row("dense", "torch_eager", "own", "c_fc", 100.0),
        build.bench_row("monarch", "triton_x", "own", "c_fc", 50.0),
        build.bench_row("blast", "triton_y", "own", "c_fc", 50.0),
        build.bench_row("dense", "torch_eager", "own", "c_proj", 100.0),
        build.bench_row("blast", "triton_y", "own", "c_proj", 50.0),
    ]
    said = markdown(
        [*rows, *({**r, "dtype": "float16", "p50": r["p50"] if r["op"] == "dense" else 25.0} for r in rows)]
    )
    assert "256 tokens, float16: p50 in us" in said
    assert "256 tokens, float32: p50 in us" in said
    assert "| geometric mean of layers, x dense (layers) | - | 4.00x (1) | 4.00x (2) |" in said
    assert "| geometric mean of layers, x dense (layers) | - | 2.00x (1) | 2.00x (2) |" in said


def test_a_profilers_time_is_never_bold(build):
    rows = [
        build.bench_row("dense", "torch_eager", "own", "c_fc", 100.0, bound_us=40.0),
        build.bench_row("monarch", "xla", "own", "c_fc", 50.0, bound_us=10.0, method="JAX's profiler"),
    ]
    said = markdown(rows)
    assert "| own c_fc | **100** | 50.0 |" in said
    assert said.endswith("shown, but not counted as a win or as the fastest.")


@pytest.mark.parametrize("what", KINDS)
def test_every_kind_is_a_table_or_a_sentence(build, what):
    counted = {"kind": "counters", "net": "gpt2s", "layer": "c_fc", "tokens": 16, "op": "blast", "impl": "torch_bmm"}
    given = [{"kind": "allocate", "path": path, "format": "blast", "lost": 0.1} for path in "ab"]
    foretold = {"kind": "extrapolation", "net": "gpt2s", "layers": {"c_fc": {}, "c_proj": {}}}
    others = [*given, foretold, counted, {**counted, "tokens": 64}]
    records = [*build.evaluated_suite(), *build.suite(1), *others]
    said = markdown(records, what)
    rows = [line for line in said.splitlines() if line.startswith("|")]
    assert len(rows) > 3
    assert all(line.endswith(" |") for line in rows)
    assert markdown([build.env()], what) == f"These records hold nothing for a table of {what}."


def test_cells_cannot_break_out():
    assert grid(["a|b"], [["<i>x</i>\ny"]], [False]) == "| a\\|b |\n| --- |\n| &lt;i>x&lt;/i> y |"


def test_an_unknown_kind_is_named_with_the_known_ones():
    with pytest.raises(InputError, match=r'unknown kind of Markdown table "latancy".*Did you mean "latency"'):
        markdown([], "latancy")


def test_the_command_prints_markdown_and_nothing_else(tmp_path, capsys, build):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in build.bench()), encoding="utf-8")
    assert main([str(file), "--markdown", f"--out={tmp_path / 'a.html'}"]) == 0
    said = capsys.readouterr()
    assert all(not line or line.startswith(("**", "|")) for line in said.out.splitlines())
    assert "a.html" in said.err
    assert main([str(file), "--markdown=speedup"]) == 0
    assert "geometric means" in capsys.readouterr().out
    assert main([str(file), "--markdown=speed"]) == 2
    assert 'Did you mean "speedup"?' in capsys.readouterr().err
