"""The folder that a compressed checkpoint is written to, whole files only, so that a kill costs one matrix.

    blrlab.json                      the request, written first: {"layers": {path: spec}, ...}; another one is refused
    parts/00000.safetensors          the factors of one layer, until its shard is written
    model-00001-of-00004.safetensors <path>.V, .S, .U, .bias of layers, and the other tensors as they were
    records.jsonl                    a `compress` record a layer, and one of the whole
    config.json, tokenizer.json ...  copied
    model.safetensors.index.json     written last: which file holds which tensor

y = x W, whatever the layout of the dense weight was: W [i, o] is what the factors make, as `factors.to_dense` does.
A shard's metadata is that of `blrlab_ops.files`, whose `load` reads its layers. Parts and shards carry the records of
their layers, so that none is lost between two files.
"""

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from blrlab import records
from blrlab.compress.naming import BIAS
from blrlab.compress.request import Request, Shard, shards
from blrlab.compress.rows import Row
from blrlab.errors import InputError
from blrlab.models import hf
from blrlab.models.hf import stored
from blrlab.models.hf.stored import Content, Stored

REQUEST, PARTS, RECORDS, LOCK = "blrlab.json", "parts", "records.jsonl", ".lock"
WHOLE = "*"  # the path in the record of the whole
NOTES = "blrlab_records"  # in the metadata of a file
COPIED = (".json", ".jinja", ".model", ".py", ".txt")  # of what lies beside the weights: config, tokenizer, code


