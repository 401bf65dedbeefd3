"""Verify the interleaved kernel against float64 and time it beside cuBLAS.

    python experiments/2026-11_hopper_h100/measure_interleaved.py --out=OUT.jsonl [--layers=qkvo,down]

Needs no more than Triton 3.6.
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from cuts import LAYERS, Layer
from interleaved import Tiles, fitting, launch
from problems import MOST_ERROR, Problem, errors, library, start, times

TILES = {
    "qkvo": [fitting(256, 64, 64, places, 8, blocks) for places in (1, 2) for blocks in (8, 16)],
    "gate_up": [fitting(256, 32, 64, places, rows, 8) for places in (1, 2) for rows in (2, 4, 8)],
    "down": [fitting(256, 32, 64, places, 8, blocks) for places in (1, 2) for blocks in (8, 16)],
    "up": [fitting(256, ranks, 64, places, 8, 16) for places in (1, 2) for ranks in (16, 64)],
    "down1b": [fitting(128, ranks, 64, places, 8, 16) for places in (1, 2) for ranks in (16, 64)],
    "qkv": [fitting(256, 64, 64, places, rows, 8) for places in (1, 2) for rows in (8, 16)],
    "fc1": [fitting(256, 32, 64, places, rows, 8) for places in (1, 2) for rows in (4, 8, 16)],
}
LONG = {f"{name}@{tokens}": (name, tokens) for name in ("qkvo", "gate_up", "down") for tokens in (4096, 16384)}


def layer_of(name: str) -> Layer:
    """Return one of `LAYERS`, or such a one at more tokens."""
    name, tokens = LONG.get(name, (name, 0))
    return LAYERS[name]._replace(tokens=tokens) if tokens else LAYERS[name]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("interleaved.jsonl"))
    parser.add_argument("--layers", default=",".join([*TILES, *LONG]))
    asked = parser.parse_args()
    with asked.out.open("a") as file:
        for name in asked.layers.split(","):
            for row in rows(layer_of(name), TILES[LONG.get(name, (name,))[0]]):
                print(name, row["impl"], row.get("config", ""), row.get("p50", "wrong"), flush=True)
                file.write(json.dumps(row) + "\n")


def rows(layer: Layer, sizes: list[Tiles]) -> list[dict[str, Any]]:
    """Measure a layer: every cut that is right, and cuBLAS."""
    problem, found = Problem(layer, "cuda"), []
    common = {**start(problem), "impl": "hopper_interleaved"}
    least, _ = errors(problem.exact.bfloat16(), problem.exact)
    made = [[launch(problem, size, copy, problem.y) for copy in range(len(problem.weights))] for size in sizes]
    with ThreadPoolExecutor(len(made)) as threads:  # which compiles them
        list(threads.map(lambda launches: launches[0](), made))
    for size, launches in zip(sizes, made, strict=True):
        row = {**common, "config": size._asdict(), "time": time.strftime("%Y-%m-%dT%H:%M:%S")}
        torch.cuda.synchronize()
        problem.y.fill_(float("nan"))
        launches[0]()
        error, error_max = errors(problem.y, problem.exact)
        row |= {"error": error, "error_max": error_max, "error_budget": MOST_ERROR * least}
        row["passed"] = error <= MOST_ERROR * least
        found.append({**row, **timed(launches)} if row["passed"] else row)
    return found + [{**common, **own, **timed(calls)} for own, calls in library(problem)]


def timed(calls: list[Any]) -> dict[str, float]:
    """Return a call's time (us)."""
    return dict(zip(("p20", "p50", "p80"), times(calls), strict=True))


if __name__ == "__main__":
    main()
