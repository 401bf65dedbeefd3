"""Where tuned configurations are kept: one JSON file a device, in the user's cache folder.

The folder is $BLRLAB_OPS_CACHE, else blrlab_ops in $XDG_CACHE_HOME or ~/.cache, and in it `tuning`. Files of the same
form in `DEFAULTS` come with the package; the user's entries win over theirs, by key and impl. An entry counts only
for the Triton release (major.minor) that it was measured with.

Files are read when a device is first looked up, and again only by `record`, `forget` and `refresh`. So the lookups of
every call of a layer never ask the disk, and no other process changes in the middle of a run which kernels run, and
hence how results are rounded.
"""

import contextlib
import functools
import importlib.metadata
import os
import pathlib
import re
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType

from . import Entry, Key, Table, from_json, to_json

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # on Windows, where of two processes that record at the same time one may lose
    fcntl = None

DEFAULTS = pathlib.Path(__file__).parent / "defaults"
RUNNING = "running"  # stands for the version of Triton that is installed
_ORPHANED_S = 3600  # a temporary file this old belongs to a process that was killed

_lock = threading.RLock()  # over all below, and held while files are read and written
_tables: dict[pathlib.Path, Table] = {}
_found: dict[tuple[str, Key, str | None], dict[str, Entry]] = {}
_unsaved: dict[pathlib.Path, list[Callable[[Table], object]]] = {}  # changes that could not be written
_warned: set[str] = set()
_version = 0


def lookup(device: str, key: Key, triton: str | None = RUNNING) -> dict[str, Entry]:
    """Return the entries of a key by impl, the fastest first; empty where none was recorded.

    Args:
      device: name as CUDA reports it.
      key: with a bucket of tokens.
      triton: version whose entries count; None for those measured where it was not installed.

    Raises:
      ValueError: when the device has no name, or the key is none: its tokens are no bucket, for example.
    """
    found = _found.get((device, key, triton))
    return dict(_find(device, key, triton) if found is None else found)


def best(device: str, key: Key, triton: str | None = RUNNING) -> Entry | None:
    """Return the fastest entry of a key, None where none was recorded; arguments and errors as of `lookup`."""
    return next(iter(lookup(device, key, triton).values()), None)


def record(device: str, key: Key, entry: Entry, *, replace: bool = False) -> None:
    """Keep an entry in the user's file, unless a faster one of this key, impl and Triton release is there.

    Where the file cannot be written, one warning says so and the entry is kept in memory, until a later write works.

    Args:
      device: name as CUDA reports it.
      key: with a bucket of tokens.
      entry: of this key; it is copied.
      replace: keep it in the place of a faster one too.

    Raises:
      ValueError: when the device has no name, the key is none, or a field of the entry is of a wrong type.
    """
    key, entry = key.checked(), entry.checked()

    def put(table: Table) -> None:
        impls = table.setdefault(key, {})
        there = impls.get(entry.impl)
        if replace or there is None or _release(there.triton) != _release(entry.triton) or entry.us <= there.us:
            impls[entry.impl] = entry

    _change(device, put)


def forget(device: str, key: Key | None = None) -> None:
    """Drop the user's entries of a key, or all of the device; those that came with the package stay."""
    _change(device, Table.clear if key is None else lambda table: table.pop(key, None))


def refresh() -> None:
    """Have the files read again at the next lookup, for what other processes recorded or for another folder."""
    with _lock:
        _tables.clear()
        _mark_changed()


def version() -> int:
    """Return a number that changes with the entries, for caches on top of this: ask for it before the lookup."""
    return _version


def path(device: str) -> pathlib.Path:
    """Return the user's file of a device, which need not exist.

    >>> path("NVIDIA H100 80GB HBM3").name
    'nvidia_h100_80gb_hbm3.json'

    Raises:
      ValueError: when the name has neither a letter nor a digit.
    """
    if given := os.environ.get("BLRLAB_OPS_CACHE"):
        folder = pathlib.Path(given).absolute()
    else:
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
        # The specification has relative folders ignored.
        folder = (cache if cache.is_absolute() else pathlib.Path.home() / ".cache") / "blrlab_ops"
    return folder / "tuning" / _file_name(device)


def read(file: pathlib.Path) -> Table:
    """Read the entries of a file.

    Raises:
      OSError: when there is none, or it cannot be read.
      ValueError: when it is damaged or of another device, with what is wrong.
    """
    device, table = from_json(file.read_text(encoding="utf-8"))
    if _file_name(device) != file.name:
        raise ValueError(f"its device {device!r} belongs in {_file_name(device)}")
    return table


