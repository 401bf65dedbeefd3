"""Images with labels: where they come from, how they are cut, and batches of them.

Sources: digits (1,797 of 8 x 8 that scikit-learn ships), a folder of class folders (as ImageNet's `train` and `val`, or
one that is split here), or a Hugging Face dataset with columns of images and labels. A prepared folder holds
`data.json`, and the arrays of digits or the list of files. Images are float32 [S, S, C], -1 to 1, channels last.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from blrlab.data import class_folders
from blrlab.data.batches import Stream, evenly
from blrlab.errors import InputError, one_of
from blrlab.records import write_text

SOURCES = ("digits", "folder", "huggingface")
SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp")
MARGIN = 0.875  # of the shorter side, that evaluation keeps
Example = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Images:
    """Prepared images.

    Attributes:
      train: index -> (picture, label), and their number.
      valid: the same.
      summary: source, files, classes, train, valid, hash, unit.
    """

    train: "Pictures"
    valid: "Pictures"
    summary: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Pictures with labels, opened one at a time."""

    open: Callable[[int], Any]  # a PIL image
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.open(index), int(self.labels[index])

    def at(self, indices: Sequence[int]) -> "Pictures":
        """Return some of them."""
        return Pictures(lambda index: self.open(indices[index]), self.labels[list(indices)])


def prepare(
    folder: Path, source: str, path: str = "", name: str = "", subset: str = "", valid_fraction: float = 0.1
) -> Images:
    """Find the images of a source, split them and write down which they are.

    Args:
      folder: where that goes.
      source: digits, folder or huggingface.
      path: of the class folders, or of `train` and `val` that hold them.
      name: of the dataset on the hub, or its local folder.
      subset: of the dataset.
      valid_fraction: the share held out where the source has no split of its own.

    Raises:
      InputError: the source is unknown or missing, has no classes, or classes without an image.
    """
    one_of(source, SOURCES, "data source")
    folder.mkdir(parents=True, exist_ok=True)
    made = {"digits": _digits, "folder": _folder, "huggingface": _huggingface}[source]
    told = made(folder, path, name, subset, valid_fraction)
    write_text(folder / "data.json", json.dumps({"source": f"{source} {path or name}".strip(), **told}, indent=1))
    return load(folder)


def load(folder: Path) -> Images:
    """Open prepared images.

    Raises:
      InputError: a file is missing or damaged.
    """
    try:
        summary = json.loads((folder / "data.json").read_text(encoding="utf-8"))
        kind = summary["source"].split(" ")[0]
        opened = {"digits": _open_digits, "folder": _open_folder, "huggingface": _open_huggingface}[kind]
        train, valid = (opened(folder, summary, side) for side in ("train", "valid"))
        return Images(train, valid, {key: value for key, value in summary.items() if key not in ("name", "subset")})
    except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"the prepared images in {folder} are damaged ({error}): delete that folder.") from None


def _summary(files: int, classes: Sequence[str], train: int, valid: int, digest: str) -> dict[str, Any]:
    return {
        "files": files,
        "classes": list(classes),
        "train": train,
        "valid": valid,
        "hash": digest,
        "unit": "image",
    }


def _digits(folder: Path, path: str, name: str, subset: str, fraction: float) -> dict[str, Any]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("data.source=digits needs scikit-learn: pip install scikit-learn.") from None
    found: Any = load_digits()
    pixels = np.round(found.images * (255 / 16)).astype(np.uint8)
    held = class_folders.held_out([str(index) for index in range(len(pixels))], fraction)
    digest = hashlib.sha256(pixels.tobytes() + found.target.astype(np.int64).tobytes() + held.tobytes()).hexdigest()
    for side, chosen in (("train", ~held), ("valid", held)):
        np.save(folder / f"{side}_images.npy", pixels[chosen])
        np.save(folder / f"{side}_labels.npy", found.target[chosen].astype(np.int64))
    return _summary(1, [str(digit) for digit in range(10)], int((~held).sum()), int(held.sum()), digest)


def _open_digits(folder: Path, summary: dict[str, Any], side: str) -> Pictures:
    from PIL import Image

    pixels = np.load(folder / f"{side}_images.npy")
    return Pictures(lambda index: Image.fromarray(pixels[index]), np.load(folder / f"{side}_labels.npy"))


def _folder(folder: Path, path: str, name: str, subset: str, fraction: float) -> dict[str, Any]:
    root = class_folders.root_of(path, "image")
    classes, found = class_folders.find(root, SUFFIXES, "image")
    if "all" in found:
        files = found["all"]
        if len(files) < 2:
            raise InputError(f"{root} has one image: one is to train on, and one to be held out.")
        held = class_folders.held_out([str(Path(file).relative_to(root)) for file, _ in files], fraction)
        found = {
            "train": [file for file, out in zip(files, held, strict=True) if not out],
            "valid": [file for file, out in zip(files, held, strict=True) if out],
        }
    digest = class_folders.digest(root, found)
    write_text(folder / "files.json", json.dumps(found))
    count = sum(map(len, found.values()))
    return _summary(count, classes, len(found["train"]), len(found["valid"]), digest)


def _open_folder(folder: Path, summary: dict[str, Any], side: str) -> Pictures:
    from PIL import Image

    files = json.loads((folder / "files.json").read_text(encoding="utf-8"))[side]

    def opened(index: int) -> Any:
        try:
            picture = Image.open(files[index][0])
            picture.load()  # reads it whole, and closes the file
            return picture
        except OSError as error:
            raise InputError(f"{files[index][0]} cannot be read as an image: {error}") from None

    return Pictures(opened, np.array([label for _, label in files], np.int64))


