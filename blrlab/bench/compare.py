"""Compare two benchmarks: the speed-up of every row with its spread, and whether anything got slower.

    python -m blrlab.bench.compare runs/main/records.jsonl runs/branch/records.jsonl
    python -m blrlab.bench.compare runs/main runs/branch --threshold=1.10 --only=monarch,blast --only=impl=triton_*
    python -m blrlab.bench.compare runs/a40 runs/h100 --across-devices --json

A and B are files of records, or folders with a records.jsonl; of several rows of one measurement the last counts.
A/B is A's median over B's, above 1 where B is faster; the spread runs from A's p20 over B's p80 to A's p80 over B's
p20. A row is faster or slower where the p20 to p80 ranges do not overlap. It regressed where it is slower by more than
the threshold, or passed its gate in A and failed it or has no time in B.

Exit status: 0 nothing regressed, 1 something did, 2 wrong input.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from blrlab import records
from blrlab.bench import pairs
from blrlab.bench.pairs import Comparison, Pair, Row
from blrlab.bench.results import IDENTITY
from blrlab.errors import InputError

EXIT_REGRESSED, EXIT_INPUT = 1, 2
PIPED_WIDTH = 160  # of a table that no terminal bounds
SAID = ("p20", "p50", "p80", "passed")  # of each side, in JSON
LISTED = 5  # rows named of those that only one side has


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        found = _compare(options)
    except ValueError as error:  # an InputError is one
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}")
    if options.json:
        print(json.dumps(as_json(found, options), allow_nan=False))
    else:
        _print(found, options)
    return EXIT_REGRESSED if found.regressions else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m blrlab.bench.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", type=Path, metavar="A", help="the records before: a file, or a folder with records.jsonl")
    parser.add_argument("b", type=Path, metavar="B", help="the records after")
    parser.add_argument("--threshold", type=float, default=1.05, help="times slower that B may be; default: 1.05")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERNS",
        help="rows whose op, impl, net or layer matches, commas between: triton_*, or layer=c_*; each one narrows",
    )
    parser.add_argument("--across-devices", action="store_true", help="compare rows of different devices too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _fail(sentence: str) -> int:
    print(f"blrlab.bench.compare: {sentence}", file=sys.stderr)
    return EXIT_INPUT


def _compare(options: argparse.Namespace) -> Comparison:
    if not (math.isfinite(options.threshold) and options.threshold >= 1):
        raise InputError(f"--threshold is {options.threshold:g}: it is a number from 1 up, such as 1.05.")
    a, b = read(options.a), read(options.b)
    pairs.check_patterns([*a, *b], options.only)
    a, b = pairs.chosen(a, options.only), pairs.chosen(b, options.only)
    for name, rows in (("A", a), ("B", b)):
        if not rows:
            raise InputError(f"--only={' --only='.join(options.only)} leaves no row of {name}.")
    return pairs.compare(a, b, options.threshold, options.across_devices)


def read(path: Path) -> list[Row]:
    """Return the benchmark rows of a file or of a folder's records.jsonl.

    Raises:
      InputError: there is no such file, a line is damaged, or it holds no benchmark rows.
    """
    file = path / "records.jsonl" if path.is_dir() else path
    rows = [record for record in records.read(file) if record.get("kind") == "bench"]
    if not rows:
        raise InputError(f"{file} holds no benchmark rows: python -m blrlab.bench.layer --out={file} writes some.")
    for row in rows:
        missing = [name for name in pairs.WORDS if not isinstance(row.get(name), str)]
        if missing:
            raise InputError(f"{file} is damaged: a benchmark row has no {missing[0]}.")
    return rows


def as_json(found: Comparison, options: argparse.Namespace) -> dict[str, Any]:
    """Return all that the table says as one JSON object."""
    return {
        "a": str(options.a),
        "b": str(options.b),
        "threshold": options.threshold,
        "rows": [_row_json(pair) for pair in found.pairs],
        "means": [{"op": op, "impl": impl, "speed_up": mean, "rows": count} for op, impl, mean, count in found.means()],
        "only_a": [_name(row) for row in found.only_a],
        "only_b": [_name(row) for row in found.only_b],
        "notes": pairs.notes(found),
        "regressions": len(found.regressions),
    }


def _row_json(pair: Pair) -> dict[str, Any]:
    times = {f"{side}_{name}": row.get(name) for side, row in (("a", pair.a), ("b", pair.b)) for name in SAID}
    return {
        **{name: pair.a.get(name) for name in IDENTITY},
        **times,
        "speed_up": pair.ratio,
        "spread": pair.spread,
        "verdict": pair.verdict,
        "regressed": pair.regressed,
        "differs": pairs.differs(pair),
        "reason": pair.b.get("reason"),
    }


def _print(found: Comparison, options: argparse.Namespace) -> None:
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False)
    console.print(Text(f"A {options.a}\nB {options.b}\n"))
    console.print(_rows_table(found))
    if found.means():
        console.print()
        console.print(_means_table(found))
    for line in _closing(found, options.threshold):
        console.print(Text(line), soft_wrap=True)


def _rows_table(found: Comparison) -> Table:
    table = _table("layer", "tokens>", "dtype", "op", "impl", "A us>", "B us>", "A/B>", "spread>", "verdict")
    for pair in found.pairs:
        spread = "" if pair.spread is None else "{:.3f} to {:.3f}".format(*pair.spread)
        ratio = "" if pair.ratio is None else f"{pair.ratio:.3f}"
        row, verdict = pair.a, pair.verdict + (", regressed" if pair.regressed else "")
        count = f"{row['batch']} x {row['tokens']}" if row.get("batch") else f"{row.get('tokens')}"
        cells = (_layer(row), count, row.get("dtype"), row["op"], row["impl"], _us(pair.a), _us(pair.b))
        table.add_row(*(Text(str(cell)) for cell in (*cells, ratio, spread, verdict)))
    return table


def _means_table(found: Comparison) -> Table:
    table = _table("geometric mean of A/B", "impl", "A/B>", "rows>")
    for op, impl, mean, count in found.means():
        table.add_row(op, impl, f"{mean:.3f}", str(count))
    return table


def _table(*titles: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="")
    for title in titles:
        table.add_column(title.rstrip(">"), justify="right" if title.endswith(">") else "left", overflow="fold")
    return table


def _closing(found: Comparison, threshold: float) -> list[str]:
    """Say what is not in the tables, and what came of it."""
    lines = ["", *pairs.notes(found)]
    for name, rows in (("A", found.only_a), ("B", found.only_b)):
        if rows:
            more = f" and {len(rows) - LISTED} more" if len(rows) > LISTED else ""
            lines.append(f"Only in {name}, {len(rows)}: {'; '.join(map(_name, rows[:LISTED]))}{more}.")
    for pair in found.regressions:
        reason = f"{1 / pair.ratio:.3f} times slower" if pair.ratio else pair.b.get("reason") or pair.verdict
        lines.append(f"Regressed: {_name(pair.a)}: {reason}")
    counts = {verdict: sum(pair.verdict == verdict for pair in found.pairs) for verdict in pairs.VERDICTS}
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    lines.append(f"{len(found.pairs)} compared: {said}; {len(found.regressions)} regressed (threshold {threshold:g}).")
    return lines


def _us(row: Row) -> str:
    return f"{row['p50']:,.2f}" if pairs.timed(row) else "-"


def _layer(row: Row) -> str:
    """Name a layer; its sizes too, since one layer may be measured at several ranks and blocks."""
    words = [row["net"], row["layer"] if row["layer"] != "*" else "model", row.get("phase") or ""]
    blocks = row.get("blocks")
    if blocks and blocks != [1, 1]:
        words.append("b" + "x".join(map(str, blocks)))
    if row.get("rank") or row.get("block_rank"):
        words.append(f"r{row['rank']}" if row.get("rank") else f"r'{row['block_rank']}")
    return " ".join(filter(None, words))


def _name(row: Row) -> str:
    return f"{_layer(row)} n={row.get('tokens')} {row.get('dtype')} {row['op']} {row['impl']}"


if __name__ == "__main__":
    sys.exit(main())
