"""A prepared folder: the tokens, what it says of the text, and what a damaged one says."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from blrlab import data
from blrlab.data import text
from blrlab.data.prepare import Dataset, unigram_entropy
from blrlab.errors import InputError

FILES = {
    "a.txt": b"aab\n" * 30,
    "b/c.txt": "漢字é\n".encode() * 20,
    "d.txt": b"xyz\n" * 25,
    "e.txt": b"q" * 40,
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "text" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "text"


def prepare(source: Path, kind: str = "byte") -> Dataset:
    folder = source.parent / "prepared"
    return data.prepare(folder, source="folder", path=str(source), tokenizer_kind=kind, vocab_size=300)


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_the_summary_agrees_with_the_text_and_the_tokens(source: Path, kind: str) -> None:
    found = prepare(source, kind)
    read = text.read("folder", path=str(source))
    sizes = [sum(len(content) for _, content in part) for part in (read.train, read.valid)]
    whole = b"".join(FILES.values())
    shares = [whole.count(byte) / len(whole) for byte in set(whole)]
    digest = found.summary.pop("hash")
    assert len(digest) == 64
    assert digest == prepare(source, kind).summary["hash"]
    assert digest != prepare(source, "bpe" if kind == "byte" else "byte").summary["hash"]
    found = prepare(source, kind)
    assert found.summary | {"hash": digest} == {
        "source": f"folder {source}",
        "files": len(FILES),
        "bytes": len(whole),
        "train_bytes": sizes[0],
        "valid_bytes": sizes[1],
        "hash": digest,
        "unigram_entropy": pytest.approx(-sum(share * math.log(share) for share in shares)),
        "tokenizer": kind,
        "unit": "byte" if kind == "byte" else "token",
    }
    assert found.vocab_size == len(found.token_bytes)
    assert found.vocab_size == 256 if kind == "byte" else 257 < found.vocab_size <= 300
    for tokens, part, size in zip((found.train, found.valid), (read.train, read.valid), sizes, strict=True):
        assert found.token_bytes[tokens].sum() == size + len(part), "a separator counts as one byte"


def test_a_prepared_text_of_bytes_is_the_text(source: Path) -> None:
    found = prepare(source)
    documents = found.train.tobytes().split(b"\0")[:-1] + found.valid.tobytes().split(b"\0")[:-1]
    assert sorted(documents) == sorted(FILES.values())


def test_every_file_is_listed_with_its_bytes_and_side(source: Path) -> None:
    prepare(source)
    read = text.read("folder", path=str(source))
    listed = json.loads((source.parent / "prepared" / "files.json").read_text(encoding="utf-8"))
    assert {each["path"]: each["bytes"] for each in listed} == {name: len(content) for name, content in FILES.items()}
    assert {each["path"] for each in listed if each["split"] == "valid"} == {name for name, _ in read.valid}
    assert {each["path"] for each in listed if each["split"] == "train"} == {name for name, _ in read.train}


def test_one_file_is_counted_once_though_both_sides_have_some_of_it(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "book.txt").write_bytes(b"words " * 100)
    found = prepare(tmp_path / "text")
    assert [found.summary[name] for name in ("files", "train_bytes", "valid_bytes")] == [1, 540, 60]


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_a_prepared_text_is_opened_again_as_it_was(source: Path, kind: str) -> None:
    made, found = prepare(source, kind), data.load(source.parent / "prepared")
    for name in ("train", "valid", "token_bytes"):
        assert np.array_equal(getattr(made, name), getattr(found, name))
    assert (made.vocab_size, made.summary) == (found.vocab_size, found.summary)
    assert (source.parent / "prepared" / "tokenizer.json").exists() == (kind == "bpe")


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_preparing_is_deterministic(source: Path, kind: str) -> None:
    prepare(source, kind)
    folder = source.parent / "prepared"
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    prepare(source, kind)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


@pytest.mark.parametrize(
    ("contents", "entropy"),
    [
        ([b"aaaa"], 0.0),
        ([b"ab", b"ba"], math.log(2)),
        ([b"aab", b"b", b""], math.log(2)),
        ([b"aaab"], -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))),
        ([bytes(range(256))], math.log(256)),
    ],
)
def test_unigram_entropy_is_that_of_a_count_by_hand(contents: list[bytes], entropy: float) -> None:
    assert unigram_entropy(contents) == pytest.approx(entropy, abs=1e-12)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no folder": lambda folder: folder.rename(folder.with_name("moved")),
    "no data.json": lambda folder: (folder / "data.json").unlink(),
    "no train.npy": lambda folder: (folder / "train.npy").unlink(),
    "no token_bytes.npy": lambda folder: (folder / "token_bytes.npy").unlink(),
    "empty data.json": lambda folder: (folder / "data.json").write_text(""),
    "half of data.json": lambda folder: (folder / "data.json").write_text('{"source": "stdl'),
    "data.json without a vocabulary": lambda folder: (folder / "data.json").write_text("{}"),
    "data.json is a list": lambda folder: (folder / "data.json").write_text("[]"),
    "data.json is not UTF-8": lambda folder: (folder / "data.json").write_bytes(b'{"source": "\xff"}'),
    "empty train.npy": lambda folder: (folder / "train.npy").write_bytes(b""),
    "half of train.npy": lambda folder: _cut(folder / "train.npy"),
    "half of valid.npy": lambda folder: _cut(folder / "valid.npy"),
    "half of token_bytes.npy": lambda folder: _cut(folder / "token_bytes.npy"),
    "train.npy is no array": lambda folder: (folder / "train.npy").write_bytes(b"text" * 50),
}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_named(source: Path, damage: str) -> None:
    prepare(source)
    folder = source.parent / "prepared"
    DAMAGE[damage](folder)
    with pytest.raises(InputError, match=r"is damaged .*delete that folder") as caught:
        data.load(folder)
    assert str(folder) in str(caught.value)
