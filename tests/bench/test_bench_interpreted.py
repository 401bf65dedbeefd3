"""Triton's interpreter in a child process, and the sentences where it gives nothing."""

import json
import os
import subprocess
import sys

import pytest
from blrlab_ops.testing import Case

from blrlab.bench import interpreted

ROW = {"op": "monarch", "error": 1e-7, "error_max": 4e-7, "error_budget": 5e-7, "passed": True}
LOW_RANK = Case("low_rank", 7, 24, 36, (1, 1), 5)
MONARCH = Case("monarch", 7, 24, 36, (3, 2), 4)
BLAST = Case("blast", 7, 24, 36, (2, 3), 5)
IMPL = "triton_two_stage"


def answer(monkeypatch: pytest.MonkeyPatch, stdout: str = "", stderr: str = "", code: int = 0) -> list[list[str]]:
    """Let the child print this; return the list of commands it will be started with."""
    commands: list[list[str]] = []

    def run(command, **options):
        commands.append(command)
        assert options["env"]["TRITON_INTERPRET"] == "1"
        return subprocess.CompletedProcess(command, code, stdout, stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_shapes_are_written_as_the_command_reads_them() -> None:
    from blrlab_ops import verify

    written = [interpreted.shape_flag(case) for case in (LOW_RANK, MONARCH, BLAST)]
    assert written == [
        "--shape=low_rank:7x24x36:b1x1:r5",
        "--shape=monarch:7x24x36:b3x2:r4",
        "--shape=blast:7x24x36:b2x3:r5",
    ]
    read = [verify.parse_shape(flag.removeprefix("--shape=")) for flag in written]
    assert read == [LOW_RANK, MONARCH, BLAST]


def test_nothing_to_verify_needs_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = answer(monkeypatch)
    assert interpreted.verify([]) == []
    assert commands == []


def test_a_tiny_layer_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    (row,) = interpreted.verify([(MONARCH, IMPL)])
    assert isinstance(row, dict), row
    assert row["passed"] is True
    assert (row["op"], row["impl"], row["dtype"], row["tokens"]) == ("monarch", IMPL, "float32", 7)
    assert (row["in_features"], row["out_features"], row["blocks"], row["rank"]) == (24, 36, [3, 2], 4)
    assert 0 < row["error"] <= row["error_budget"]
    assert 0 < row["error_max"] <= row["error_max_budget"]


def test_all_layers_are_one_child_and_rows_come_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [ROW, ROW | {"op": "blast", "passed": False}]
    commands = answer(monkeypatch, "a warning\n" + "".join(json.dumps(row) + "\n" for row in rows), code=1)
    assert interpreted.verify([(MONARCH, IMPL), (BLAST, IMPL)]) == rows, "a failed gate is a row too"
    (command,) = commands
    assert command[:3] == [sys.executable, "-m", "blrlab_ops.verify"]
    assert {f"--impl={IMPL}", "--dtype=float32", "--json"} <= set(command)
    assert [flag for flag in command if flag.startswith("--shape")] == [
        "--shape=monarch:7x24x36:b3x2:r4",
        "--shape=blast:7x24x36:b2x3:r5",
    ]


def test_of_many_tokens_a_few_are_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = answer(monkeypatch, json.dumps(ROW) + "\n")
    assert interpreted.verify([(MONARCH._replace(tokens=384), IMPL)]) == [ROW]
    assert commands[0][-1] == f"--shape=monarch:{interpreted.MOST_TOKENS}x24x36:b3x2:r4"


def test_implementations_are_a_child_each_and_verdicts_find_back_to_their_layers(monkeypatch) -> None:
    commands: list[list[str]] = []

    def run(command, **options):
        commands.append(command)
        impl = next(flag for flag in command if flag.startswith("--impl=")).removeprefix("--impl=")
        flags = [flag for flag in command if flag.startswith("--shape=")]
        lines = "".join(json.dumps({"impl": impl, "shape": flag}) + "\n" for flag in flags)
        return subprocess.CompletedProcess(command, 0, lines, "")

    monkeypatch.setattr(subprocess, "run", run)
    wanted = [(MONARCH, "triton_a"), (MONARCH, "triton_b"), (BLAST, "triton_a"), (LOW_RANK, "triton_b")]
    found = interpreted.verify(wanted)
    assert found == [{"impl": impl, "shape": interpreted.shape_flag(case)} for case, impl in wanted]
    assert len(commands) == 2


def test_a_layer_that_is_asked_for_twice_is_answered_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, 2 * (json.dumps(ROW) + "\n"))
    assert interpreted.verify([(MONARCH, IMPL), (MONARCH, IMPL)]) == [ROW, ROW]


def test_a_child_that_takes_too_long_is_a_sentence_for_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command, *, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    sentence = "Triton's interpreter took longer than 30 s"
    assert interpreted.verify([(MONARCH, IMPL), (BLAST, IMPL)], timeout=30) == [sentence] * 2


def test_a_child_is_ended_when_its_time_is_up() -> None:
    assert interpreted.verify([(MONARCH, IMPL)], timeout=0.05) == ["Triton's interpreter took longer than 0 s"]


@pytest.mark.parametrize(
    ("stdout", "stderr", "reason"),
    [
        ("", "Traceback\n  File\nImportError: no triton\n", "ImportError: no triton"),
        ("", "", "it printed nothing"),
        (json.dumps(ROW) + "\n", "Killed\n", "Killed"),
        (json.dumps(ROW) + "\n" + json.dumps(ROW)[:15], "Killed\n", "Killed"),
        (json.dumps(ROW) + '\n{"op": "mon\n', "Killed\n", "Killed"),
        (json.dumps(ROW) + "\n17\n", "Killed\n", "Killed"),
    ],
    ids=["failed", "silent", "one row of two", "half a row", "half a row and a newline", "no object"],
)
def test_a_child_that_fails_is_a_sentence(stdout, stderr, reason, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, stdout, stderr, code=1)
    found = interpreted.verify([(MONARCH, IMPL), (BLAST, IMPL)])
    assert found == [f"Triton's interpreter failed: {reason}"] * 2
