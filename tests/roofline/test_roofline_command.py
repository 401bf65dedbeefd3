"""`python -m blrlab.roofline`: what it prints and writes, and how it refuses."""

import importlib
import io
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from blrlab_ops import devices, shapes
from rich.cells import cell_len
from rich.console import Console

from blrlab import records
from blrlab.roofline import advice, predict, tables
from blrlab.roofline.__main__ import main


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep measured devices of whoever runs the tests out of them."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "120")


def test_a_table_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device=a40,h100", "--layer=qkvo", "--tokens=1,0"]) == 0
    said = capsys.readouterr().out
    assert "NVIDIA A40, llama7b, bfloat16: predictions, not measurements" in said
    assert "NVIDIA H100 SXM" in said
    rows = re.findall(r"^ *(?:qkvo +\d+ +)?(dense|low_rank|monarch|blast) +(\w+) .* (\S+x) +\S+$", said, re.MULTILINE)
    assert len(rows) == 2 * 2 * 10
    assert [row[2] for row in rows if row[0] == "dense"] == ["1.00x"] * 4
    assert "A kernel takes longer; ratios over dense are estimates." in " ".join(said.split())


def test_nets_have_tables_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device=a40", "--net=mistral_7b,qwen25_7b", "--layer=down", "--op=dense"]) == 0
    said = capsys.readouterr().out
    assert said.index("NVIDIA A40, mistral_7b, bfloat16") < said.index("NVIDIA A40, qwen25_7b, bfloat16")
    assert said.count("matmul") == 2


def test_out_holds_every_row_and_is_replaced_not_doubled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.jsonl"
    records.append(file, {"kind": "env", "device": "mine"})
    for _ in range(2):
        assert main(["--device=a40", "--net=gpt2s", "--op=dense,blast", f"--out={file}"]) == 0
    found = records.read(file)
    assert [row["kind"] for row in found] == ["env"] + ["bound"] * 3 * 5
    assert f"wrote 15 records to {file}" in capsys.readouterr().out.replace("\n", "")
    assert {row["tokens"] for row in found[1:]} == {384}
    assert found[1:6] == [
        row for op in ("dense", "blast") for row in predict.rows(devices.get("a40"), *_first(op), 384, "bfloat16")
    ]


def _first(op: str) -> tuple[shapes.Layer, str]:
    return shapes.layers("gpt2s")[0], op


