"""Records: what is written comes back, a kill costs one line at most, and damage is named by its line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blrlab import records
from blrlab.errors import InputError

TRAIN = {"kind": "train", "step": 1, "loss": 2.5, "phase": "dense"}
EVAL = {
    "kind": "eval",
    "stage": "dense",
    "value": None,
    "blocks": [2, 2],
    "unit": "nats/byte",
    "origin": "é漢 \n\0",
}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "records.jsonl"


def test_what_is_appended_is_read_in_order(log: Path) -> None:
    rows = [{"kind": kind, "place": place} for place, kind in enumerate(records.KINDS)] + [TRAIN, EVAL]
    for row in rows:
        records.append(log, row)
    assert records.read(log) == rows
    assert len(log.read_bytes().splitlines()) == len(rows), "one line a record, whatever its strings hold"


def test_floats_come_back_to_the_bit(log: Path) -> None:
    values = [0.1, 1e-308, 1 / 3, -0.0, 2**53 + 1]
    records.append(log, TRAIN | {"loss": values})
    assert [value.hex() if isinstance(value, float) else value for value in records.read(log)[0]["loss"]] == [
        value.hex() if isinstance(value, float) else value for value in values
    ]


@pytest.mark.parametrize("kind", ["training", "", None, 3])
def test_an_unknown_kind_is_refused_and_leaves_no_file(log: Path, kind: object) -> None:
    with pytest.raises(ValueError, match=r"env, train, allocate, compress, eval, bench") as caught:
        records.append(log, {"kind": kind})
    assert repr(kind) in str(caught.value)
    with pytest.raises(ValueError, match="not None"):
        records.append(log, {"loss": 1.0})
    assert not log.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), [1.0, float("nan")]])
def test_nan_and_infinity_are_refused_and_the_file_stays_whole(log: Path, value: object) -> None:
    records.append(log, TRAIN)
    with pytest.raises(ValueError, match="JSON compliant"):
        records.append(log, TRAIN | {"loss": value})
    with pytest.raises(ValueError, match="JSON compliant"):
        records.rewrite(log, [TRAIN, TRAIN | {"loss": value}])
    assert records.read(log) == [TRAIN]
    assert [path.name for path in log.parent.iterdir()] == [log.name]


def test_a_missing_file_is_named(log: Path) -> None:
    with pytest.raises(InputError, match="does not exist") as caught:
        records.read(log)
    assert str(log) in str(caught.value)


def test_an_empty_file_holds_no_records(log: Path) -> None:
    log.touch()
    assert records.read(log) == []


@pytest.mark.parametrize("cut", range(1, len(json.dumps(TRAIN)), 7))
def test_a_torn_last_line_is_left_out_wherever_it_was_torn(log: Path, cut: int) -> None:
    records.append(log, EVAL)
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(TRAIN)[:cut])
    assert records.read(log) == [EVAL]
    records.keep(log, lambda record: True)
    assert log.read_text(encoding="utf-8") == json.dumps(EVAL) + "\n"
    records.append(log, TRAIN)
    assert records.read(log) == [EVAL, TRAIN]


@pytest.mark.parametrize("tail", ['{"kind": "train", "st', json.dumps(TRAIN)], ids=["torn", "newline lost"])
def test_appending_after_a_kill_spoils_no_line(log: Path, tail: str) -> None:
    """The next writer drops a torn last line, or ends it: what it appends must be readable."""
    records.append(log, EVAL)
    with log.open("a", encoding="utf-8") as file:
        file.write(tail)
    records.append(log, TRAIN | {"step": 2})
    found = records.read(log)
    assert found[0] == EVAL
    assert found[-1] == TRAIN | {"step": 2}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"kind": "train", "st', "not JSON"),
        (b"", "not JSON"),
        (b"{'kind': 'train'}", "not JSON"),
        (b"[1, 2]", "not a JSON object"),
        (b'"train"', "not a JSON object"),
        (b"17", "not a JSON object"),
        (b'{"kind": "train", "note": "\xff\xfe"}', "damaged"),
        (b"\0" * 40, "not JSON"),
    ],
    ids=["torn", "empty", "quotes", "list", "string", "number", "not UTF-8", "zeros"],
)
def test_a_damaged_line_is_named(log: Path, line: bytes, reason: str) -> None:
    whole = json.dumps(TRAIN).encode() + b"\n"
    log.write_bytes(whole * 2 + line + b"\n" + whole)
    with pytest.raises(InputError, match=f"line 3.*{reason}") as caught:
        records.read(log)
    assert str(log) in str(caught.value)


def test_keep_drops_what_is_not_wanted_and_a_missing_file_stays_missing(log: Path) -> None:
    records.keep(log, lambda record: True)
    assert not log.exists()
    records.rewrite(log, [TRAIN | {"step": step} for step in range(6)])
    records.keep(log, lambda record: record["step"] % 2 == 0)
    assert [record["step"] for record in records.read(log)] == [0, 2, 4]


def test_keep_leaves_a_damaged_file_as_it_is(log: Path) -> None:
    log.write_text('{"kind": "train"}\nnonsense\n{"kind": "train"}\n', encoding="utf-8")
    before = log.read_bytes()
    with pytest.raises(InputError, match="line 2"):
        records.keep(log, lambda record: True)
    assert log.read_bytes() == before


def test_rewrite_replaces_all_records(log: Path) -> None:
    records.rewrite(log, [TRAIN] * 3)
    records.rewrite(log, iter([EVAL]))
    assert records.read(log) == [EVAL]
    records.rewrite(log, [])
    assert records.read(log) == []
    assert log.read_bytes() == b""


def test_write_text_keeps_the_text_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    for text in ("first\n", "zweite é漢\n", ""):
        records.write_text(path, text)
        assert path.read_bytes() == text.encode()
    assert [found.name for found in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_writer_that_fails_leaves_the_former_text(tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "data.json"
    records.write_text(path, "old")
    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), fail)
    with pytest.raises(OSError, match="No space left"):
        records.write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "old"


WRITER = """
import sys
from pathlib import Path
from blrlab.records import write_text
while True:
    for letter in "ab":
        write_text(Path(sys.argv[1]), letter * 300_000)
        print(letter, flush=True)
"""


def test_a_reader_never_sees_half_a_file_also_when_the_writer_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, env=environment) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"a\n"
        seen, end = set(), time.monotonic() + 0.5
        while time.monotonic() < end:
            seen.add(path.read_bytes())
        writer.send_signal(signal.SIGKILL)
    seen.add(path.read_bytes())
    assert seen <= {letter * 300_000 for letter in (b"a", b"b")}
