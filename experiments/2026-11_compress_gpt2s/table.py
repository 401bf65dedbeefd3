"""Print the README's table from records.

python experiments/2026-11_compress_gpt2s/table.py [RECORDS]
"""

import itertools
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from cells import FACTORS, STUDY, cells, losses

from blrlab import records
from blrlab.errors import InputError

# What a row is called, by kind; the format is told once.
ROWS = {
    "low_rank": ("low rank", "svd"),
    "monarch": ("Monarch, 4 blocks", "block_svd"),
    "blast_precgd": ("BLAST, 6 blocks", "precgd, as published"),
    "blast": ("BLAST, 6 blocks", "alternating"),
    "blast12": ("BLAST, 12 blocks", "alternating"),
    "budget": ("budget, all formats", "each format's"),
}
MODES = ("plain", "whitened", "sequential")
SIZES = sorted(FACTORS, key=float)
Lost = Mapping[str, Mapping[str, float]]


def lost(folder: Path) -> dict[str, dict[str, float]]:
    """Return {cell: {stage: loss less the dense model's, nats/token}} of the cells that were measured.

    Raises:
      InputError: there are none, or they were measured on different data.
    """
    files = {cell.name: folder / f"{cell.name}.jsonl" for cell in cells()}
    found = {name: told for name, file in files.items() if (told := losses(file))}
    hashes = {row["data_hash"] for name in found for row in records.read(files[name]) if row["kind"] == "eval"}
    if not hashes:
        raise InputError(f"{folder} holds no cell that was evaluated.")
    if len(hashes) > 1:
        raise InputError(f"{folder} holds cells of {len(hashes)} data hashes, and one table holds one.")
    return {name: {stage: value - of["dense"] for stage, value in of.items()} for name, of in found.items()}


def mean_error(file: Path, field: str) -> str:
    """Return the mean of an error over the layers of a cell; empty where it has none."""
    rows = records.read(file) if file.exists() else []
    values = [row[field] for row in rows if row["kind"] == "compress" and row.get(field) is not None]
    return f"{fmean(values):.{3 if field == 'relative_error' else 4}f}" if values else ""


def entry(found: Lost, name: str, best: Mapping[tuple[str, str], float]) -> str:
    """Return what a cell lost, after healing in brackets, the least of its size in bold."""
    told = []
    for stage, form in (("compressed", "{}"), ("healed", "({})")):
        if stage in found.get(name, {}):
            value = found[name][stage]
            least = value == best[name.rpartition("_")[2], stage]
            told.append(form.format(f"**{value:.4f}**" if least else f"{value:.4f}"))
    return " ".join(told)


def table(folder: Path) -> str:
    """Return the table, in Markdown."""
    found = lost(folder)
    best: dict[tuple[str, str], float] = {}
    for name, of in found.items():
        for stage, value in of.items():
            at = name.rpartition("_")[2], stage
            best[at] = min(value, best.get(at, value))
    sizes = " | ".join(f"factor {size}" for size in SIZES)
    lines = [f"| | algorithm | {sizes} | error of weights, at 2 | of outputs, at 2 |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    before = ""
    for kind, mode in itertools.product(ROWS, MODES):
        if any(f"{kind}_{mode}_{size}" in found for size in SIZES):
            form, algorithm = ROWS[kind]
            at_2 = folder / f"{kind}_{mode}_2.jsonl"
            entries = [entry(found, f"{kind}_{mode}_{size}", best) for size in SIZES]
            entries += [mean_error(at_2, field) for field in ("relative_error", "output_error")]
            called = algorithm if mode == "plain" else f"{algorithm} {mode}"
            line = f"| {form if form != before else ''} | {called} | {' | '.join(entries)} |"
            lines.append(line.replace("  ", " "))
            before = form
    dense = sorted({f"{losses(folder / f'{name}.jsonl')['dense']:.4f}" for name in found})
    return "\n".join([*lines, "", f"Dense: {', '.join(dense)} nats/token."])


if __name__ == "__main__":
    try:
        print(table(Path(sys.argv[1]) if len(sys.argv) > 1 else STUDY / "records"))
    except InputError as problem:
        raise SystemExit(f"table.py: {problem}") from None
