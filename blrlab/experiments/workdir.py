"""The work folder: a folder a stage, each with a fingerprint of what it was made from.

    config.json          the resolved config of the last command
    records.jsonl        the records of all stages, in order
    <stage>/stage.json   state (running or done) and the config parts and earlier stages it depends on
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from blrlab import records
from blrlab.errors import InputError, one_of

KEPT = ("data", "dense")


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage depends on.

    Attributes:
      name: also its folder's.
      parts: config fields, or groups of fields, that change its result.
      after: the stages whose results it starts from.
      optional: stages whose results it uses if they are there.
    """

    name: str
    parts: tuple[str, ...]
    after: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


STAGES = (
    Stage("data", ("data", "init_from")),
    Stage("dense", ("model", "train", "seed"), ("data",)),
    Stage("compress", ("factors", "rules"), ("dense",)),
    Stage("heal", ("heal",), ("compress",)),
    Stage("continue", ("heal",), ("dense",)),
    Stage("eval", ("eval",), ("dense",), ("compress", "heal", "continue")),
    Stage("bridge", (), ("compress",), ("heal",)),
    Stage("bench", ("bench",), ("compress",), ("heal",)),
    Stage("report", (), (), ("dense", "compress", "heal", "continue", "eval", "bridge", "bench")),
)
NAMES = tuple(stage.name for stage in STAGES)


def chosen(stages: str) -> tuple[str, ...]:
    """Read `config.stages`: all, or names with commas between, into the order they run in.

    Raises:
      InputError: a name is unknown.
    """
    names = NAMES if stages.strip() == "all" else tuple(filter(None, map(str.strip, stages.split(","))))
    if not names:
        raise InputError(f"config.stages is empty: give all, or some of {', '.join(NAMES)}.")
    for name in names:
        one_of(name, NAMES, "stage")
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
            return json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            raise InputError(f"{file} is damaged: delete the folder {file.parent}.") from None

    def parts(self, stage: str) -> dict[str, Any]:
        """Return the config fields a stage depends on itself."""
        wanted = _stage(stage).parts
        return {
            name: value
            for name, value in self._flat.items()
            if any(name == part or name.startswith(f"{part}.") for part in wanted)
        }

    def fingerprint(self, stage: str) -> str:
        """Return a hash of a stage's parts and of the stages it starts from."""
        found = _stage(stage)
        uses = [*found.after, *(name for name in found.optional if name in self._run or self.done(name))]
        content = {"parts": self.parts(stage), "after": {name: self.fingerprint(name) for name in uses}}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def done(self, stage: str) -> bool:
        """Tell whether a stage's result is there and belongs to this config."""
        stored = self.stored(stage)
        return bool(stored) and stored["state"] == "done" and stored["fingerprint"] == self.fingerprint(stage)

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
          InputError: the dense model would have to change, or a stage's earlier stages are missing.
        """
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"--workdir {self.root} is a file.")
        changes = [change for stage in KEPT for change in self.differences(stage)]
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
        """Hold the folder for this process.

        Raises:
          InputError: another process works in it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another process works in {self.root}: wait for it, or take another.") from None
            yield

    def forget(self) -> None:
        """Remove the folder if no model is in it yet, so that a wrong input leaves nothing half-written."""
        if not self.done("dense") and not (self.path("dense") / "checkpoints").exists():
            shutil.rmtree(self.root, ignore_errors=True)

    def run(self, stage: str, work: Callable[[Path], None], say: Callable[[str], None]) -> None:
        """Run a stage unless its result is there; go on with a killed one; clear away an outdated one."""
        folder, stored, fingerprint = self.path(stage), self.stored(stage), self.fingerprint(stage)
        if self.done(stage):
            say(f"{stage}: done before")
            return
        if folder.exists() and (stored is None or stored["fingerprint"] != fingerprint):
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        entry = {"state": "running", "fingerprint": fingerprint, "parts": self.parts(stage)}
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
