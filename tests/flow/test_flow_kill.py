"""Killed at any moment, the same command goes on and ends with the same losses, bit for bit."""

import os
import signal
import subprocess
import sys
import time

import pytest

from blrlab import records

MOMENTS = ("dense: step 10", "a save", "compress: h_0", "heal: step 4", "dense_continued: step 2")


def _start(arguments):
    command = [sys.executable, "-u", "-m", "blrlab.experiments.run", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _kill_at(moment, arguments, folder):
    """Run until a line begins with the moment, or until a checkpoint is being written, then SIGKILL."""
    process = _start(arguments)
    if moment == "a save":
        while process.poll() is None and not _saving(folder / "dense" / "checkpoints"):
            time.sleep(0.0005)
        seen = process.poll() is None
    else:
        seen = any(line.startswith(moment) for line in process.stdout)
    os.kill(process.pid, signal.SIGKILL)
    process.stdout.close()
    process.wait()
    return seen


def _saving(folder):
    try:
        return any("tmp" in entry.name for entry in os.scandir(folder))
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
    assert _start([*tiny, stages, f"--workdir={straight}"]).wait() == 0
    arguments = [*tiny, stages, f"--workdir={killed}"]
    # Half-way through a save comes first, since the later moments leave no save of the dense phase to catch.
    for moment in sorted(MOMENTS, key=lambda moment: moment != "a save"):
        assert _kill_at(moment, arguments, killed), moment
    last = _start(arguments)
    out = last.stdout.read()
    assert last.wait() == 0, out
    assert "going on from step" in out
    assert _losses(killed) == _losses(straight)