def test_advice_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "advice.jsonl"
    arguments = ["--device=a40", "--layer=down", "--tokens=1,1024", "--op=dense,monarch", "--advice", f"--out={file}"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "NVIDIA A40, llama7b down, 1 token: what is predicted to beat dense" in said
    assert "Estimates: ratios of least times at nominal rates; real kernels, dense ones too, take longer." in said
    kinds = [row["kind"] for row in records.read(file)]
    blocks = len(advice.candidates(shapes.layers("llama7b")[2], ["monarch"]))
    assert kinds == ["bound"] * 2 * 4 + ["advice"] * blocks, "advice is one record a layer, whatever --tokens"


def test_a_layer_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device=a40", "--shape=1024X2048", "--blocks=8", "--rank=256", "--op=monarch"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"1024x2048 +1024 +monarch +plain ", said)


def test_ranks_that_nobody_published_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--net=qwen25_7b", "--op=dense"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Ranks and blocks of qwen25_7b are not published: they are this project's choice." in said
    assert "The rate of the L2 of NVIDIA Jetson Orin Nano 8GB is not known" in said


def test_the_comparison_is_markdown_and_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "compared.jsonl"
    assert main(["--compare-single-peak", "--device=a40", "--layer=qkvo", f"--out={file}"]) == 0
    said = capsys.readouterr().out
    assert said.count("\n| qkvo | blast |") == 4
    assert said.count("\n| qkvo | 64 x 32 |") == 1
    assert len(records.read(file)) == 10 + 5
    assert main(["--compare-single-peak", "--device=a40", "--layer=qkvo", "--op=monarch"]) == 0
    assert "Partial fusion" not in capsys.readouterr().out


def test_help_has_examples_that_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    said = capsys.readouterr().out
    examples = re.findall(r"^  python -m blrlab\.roofline (--(?!measure).*)$", said, re.MULTILINE)
    assert len(examples) >= 5
    for example in examples:
        assert main([word for word in example.split() if not word.startswith("--out")]) == 0, example
    for name in (*devices.DEVICES, *shapes.NETS, *predict.ITEMSIZE):
        assert name in said


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("--device=a41", r"'a41' is not one of \('a40', .*did you mean 'a40'"),
        ("--device=,", "--device names nothing"),
        ("--net=lama7b", r'unknown net "lama7b": it is one of llama7b, .* Did you mean "llama7b"\?'),
        ("--layer=qkv", r'unknown layer of llama7b "qkv": it is one of qkvo, gate_up, down. Did you mean "qkvo"\?'),
        ("--op=monarc", r'unknown op "monarc": it is one of dense, .* Did you mean "monarch"\?'),
        ("--dtype=bf16", r'unknown dtype "bf16": it is one of bfloat16, .* Did you mean "bfloat16"\?'),
        ("--tokens=-1", '--tokens takes whole numbers from 0, not "-1"'),
        ("--tokens=many", 'not "many"'),
        ("--shape=4096", '--shape is in x out features, such as 4096x11008, not "4096"'),
        ("--shape=0x8 --rank=1 --blocks=1", '--shape takes whole numbers from 1, not "0"'),
        ("--shape=8x8 --rank=4", "needs --rank and --blocks"),
        ("--shape=64x96 --rank=16 --blocks=5", "5 blocks do not divide a layer of 64 x 96: 1, 2, 4, 8, 16, 32 do"),
        ("--shape=64x96 --rank=15 --blocks=2", "2 Monarch blocks share the rank evenly, and do not divide 15"),
        ("--rank=16", "--blocks and --rank are of a layer given by --shape"),
        ("--out=/nowhere/at/all.jsonl", "--out=/nowhere/at/all.jsonl is not a file in a folder that exists"),
        ("--out=/", "--out=/ is not a file"),
        ("--advice --op=dense", "--op needs another format"),
    ],
)
def test_a_wrong_input_is_one_sentence_and_2(capsys: pytest.CaptureFixture[str], arguments: str, problem: str) -> None:
    assert main(arguments.split()) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert re.search(problem, said.err)
    assert said.err.startswith("blrlab.roofline: ")
    assert said.err.count("\n") == 1


def test_an_unknown_flag_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--devices=a40"])
    assert done.value.code == 2
    assert "unrecognized arguments: --devices=a40" in capsys.readouterr().err


def test_what_excludes_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--advice", "--compare-single-peak"])
    assert done.value.code == 2
    assert "not allowed with argument --advice" in capsys.readouterr().err


def test_measure_hands_on_what_is_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    handed: list[list[str]] = []
    command = SimpleNamespace(main=lambda arguments: handed.append(arguments) or 0)
    monkeypatch.setattr(importlib, "import_module", {"blrlab_ops.measure": command}.__getitem__)
    assert main(["--measure", "--seconds=1"]) == 0
    assert handed == [["--seconds=1"]]

    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"no module named torch, wanted by {name}")

    monkeypatch.setattr(importlib, "import_module", missing)
    assert main(["--measure"]) == 2
    assert "--measure needs PyTorch" in capsys.readouterr().err


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("net", shapes.NETS)
def test_no_line_is_wider_than_the_console_and_no_row_wraps(net: str, width: int) -> None:
    device, stream = devices.get("a40"), io.StringIO()
    console = Console(width=width, file=stream)
    rows = [
        row
        for layer in shapes.layers(net)
        for tokens in (1, 16384)
        for op in predict.OPS
        for row in predict.rows(device, layer, op, tokens, "bfloat16")
    ]
    tables.print_rows(rows, console)
    lines = stream.getvalue().splitlines()
    assert max(cell_len(line) for line in lines) <= width
    assert sum(bool(re.search(r"\dx +\S+$", line)) for line in lines) == len(rows)
    assert (lines[2].count("us") > 0) == (width == 120), "of every term"
    for needed in ("us", "binds", "dense", "bound"):
        assert needed in stream.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_advice_fits(width: int) -> None:
    stream = io.StringIO()
    layer = shapes.layers("llama7b")[1]
    found = advice.advise(devices.get("h100"), layer, 1024, "bfloat16")
    tables.print_advice("NVIDIA H100 SXM", "llama7b gate_up", 1024, found, Console(width=width, file=stream))
    lines = stream.getvalue().splitlines()
    assert max(cell_len(line) for line in lines) <= width
    assert len([line for line in lines if re.match("low_rank|monarch|blast", line)]) == len(found)
    assert (stream.getvalue().count("bound") > 1) == (width == 120)
