"""Report on finished or interrupted runs.

    python -m blrlab.report runs/gpt2_monarch runs/gpt2_blast --out=report.html

A run is a folder with a `records.jsonl`, or such a file. The tables go to the terminal, and the whole
report to the page named by `--out`. Several runs are read one after the other; where they timed the same
thing on the same device, the last one counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from blrlab.report import print_report, write_html
from blrlab.report.groups import Record

RECORDS = "records.jsonl"


def read_run(path: Path) -> list[Record]:
    """Read the records of a run's folder or file, each with the field `run`: where it was read from.

    Raises ValueError, with the path and what is wrong, where there is no such file or a line is no record.
    """
    file = path / RECORDS if path.is_dir() else path
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        within = f": the folder holds no {RECORDS}" if path.is_dir() else ""
        raise ValueError(f"no records at {file}{within}") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"cannot read {file}: {problem}") from None
    return [
        {**_record(line, f"{file}:{number}"), "run": str(path)}
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the runs' report, write the page where asked, and return the exit status: 2 for an error."""
    parser = argparse.ArgumentParser(
        prog="python -m blrlab.report",
        description="Tables of one or several runs, and one self-contained HTML page.",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help=f"folder with {RECORDS}, or a .jsonl file"
    )
    parser.add_argument(
        "--out", type=Path, metavar="PAGE", help="also write the page here, such as report.html"
    )
    chosen = parser.parse_args(arguments)
    try:
        records = [record for path in chosen.runs for record in read_run(path)]
        print_report(records, Console())
        if chosen.out:
            print(f"\nwrote {write_html(records, chosen.out)}")
    except (ValueError, OSError) as problem:
        print(f"blrlab.report: {problem}", file=sys.stderr)
        return 2
    return 0


def _record(line: str, place: str) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as problem:
        raise ValueError(f"{place}: not a line of JSON ({problem.msg}, column {problem.colno})") from None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise ValueError(f"{place}: a record is a JSON object with a `kind`, and this line is not")
    return record


if __name__ == "__main__":
    sys.exit(main())
