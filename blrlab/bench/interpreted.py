"""Verify the Triton kernels without a GPU: in Triton's interpreter, in a child process.

The interpreter is chosen when a kernel's module loads, so it cannot share a process with anything else.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from blrlab_ops.testing import Case

Verdict = dict[str, Any] | str
MOST_TOKENS = 72  # a tile and a part of one; the interpreter takes minutes for hundreds


def verify(wanted: Sequence[tuple[Case, str]], timeout: float = 600.0) -> list[Verdict]:
    """Verify implementations on one layer's sizes after another, on random numbers of few tokens, in float32.

    Returns:
      For each the row that `blrlab_ops.verify` prints, or a sentence on why there is none.
    """
    found: dict[tuple[Case, str], Verdict] = {}
    for impl in dict.fromkeys(impl for _, impl in wanted):
        cases = [case for case, name in wanted if name == impl]
        found |= zip(((case, impl) for case in cases), _verify(cases, impl, timeout), strict=True)
    return [found[each] for each in wanted]


def _verify(cases: Sequence[Case], impl: str, timeout: float) -> list[Verdict]:
    command = [sys.executable, "-m", "blrlab_ops.verify", f"--impl={impl}", "--dtype=float32", "--json"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    try:
        done = subprocess.run(
            [*command, *(shape_flag(case._replace(tokens=min(case.tokens, MOST_TOKENS))) for case in cases)],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return [f"Triton's interpreter took longer than {timeout:.0f} s"] * len(cases)
    rows = [row for row in map(_row, done.stdout.splitlines()) if row]
    if len(rows) != len(cases):
        last = (done.stderr.strip() or "it printed nothing").splitlines()[-1]
        return [f"Triton's interpreter failed: {last}"] * len(cases)
    return list(rows)


def _row(line: str) -> dict[str, Any] | None:
    """Read one printed line; None for what is no whole row."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def shape_flag(case: Case) -> str:
    """Write sizes as `--shape=monarch:384x768x2304:b4x4:r48` (rank r of low_rank and blast, r' of monarch)."""
    sizes = f"{case.tokens}x{case.in_features}x{case.out_features}"
    return f"--shape={case.format}:{sizes}:b{case.blocks[0]}x{case.blocks[1]}:r{case.rank}"
