"""The work folder: a folder a stage, each with a fingerprint of what it was made from.

    config.json          the config of the last command, and what it resolved to
    records.jsonl        the records of all stages, in order
    <stage>/stage.json   state (running or done), and the config parts and earlier results it was made from
    <stage>/records.jsonl, <stage>/params/, ...

A stage whose parts or whose earlier stages changed is made anew. The dense model is too dear for that: a change
that reaches it is an error.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from blrlab import records
from blrlab.errors import InputError, one_of

KEPT = ("data", "dense")
# How often a stage writes changes none of its results.
HARMLESS = (".log_every", ".checkpoint_every")
# Neither does what training does to factors and learns from a teacher, where the model is dense.
OF_FACTORS = (".factor_rates", ".decay", ".distil", ".distil_weight", ".temperature")
OUTDATED = ".outdated-"
# Of a budget, what says what is measured, and not how much there is to spend.
MEASURED = ("budget.formats", "budget.blocks", "budget.multiple", "budget.sensitivity")
# What a denoiser's loss depends on, and so what its data's hash tells apart.
OF_NOISE = ("noise.steps", "noise.first", "noise.last", "model.size", "model.out_channels")


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage depends on.

    Attributes:
      name: also its folder's.
      leaves: what is in its folder once it is done.
      parts: config fields, or groups of fields, that change its result; `machine` is where it runs.
      after: the stages whose results it starts from.
      optional: stages whose results it uses if they are there.
      named_only: whether `all` leaves it out.
      dense: whether it trains a dense model.
    """

    name: str
    leaves: str
    parts: tuple[str, ...]
    after: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    named_only: bool = False
    dense: bool = False


STAGES = (
    Stage("data", "data.json", ("data", "init_from", *OF_NOISE)),
    Stage("dense", "params", ("model", "train", "seed", "noise"), ("data",), dense=True),
    Stage("curves", "losses.json", (*MEASURED, "rules", "compress"), ("dense",), named_only=True),
    Stage("allocate", "plan.json", ("budget", "rules"), ("dense", "curves"), named_only=True),
    Stage("compress", "params", ("factors", "rules", "rules_file", "compress"), ("dense",)),
    Stage("heal", "params", ("heal",), ("compress",)),
    Stage("continue", "params", ("heal",), ("dense",), dense=True),
    Stage("eval", "records.jsonl", ("eval",), ("dense",), ("compress", "heal", "continue")),
    Stage("sample", "samples.npz", ("sample",), ("dense",), ("compress", "heal", "continue"), named_only=True),
    Stage("bridge", "stage.json", ("machine",), ("compress",), ("heal",)),
    Stage("roofline", "records.jsonl", ("roofline",), named_only=True),
    Stage("bench", "stage.json", ("bench", "machine"), (), ("compress", "heal")),
    Stage(
        "report",
        "../report.html",
        (),
        (),
        ("data", "dense", "allocate", "compress", "heal", "continue", "eval", "sample", "roofline", "bench"),
    ),
)
NAMES = tuple(stage.name for stage in STAGES)


def chosen(stages: str) -> tuple[str, ...]:
    """Read `config.stages`: names with commas between, in running order; all stands for those that need not be named.

    Raises:
      InputError: a name is unknown.
    """
    names = tuple(filter(None, map(str.strip, stages.split(","))))
    if "allocate" in names:
        names += ("curves",)
    if "all" in names:
        names += tuple(stage.name for stage in STAGES if not stage.named_only)
    if not names:
        raise InputError(f"config.stages is empty: give all, or some of {', '.join(NAMES)}.")
    for name in names:
        one_of(name, (*NAMES, "all"), "stage")
    return tuple(name for name in NAMES if name in names)


