"""Killed at any moment, the same command goes on and ends with the same losses, bit for bit."""

import os
import signal
import subprocess
import sys
import time

import pytest

from blrlab import records

# Half-way through a save comes first: later moments leave no save of the dense phase to catch.
MOMENTS = ("a save", "dense: step 10", "compress: h_0", "heal: step 4", "dense_continued: step 2")


def _start(arguments):
    command = [sys.executable, "-u", "-m", "blrlab.experiments.run", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _finish(arguments):
    """Run to the end; return what was printed."""
    with _start(arguments) as process:
        printed = process.stdout.read()
    assert process.returncode == 0, printed
    return printed


def _kill_at(moment, arguments, folder):
    """Run until a line begins with the moment, or until a checkpoint is being written, then SIGKILL.

    Returns what was printed, or fails if the moment never came.
    """
    lines = []
    with _start(arguments) as process:
        if moment == "a save":
            while process.poll() is None and not _saving(folder / "dense" / "checkpoints"):
                time.sleep(0.0005)
            seen = process.poll() is None
        else:
            seen = any(lines.append(line) or line.startswith(moment) for line in process.stdout)
        process.send_signal(signal.SIGKILL)
    assert seen, f"{moment}: {''.join(lines)}"
    return "".join(lines)


def _saving(folder):
    try:
        return any("tmp" in name for name in os.listdir(folder))
    except FileNotFoundError:
        return False


def _losses(folder):
    found = records.read(folder / "records.jsonl")
    train = [(row["phase"], row["step"], row["loss"]) for row in found if row["kind"] == "train"]
    evaluated = [(row["stage"], row["value"]) for row in found if row["kind"] == "eval"]
    errors = [(row["path"], row.get("relative_error")) for row in found if row["kind"] == "compress"]
    return train, evaluated, errors


@pytest.mark.slow
def test_kills_change_nothing(tiny, tmp_path):
    stages = "--config.stages=data,dense,compress,heal,continue,eval"
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    _finish([*tiny, stages, f"--workdir={straight}"])
    arguments = [*tiny, stages, f"--workdir={killed}"]
    printed = "".join(_kill_at(moment, arguments, killed) for moment in MOMENTS)
    printed += _finish(arguments)
    assert "dense: going on from step" in printed
    assert "heal: going on from step" in printed
    assert _losses(killed) == _losses(straight)
