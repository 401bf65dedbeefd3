"""Where text comes from: Python's own standard library, a folder, or a Hugging Face dataset.

Every source gives documents, (name, bytes) pairs in a fixed order, in a training and a validation part.
"""

import dataclasses
import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from blrlab.errors import InputError, home_expanded, one_of

SOURCES = ("stdlib", "folder", "huggingface")
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
Document = tuple[str, bytes]


@dataclasses.dataclass(frozen=True)
class Text:
    """Documents, split."""

    train: tuple[Document, ...]
    valid: tuple[Document, ...]

    def digest(self) -> str:
        """Return a SHA-256 over names, contents and split: two texts of one digest are the same."""
        digest = hashlib.sha256()
        for part in (self.train, self.valid):
            digest.update(b"part")
            for name, content in part:
                digest.update(f"{name}\0{len(content)}\0".encode(errors="surrogateescape"))
                digest.update(content)
        return digest.hexdigest()


def read(source: str, path: str = "", name: str = "", subset: str = "", valid_fraction: float = 0.1) -> Text:
    """Read a source of text and split it.

    Args:
      source: stdlib, folder or huggingface.
      path: the folder, for `folder`.
      name: the dataset's name or its local folder, for `huggingface`.
      subset: the dataset's configuration, such as wikitext-103-raw-v1.
      valid_fraction: share of bytes kept for validation where the source has no split of its own.

    Raises:
      InputError: the source is unknown, missing, or has no text.
    """
    one_of(source, SOURCES, "data source")
    if not 0 < valid_fraction < 1:
        raise InputError(f"data.valid_fraction is {valid_fraction}; it must lie between 0 and 1.")
    if source == "huggingface":
        return _huggingface(name, subset)
    if source == "stdlib":
        root, documents = "the standard library", list(_standard_library())
    else:
        root, documents = path, list(_folder(path))
    documents = [(name, content) for name, content in documents if content.strip()]
    if not documents:
        raise InputError(f'no text in "{root}": every file there is empty, or there is none.')
    return split(documents, valid_fraction)


def split(documents: Sequence[Document], valid_fraction: float) -> Text:
    """Split documents by file, in the order of a hash of their names, until enough bytes are held out.

    A single document is cut, its end being the validation text.
    """
    if len(documents) == 1:
        name, content = documents[0]
        cut = len(content) - max(int(len(content) * valid_fraction), 1)
        # Not inside a UTF-8 character, which has up to three bytes after its first.
        cut = next((back for back in range(cut, max(cut - 4, 0), -1) if content[back] & 0xC0 != 0x80), cut)
        return Text(((name, content[:cut]),), ((name, content[cut:]),))
    wanted = valid_fraction * sum(len(content) for _, content in documents)
    valid: set[str] = set()
    held = 0
    by_hash = sorted(
        documents, key=lambda document: hashlib.sha256(document[0].encode(errors="surrogateescape")).digest()
    )
    for name, content in by_hash[:-1]:
        if held >= wanted:
            break
        valid.add(name)
        held += len(content)
    return Text(
        tuple(document for document in documents if document[0] not in valid),
        tuple(document for document in documents if document[0] in valid),
    )


def _standard_library() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _NOT_LIBRARY.intersection(relative.parts):
            yield relative.as_posix(), path.read_bytes()


def _folder(path: str) -> Iterator[Document]:
    root = home_expanded(path)
    if not path or not root.is_dir():
        raise InputError(f'no folder of text at "{path}": set data.path to one.')
    for file in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
        if file.is_file() and not hidden:
            content = file.read_bytes()
            if b"\0" not in content:  # a NUL byte: an image, an archive, not text
                yield file.relative_to(root).as_posix(), content


def _grouped(rows: Sequence[str], size: int = 2**20) -> Iterator[bytes]:
    """Join rows into documents of about `size` characters, so that a tokenizer never holds a whole split.

    Rows that do not end their line, as those of some datasets do not, get a line end.
    """
    held, length = [], 0
    for row in rows:
        held.append(row if row.endswith("\n") or not row else f"{row}\n")
        length += len(row)
        if length >= size:
            yield "".join(held).encode()
            held, length = [], 0
    yield "".join(held).encode()


def _huggingface(name: str, subset: str) -> Text:
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
    parts = []
    for part in ("train", "validation"):
        if part not in loaded or "text" not in loaded[part].column_names:
            raise InputError(f'the dataset "{name}" has no {part} split with a column "text".')
        rows = [row or "" for row in loaded[part]["text"]]
        if not all(isinstance(row, str) for row in rows):
            raise InputError(f'the column "text" of the {part} split of "{name}" holds other things than text.')
        contents = [content for content in _grouped(rows) if content.strip()]
        if not contents:
            raise InputError(f'the {part} split of the dataset "{name}" has no text.')
        parts.append(tuple((f"{part}/{index}", content) for index, content in enumerate(contents)))
    return Text(*parts)