class Workdir:
    """A work folder under a config; `flat` is the config as {dotted name: value}, JSON values only."""

    def __init__(self, root: Path, flat: Mapping[str, Any], run: Sequence[str]):
        self.root = root
        self._flat = json.loads(json.dumps(dict(flat)))
        self._run = tuple(run)

    def path(self, stage: str) -> Path:
        """Return a stage's folder."""
        return self.root / stage

    def stored(self, stage: str) -> dict[str, Any] | None:
        """Return what a stage's folder says of itself, or None.

        Raises:
          InputError: the file is damaged.
        """
        file = self.path(stage) / "stage.json"
        try:
            entry = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError:
            entry = None
        if not isinstance(entry, dict) or not {"state", "fingerprint", "parts", "made"} <= set(entry):
            raise InputError(f"{file} is damaged: delete the folder {file.parent}.")
        return entry

    def parts(self, stage: str) -> dict[str, Any]:
        """Return the config fields a stage depends on itself."""
        wanted, without = _stage(stage).parts, HARMLESS + OF_FACTORS * _stage(stage).dense
        return {
            name: value
            for name, value in self._flat.items()
            if any(name == part or name.startswith(f"{part}.") for part in wanted) and not name.endswith(without)
        }

    def fingerprint(self, stage: str) -> str:
        """Return a hash of a stage's parts and of the very results it starts from."""
        found = _stage(stage)
        uses = [*found.after, *(name for name in found.optional if name in self._run or self.done(name))]
        content = {"parts": self.parts(stage), "after": {name: self._result(name) for name in uses}}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def _result(self, stage: str) -> str:
        """Name a stage's result: when it was made, or what it will be made from."""
        stored = self.stored(stage)
        return stored["made"] if stored and self.done(stage) else self.fingerprint(stage)

    def done(self, stage: str) -> bool:
        """Tell whether a stage's result is there and belongs to this config."""
        stored = self.stored(stage)
        if not stored or stored["state"] != "done" or not (self.path(stage) / _stage(stage).leaves).exists():
            return False
        return stored["fingerprint"] == self.fingerprint(stage)

    def differences(self, stage: str) -> list[str]:
        """Say which fields of a stage's own parts changed since it began, `name: old -> new`."""
        stored = self.stored(stage)
        if not stored:
            return []
        old, new = stored["parts"], self.parts(stage)
        return [
            f"{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}"
            for name in {**old, **new}
            if old.get(name) != new.get(name)
        ]

    def check(self) -> list[str]:
        """Compare the folder with the config, before any work; return sentences on what will be made anew.

        Raises:
          InputError: the dense model would have to change, a stage's earlier stages are missing, or a folder that
            is not a stage's is in the way.
        """
        for name in NAMES:
            folder = self.path(name)
            if self.stored(name) is None and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
                raise InputError(f"{folder} is in the way, and no stage made it: take another --workdir.")
        changes = list(dict.fromkeys(change for stage in KEPT for change in self.differences(stage)))
        if changes and self.stored("dense"):
            raise InputError(
                f"{self.root} holds a dense model made otherwise ({'; '.join(changes)}): "
                "take another --workdir, or set these fields back."
            )
        for name in self._run:
            for needed in _stage(name).after:
                if needed not in self._run and not self.done(needed):
                    raise InputError(f"stage {name} starts from {needed}, which {self.root} lacks: add it to stages.")
        said = []
        for name in self._run:
            changes = self.differences(name)
            if changes:
                said.append(f"{'; '.join(changes)}: running again from {name} on")
        return said

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; after a wrong input, leave nothing that was not there before.

        Raises:
          InputError: another process works in it, or it is a file.
        """
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"--workdir {self.root} is a file.")
        before = set(self.root.iterdir()) if self.root.is_dir() else set()
        made = [folder for folder in (self.root, *self.root.parents) if not folder.exists()]
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another process works in {self.root}: wait for it, or take another.") from None
            for leftover in self.root.glob(f"{OUTDATED}*"):
                shutil.rmtree(leftover)
            try:
                yield
            except (InputError, OSError):
                if not self.stored("dense"):
                    self._forget(before, made)
                raise

    def _forget(self, before: set[Path], made: list[Path]) -> None:
        """Remove what this command put here, and the folders it made."""
        for entry in set(self.root.iterdir()) - before:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for folder in made:
            folder.rmdir()

    def run(self, stage: str, work: Callable[[Path], None], say: Callable[[str], None]) -> None:
        """Run a stage unless its result is there; go on with a killed one; clear away an outdated one."""
        folder, stored, fingerprint = self.path(stage), self.stored(stage), self.fingerprint(stage)
        if self.done(stage):
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # a kill may have left them
            say(f"{stage}: done before")
            return
        if stored and (stored["fingerprint"] != fingerprint or stored["state"] == "done"):
            # Renamed before it is removed, so that a kill in between leaves no half of a stage.
            outdated = self.root / f"{OUTDATED}{uuid.uuid4().hex}"
            folder.rename(outdated)
            shutil.rmtree(outdated)
        folder.mkdir(exist_ok=True)
        entry = {"state": "running", "fingerprint": fingerprint, "parts": self.parts(stage), "made": uuid.uuid4().hex}
        records.write_text(folder / "stage.json", json.dumps(entry, indent=1))
        work(folder)
        records.write_text(folder / "stage.json", json.dumps(entry | {"state": "done"}, indent=1))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # a finished stage has its result
        self.gather()

    def gather(self) -> list[records.Record]:
        """Write the root's `records.jsonl` from the records of the stages that belong to this config."""
        found = []
        for stage in NAMES:
            file = self.path(stage) / "records.jsonl"
            if file.exists() and self.done(stage):
                found += records.read(file)
        records.rewrite(self.root / "records.jsonl", found)
        return found


def _stage(name: str) -> Stage:
    return next(stage for stage in STAGES if stage.name == name)
