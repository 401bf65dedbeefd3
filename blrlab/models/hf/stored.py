"""Tensors of safetensors files by their bytes: one is read at a time, and a file is written as its bytes come.

A memory map of a shard would count towards this process with every page that was read, so byte ranges are read
instead; and bytes know every dtype, where NumPy lacks bfloat16. The format: 8 bytes that tell the length of the
header, the header (JSON), then the tensors one after another.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from blrlab.errors import InputError

DTYPES = {"F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}  # of weights that can be compressed
PACKED = "blrlab_ops"  # in the metadata of a file of factors: what `blrlab_ops.files` reads them by
PIECE = 16 << 20  # bytes that are copied at once


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor, as the header of a file tells of it.

    Attributes:
      name: of the tensor.
      dtype: as safetensors names it, such as BF16.
      shape: its sizes.
      path: the file.
      offset: of its first byte in the file.
      size: bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    size: int

    def pieces(self) -> Iterator[bytes]:
        """Yield its bytes, a few megabytes at a time.

        Raises:
          InputError: the file ends before the tensor does.
        """
        with self.path.open("rb") as file:
            file.seek(self.offset)
            left = self.size
            while left:
                piece = file.read(min(PIECE, left))
                if not piece:
                    raise InputError(f'{self.path} ends before its tensor "{self.name}" does.')
                left -= len(piece)
                yield piece

    def read(self) -> np.ndarray:
        """Return its numbers; of a dtype of `DTYPES`."""
        numbers, at = np.empty(self.size, np.uint8), 0
        for piece in self.pieces():
            numbers[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
            at += len(piece)
        return numbers.view(jnp.dtype(DTYPES[self.dtype])).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Content:
    """A tensor that is to be written: its name, dtype and shape, and where its bytes come from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Iterable[bytes]

    @property
    def size(self) -> int:
        """How many bytes it takes."""
        return size_of(self.dtype, self.shape)


def in_dtype(tensor: Stored, dtype: str) -> Content | Stored:
    """Return a small tensor in a dtype of `DTYPES`; one of another dtype than these as it is."""
    if tensor.dtype == dtype or tensor.dtype not in DTYPES:
        return tensor
    changed = tensor.read().astype(jnp.dtype(DTYPES[dtype]))
    return Content(tensor.name, dtype, tensor.shape, [changed.tobytes()])


def size_of(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor of a dtype of `DTYPES`."""
    return math.prod(shape) * jnp.dtype(DTYPES[dtype]).itemsize


def dtype_name(dtype: np.dtype) -> str:
    """Return what safetensors calls a dtype of `DTYPES`."""
    return next(name for name, known in DTYPES.items() if jnp.dtype(known) == dtype)


def look(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Return the tensors of a file and its metadata.

    Raises:
      InputError: the file is damaged, or shorter than its header says.
    """
    try:
        with safe_open(path, framework="numpy") as file:  # checks the header against the file's length
            metadata = dict(file.metadata() or {})
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is damaged or cannot be read: {error}") from None
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            found[name] = Stored(name, entry["dtype"], tuple(entry["shape"]), path, 8 + length + start, end - start)
    return found, metadata


def write(path: Path, contents: Sequence[Content | Stored], metadata: Mapping[str, str]) -> None:
    """Write a file whole or not at all; a reader never sees half of it.

    Args:
      path: the file.
      contents: the tensors, new ones or ones of other files. Those of wide dtypes come first, so that all are aligned.
      metadata: strings that the header keeps.
    """
    wide = sorted(contents, key=lambda content: -(content.size // max(math.prod(content.shape), 1)))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for content in wide:
        start, end = end, end + content.size
        header[content.name] = {"dtype": content.dtype, "shape": list(content.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for content in wide:
            for piece in content.pieces() if isinstance(content, Stored) else content.pieces:
                file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """Make the new name of a file in a folder last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
