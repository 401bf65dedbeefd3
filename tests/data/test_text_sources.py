"""The standard library and folders as sources of text."""

import sysconfig
from pathlib import Path

import pytest

from blrlab.data import text
from blrlab.errors import InputError

Files = dict[str, bytes]


def write(root: Path, files: Files) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def names(read: text.Text) -> list[str]:
    return sorted(name for name, _ in (*read.train, *read.valid))


@pytest.fixture(scope="module")
def library() -> text.Text:
    return text.read("stdlib")


def test_the_standard_library_is_source_code_alone(library: text.Text) -> None:
    found = names(library)
    assert {"json/decoder.py", "ast.py", "collections/__init__.py"} <= set(found)
    assert all(name.endswith(".py") for name in found)
    outside = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    assert not [name for name in found if outside.intersection(name.split("/"))]
    root = Path(sysconfig.get_paths()["stdlib"])
    content = dict(library.train + library.valid)["json/decoder.py"]
    assert content == (root / "json" / "decoder.py").read_bytes()


def test_the_standard_library_is_the_same_text_every_time(library: text.Text) -> None:
    again = text.read("stdlib")
    assert again == library
    assert again.digest() == library.digest()


def test_a_tenth_of_the_standard_library_validates(library: text.Text) -> None:
    sizes = [sum(len(content) for _, content in part) for part in (library.train, library.valid)]
    assert sizes[1] / sum(sizes) == pytest.approx(0.1, abs=0.02)


def test_folders_of_others_inside_the_standard_library_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"os.py": b"a = 1\n", "json/scan.py": b"b = 2\n", "testing.py": b"c = 3\n"}
    others = [
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "json/tests",
        "idlelib/idle_test",
        "__pycache__",
    ]
    write(tmp_path / "tests" / "lib", own | {f"{folder}/mod.py": b"d = 4\n" for folder in others})
    write(tmp_path / "tests" / "lib", {"README.txt": b"text\n", "site-packages/pkg/deep/mod.py": b"e\n"})
    paths = {"stdlib": str(tmp_path / "tests" / "lib")}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    read = text.read("stdlib")
    assert dict(read.train + read.valid) == own, "only folders below the library count, not those above it"


def test_a_folder_is_read_to_its_depths_without_hidden_binary_and_empty_files(tmp_path: Path) -> None:
    kept = {
        "a.txt": "é漢字\r\n".encode(),
        "sub/deep/er/b.py": b"x = 1\n",
        "sub/c": b"latin \xe9\n",
        "name with spaces.md": b"# d\n",
    }
    skipped = {
        ".hidden": b"no\n",
        ".git/config": b"no\n",
        "sub/.cache/deep/e.txt": b"no\n",
        "image.png": b"\x89PNG\0\0data",
        "empty.txt": b"",
        "blank.txt": b" \n\t\n",
    }
    write(tmp_path, kept | skipped)
    read = text.read("folder", path=str(tmp_path))
    assert dict(read.train + read.valid) == kept, "contents are kept to the byte"


def test_a_folder_below_a_hidden_one_is_read(tmp_path: Path) -> None:
    root = write(tmp_path / ".data" / "text", {"a.txt": b"first\n", "b.txt": b"second\n"})
    assert names(text.read("folder", path=str(root))) == ["a.txt", "b.txt"]


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"texts/a.txt": b"first\n", "texts/b.txt": b"second\n"})
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names(text.read("folder", path="~/texts")) == ["a.txt", "b.txt"]


def test_one_file_is_cut_and_nothing_lost(tmp_path: Path) -> None:
    content = b"0123456789" * 100
    write(tmp_path, {"book.txt": content})
    read = text.read("folder", path=str(tmp_path), valid_fraction=0.25)
    assert [name for name, _ in (*read.train, *read.valid)] == ["book.txt", "book.txt"]
    assert (read.train[0][1], read.valid[0][1]) == (content[:750], content[750:])


def test_one_file_is_cut_between_characters(tmp_path: Path) -> None:
    """Half a character on either side would be no text, and would decode to others than were there."""
    content = "漢字" * 101
    write(tmp_path, {"book.txt": content.encode()})
    for held in range(50, 56):
        fraction = (held + 0.5) / len(content.encode())
        read = text.read("folder", path=str(tmp_path), valid_fraction=fraction)
        assert read.train[0][1].decode() + read.valid[0][1].decode() == content


@pytest.mark.parametrize(
    ("files", "path", "sentence"),
    [
        ({}, "", "no folder of text"),
        ({}, "missing", "no folder of text"),
        ({"file.txt": b"text"}, "file.txt", "no folder of text"),
        ({}, ".", "no text in"),
        ({"a.txt": b"", "b.txt": b" \n", ".c": b"text", "d.bin": b"\0"}, ".", "no text in"),
    ],
    ids=["no path", "missing", "a file", "empty", "nothing readable"],
)
def test_a_folder_without_text_is_an_error(tmp_path: Path, files: Files, path: str, sentence: str) -> None:
    write(tmp_path, files)
    whole = str(tmp_path / path) if path else ""
    with pytest.raises(InputError, match=sentence) as caught:
        text.read("folder", path=whole)
    assert f'"{whole}"' in str(caught.value)


def test_an_unknown_source_is_told_the_known_ones() -> None:
    with pytest.raises(InputError, match=r'"foldr".*stdlib, folder, huggingface.*Did you mean "folder"'):
        text.read("foldr")


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_fraction_that_leaves_a_side_empty_is_refused(tmp_path: Path, fraction: float) -> None:
    write(tmp_path, {"a.txt": b"text"})
    with pytest.raises(InputError, match=r"data.valid_fraction is .*between 0 and 1"):
        text.read("folder", path=str(tmp_path), valid_fraction=fraction)
