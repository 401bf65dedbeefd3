"""Files of latents, `.npy`, `.npz` or `.safetensors`, of which one latent is read at a time.

An array in them is a latent [C, h, h] or a stack of them [n, C, h, h], whose rows are read alone. A member of a
`.npz` is only read whole, so a stack there is refused.
"""

import contextlib
import functools
import os
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile

from blrlab.errors import InputError

SUFFIXES = (".npy", ".npz", ".safetensors")
BY_ROWS = (".npy", ".safetensors")  # of which a row is read without the others
FLOATS = ("float16", "float32", "float64", "F16", "F32", "F64")  # as NumPy and safetensors call them
END = 4096  # bytes
Place = tuple[str, str, int]  # file, name of the array in it, row of it (-1: all of it)


def places(file: str) -> list[tuple[Place, tuple[int, ...]]]:
    """Return where the latents of a file lie, and their shapes [C, h, h].

    Raises:
      InputError: it cannot be read, or an array is no latent and no stack of them.
    """
    with _naming(file):
        sizes = {name: _size(stored) for name, stored in sorted(_arrays(file).items())}
    found: list[tuple[Place, tuple[int, ...]]] = []
    for name, (shape, dtype) in sizes.items():
        if len(shape) not in (3, 4) or shape[-1] != shape[-2] or dtype not in FLOATS:
            raise InputError(f"{file} holds {dtype} {list(shape)}; latents are floats [C, h, h].")
        if len(shape) == 4 and shape[0] > 1 and _suffix(file) not in BY_ROWS:
            raise InputError(f"{file} holds a stack of {shape[0]} latents; stacks are read of {' or '.join(BY_ROWS)}.")
        rows = range(shape[0]) if len(shape) == 4 else (-1,)
        found += [((file, name, row), shape[-3:]) for row in rows]
    return found


def read(place: Place) -> np.ndarray:
    """Read a latent and no other: float32 [C, h, h].

    Raises:
      InputError: the file cannot be read, or lacks it.
    """
    file, name, row = place
    with _naming(file):
        if _suffix(file) == ".npz":
            with Path(file).open("rb") as opened, NpzFile(opened) as members:
                stored = members[name]
        else:
            stored = _mapped(file)[name]
        return np.asarray(stored[:] if row < 0 else stored[row], np.float32)


def ends(file: str) -> bytes:
    """Return the first and the last bytes of a file, which tell apart two of the same name and size.

    Raises:
      InputError: it cannot be read.
    """
    with _naming(file), Path(file).open("rb") as opened:
        first = opened.read(END)
        opened.seek(max(len(first), opened.seek(0, os.SEEK_END) - END))
        return first + opened.read()


def _suffix(file: str) -> str:
    return Path(file).suffix.lower()


def _arrays(file: str) -> dict[str, Any]:
    """Return the arrays of a file by name; that of a .npy has none."""
    if _suffix(file) != ".npz":
        return _mapped(file)
    with Path(file).open("rb") as opened, NpzFile(opened) as members:
        return dict(members)


@functools.lru_cache(maxsize=8)
def _mapped(file: str) -> dict[str, Any]:
    """Return arrays of which only what is indexed is read."""
    from safetensors import safe_open

    if _suffix(file) == ".npy":
        return {"": np.lib.format.open_memmap(file, mode="r")}
    opened = safe_open(file, framework="np")
    return {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (it is no dict)


def _size(stored: Any) -> tuple[tuple[int, ...], str]:
    """Return the shape and the name of the dtype."""
    if isinstance(stored, np.ndarray):
        return stored.shape, stored.dtype.name
    return tuple(stored.get_shape()), stored.get_dtype()


@contextlib.contextmanager
def _naming(file: str) -> Iterator[None]:
    """Say which file it is that cannot be read.

    Raises:
      InputError: so it is.
    """
    from safetensors import SafetensorError

    # All that random changes to such files have led to.
    of_zip, of_header = (zipfile.BadZipFile, zlib.error), (tokenize.TokenError, SafetensorError)
    try:
        yield
    except (OSError, ValueError, EOFError, LookupError, RuntimeError, *of_zip, *of_header) as error:
        raise InputError(f"{file} cannot be read as latents: {error}") from None