def _huggingface(folder: Path, path: str, name: str, subset: str, fraction: float) -> dict[str, Any]:
    parts, classes = _dataset(name, subset)
    digest = hashlib.sha256("".join(part._fingerprint for part in parts.values()).encode()).hexdigest()
    count = {side: len(part) for side, part in parts.items()}
    told = _summary(sum(count.values()), classes, count["train"], count["valid"], digest)
    return {**told, "name": name, "subset": subset}


def _dataset(name: str, subset: str) -> tuple[dict[str, Any], list[str]]:
    if not name:
        raise InputError("data.source=huggingface needs a dataset: set data.name.")
    try:
        import datasets
    except ImportError:
        raise InputError("data.source=huggingface needs the datasets library: pip install datasets.") from None
    try:
        loaded = datasets.load_dataset(name, subset or None)
    except Exception as error:  # the library raises many kinds: offline, unknown name, no such subset
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f'the dataset "{name}" cannot be had: {reason}') from None
    parts: dict[str, Any] = {}
    for side, names in class_folders.SPLITS.items():
        parts[side] = next((loaded[each] for each in names if each in loaded), None)
        if parts[side] is None or not {"image", "label"} <= set(parts[side].column_names):
            raise InputError(f'the dataset "{name}" has no {names[0]} split with columns "image" and "label".')
    classes = getattr(parts["train"].features["label"], "names", None) or sorted(set(map(str, parts["train"]["label"])))
    return parts, list(classes)


def _open_huggingface(folder: Path, summary: dict[str, Any], side: str) -> Pictures:
    part = _dataset(summary["name"], summary["subset"])[0][side]
    return Pictures(lambda index: part[int(index)]["image"], np.asarray(part["label"], np.int64))


class _Examples:
    """Pictures as grain reads them."""

    def __init__(self, pictures: Pictures):
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self._pictures[index]


class ImageBatches(Stream):
    """An endless stream of shuffled, augmented batches {"image": [batch, S, S, C], "label": [batch]}.

    A picture is cut out at random and made as large as the model sees (Szegedy et al., arXiv 1409.4842): an area
    between `smallest` and all of it, sides of at most 3 : 4; then turned over half the time, where `flip`.

    Args:
      pictures: with labels.
      size: S.
      channels: C, 1 or 3.
      batch: images a batch.
      seed: of the shuffle and of what is drawn.
      smallest: the least share of a picture's area that is cut out; 1: the whole picture, made square.
      flip: whether left and right may change places.
      workers: threads that read and cut.
      margin: instead of at random, cut out the middle: a square of this share of the shorter side.

    Raises:
      InputError: there are fewer images than a batch has.
    """

    def __init__(
        self,
        pictures: Pictures,
        size: int,
        channels: int,
        batch: int,
        seed: int,
        smallest: float = 0.08,
        flip: bool = True,
        workers: int = 4,
        margin: float | None = None,
    ):
        if len(pictures) < batch:
            raise InputError(f"there are {len(pictures)} training images, less than one batch of {batch}.")

        def one(example: tuple[Any, int], rng: np.random.Generator) -> Example:
            picture, label = example
            size_of = picture.size
            cut = _middle(size_of, margin) if margin else _random_cut(size_of, smallest, rng)
            turned = flip and rng.random() < 0.5
            return {"image": _pixels(picture, cut, size, channels, turned), "label": np.asarray(label, np.int64)}

        drawn = grain.MapDataset.source(_Examples(pictures)).seed(seed).shuffle().repeat().random_map(one)
        reading = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=4 * workers)
        super().__init__(drawn.to_iter_dataset(reading).batch(batch), "image", 1)


def held_out(pictures: Pictures, size: int, channels: int, most: int, margin: float = MARGIN) -> Example:
    """Return up to `most` pictures, evenly spread, their middles cut out as is usual for evaluation.

    Of large pictures the middle is a square of `margin` of the shorter side.

    Raises:
      InputError: there is none.
    """
    if not len(pictures):
        raise InputError("no image is held out.")
    found = [pictures[index] for index in evenly(len(pictures), most)]
    images = [_pixels(picture, _middle(picture.size, margin), size, channels, False) for picture, _ in found]
    return {"image": np.stack(images), "label": np.array([label for _, label in found], np.int64)}


def _middle(size: tuple[int, int], margin: float) -> tuple[float, float, float, float]:
    """Return the square in the middle; of small pictures, such as digits, all of it."""
    side = min(size) * (margin if min(size) > 64 else 1.0)
    left, top = (size[0] - side) / 2, (size[1] - side) / 2
    return left, top, left + side, top + side


def _random_cut(size: tuple[int, int], smallest: float, rng: np.random.Generator) -> tuple[float, float, float, float]:
    width, height = size
    for _ in range(10):
        area, ratio = rng.uniform(smallest, 1.0) * width * height, np.exp(rng.uniform(-1, 1) * np.log(4 / 3))
        if smallest >= 1:
            break
        wide, high = (area * ratio) ** 0.5, (area / ratio) ** 0.5
        if wide <= width and high <= height:
            left, top = rng.uniform(0, width - wide), rng.uniform(0, height - high)
            return left, top, left + wide, top + high
    return 0.0, 0.0, float(width), float(height)


def _pixels(picture: Any, box: tuple[float, float, float, float], size: int, channels: int, turned: bool) -> np.ndarray:
    from PIL import Image

    grey = picture.convert("L" if channels == 1 else "RGB")
    resized = grey.resize((size, size), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(resized, np.float32).reshape(size, size, channels) / 127.5 - 1
    return np.ascontiguousarray(pixels[:, ::-1]) if turned else pixels
