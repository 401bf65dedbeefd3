"""Verify the Triton kernels without a GPU: in Triton's interpreter, in a child process.

The interpreter is chosen when a kernel's module loads, so it cannot share a process with anything else.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from blrlab.bench.backends import TRITON
from blrlab.bench.problem import Problem

Row = dict[str, Any]


def verify(problems: Sequence[Problem], timeout: float = 600.0) -> list[Row | str]:
    """Verify one factored layer's shape after another on random numbers, in float32.

    Returns:
      For each problem the row that `blrlab_ops.verify` prints, or a sentence on why there is none.
    """
    shapes = [shape_flag(problem) for problem in problems]
    if not shapes:
        return []
    if importlib.util.find_spec("torch") is None:
        return ["PyTorch is not installed"] * len(problems)
    command = [sys.executable, "-m", "blrlab_ops.verify", f"--impl={TRITON}", "--dtype=float32", "--json"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    try:
        done = subprocess.run(
            [*command, *shapes], capture_output=True, text=True, check=False, timeout=timeout, env=environment
        )
    except subprocess.TimeoutExpired:
        return [f"Triton's interpreter took longer than {timeout:.0f} s"] * len(problems)
    rows = [row for row in map(_row, done.stdout.splitlines()) if row]
    if len(rows) != len(problems):
        last = (done.stderr.strip() or "it printed nothing").splitlines()[-1]
        return [f"Triton's interpreter failed: {last}"] * len(problems)
    return list(rows)


def _row(line: str) -> Row | None:
    """Read one printed line; None for what is no whole row."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def shape_flag(problem: Problem) -> str:
    """Write a problem as `--shape=monarch:384x768x2304:b4x4:r48` (rank r of low_rank and blast, r' of monarch)."""
    spec = problem.spec
    sizes = f"{problem.tokens}x{spec.in_features}x{spec.out_features}"
    return f"--shape={spec.format}:{sizes}:b{spec.blocks[0]}x{spec.blocks[1]}:r{spec.rank}"