class Folder:
    """A folder, and what of a request is in it."""

    def __init__(self, root: Path, request: Request):
        """Plan the files; `opened` makes the folder ready."""
        self.root, self.request, self.shards = root, request, shards(request)
        self._numbers = {path: number for number, path in enumerate(request.specs)}
        self._rows: dict[str, Row] = {}

    @property
    def rows(self) -> list[Row]:
        """The records of the layers that are finished, in the order of the model."""
        return sorted(self._rows.values(), key=lambda row: self._numbers[row["path"]])

    @property
    def todo(self) -> list[str]:
        """The paths that are not finished."""
        return [path for path in self.request.specs if path not in self._rows]

    @property
    def whole(self) -> Row | None:
        """The record of the whole, if all is written."""
        files = (hf.INDEX, RECORDS, *(shard.file for shard in self.shards))
        if not all((self.root / file).exists() for file in files):
            return None
        return next((row for row in records.read(self.root / RECORDS) if row.get("path") == WHOLE), None)

    @contextlib.contextmanager
    def opened(self, fresh: bool = False) -> Iterator[None]:
        """Hold the folder for this process, and find what is finished.

        Args:
          fresh: remove what an earlier run left.

        Raises:
          InputError: it is a file or holds something else, another process works in it, or it was made by another
            request.
        """
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"--out {self.root} is a file.")
        if self.root.resolve() in {self.request.source.resolve(), *self._sources()}:
            raise InputError(f"--out {self.root} is the checkpoint's own folder: take another.")
        if self.root.is_dir() and not (self.root / REQUEST).exists():
            others = sorted({entry.name for entry in self.root.iterdir()} - {LOCK, REQUEST + ".tmp"})
            if others:
                raise InputError(f"--out {self.root} holds other files, such as {others[0]}: take another folder.")
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / LOCK).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another process works in {self.root}: wait for it, or take another.") from None
            if fresh:
                self._clear()
            self._agree(fresh)
            self._find()
            yield

    def _sources(self) -> set[Path]:
        return {tensor.path.resolve().parent for tensor in self.request.tensors.values()}

    def _clear(self) -> None:
        for pattern in (hf.INDEX, "model-*-of-*.safetensors", "*.tmp", RECORDS):
            for path in self.root.glob(pattern):
                path.unlink()
        shutil.rmtree(self.root / PARTS, ignore_errors=True)

    def _agree(self, fresh: bool) -> None:
        """Keep the request, or compare it with the one that is kept."""
        wanted, path = self.request.described(), self.root / REQUEST
        if fresh or not path.exists():
            return records.write_text(path, json.dumps(wanted, indent=1) + "\n")
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            difference = _difference(kept, wanted)
        except (ValueError, AttributeError) as error:
            raise InputError(f"{path} is damaged: {error}: take another --out, or --fresh.") from None
        if difference:
            fix = "take another --out, or --fresh"
            raise InputError(f"{self.root} was begun with another request: {difference}: {fix}.")

    def _find(self) -> None:
        """Read which layers are finished off the files, and bring the records to the same state."""
        if self.whole is None:
            (self.root / PARTS).mkdir(exist_ok=True)
        for leftover in (*self.root.glob("*.tmp"), *(self.root / PARTS).glob("*.tmp")):
            leftover.unlink()
        for shard in self.shards:
            if (self.root / shard.file).exists():
                self._note(self.root / shard.file)
                self._drop_parts(shard)
        for path in self.todo:
            if self._part(path).exists():
                self._note(self._part(path))
        file = self.root / RECORDS
        records.keep(file, lambda record: record.get("path") in (None, WHOLE, *self._rows))
        present = {record.get("path") for record in records.read(file)} if file.exists() else set()
        for row in self.rows:
            if row["path"] not in present:
                records.append(file, row)
        for shard in self.shards:
            self._join(shard)

    def _note(self, path: Path) -> None:
        self._rows |= {row["path"]: row for row in json.loads(stored.look(path)[1][NOTES])}

    def _part(self, path: str) -> Path:
        return self.root / PARTS / f"{self._numbers[path]:05d}.safetensors"

    def start(self, env: Row) -> None:
        """Append the record of the machine that the next layers are compressed on."""
        records.append(self.root / RECORDS, env)

    def add(self, row: Row, kernel: Mapping[str, np.ndarray]) -> None:
        """Keep the factors and the record of a layer; write its shard once it is complete."""
        path: str = row["path"]
        factors = [
            Content(f"{path}.{part}", stored.dtype_name(factor.dtype), factor.shape, [_bytes(factor)])
            for part, factor in kernel.items()
        ]
        stored.write(self._part(path), factors, {NOTES: json.dumps([row])})
        records.append(self.root / RECORDS, row)
        self._rows[path] = row
        self._join(next(shard for shard in self.shards if path in shard.paths))

    def _join(self, shard: Shard) -> None:
        """Write a shard if all of its layers are finished and it is not there."""
        path = self.root / shard.file
        if path.exists() or any(layer not in self._rows for layer in shard.paths):
            return
        contents: list[Content | Stored] = [self.request.tensors[name] for name in shard.copied]
        entries = {}
        for layer in shard.paths:
            own: list[Content | Stored] = list(stored.look(self._part(layer))[0].values())
            if bias := self.request.tensors.get(layer + BIAS):
                own.append(stored.in_dtype(bias, self.request.dtype_of(layer)))  # a layer is of one dtype
            permute = {tensor.name.removeprefix(layer + "."): list(range(len(tensor.shape))) for tensor in own}
            entries[layer] = {"format": self.request.specs[layer].format, "impl": None, "permute": permute}
            contents += own
        packed = json.dumps({"version": 1, "layers": entries})
        notes = json.dumps([self._rows[layer] for layer in shard.paths])
        stored.write(path, contents, {"format": "pt", stored.PACKED: packed, NOTES: notes})
        self._drop_parts(shard)

    def _drop_parts(self, shard: Shard) -> None:
        for layer in shard.paths:
            self._part(layer).unlink(missing_ok=True)

    def finish(self, whole: Row) -> None:
        """Append the record of the whole, copy what lies beside the weights, and write the index."""
        file = self.root / RECORDS
        records.keep(file, lambda record: record.get("path") != WHOLE)
        records.append(file, whole)
        for beside in sorted(self.request.source.iterdir()):
            if beside.is_file() and beside.suffix in COPIED and beside.name not in (hf.INDEX, REQUEST):
                shutil.copyfile(beside, self.root / beside.name)
        tensors = [tensor for shard in self.shards for tensor in stored.look(self.root / shard.file)[0].values()]
        index = {
            "metadata": {"total_size": sum(tensor.size for tensor in tensors)},
            "weight_map": {tensor.name: tensor.path.name for tensor in tensors},
        }
        records.write_text(self.root / hf.INDEX, json.dumps(index, indent=1) + "\n")
        shutil.rmtree(self.root / PARTS)


def _bytes(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def _difference(kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Say where two requests differ; an empty sentence where they do not."""
    old, new = kept.get("layers", {}), wanted["layers"]
    for path in dict.fromkeys((*old, *new)):
        if path not in new or path not in old:
            return f"{path} is {'not ' if path not in new else ''}to be compressed now"
        for field, value in new[path].items():
            if old[path].get(field) != value:
                return f"{path} has {field} {old[path].get(field)} there, and {value} now"
    if kept.get("checkpoint") != wanted["checkpoint"]:
        return "the checkpoint is another one"
    field = next((field for field in wanted if kept.get(field) != wanted[field]), None)
    return f"{field} is {kept.get(field)} there, and {wanted[field]} now" if field else ""
