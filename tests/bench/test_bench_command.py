"""The command: its rows on disk as they are measured, going on where it stopped, and one sentence for what is wrong."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blrlab import environment, records
from blrlab.bench import backends, card, layer, suite
from blrlab.bench.backends import BACKENDS

TINY = ("--shape=24x36", "--blocks=3x2", "--rank=12", "--seconds=0.001", "--device=cpu")
TWO = ("--impl=torch_eager,torch_bmm", "--op=dense,monarch")  # three rows a layer
ROWS = [("dense", "torch_eager"), ("monarch", "torch_eager"), ("monarch", "torch_bmm")]
PLAIN = BACKENDS["torch_eager"]


@pytest.fixture(autouse=True)
def quick(device, monkeypatch: pytest.MonkeyPatch):
    """Ceilings that need not be measured, and nothing compiled to be forgotten."""
    monkeypatch.setattr(card, "_processor", lambda dtype: device())
    monkeypatch.setattr(backends, "forget_compiled", lambda: None)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out" / "records.jsonl"


def run(out: Path, *flags: str) -> int:
    return layer.main([*TINY, *flags, f"--out={out}"])


def rows(out: Path) -> list[dict]:
    return [record for record in records.read(out) if record["kind"] == "bench"]


def measured(out: Path) -> list[tuple[str, str, int]]:
    return [(row["op"], row["impl"], row["tokens"]) for row in rows(out)]


def three(*tokens: int) -> list[tuple[str, str, int]]:
    return [(*row, count) for count in tokens for row in ROWS]


def test_a_run_leaves_the_machine_and_its_rows_and_says_where(out: Path, capsys) -> None:
    assert run(out, *TWO, "--tokens=5") == 0
    env, *found = records.read(out)
    assert (env["kind"], env["backend"], env["torch"]) == ("env", "cpu", environment.version("torch"))
    assert env["peaks"]["name"] == "a test"
    assert measured(out) == three(5)
    for row in found:
        assert (row["net"], row["layer"], row["dtype"]) == ("custom", "24x36", "float32")
        assert (row["in_features"], row["out_features"]) == (24, 36)
        assert row["passed"] is True
        assert row["p50"] > 0
        assert {name: row[name] for name in ("device", "torch", "commit")} == {
            name: env["peaks"]["name"] if name == "device" else env[name] for name in ("device", "torch", "commit")
        }
    monarch = found[-1]
    assert (monarch["blocks"], monarch["block_rank"]) == ([3, 2], 4)
    said = capsys.readouterr().out
    for row in found:
        assert f"{row['p50']:.1f} us" in said
    assert f"wrote {out}; python -m blrlab.report {out} --out=report.html shows it" in said


def test_what_is_there_is_not_measured_again(out: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    run(out, *TWO, "--tokens=5,6")
    before = out.read_bytes()
    commit = rows(out)[0]["commit"]
    monkeypatch.setattr(suite, "_verified", lambda *_: pytest.fail("there is nothing to measure"))
    capsys.readouterr()
    assert run(out, *TWO, "--tokens=5,6") == 0
    assert out.read_bytes() == before
    assert f"2 of 2 layers are in {out} already, measured at commit {commit}" in capsys.readouterr().out


def test_a_run_goes_on_with_what_is_missing(out: Path, capsys) -> None:
    run(out, *TWO, "--tokens=5,7")
    capsys.readouterr()
    assert run(out, *TWO, "--tokens=5,6,7,8") == 0
    assert measured(out) == three(5, 7, 6, 8)
    assert "2 of 4 layers are in" in capsys.readouterr().out
    assert [record["kind"] for record in records.read(out)].count("env") == 2, "each run's rows follow its machine"


def test_other_backends_are_measured_with_those_that_are_there(out: Path) -> None:
    """Times of one layer are compared with each other: all are taken in the same minutes."""
    run(out, *TWO, "--tokens=5")
    assert run(out, "--impl=torch_eager,ref", "--op=dense,monarch", "--tokens=5") == 0
    again = [("dense", "torch_eager", 5), ("monarch", "torch_eager", 5), ("monarch", "ref", 5)]
    assert measured(out) == three(5) + again
    assert run(out, "--impl=torch_eager", "--op=monarch", "--tokens=5") == 0
    assert len(rows(out)) == 6, "fewer are there already"


@pytest.mark.parametrize("flag", ["--dtype=bfloat16", "--rank=6", "--blocks=2x3", "--shape=36x24"])
def test_another_layer_is_another_measurement(out: Path, flag: str) -> None:
    run(out, *TWO, "--tokens=5")
    assert run(out, *TWO, "--tokens=5", flag) == 0
    assert len(rows(out)) == 6


def test_another_version_of_torch_measures_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(out, *TWO, "--tokens=5")
    version = environment.version
    monkeypatch.setattr(environment, "version", lambda name: "99.0" if name == "torch" else version(name))
    assert run(out, *TWO, "--tokens=5") == 0
    assert measured(out) == three(5, 5)
    assert [row["torch"] for row in rows(out)][-1] == "99.0"


def test_a_torn_last_line_is_measured_again(out: Path) -> None:
    run(out, *TWO, "--tokens=5,6")
    whole = out.read_bytes()
    out.write_bytes(whole[:-40])
    assert run(out, *TWO, "--tokens=5,6") == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["op"], row["impl"], row["tokens"]) for row in found if row["kind"] == "bench"] == (
        three(5) + three(6)[:2] + three(6)
    )


def test_fresh_measures_anew(out: Path) -> None:
    run(out, *TWO, "--tokens=5,6")
    assert run(out, *TWO, "--tokens=6", "--fresh") == 0
    assert measured(out) == three(6)


def test_rows_are_on_disk_when_the_next_layer_starts(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there: dict[int, list] = {}

    def make(problem, kernel):
        there.setdefault(problem.case.tokens, measured(out))
        return PLAIN.make(problem, kernel)

    monkeypatch.setitem(BACKENDS, "torch_eager", dataclasses.replace(PLAIN, make=make))
    assert run(out, *TWO, "--tokens=5,6,7") == 0
    assert there == {5: [], 6: three(5), 7: three(5, 6)}


def stop_at(monkeypatch: pytest.MonkeyPatch, tokens: int, error: BaseException) -> None:
    """Let the verification of a layer with this many tokens end in an error."""
    verified = suite._verified

    def interrupted(entry, settings):
        if entry.problem.case.tokens == tokens:
            raise error
        return verified(entry, settings)

    monkeypatch.setattr(suite, "_verified", interrupted)


def test_a_stopped_run_keeps_the_layers_it_finished_and_goes_on_from_there(out: Path, capsys, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 6, KeyboardInterrupt())
        assert run(out, *TWO, "--tokens=5,6,7") == 130
    said = capsys.readouterr()
    assert said.err == "\nstopped; the same command with its --out goes on from here.\n"
    assert "wrote" not in said.out
    assert measured(out) == three(5)
    assert run(out, *TWO, "--tokens=5,6,7") == 0
    assert measured(out) == three(5, 6, 7)


def test_a_stop_while_a_backend_is_timed_is_no_reason_in_its_row(out: Path, monkeypatch) -> None:
    def make(problem, kernel):
        call, calls = PLAIN.make(problem, kernel), itertools.count()

        def stopped():
            if problem.case.tokens == 6 and next(calls) == 3:
                raise KeyboardInterrupt
            return call()

        return stopped

    monkeypatch.setitem(BACKENDS, "torch_eager", dataclasses.replace(PLAIN, make=make))
    assert run(out, *TWO, "--tokens=5,6,7") == 130
    assert measured(out) == three(5)


def test_a_backend_that_is_wrong_makes_the_status_1_and_keeps_the_rest(out: Path, monkeypatch, capsys) -> None:
    wrong = dataclasses.replace(PLAIN, to_rows=lambda problem, y: torch.zeros_like(y))
    monkeypatch.setitem(BACKENDS, "torch_eager", wrong)
    assert run(out, *TWO, "--tokens=5") == 1
    assert [row["passed"] for row in rows(out)] == [False, False, True]
    assert [row["p50"] is None for row in rows(out)] == [True, True, False]
    assert "its error is over its budget, so it has no speed" in capsys.readouterr().out


def test_a_backend_that_declines_is_no_failure(out: Path, monkeypatch) -> None:
    monkeypatch.setattr(backends, "_compiler", lambda: None)
    assert run(out, "--impl=torch_eager,torch_compile", "--op=dense", "--tokens=5") == 0
    assert [row.get("reason") is None for row in rows(out)] == [True, False]


WRONG = {
    "net": (["--net=gpt2"], 'unknown net "gpt2": it is one of ', 'Did you mean "gpt2s"?'),
    "layer": (["--net=gpt2s", "--layer=c_atn"], 'unknown layer of gpt2s "c_atn": it is one of ', '"c_attn"?'),
    "op": (["--net=gpt2s", "--op=dense,monrach"], 'unknown op "monrach": it is one of dense, ', '"monarch"?'),
    "impl": (["--net=gpt2s", "--impl=torch_bm"], 'unknown impl "torch_bm": it is one of all, ', '"torch_bmm"?'),
    "dtype": (["--net=gpt2s", "--dtype=bfloat"], 'unknown dtype "bfloat": it is one of ', '"bfloat16"?'),
    "device": (["--net=gpt2s", "--device=cdua"], 'unknown device "cdua": it is one of cuda, cpu.', '"cuda"?'),
    "cores": (
        ["--net=gpt2s", "--device=cpu:1"],
        'no device "cpu:1": give cpu, and CUDA_VISIBLE_DEVICES=1 to pick a GPU.',
        "",
    ),
    "no number": (
        ["--net=gpt2s", "--device=cpu:"],
        'no device "cpu:": give cpu, and CUDA_VISIBLE_DEVICES=0 to pick a GPU.',
        "",
    ),
    "two dtypes": (["--net=gpt2s", "--dtype=float16,float32"], "one --dtype at a time", ""),
    "no layer": ([], "no layer is named: give --net=all, some of ", ", or --shape=IxO."),
    "no op": (["--net=gpt2s", "--op=,"], "no op is named: give some of dense, ", ""),
    "no impl": (["--net=gpt2s", "--impl="], "no impl is named: give all, or some of ", ""),
    "both": (["--net=gpt2s", "--shape=8x8"], "--shape is a layer by itself: leave --net and --layer out.", ""),
    "rank of a net": (["--net=gpt2s", "--rank=8"], "--rank and --blocks go with --shape: a named net has its own.", ""),
    "workers": (["--net=gpt2s", "--workers=-3"], "--workers is -3: it is a number from 0 on.", ""),
    "tokens": (
        ["--net=gpt2s", "--tokens=1,-3"],
        '--tokens takes whole numbers from 0 on, with commas between, not "-3".',
        "",
    ),
    "shape": (["--shape=24x"], '--shape is like 4096x11008, not "24x".', ""),
    "blocks": (["--shape=24x36", "--blocks=3x2x1"], '--blocks is like 4096x11008, not "3x2x1".', ""),
    "no blocks": (["--shape=24x36", "--blocks=0"], '--blocks is like 4096x11008, not "0".', ""),
    "odd blocks": (["--shape=24x36", "--blocks=5", "--rank=5"], "5 x 5 blocks do not divide a 24 x 36 layer.", ""),
    "odd rank": (
        ["--shape=24x36", "--blocks=3", "--rank=10"],
        "monarch's rank 10 is not a multiple of its 3 blocks.",
        "",
    ),
    "rank": (["--shape=24x36", "--rank=-4"], "rank is -4: low_rank needs a positive one.", ""),
    "seconds": (["--net=gpt2s", "--seconds=0"], "--seconds is 0: it is a positive number.", ""),
    "no seconds": (["--net=gpt2s", "--seconds=nan"], "--seconds is nan: it is a positive number.", ""),
    "no clone": (["--net=gpt2s", "--impl=paper_monarch_right"], 'impl "paper_monarch_right" needs --paper=FOLDER', ""),
    "a folder": (
        ["--net=gpt2s", "--paper=."],
        "no triton_funcs/monarch_kernels.py in .: clone https://github.com/",
        "",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_work_is_one_sentence_and_status_2(what: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(suite, "bench_layers", lambda *_: pytest.fail("nothing is to be measured"))
    flags, start, end = WRONG[what]
    device = [] if any(flag.startswith("--device") for flag in flags) else ["--device=cpu"]
    assert layer.main([*flags, *device]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"blrlab.bench.layer: {start}")
    assert said.err.rstrip().endswith(end)
    assert said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [], "and leaves no file"


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch finds a CUDA device")
def test_a_gpu_that_is_not_there_is_one_sentence(tmp_path: Path, capsys) -> None:
    assert layer.main(["--net=gpt2s", "--device=cuda", f"--out={tmp_path}"]) == 2
    sentence = "no CUDA GPU that PyTorch finds: leave --device out to measure the CPU."
    assert capsys.readouterr().err == f"blrlab.bench.layer: {sentence}\n"


def test_without_torch_there_is_one_sentence(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert layer.main(["--net=gpt2s"]) == 2
    assert capsys.readouterr().err == "blrlab.bench.layer: benchmarks need PyTorch: pip install torch.\n"


def test_a_damaged_file_is_one_sentence_and_left_as_it_is(out: Path, capsys) -> None:
    out.parent.mkdir()
    out.write_text('{"kind": "env"}\nno json\n{"kind": "env"}\n')
    before = out.read_bytes()
    assert run(out, *TWO) == 2
    assert capsys.readouterr().err == f"blrlab.bench.layer: {out}, line 2 is damaged: it is not JSON.\n"
    assert out.read_bytes() == before


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path, capsys) -> None:
    file = tmp_path / "a_file"
    file.write_text("")
    assert run(file / "records.jsonl", *TWO) == 2
    said = capsys.readouterr().err
    assert said.startswith("blrlab.bench.layer: ")
    assert str(file) in said
    assert said.count("\n") == 1


def test_out_may_be_a_folder(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "new", tmp_path / "with.dot"):
        (tmp_path / "with.dot").mkdir(exist_ok=True)
        assert run(folder, "--impl=torch_eager", "--op=dense", "--tokens=5") == 0
        assert len(rows(folder / "records.jsonl")) == 1


def test_without_out_every_run_has_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert layer.main([*TINY, "--impl=torch_eager", "--op=dense", "--tokens=5"]) == 0
    (file,) = tmp_path.glob("runs/layers-*/records.jsonl")
    assert len(rows(file)) == 1


def test_a_layer_of_ones_own_has_half_the_weights_and_square_blocks_unless_told(out: Path) -> None:
    flags = ("--shape=64x96", "--blocks=4", "--seconds=0.001", "--device=cpu", "--impl=torch_eager", "--tokens=0,3")
    assert layer.main([*flags, f"--out={out}"]) == 0
    found = {(row["op"], row["tokens"]): row for row in rows(out)}
    assert {tokens for _, tokens in found} == {3, 1024}
    assert {row["layer"] for row in found.values()} == {"64x96"}
    # r (i + o) = i o / 2 at 19.2: 20 is the nearest multiple of the blocks
    assert [found[op, 3]["rank"] for op in ("dense", "low_rank", "monarch", "blast")] == [None, 20, 20, 20]
    assert found["monarch", 3]["block_rank"] == 5
    assert found["blast", 3]["blocks"] == [4, 4]


@pytest.mark.parametrize("where", ["cpu", "cpu:0"])
def test_a_processor_is_measured_in_float32_unless_told(out: Path, where: str) -> None:
    flags = ("--impl=torch_eager", "--op=dense", "--tokens=5", f"--device={where}")
    assert run(out, *flags) == 0
    assert run(out, *flags, "--dtype=bfloat16") == 0
    assert [row["dtype"] for row in rows(out)] == ["float32", "bfloat16"]


def test_help_shows_commands_that_are_read(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        layer.main(["--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    examples = [
        line.split()[3:] for line in said.splitlines() if line.strip().startswith("python -m blrlab.bench.layer")
    ]
    assert len(examples) >= 3
    for example in examples:
        options = layer._parser().parse_args(example)
        assert backends.chosen(options.impl)
        assert layer._groups(options, "bfloat16")


def python(code: str, *arguments: str) -> str:
    """Run a process of its own, where nothing is loaded that only a test needs."""
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LOADED = "print('LOADED', *sorted({'jax', 'torch', 'triton'} & set(sys.modules)))"


def test_help_starts_without_torch_or_jax() -> None:
    code = f"""
