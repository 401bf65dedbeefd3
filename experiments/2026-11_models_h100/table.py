"""Print the README's tables from the records: times, and speed over the dense model of the same batch and compiler.

python experiments/2026-11_models_h100/table.py
"""

import json
from pathlib import Path

RECORDS = Path(__file__).resolve().parent / "records"
FILES = {
    "llama7b": "llama7b,llama7b_prefill,llama7b_joined,llama7b_compiled",
    "llama1b": "llama1b",
    "gpt2s": "gpt2s",
    "vit_b": "vit_b,vit_b_compiled",
    "dit_xl": "dit_xl,dit_xl_bias,dit_xl_16384",
}
NOTES = {"llama7b_prefill": ", hopper_chained at hand", "dit_xl_bias": ", the bias a part of the product"}
FORMATS = ("low_rank", "monarch", "blast")


def rows(net: str) -> list[dict]:
    """Return the timed rows of a net."""
    found = []
    for name in FILES[net].split(","):
        lines = (RECORDS / f"{name}.jsonl").read_text().splitlines()
        timed = [row for row in map(json.loads, lines) if row["kind"] == "bench" and row["p50"]]
        found += [row | {"file": name} for row in timed]
    return found


def table(net: str) -> str:
    """Return a net's table: ms, in brackets over dense of the same file, else of the net's first."""
    found = rows(net)
    lines = [f"| {net} | dense | low rank | Monarch | BLAST |", "|---|---:|---:|---:|---:|"]
    kinds = dict.fromkeys(
        (
            row["file"],
            row["phase"],
            row["batch"],
            row["tokens"],
            row["impl"] in ("torch_compile", "joined") and row["impl"],
        )
        for row in found
    )
    for file, phase, batch, tokens, how in kinds:
        at = (file, phase, batch, tokens)
        alike = [row for row in found if tuple(row[key] for key in ("file", "phase", "batch", "tokens")) == at]
        own = {
            row["op"]: row for row in alike if (row["impl"] == how if how else row["impl"] in ("torch_eager", "best"))
        }
        plain = {"op": "dense", "impl": "torch_eager", "phase": phase, "batch": batch, "tokens": tokens}
        base = own.get("dense") or next(row for row in found if plain.items() <= row.items())
        cells = [f"{own['dense']['p50'] / 1e3:.2f}" if "dense" in own else ""]
        for op in FORMATS:
            ratio = base["p50"] / own[op]["p50"] if op in own else 0
            cells.append(f"{own[op]['p50'] / 1e3:.2f} ({ratio:.2f}x)" if op in own else "")
        label = f"{phase}, {batch} x {tokens}{f', {how}' if how else ''}{NOTES.get(file, '')}"
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    for net in FILES:
        print(table(net), end="\n\n")
        weights = {row["op"]: row["weight_bytes"] for row in rows(net)}
        print(", ".join(f"{op} {size / 1e9:.3f} GB" for op, size in weights.items()), end="\n\n")
