"""Files in folders, one for each class: found, labelled and split.

A root holds the class folders itself, and is split here by the hashes of names; or it holds `train` and `val` (or
`valid`, `validation`, `test`), which do.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from blrlab.errors import InputError, home_expanded

SPLITS = {"train": ("train",), "valid": ("validation", "valid", "val", "test")}
Labelled = list[tuple[str, int]]  # file, label


def root_of(path: str, what: str) -> Path:
    """Return the folder at a path.

    Raises:
      InputError: there is none; `what` is what it should hold, such as image.
    """
    root = home_expanded(path)
    if not path or not root.is_dir():
        raise InputError(f'no folder of {what}s at "{path}": set data.path to one.')
    return root


def find(root: Path, suffixes: Sequence[str], what: str) -> tuple[list[str], dict[str, Labelled]]:
    """Return the classes of a root, in order, and its labelled files by side: train and valid, or all without a split.

    Raises:
      InputError: there are no classes, one has no file, or one is only validated on.
    """
    sides = {
        side: next((root / each for each in names if (root / each).is_dir()), None) for side, names in SPLITS.items()
    }
    if not (sides["train"] and sides["valid"]):
        classes = _classes(root, what)
        return classes, {"all": _listed(root, classes, suffixes, what)}
    classes = _classes(sides["train"], what)
    found = {side: _listed(place, classes, suffixes, what) for side, place in sides.items() if place}
    odd = sorted(set(_classes(sides["valid"], what)) - set(classes))
    if odd:
        raise InputError(f"{sides['valid']} has the class {odd[0]}, which {sides['train']} has not.")
    return classes, found


def held_out(names: Sequence[str], fraction: float) -> np.ndarray:
    """Return which of several names are held out, by their hashes: the same ones whatever their order."""
    hashes = [int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") for name in names]
    order = np.argsort(np.array(hashes, np.uint64))
    held = np.zeros(len(names), bool)
    held[order[: min(max(round(fraction * len(names)), 1), len(names) - 1)]] = True
    return held


def digest(root: Path, sides: Mapping[str, Labelled]) -> str:
    """Return a hash of files by split, name, label and size."""
    found = hashlib.sha256()
    for side, files in sides.items():
        for file, label in files:
            found.update(f"{side} {Path(file).relative_to(root)} {label} {Path(file).stat().st_size}\0".encode())
    return found.hexdigest()


def _classes(root: Path, what: str) -> list[str]:
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise InputError(f"{root} has no classes: it should hold a folder of {what}s for each.")
    return classes


def _listed(root: Path, classes: Sequence[str], suffixes: Sequence[str], what: str) -> Labelled:
    found = []
    for label, name in enumerate(classes):
        own = sorted(file for file in (root / name).rglob("*") if file.suffix.lower() in suffixes)
        if not own:
            raise InputError(f"the class {root / name} has no {what} ({', '.join(suffixes)}).")
        found += [(str(file), label) for file in own]
    return found