@functools.cache
def triton_version() -> str | None:
    """Return the version of Triton that is installed; None without one."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def _file_name(device: str) -> str:
    name = re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
    if not name:
        raise ValueError(f"device {device!r} must be a name as CUDA reports it, like 'NVIDIA A40'")
    return f"{name}.json"


def _release(triton: str | None) -> str | None:
    return triton and ".".join(triton.split(".")[:2])


def _find(device: str, key: Key, triton: str | None) -> dict[str, Entry]:
    wanted, key = _release(triton_version() if triton == RUNNING else triton), key.checked()
    with _lock:
        file = path(device)
        rows = [_table(each).get(key, {}) for each in (DEFAULTS / file.name, file)]
        counting = {entry.impl: entry for row in rows for entry in row.values() if _release(entry.triton) == wanted}
        found = dict(sorted(counting.items(), key=lambda item: item[1].us))
        _found[device, key, triton] = found
    return found


def _mark_changed() -> None:
    global _version
    _found.clear()
    _version += 1  # last, so that whoever reads the new number finds no old entries


def _table(file: pathlib.Path) -> Table:
    """Return the entries of a file, which is read on first use."""
    if file not in _tables:
        table = _read_or_warn(file)
        for change in _unsaved.get(file, ()):
            change(table)
        _tables[file] = table
    return _tables[file]


def _read_or_warn(file: pathlib.Path) -> Table:
    try:
        return read(file)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        _warn_once(f"{file} cannot be read ({error.strerror}) and counts as empty")
        return {}
    except ValueError as damage:
        return _without_damaged(file, damage)


def _without_damaged(file: pathlib.Path, damage: ValueError) -> Table:
    if file.parent == DEFAULTS:
        _warn_once(f"{file} came with the package but is damaged ({damage}) and counts as empty")
        return {}
    try:
        with _locked(file):
            return _read_or_set_aside(file)
    except OSError as error:
        _warn_once(f"{file} is damaged ({damage}), cannot be renamed ({error.strerror}) and counts as empty")
        return {}


def _read_or_set_aside(file: pathlib.Path) -> Table:
    """Read a file under its lock; without it, a good file that had just replaced the damaged one could be renamed."""
    try:
        return read(file)
    except FileNotFoundError:
        return {}
    except ValueError as damage:
        now = time.time_ns()
        stamp = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(now // 10**9))}.{now % 10**9:09}Z"
        aside = file.with_name(f"{file.name}.damaged-{stamp}")
        os.replace(file, aside)
        warnings.warn(f"{file} is damaged ({damage}), was renamed to {aside.name} and counts as empty", stacklevel=2)
        return {}


def _warn_once(sentence: str) -> None:
    if sentence not in _warned:
        _warned.add(sentence)
        warnings.warn(sentence, stacklevel=2)


def _change(device: str, change: Callable[[Table], object]) -> None:
    """Apply a change to the user's file and to what is in memory; to the latter alone where the file is unwritable."""
    file = path(device)
    with _lock:
        changes = _unsaved.setdefault(file, [])
        changes.append(change)
        try:
            _tables[file] = _rewrite(file, device, changes)
            changes.clear()
        except OSError as error:
            _tables.pop(file, None)
            _warn_once(f"{file} cannot be written ({error.strerror}): what is tuned is kept in memory only")
        finally:
            _mark_changed()


def _rewrite(file: pathlib.Path, device: str, changes: list[Callable[[Table], object]]) -> Table:
    with _locked(file):
        table = _read_or_set_aside(file)
        for change in changes:
            change(table)
        if table:
            _write(file, to_json(device, table))
        else:
            file.unlink(missing_ok=True)
    return table


@contextlib.contextmanager
def _locked(file: pathlib.Path) -> Iterator[None]:
    """Keep other processes out. The lock is a file that stays: were it deleted, two could each lock their own."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{file}.lock", "a") as stream:
        if fcntl is not None:
            fcntl.flock(stream, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if fcntl is not None:
                fcntl.flock(stream, fcntl.LOCK_UN)  # closing is not enough while a forked child has the file open


def _write(file: pathlib.Path, text: str) -> None:
    """Replace a file as a whole, so that neither a reader nor a crash finds half of it."""
    for orphan in file.parent.glob(f"{file.name}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - orphan.stat().st_mtime > _ORPHANED_S:
                orphan.unlink()
    # A name of its own each time: where a network drive does not lock between hosts, a write may be lost but not mixed.
    handle, temporary = tempfile.mkstemp(prefix=f"{file.name}.", suffix=".tmp", dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        pathlib.Path(temporary).unlink(missing_ok=True)
