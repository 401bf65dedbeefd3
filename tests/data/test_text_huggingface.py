"""Hugging Face datasets: local folders read offline, and a sentence for all that can be wrong."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from blrlab.data import text
from blrlab.errors import InputError

datasets = pytest.importorskip("datasets", reason="the hub extra is not installed")
pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def rows(*texts: Any) -> list[dict[str, Any]]:
    return [{"text": each} for each in texts]


def folder(tmp_path: Path, **parts: list[dict[str, Any]]) -> str:
    root = tmp_path / "dataset"
    root.mkdir()
    for part, found in parts.items():
        lines = "".join(json.dumps(row) + "\n" for row in found)
        (root / f"{part}.jsonl").write_text(lines, encoding="utf-8")
    return str(root)


def test_both_splits_are_read_from_json_lines(tmp_path: Path) -> None:
    name = folder(tmp_path, train=rows(" = Title = ", "", "héllo 漢字"), validation=rows("one", "two"))
    read = text.read("huggingface", name=name)
    assert [content for _, content in read.train] == [" = Title = \nhéllo 漢字\n".encode()]
    assert [content for _, content in read.valid] == [b"one\ntwo\n"]
    assert read.train[0][0] == "train/0"
    assert read.valid[0][0] == "validation/0"


def test_parquet_files_are_read_and_their_test_split_is_not(tmp_path: Path) -> None:
    root = tmp_path / "dataset"
    root.mkdir()
    for part in ("train", "validation", "test"):
        table = datasets.Dataset.from_dict({"text": [f"the {part} text"], "id": [1]})
        table.to_parquet(str(root / f"{part}.parquet"))
    read = text.read("huggingface", name=str(root))
    assert [content for _, content in read.train + read.valid] == [b"the train text\n", b"the validation text\n"]


def test_rows_that_end_their_lines_are_not_given_another_end(tmp_path: Path) -> None:
    name = folder(tmp_path, train=rows(" = Title = \n", "", " text \n"), validation=rows("two"))
    assert text.read("huggingface", name=name).train[0][1] == b" = Title = \n text \n"


def test_a_long_split_becomes_several_documents(tmp_path: Path) -> None:
    name = folder(tmp_path, train=rows(*["x" * 999] * 2200), validation=rows("two"))
    documents = text.read("huggingface", name=name).train
    assert [document for document, _ in documents] == ["train/0", "train/1", "train/2"]
    assert sum(len(content) for _, content in documents) == 2200 * 1000


def test_the_same_dataset_has_the_same_digest(tmp_path: Path) -> None:
    name = folder(tmp_path, train=rows("one"), validation=rows("two"))
    assert text.read("huggingface", name=name).digest() == text.read("huggingface", name=name).digest()


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"train": rows("one")}, "has no validation split"),
        ({"validation": rows("one")}, "has no train split"),
        (
            {"train": [{"body": "one"}], "validation": [{"body": "one"}]},
            'no train split with a column "text"',
        ),
        ({"train": rows("one"), "validation": rows("", "  ")}, "the validation split .* has no text"),
        ({"train": rows(""), "validation": rows("one")}, "the train split .* has no text"),
        ({"train": rows(1, 2), "validation": rows(3)}, "text"),
        ({}, "cannot be had"),
    ],
    ids=["no validation", "no train", "no column", "no valid text", "no train text", "numbers", "no files"],
)
def test_a_dataset_without_two_texts_is_an_error(tmp_path: Path, parts: dict, sentence: str) -> None:
    name = folder(tmp_path, **parts)
    with pytest.raises(InputError, match=sentence) as caught:
        text.read("huggingface", name=name)
    assert name in str(caught.value)


def test_a_row_without_text_is_an_empty_one(tmp_path: Path) -> None:
    name = folder(tmp_path, train=rows("one", None, "two"), validation=rows("three"))
    assert text.read("huggingface", name=name).train[0][1] == b"one\ntwo\n"


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing"])
def test_an_unknown_name_is_an_error_without_a_network(name: str) -> None:
    with pytest.raises(InputError, match=f'the dataset "{name}" cannot be had: .+') as caught:
        text.read("huggingface", name=name)
    assert "\n" not in str(caught.value)


def test_no_name_is_told_which_setting_is_missing() -> None:
    with pytest.raises(InputError, match=r"data\.name"):
        text.read("huggingface", name="")


def test_an_unknown_subset_is_an_error_that_names_the_known_ones(tmp_path: Path) -> None:
    name = folder(tmp_path, train=rows("one"), validation=rows("two"))
    with pytest.raises(InputError, match=r"wikitext-103.*default"):
        text.read("huggingface", name=name, subset="wikitext-103")


def test_without_the_library_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        text.read("huggingface", name="nothing")
