"""Latents with labels: what an autoencoder made of images, in files in class folders.

Files (`latent_files`) hold latents [C, h, h], channels first as autoencoders give them, or stacks of them. What is
returned is float32 [h, h, C], channels last, multiplied by a scale: that of Stable Diffusion's autoencoder is 0.18215
(Rombach et al., arXiv 2112.10752). What one file holds at the same row is held out together, for it may be an image
and its mirror. A prepared folder holds `data.json` and `latents.json`, the list of files.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from blrlab.data import class_folders, latent_files
from blrlab.data.batches import Stream, evenly
from blrlab.data.latent_files import SUFFIXES, Place
from blrlab.errors import InputError
from blrlab.records import write_text

SOURCE = "latents"
LISTED = "latents.json"


@dataclasses.dataclass(frozen=True)
class Part:
    """Latents of one side of the split, read one at a time: index -> ([C, h, h] as stored, label)."""

    places: Sequence[Place]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return latent_files.read(self.places[index]), int(self.labels[index])

    def at(self, indices: Sequence[int]) -> "Part":
        """Return some of them."""
        return Part([self.places[index] for index in indices], self.labels[list(indices)])


@dataclasses.dataclass(frozen=True)
class Latents:
    """Prepared latents; `summary` has source, files, classes, train, valid, hash, unit, shape."""

    train: Part
    valid: Part
    summary: dict[str, Any]


def prepare(folder: Path, path: str, valid_fraction: float = 0.1) -> Latents:
    """Find the latents in class folders, split them and write down which they are.

    Args:
      folder: where that goes.
      path: of the class folders, or of `train` and `val` that hold them.
      valid_fraction: the share held out where there is no such split.

    Raises:
      InputError: there is no such folder, no class, a class without latents, or a file that holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    root = class_folders.root_of(path, "latent")
    classes, found = class_folders.find(root, SUFFIXES, "latent")
    entries: dict[str, list[Any]] = {side: [] for side in found}
    shapes: dict[tuple[int, ...], str] = {}
    for side, file, label in ((side, *labelled) for side, files in found.items() for labelled in files):
        for place, shape in latent_files.places(file):
            shapes.setdefault(shape, file)
            entries[side].append((*place, label))
    shape = _only(shapes, root)
    if "all" in entries:
        entries = _split(root, entries["all"], valid_fraction)
    counts = {side: len(listed) for side, listed in entries.items()}
    named = "".join(f"{side} {len(listed)}\0" for side, listed in entries.items())
    summary = {
        "source": f"{SOURCE} {path}",
        "files": sum(map(len, found.values())),
        "classes": classes,
        **counts,
        "hash": _digest(root, found, named),
        "unit": "image",
        "shape": list(shape),
    }
    write_text(folder / LISTED, json.dumps(entries))
    write_text(folder / "data.json", json.dumps(summary, indent=1))
    return load(folder)


def prepared(folder: Path) -> bool:
    """Tell whether a prepared folder is of latents."""
    return (folder / LISTED).exists()


def load(folder: Path) -> Latents:
    """Open prepared latents.

    Raises:
      InputError: a file is missing or damaged.
    """
    try:
        summary = json.loads((folder / "data.json").read_text(encoding="utf-8"))
        listed = json.loads((folder / LISTED).read_text(encoding="utf-8"))
        parts = {
            side: Part([tuple(entry[:3]) for entry in listed[side]], np.array([entry[3] for entry in listed[side]]))
            for side in ("train", "valid")
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"the prepared latents in {folder} are damaged ({error}): delete that folder.") from None
    return Latents(parts["train"], parts["valid"], summary)


def _only(shapes: dict[tuple[int, ...], str], root: Path) -> tuple[int, ...]:
    """Return the one shape [C, h, h] of all latents.

    Raises:
      InputError: two differ, or there is none.
    """
    if not shapes:
        raise InputError(f"the files in {root} hold no latent.")
    if len(shapes) > 1:
        (one, first), (other, second) = list(shapes.items())[:2]
        raise InputError(f"{first} holds latents {list(one)} and {second} {list(other)}: they must be alike.")
    return next(iter(shapes))


def _digest(root: Path, sides: Mapping[str, class_folders.Labelled], named: str) -> str:
    """Return a hash of the files, both ends of each (latents of one shape have one size), and of the split."""
    found = hashlib.sha256((class_folders.digest(root, sides) + named).encode())
    for file, _ in itertools.chain(*sides.values()):
        found.update(latent_files.ends(file))
    return found.hexdigest()


def _split(root: Path, entries: list[Any], fraction: float) -> dict[str, list[Any]]:
    # An array that is no stack lies at the first row; the array's name tells an image from its mirror.
    names = [f"{Path(file).relative_to(root)} {max(row, 0)}" for file, _, row, _ in entries]
    images = list(dict.fromkeys(names))
    if len(images) < 2:
        raise InputError(f"{root} has one latent, its mirrors apart: one is to train on, and one to be held out.")
    held = dict(zip(images, class_folders.held_out(images, fraction), strict=True))
    return {
        "train": [entry for entry, name in zip(entries, names, strict=True) if not held[name]],
        "valid": [entry for entry, name in zip(entries, names, strict=True) if held[name]],
    }


def _example(stored: np.ndarray, label: int, scale: float) -> dict[str, np.ndarray]:
    image = np.ascontiguousarray(np.moveaxis(stored, 0, -1)) * np.float32(scale)
    return {"image": image, "label": np.asarray(label, np.int64)}


class LatentBatches(Stream):
    """An endless stream of shuffled batches {"image": [batch, h, h, C], "label": [batch]}.

    Args:
      part: latents with labels.
      batch: latents a batch.
      seed: of the shuffle.
      scale: they are multiplied by.
      workers: threads that read.

    Raises:
      InputError: there are fewer latents than a batch has.
    """

    def __init__(self, part: Part, batch: int, seed: int, scale: float = 1.0, workers: int = 4):
        if len(part) < batch:
            raise InputError(f"there are {len(part)} training latents, less than one batch of {batch}.")
        shuffled = grain.MapDataset.source(part).seed(seed).shuffle().repeat()  # type: ignore[arg-type]
        reading = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=4 * workers)
        examples = shuffled.map(lambda example: _example(*example, scale))
        super().__init__(examples.to_iter_dataset(reading).batch(batch), "image", 1)


def held_out(part: Part, most: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Return up to `most` latents, evenly spread.

    Raises:
      InputError: there is none.
    """
    if not len(part):
        raise InputError("no latent is held out.")
    found = [_example(*part[index], scale) for index in evenly(len(part), most)]
    return {name: np.stack([example[name] for example in found]) for name in ("image", "label")}
