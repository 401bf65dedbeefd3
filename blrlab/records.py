"""Records: the one form in which a number leaves a stage. JSON lines, one object each, with a `kind`.

Kinds are `env`, `train`, `allocate`, `compress`, `eval`, `bench`, `counters`, `bound`, `advice` and `extrapolation`;
CONTRIBUTING.md lists the fields of each. Files are only ever appended to, or rewritten whole through a temporary file,
so a kill leaves at most one torn last line, which the next writer drops.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from blrlab.errors import InputError

Record = dict[str, Any]
KINDS = ("env", "train", "allocate", "compress", "eval", "bench", "counters", "bound", "advice", "extrapolation")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: a reader never sees half of it."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def append(path: Path, record: Record) -> None:
    """Append one record and flush it to the operating system.

    Raises:
      ValueError: the kind is unknown, or a value is not JSON (NaN and infinity are not).
    """
    if record.get("kind") not in KINDS:
        raise ValueError(f"a record's kind is one of {', '.join(KINDS)}, not {record.get('kind')!r}")
    line = json.dumps(record, allow_nan=False) + "\n"
    with path.open("ab+") as file:
        if file.tell() and _torn(file):
            keep(path, lambda _: True)
    with path.open("ab") as file:
        file.write(line.encode())


def _torn(file: BinaryIO) -> bool:
    """Tell whether a file that is not empty lacks its last newline."""
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        yield from enumerate(file, 1)


def read(path: Path) -> list[Record]:
    """Return the records of a file, in order; a torn last line (no newline) is left out.

    Raises:
      InputError: the file is missing, or a whole line is not a JSON object.
    """
    if not path.is_file():
        raise InputError(f"no records at {path}: the file does not exist.")
    found = []
    for number, line in _lines(path):
        try:
            record = json.loads(line)
        except ValueError:  # not JSON, or not UTF-8
            if not line.endswith(b"\n"):
                break
            raise InputError(f"{path}, line {number} is damaged: it is not JSON.") from None
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {number} is damaged: it is not a JSON object.")
        found.append(record)
    return found


def rewrite(path: Path, records: Iterable[Record]) -> None:
    """Replace a file's records in one step."""
    write_text(path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in records))


def keep(path: Path, wanted: Callable[[Record], bool]) -> None:
    """Drop the records that are not wanted, and a torn last line; a missing file stays missing."""
    if path.exists():
        rewrite(path, filter(wanted, read(path)))
