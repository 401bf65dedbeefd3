"""Train the study's GPT2-S once and measure the cells of its table that `records` lacks, several beside one another.

    python experiments/2026-11_compress_gpt2s/measure.py --work=WORK --out=OUT --tar=OUT.tar.gz --seconds=450

WORK holds the corpus, the dense model and compiled programs; OUT/records a file a cell, named as in `records`; OUT/logs
what each run said. The same command goes on after a stop. On an H100 the dense model takes five minutes, a cell half a
minute to five. `--cells='*'` measures all, in the order of their importance, and `--check` two first that `records`
has, to tell whether the dense model trained anew stands for the one before. Where the corpus is another, so is the
data hash, and every cell is to be measured anew. `--toy` tries everything on a CPU, in minutes.

The table is printed by `table.py`, beside this file. The figure is what_is_lost_against_size_*.svg of
`python -m blrlab.report RECORDS/*_{1.5,2,3}.jsonl --figures=FOLDER`.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import fnmatch
import importlib.util
import json
import multiprocessing
import os
import shutil
import tarfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from cells import KINDS, STUDY, Cell, cells, losses, rules

from blrlab import records
from blrlab.errors import InputError, did_you_mean
from blrlab.experiments.run import main as run

CONFIG = STUDY.parents[1] / "configs/gpt2_blast.py"
CORPUS = (9909, 191270726)  # files and bytes of the corpus of `records`
PACKAGES = "flax,jax,matplotlib,networkx,numpy,optax,scipy,sklearn,sympy,torch,transformers,triton"
CHECKED = ("low_rank_plain_2", "blast_whitened_2")
STAGES = "--config.stages=data,dense,compress,heal,eval"
FULL = {
    **{"model.width": 768, "train.steps": 2500, "compress.windows": 64, "eval.windows": 128},
    **{"heal.steps": 100, "heal.batch": 8, "heal.warmup": 20, "heal.learning_rate": 2e-5},
}
TOY = {
    **{"model.width": 96, "model.layers": 2, "model.context": 64, "train.steps": 40, "train.warmup": 4},
    **{"compress.windows": 16, "eval.windows": 16, "budget.multiple": 4},
    **{"heal.steps": 10, "heal.batch": 4, "heal.warmup": 2, "heal.learning_rate": 2e-5},
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a command works, until when (s since the epoch) cells begin, and at which sizes."""

    work: Path
    out: Path
    deadline: float
    toy: bool

    @property
    def sizes(self) -> dict[str, Any]:
        """Fields of the config that every run sets."""
        return TOY if self.toy else FULL

    def file(self, name: str) -> Path:
        """Return the file of records of a cell."""
        return self.out / "records" / f"{name}.jsonl"

    def run(self, folder: Path, name: str, *flags: str) -> None:
        """Run one experiment in this process, what it says going to a file.

        Raises:
          RuntimeError: it did not end well.
        """
        data = {"data.source": "folder", "data.path": self.work / "corpus", "data.valid_fraction": 0.02}
        fields = [f"--config.{field}={value}" for field, value in {**data, **self.sizes}.items()]
        log = self.out / "logs" / f"{name}.log"
        with log.open("a") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            scale = "small" if self.toy else "full"
            code = run([f"--config={CONFIG}:{scale}", f"--workdir={folder}", *fields, *flags])
        if code:
            raise RuntimeError(f"exit code {code}, {log.read_text().splitlines()[-1]}")