import sys
from blrlab.bench import layer
try:
    layer.main(["--help"])
except SystemExit as end:
    assert end.code == 0
{LOADED}
"""
    said = python(code)
    assert "--impl" in said
    assert said.splitlines()[-1].split() == ["LOADED"]


def test_jax_is_loaded_only_where_xla_is_asked_for(out: Path) -> None:
    code = f"""
import sys
from blrlab.bench import layer
assert layer.main(sys.argv[1:]) == 0
{LOADED}
"""
    said = python(code, *TINY, *TWO, "--tokens=5", f"--out={out}")
    assert "torch" in said.splitlines()[-1].split()
    assert "jax" not in said.splitlines()[-1].split()
    assert measured(out) == three(5)
    assert rows(out)[0]["jax"] == environment.version("jax"), "its version is known all the same"


@pytest.mark.parametrize(
    "reason", ["OutOfMemoryError: full", "the process that ran XLA crashed", "it cannot be timed: x"]
)
def test_what_failed_by_chance_is_measured_again(tmp_path: Path, reason: str) -> None:
    from blrlab.bench.results import MACHINE, Results

    machine = dict.fromkeys(MACHINE, "1")
    row = {"kind": "bench", "op": "dense", "impl": "xla", **machine}
    for text, there in ((None, True), ("no GPU here", True), (reason, False)):
        results = Results(tmp_path / "records.jsonl", fresh=True)
        results.add([row | {"reason": text}])
        assert Results(results.path).has(row, machine) is there
        assert not Results(results.path).has(row, machine | {"torch": "2"})
