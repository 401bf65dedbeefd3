"""Turn text into token files once, and say exactly which text it was.

A prepared folder holds `train.npy` and `valid.npy` (one row of tokens each), `token_bytes.npy` (bytes of text a
token stands for), `files.json` (every file with its bytes and side), `tokenizer.json` unless tokens are bytes, and
`data.json`: source, counts, the hash of text and tokenizer, and the unigram byte entropy.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np

from blrlab.data import text, tokenizer
from blrlab.data.tokenizer import Tokenizer
from blrlab.errors import InputError
from blrlab.records import write_text


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A prepared text.

    Attributes:
      train: tokens [n].
      valid: tokens [m].
      token_bytes: [vocab_size], bytes of text each token stands for.
      vocab_size: of the tokenizer.
      summary: source, files, bytes, train_bytes, valid_bytes, hash, unigram_entropy (nats/byte), tokenizer, unit.
    """

    train: np.ndarray
    valid: np.ndarray
    token_bytes: np.ndarray
    vocab_size: int
    summary: dict


def prepare(
    folder: Path,
    *,
    source: str,
    path: str = "",
    name: str = "",
    subset: str = "",
    valid_fraction: float = 0.1,
    tokenizer_kind: str = "byte",
    vocab_size: int = 50257,
    checkpoint: Path | None = None,
) -> Dataset:
    """Read, split and tokenise a text into `folder`; see `text.read` and `tokenizer.make` for the arguments.

    Raises:
      InputError: there is no such text, or no such tokenizer.
    """
    read = text.read(source, path, name, subset, valid_fraction)
    contents = [content for _, content in read.train]
    made = tokenizer.make(tokenizer_kind, contents, vocab_size, checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "train.npy", made.encode(contents))
    np.save(folder / "valid.npy", made.encode(content for _, content in read.valid))
    np.save(folder / "token_bytes.npy", made.byte_lengths())
    if made.model is not None:
        made.model.save(str(folder / "tokenizer.json"))
    write_text(folder / "files.json", json.dumps(_files(read), indent=1))
    write_text(folder / "data.json", json.dumps(_summary(read, source, name or path, made), indent=1))
    return load(folder)


def load(folder: Path) -> Dataset:
    """Open a prepared folder; the tokens stay on disk until they are read.

    Raises:
      InputError: a file is missing or damaged.
    """
    try:
        summary = json.loads((folder / "data.json").read_text(encoding="utf-8"))
        return Dataset(
            np.load(folder / "train.npy", mmap_mode="r"),
            np.load(folder / "valid.npy", mmap_mode="r"),
            np.load(folder / "token_bytes.npy"),
            summary.pop("vocab_size"),
            summary,
        )
    except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError) as error:
        raise InputError(f"the prepared text in {folder} is damaged ({error}): delete that folder.") from None


def unigram_entropy(contents: list[bytes]) -> float:
    """Return the entropy of the distribution of single bytes, in nats per byte."""
    counts = np.zeros(256)
    for content in contents:
        counts += np.bincount(np.frombuffer(content, np.uint8), minlength=256)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _files(read: text.Text) -> list[dict]:
    sides = (("train", read.train), ("valid", read.valid))
    return [{"path": path, "bytes": len(content), "split": side} for side, part in sides for path, content in part]


def _digest(read: text.Text, made: Tokenizer) -> str:
    """Hash the text and how it is cut: losses of one hash can be compared."""
    vocabulary = made.model.to_str() if made.model else ""
    return hashlib.sha256(f"{read.digest()} {made.kind} {vocabulary}".encode()).hexdigest()


def _summary(read: text.Text, source: str, origin: str, made: Tokenizer) -> dict:
    sizes = {
        side: sum(len(content) for _, content in part) for side, part in (("train", read.train), ("valid", read.valid))
    }
    return {
        "source": f"{source} {origin}".strip(),
        "files": len({path for path, _ in (*read.train, *read.valid)}),
        "bytes": sum(sizes.values()),
        "train_bytes": sizes["train"],
        "valid_bytes": sizes["valid"],
        "hash": _digest(read, made),
        "unigram_entropy": unigram_entropy([content for _, content in (*read.train, *read.valid)]),
        "tokenizer": made.kind,
        "unit": made.unit,
        "vocab_size": made.vocab_size,
    }