def gather(folder: Path, packages: Sequence[str], most: int) -> None:
    """Copy the Python sources of installed packages, at most so many files of each, and say if they are the study's.

    Raises:
      InputError: a package is not installed.
    """
    partial = folder.with_name("corpus.part")
    for name in () if folder.exists() else packages:
        found = importlib.util.find_spec(name)
        if found is None or not found.submodule_search_locations:
            raise InputError(f'the corpus needs the package "{name}", which is not installed: give --packages.')
        root = Path(found.submodule_search_locations[0])
        for file in sorted(root.rglob("*.py"))[:most]:
            target = partial / file.relative_to(root.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    if not folder.exists():
        partial.rename(folder)
    sizes = [len(content) for content in (file.read_bytes() for file in folder.rglob("*.py")) if content.strip()]
    same = "as" if (len(sizes), sum(sizes)) == CORPUS else "other than"
    print(f"corpus: {len(sizes):,} files, {sum(sizes):,} bytes, {same} in records", flush=True)


def train(place: Place) -> float:
    """Prepare the data, train the dense model, and return its loss in the last step, nats/token."""
    folder = place.work / "dense"
    place.run(folder, "dense", "--config.stages=data,dense")
    rows = [row for row in records.read(folder / "records.jsonl") if row["kind"] == "train"]
    records.rewrite(place.file("dense"), rows)
    return rows[-1]["loss"]


def link(folder: Path, source: Path, *stages: str) -> None:
    """Let a work folder have the finished stages of another."""
    folder.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        if not (folder / stage).exists():  # else it goes on after a stop
            (folder / stage).symlink_to(source / stage)


def curves(mode: str, place: Place, *flags: str) -> Path:
    """Measure once what layers lose, for all budgets of a mode, and return the work folder that has it."""
    folder = place.work / f"curves_{mode}"
    with folder.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        link(folder, place.work / "dense", "data", "dense")
        place.run(folder, folder.name, *flags, "--config.stages=curves")
    return folder


def measure(cell: Cell, place: Place) -> float | None:
    """Compress, heal and evaluate; return how long it took (s), or None where the deadline had passed."""
    if (start := time.time()) > place.deadline:
        return None
    folder = place.work / "cells" / cell.name
    link(folder, place.work / "dense", "data", "dense")
    flags = [f"--config.compress.mode={cell.mode}"]
    if cell.kind == "budget":
        flags += ["--config.budget.blocks=4,6,12"]
        link(folder, curves(cell.mode, place, *flags), "curves")
        flags += [f"--config.budget.value={cell.factor}"]
        plan = place.out / "records" / f"{cell.name}_plan.json"
        place.run(folder, cell.name, *flags, "--config.stages=data,dense,allocate")
        shutil.copyfile(folder / "allocate/plan.json", plan)
        shutil.copyfile(folder / "allocate/records.jsonl", place.file(f"{cell.name}_allocate"))
    else:
        flags += [f"--config.factors.format={KINDS[cell.kind][0]}"]
        flags += ["--config.compress.blast=precgd"] if cell.kind == "blast_precgd" else []
        plan = folder / "rules.json"
        plan.write_text(json.dumps(rules(cell, place.sizes["model.width"])))
    place.run(folder, cell.name, *flags, f"--config.rules_file={plan}", STAGES)
    found = records.read(folder / "records.jsonl")
    own = [row for row in found if row.get("phase") != "dense" and row["kind"] != "allocate"]
    records.rewrite(place.file(cell.name), [{**row, "run": cell.name} for row in own])
    shutil.rmtree(folder)
    return time.time() - start


def ended(done: Future, name: str, place: Place) -> str:
    """Say what became of a cell: what it lost, healed in brackets, beside what `records` has of it."""
    if problem := done.exception():
        return f"{name}: failed, {type(problem).__name__}: {problem}"
    if done.result() is None:
        return f"{name}: no time left"
    here, before = losses(place.file(name)), losses(STUDY / "records" / f"{name}.jsonl")
    lost = [f"{found.get(stage, 0) - found['dense']:.4f}" if stage in found else "-"
            for found in (here, before) for stage in ("compressed", "healed")]  # fmt: skip
    told = "lost {} ({}), in records {} ({})".format(*lost)
    return f"{name}: {done.result():.0f} s, dense {here['dense']:.4f}, {told}"


def pack(place: Place, file: Path | None) -> None:
    """Put records and logs into one archive, which is whole at any time."""
    if file:
        partial = file.with_name(f"{file.name}.part")
        with tarfile.open(partial, "w:gz") as archive:
            archive.add(place.out, arcname=place.out.name)
        partial.replace(file)


def chosen(patterns: Sequence[str] | None, check: bool) -> list[Cell]:
    """Return the cells asked for; where none are named, those whose healing `records` lacks.

    Raises:
      InputError: a pattern names no cell.
    """
    names = [cell.name for cell in cells()]
    for pattern in patterns or ():
        if not fnmatch.filter(names, pattern):
            raise InputError(f'no cell is called "{pattern}".{did_you_mean(pattern, names)}')

    def wanted(name: str) -> bool:
        if patterns is None:
            return "healed" not in losses(STUDY / "records" / f"{name}.jsonl")
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    first = [cell for cell in cells() if check and cell.name in CHECKED]
    return first + [cell for cell in cells() if cell not in first and wanted(cell.name)]


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure the cells of the study's table that its records lack.")
    parser.add_argument("--work", type=Path, required=True, help="folder for corpus, dense model and programs")
    parser.add_argument("--out", type=Path, required=True, help="folder for records and logs")
    parser.add_argument("--tar", type=Path, help="also keep all of OUT in this archive")
    parser.add_argument("--cells", nargs="+", metavar="NAME", help="wildcards allowed; default: the missing ones")
    parser.add_argument("--check", action="store_true", help=f"{' and '.join(CHECKED)} first")
    parser.add_argument("--seconds", type=float, default=1e9, help="after which no cell begins")
    parser.add_argument("--workers", type=int, default=3, help="processes that measure cells")
    parser.add_argument("--packages", default=PACKAGES, help="the corpus: installed packages, commas between")
    parser.add_argument("--toy", action="store_true", help="tiny model, tiny corpus")
    return parser.parse_args()


def main() -> int:
    """Measure the cells that were asked for and return the exit code: 1 where one failed."""
    asked = arguments()
    place = Place(asked.work.resolve(), asked.out.resolve(), time.time() + asked.seconds, asked.toy)
    todo = [cell for cell in chosen(asked.cells, asked.check) if "healed" not in losses(place.file(cell.name))]
    for folder in (place.work, place.out / "records", place.out / "logs"):
        folder.mkdir(parents=True, exist_ok=True)
    # Read when the workers import JAX.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(place.work / "programs"))
    os.environ.setdefault("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false")  # fits compile in 5 s rather than 70
    gather(place.work / "corpus", asked.packages.split(","), 20 if asked.toy else 10**9)
    print(f"{len(todo)} cells to measure", flush=True)
    failed = 0
    with ProcessPoolExecutor(asked.workers, multiprocessing.get_context("spawn")) as pool:
        print(f"dense: {pool.submit(train, place).result():.4f} nats/token at the end of training", flush=True)
        pack(place, asked.tar)
        running = {pool.submit(measure, cell, place): cell.name for cell in todo}
        for done in as_completed(running):
            print(ended(done, running[done], place), flush=True)
            failed += done.exception() is not None
            pack(place, asked.tar)
    return min(failed, 1)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except (ValueError, RuntimeError) as problem:
        raise SystemExit(f"measure.py: {problem}") from None
