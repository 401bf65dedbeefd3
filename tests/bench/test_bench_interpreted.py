"""Triton's interpreter in a child process, and the sentences where it gives nothing."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from blrlab.bench import interpreted

ROW = {"op": "monarch", "error": 1e-7, "error_max": 4e-7, "error_budget": 5e-7, "passed": True}


def answer(monkeypatch: pytest.MonkeyPatch, stdout: str = "", stderr: str = "", code: int = 0) -> list[list[str]]:
    """Let the child print this; return the list of commands it will be started with."""
    commands: list[list[str]] = []

    def run(command, **options):
        commands.append(command)
        assert options["env"]["TRITON_INTERPRET"] == "1"
        return subprocess.CompletedProcess(command, code, stdout, stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_shapes_are_written_as_the_command_reads_them(problem) -> None:
    assert [interpreted.shape_flag(problem(format)) for format in ("low_rank", "monarch", "blast")] == [
        "--shape=low_rank:7x24x36:b1x1:r5",
        "--shape=monarch:7x24x36:b3x2:r4",
        "--shape=blast:7x24x36:b2x3:r5",
    ]


def test_no_problems_need_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = answer(monkeypatch)
    assert interpreted.verify([]) == []
    assert commands == []


def test_a_tiny_layer_passes(problem, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    (row,) = interpreted.verify([problem("monarch")])
    assert isinstance(row, dict), row
    assert row["passed"] is True
    assert (row["op"], row["impl"], row["dtype"], row["tokens"]) == (
        "monarch",
        "triton_two_stage",
        "float32",
        7,
    )
    assert (row["in_features"], row["out_features"], row["blocks"], row["rank"]) == (24, 36, [3, 2], 4)
    assert 0 < row["error"] <= row["error_budget"]
    assert 0 < row["error_max"] <= row["error_max_budget"]


def test_all_layers_are_one_child_and_rows_come_in_their_order(problem, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [ROW, ROW | {"op": "blast", "passed": False}]
    commands = answer(monkeypatch, "a warning\n" + "".join(json.dumps(row) + "\n" for row in rows), code=1)
    assert interpreted.verify([problem("monarch"), problem("blast")]) == rows, "a failed gate is a row too"
    (command,) = commands
    assert command[:3] == [sys.executable, "-m", "blrlab_ops.verify"]
    assert [flag for flag in command if flag.startswith("--shape")] == [
        "--shape=monarch:7x24x36:b3x2:r4",
        "--shape=blast:7x24x36:b2x3:r5",
    ]


def test_a_child_that_takes_too_long_is_a_sentence_for_every_layer(problem, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command, *, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    sentence = "Triton's interpreter took longer than 30 s"
    assert interpreted.verify([problem("monarch"), problem("blast")], timeout=30) == [sentence] * 2


def test_a_child_is_ended_when_its_time_is_up(problem) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    assert interpreted.verify([problem("monarch")], timeout=0.05) == ["Triton's interpreter took longer than 0 s"]


@pytest.mark.parametrize(
    ("stdout", "stderr", "reason"),
    [
        ("", "Traceback\n  File\nImportError: no triton\n", "ImportError: no triton"),
        ("", "", "it printed nothing"),
        (json.dumps(ROW) + "\n", "Killed\n", "Killed"),
        (json.dumps(ROW) + "\n" + json.dumps(ROW)[:15], "Killed\n", "Killed"),
        (json.dumps(ROW) + '\n{"op": "mon\n', "Killed\n", "Killed"),
    ],
    ids=["failed", "silent", "one row of two", "half a row", "half a row and a newline"],
)
def test_a_child_that_fails_is_a_sentence(problem, stdout, stderr, reason, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, stdout, stderr, code=1)
    found = interpreted.verify([problem("monarch"), problem("blast")])
    assert found == [f"Triton's interpreter failed: {reason}"] * 2


def test_without_torch_there_is_no_child(problem, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = answer(monkeypatch)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else found(name))
    assert interpreted.verify([problem("monarch")]) == ["PyTorch is not installed"]
    assert commands == []
