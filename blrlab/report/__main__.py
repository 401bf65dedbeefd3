"""Report on finished or interrupted runs.

    python -m blrlab.report runs/gpt2_monarch runs/gpt2_blast --out=report.html

A run is a folder with a `records.jsonl`, or such a file. The tables go to the terminal, and the whole
report to the page named by `--out`. Several runs are read one after the other; where they timed the same
thing on the same device, the last one counts. `--markdown`, after the runs, prints tables for a README
in place of those for a terminal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from blrlab import records
from blrlab.report import print_report, write_figures, write_html
from blrlab.report.groups import Record
from blrlab.report.markdown import KINDS, markdown

RECORDS = "records.jsonl"


def read_run(path: Path) -> list[Record]:
    """Read the records of a run's folder or file, each with the field `run`: where it was read from.

    Raises ValueError, with the path and what is wrong, where there is no such file or a line is damaged.
    """
    file = path / RECORDS if path.is_dir() else path
    try:
        return [{**record, "run": str(path)} for record in records.read(file)]
    except OSError as problem:
        raise ValueError(f"cannot read {file}: {problem}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the runs' tables, write the page where asked, and return the exit status: 2 for an error."""
    parser = argparse.ArgumentParser(
        prog="python -m blrlab.report",
        description="Tables of one or several runs, and one self-contained HTML page.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=f"folder with {RECORDS}, or a .jsonl file")
    parser.add_argument("--out", type=Path, metavar="PAGE", help="also write the page here, such as report.html")
    parser.add_argument(
        "--markdown",
        nargs="?",
        const="latency",
        metavar="KIND",
        help=f"print tables in Markdown instead: {', '.join(KINDS)} (latency where none is named)",
    )
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="also write every figure here, as SVG files")
    chosen = parser.parse_args(arguments)
    try:
        found = [record for path in chosen.runs for record in read_run(path)]
        if chosen.markdown:
            print(markdown(found, chosen.markdown))
        else:
            print_report(found, Console())
        # A README takes what goes to standard output.
        aside = sys.stderr if chosen.markdown else sys.stdout
        if chosen.out:
            print(f"\nwrote {write_html(found, chosen.out)}", file=aside)
        if chosen.figures:
            print(f"\nwrote {len(write_figures(found, chosen.figures))} figures to {chosen.figures}", file=aside)
    except (ValueError, OSError) as problem:
        print(f"blrlab.report: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
