"""Tuned kernel configurations: what a layer ran with, on one device, and how long it took.

This module holds the values and their JSON form, `store` keeps them in files. Both need nothing but Python.

    {"version": 1, "device": name as CUDA reports it, "entries": {key: {impl: {"config": ..., "us": ..., ...}}}}
"""

import dataclasses
import json
import re
from typing import Any, NamedTuple

FORMATS = ("low_rank", "monarch", "blast", "dense")
MOST_TOKENS = 65536
VERSION = 1  # of the JSON form

Config = dict[str, Any]  # int, bool and str, or one dict of these for each launch

_COUNT, _WORD = r"(0|[1-9][0-9]*)", r"([a-z0-9_]+)"
_KEY = re.compile(f"{_WORD}/{_COUNT}/{_COUNT}x{_COUNT}/{_COUNT}x{_COUNT}/{_COUNT}/{_WORD}")
_LONGEST_US = 1e12  # eleven days: whatever takes longer was not measured


def bucket(tokens: int) -> int:
    """Return the bucket of a number of tokens; the numbers of one bucket share a configuration.

    One token has a bucket of its own, up to 16 share the next, then powers of two follow, of which 65536 is the last.

    >>> [bucket(tokens) for tokens in (0, 1, 2, 16, 17, 1000, 1_000_000)]
    [1, 1, 16, 16, 32, 1024, 65536]

    Raises:
      ValueError: for a negative number.
    """
    if tokens < 0:
        raise ValueError(f"tokens {tokens} must be 0 or more")
    if tokens <= 1:
        return 1
    return min(max(16, 1 << (tokens - 1).bit_length()), MOST_TOKENS)


class Key(NamedTuple):
    """One layer, as far as its configuration depends on it.

    >>> str(Key("monarch", bucket(5), 4096, 4096, (16, 16), 64, "bfloat16"))
    'monarch/16/4096x4096/16x16/64/bfloat16'

    Attributes:
      format: one of `FORMATS`.
      tokens: a bucket of tokens, as `bucket` returns it.
      in_features: i.
      out_features: o.
      blocks: (b1, b2); (1, 1) of low_rank and dense.
      rank: r; r' of a block for monarch, 0 for dense.
      dtype: of x and the factors, such as "bfloat16".
    """

    format: str
    tokens: int
    in_features: int
    out_features: int
    blocks: tuple[int, int]
    rank: int
    dtype: str

    def __str__(self) -> str:
        (b1, b2), features = self.blocks, f"{self.in_features}x{self.out_features}"
        return f"{self.format}/{self.tokens}/{features}/{b1}x{b2}/{self.rank}/{self.dtype}"

    @classmethod
    def parse(cls, text: str) -> "Key":
        """Return the key of its string.

        >>> Key.parse("low_rank/1/768x2304/1x1/192/float16").blocks
        (1, 1)

        Raises:
          ValueError: when the string is no key, or its tokens are no bucket.
        """
        match = _KEY.fullmatch(text)
        if match is None:
            raise ValueError(f"key {text!r} must look like 'monarch/16/4096x4096/16x16/64/bfloat16'")
        tokens, in_features, out_features, b1, b2, rank = (int(match[group]) for group in range(2, 8))
        if match[1] not in FORMATS:
            raise ValueError(f"key {text!r} has format {match[1]!r}, which is not one of {FORMATS}")
        if tokens != bucket(tokens):
            raise ValueError(f"key {text!r} has {tokens} tokens, which must be their bucket {bucket(tokens)}")
        if not (in_features and out_features and b1 and b2):
            raise ValueError(f"key {text!r} must have features and blocks of 1 or more")
        return cls(match[1], tokens, in_features, out_features, (b1, b2), rank, match[8])

    def checked(self) -> "Key":
        """Return the key; raises ValueError when its string is not read back as this key."""
        if (read := Key.parse(str(self))) != self:
            raise ValueError(f"{self!r} must be {read!r}")
        return read


@dataclasses.dataclass(frozen=True)
class Entry:
    """The fastest configuration that was measured of one implementation for one key.

    Attributes:
      impl: name of the implementation.
      config: constants that the kernel was given; those of each launch may be nested: {"first": {...}, ...}.
      us: microseconds, median.
      dense_us: microseconds of the dense layer in the same run; None where it was not measured.
      triton: version of Triton; None where it was not installed.
      torch: version of PyTorch.
      time: of the measurement, ISO 8601.
    """

    impl: str
    config: Config
    us: float
    dense_us: float | None
    triton: str | None
    torch: str
    time: str

    def checked(self) -> "Entry":
        """Return a copy that shares no dict; raises ValueError when a field is of a wrong type, with its name."""
        return _entry(self.impl, _fields(self))


Table = dict[Key, dict[str, Entry]]


def to_json(device: str, table: Table) -> str:
    """Write the entries of a device as JSON, in order, so that few lines differ between two versions."""
    rows = {str(key): {impl: _fields(table[key][impl]) for impl in sorted(table[key])} for key in sorted(table)}
    content = {"version": VERSION, "device": device, "entries": rows}
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def from_json(text: str) -> tuple[str, Table]:
    """Read what `to_json` wrote: (device, table).

    Raises:
      ValueError: when it is anything else, with what is wrong.
    """
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict) or content.keys() != {"version", "device", "entries"}:
        raise ValueError("it must hold one object of version, device and entries")
    device, rows = content["device"], content["entries"]
    if type(content["version"]) is not int or content["version"] != VERSION:
        raise ValueError(f"its version {content['version']!r} is not {VERSION}")
    if not isinstance(device, str):
        raise ValueError(f"its device {device!r} is no name")
    if not isinstance(rows, dict) or not all(isinstance(impls, dict) for impls in rows.values()):
        raise ValueError("its entries must be an object of objects")
    return device, {Key.parse(key): {impl: _entry(impl, row[impl]) for impl in row} for key, row in rows.items()}


def _fields(entry: Entry) -> dict[str, Any]:
    """Return all fields but `impl`, which is the name that they stand under."""
    fields = dataclasses.asdict(entry)
    del fields["impl"]
    return fields


def _entry(impl: str, fields: Any) -> Entry:
    names = [field.name for field in dataclasses.fields(Entry) if field.name != "impl"]
    if not isinstance(impl, str) or not re.fullmatch(_WORD, impl):
        raise ValueError(f"impl {impl!r} must be made of small letters, digits and _")
    if not isinstance(fields, dict) or fields.keys() != set(names):
        raise ValueError(f"{impl} must have the fields {', '.join(names)} and no other")
    for name, value in fields.items():
        if not _is_valid(name, value):
            raise ValueError(f"{name} of {impl} cannot be {value!r}")
    return Entry(impl, **fields)


def _is_valid(name: str, value: Any) -> bool:
    if name == "config":
        return _is_config(value)
    if value is None:
        return name in ("dense_us", "triton")
    if name in ("us", "dense_us"):
        return type(value) in (int, float) and 0 < value < _LONGEST_US  # nor NaN
    return isinstance(value, str) and value != ""


def _is_config(value: Any, of_launch: bool = False) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and (type(part) in (int, bool, str) or (not of_launch and _is_config(part, True)))
        for name, part in value.items()
    )


# Last, since the store needs what is above.
from .store import best, forget, lookup, path, record, refresh, version  # noqa: E402

__all__ = ["Entry", "Key", "best", "bucket", "forget", "lookup", "path", "record", "refresh", "version"]
