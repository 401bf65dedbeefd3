"""The store of tuned configurations: nothing is lost, damaged or misread, and a known lookup costs nothing."""

import builtins
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import blrlab_ops
import pytest
from blrlab_ops.tuning import FORMATS, MOST_TOKENS, Entry, Key, bucket, from_json, store, to_json
from hypothesis import given
from hypothesis import strategies as st

DEVICE = "NVIDIA A0 80GB"  # none that the committed defaults know
FILE = "nvidia_a0_80gb.json"
KEY = Key("monarch", 16, 4096, 4096, (16, 16), 64, "bfloat16")
OTHER = Key("low_rank", 1024, 768, 2304, (1, 1), 192, "float16")
ENTRY = Entry(
    impl="triton_two_stage",
    config={"first": {"tile": 64, "split": True}, "second": {"tile": 128}, "order": "rows"},
    us=12.5,
    dense_us=20.25,
    triton="3.6.0",
    torch="2.13.0+cu130",
    time="2026-01-31T12:00:00+00:00",
)
PLAIN = dataclasses.replace(ENTRY, impl="torch_bmm", config={}, us=15.0, dense_us=None)
COMMITTED = sorted(store.DEFAULTS.glob("*.json"))

COUNTS = st.integers(1, 10**6)
KEYS = st.builds(
    Key,
    format=st.sampled_from(FORMATS),
    tokens=st.integers(0, 10**6).map(bucket),
    in_features=COUNTS,
    out_features=COUNTS,
    blocks=st.tuples(COUNTS, COUNTS),
    rank=st.integers(0, 10**6),
    dtype=st.from_regex(r"[a-z0-9_]{1,20}", fullmatch=True),
)
CONSTANTS = st.integers() | st.booleans() | st.text()
ENTRIES = st.builds(
    Entry,
    impl=st.from_regex(r"[a-z0-9_]{1,20}", fullmatch=True),
    config=st.dictionaries(st.text(), CONSTANTS | st.dictionaries(st.text(), CONSTANTS, max_size=3), max_size=3),
    us=st.floats(1e-3, 1e9),
    dense_us=st.none() | st.floats(1e-3, 1e9),
    triton=st.none() | st.text(min_size=1),
    torch=st.text(min_size=1),
    time=st.text(min_size=1),
)

# Each thread has an impl of its own under a key of all threads and processes, and keys of its own.
RECORDER = """
import dataclasses, sys, threading
from blrlab_ops.tuning import Entry, Key, store
def work(name):
    for number in range(1, 7):
        for key in (Key("blast", 16, number, 8, (2, 2), 4, "float16"), Key("dense", 1, number, 8, (1, 1), 0, name)):
            store.record("card", key, Entry(name, {"number": number}, number, None, "3.6.0", "2.13.0", "now"))
threads = [threading.Thread(target=work, args=(f"{sys.argv[1]}_{thread}",)) for thread in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
ENDLESS = """
import itertools
from blrlab_ops.tuning import Entry, Key, store
for number in itertools.count(1):
    key = Key("dense", 1, number, 8, (1, 1), 0, "float16")
    store.record("card", key, Entry("ref", {"number": number}, 1.0, None, None, "2.13.0", "now"))
    print(number, flush=True)
"""
CUT_SHORT = f"""
import resource, signal
from blrlab_ops.tuning import Entry, Key, store
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # the kernel kills who writes more to a file
store.record({DEVICE!r}, {OTHER!r}, {ENTRY!r})
"""
AS_NOBODY = f"""
import os, sys, warnings
from blrlab_ops.tuning import Entry, Key, store
try:
    os.setuid(65534)
except OSError:
    sys.exit(77)
key, entry = {KEY!r}, {ENTRY!r}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    store.record({DEVICE!r}, key, entry)
    store.record({DEVICE!r}, key._replace(rank=1), entry)
assert store.best({DEVICE!r}, key, "3.6.0") == store.best({DEVICE!r}, key._replace(rank=1), "3.6.0") == entry
print(*(warning.message for warning in caught), sep="\\n")
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache folder and a folder of defaults of the test's own; the former does not exist yet."""
    monkeypatch.setenv("BLRLAB_OPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "DEFAULTS", tmp_path / "defaults")
    store.refresh()
    yield tmp_path / "cache" / "tuning"
    store.refresh()


@pytest.fixture
def child_environment():
    return {**os.environ, "PYTHONPATH": str(Path(blrlab_ops.__file__).parents[1])}


def commit(table):
    """Write defaults of the device."""
    store.DEFAULTS.mkdir(exist_ok=True)
    (store.DEFAULTS / FILE).write_text(to_json(DEVICE, table))
    store.refresh()


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@given(st.integers(0, 10**7))
def test_buckets_hold_their_tokens(tokens):
    assert bucket(bucket(tokens)) == bucket(tokens) <= bucket(tokens + 1)
    assert min(tokens, MOST_TOKENS) <= bucket(tokens) <= max(16, 2 * tokens)


def test_buckets():
    assert sorted({bucket(tokens) for tokens in range(70000)}) == [1, *(2**power for power in range(4, 17))]
    with pytest.raises(ValueError, match="tokens -1 must be 0 or more"):
        bucket(-1)


@given(KEYS)
def test_keys_are_read_back(key):
    assert Key.parse(str(key)) == key == key.checked()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "monarch/16/4096x4096/16x16/64",
        f"{KEY}\n",
        f" {KEY}",
        "toeplitz/16/4096x4096/16x16/64/bfloat16",
        "monarch/17/4096x4096/16x16/64/bfloat16",
        "monarch/0/4096x4096/16x16/64/bfloat16",
        "monarch/16/04096x4096/16x16/64/bfloat16",
        "monarch/16/0x4096/16x16/64/bfloat16",
        "monarch/16/4096x4096/16x0/64/bfloat16",
        "monarch/16/4096x4096/16x16/-1/bfloat16",
        "monarch/16/4096x4096/16x16/64/torch.bfloat16",
        "monarch/1٦/4096x4096/16x16/64/bfloat16",
    ],
)
def test_other_strings_are_no_keys(text):
    with pytest.raises(ValueError, match=r"^key "):
        Key.parse(text)


@pytest.mark.parametrize("change", [{"tokens": 1000}, {"tokens": 16.0}, {"rank": True}, {"dtype": "torch.float16"}])
def test_keys_that_cannot_be_read_back_are_refused(change, folder):
    for call in (lambda key: store.lookup(DEVICE, key), lambda key: store.record(DEVICE, key, ENTRY)):
        with pytest.raises(ValueError):
            call(KEY._replace(**change))
    assert not folder.exists()


@given(st.dictionaries(KEYS, ENTRIES, max_size=3))
def test_json_is_read_back(entries):
    table = {key: {entry.impl: entry} for key, entry in entries.items()}
    assert from_json(to_json(DEVICE, table)) == (DEVICE, table)


def test_entries_are_kept_and_found(folder):
    assert store.lookup(DEVICE, KEY) == {}
    assert store.best(DEVICE, KEY) is None
    assert not folder.exists()  # looking up writes nothing
    for entry in (PLAIN, ENTRY):
        store.record(DEVICE, KEY, entry)
    for _ in range(2):
        assert list(store.lookup(DEVICE, KEY, "3.6.0").items()) == [("triton_two_stage", ENTRY), ("torch_bmm", PLAIN)]
        assert store.best(DEVICE, KEY, "3.6.0") == ENTRY
        assert store.lookup(DEVICE, OTHER, "3.6.0") == store.lookup("NVIDIA A40", KEY, "3.6.0") == {}
        store.refresh()
    assert names_in(folder) == [FILE, f"{FILE}.lock"]
    content = json.loads((folder / FILE).read_text())
    row = {name: value for name, value in dataclasses.asdict(PLAIN).items() if name != "impl"}
    assert (content["version"], content["device"]) == (1, DEVICE)
    assert content["entries"]["monarch/16/4096x4096/16x16/64/bfloat16"]["torch_bmm"] == row


def test_nobody_shares_dicts_with_the_store():
    config: dict = {"first": {"tile": 64}}
    store.record(DEVICE, KEY, dataclasses.replace(ENTRY, config=config))
    config["first"]["tile"] = 1
    store.lookup(DEVICE, KEY, "3.6.0").clear()
    found = store.best(DEVICE, KEY, "3.6.0")
    assert found is not None
    assert found.config == {"first": {"tile": 64}}


def test_the_faster_entry_stays():
    def recorded(us, triton="3.6.0", replace=False):
        store.record(DEVICE, KEY, dataclasses.replace(ENTRY, us=us, triton=triton), replace=replace)
        found = store.best(DEVICE, KEY, triton)
        return found and found.us

    assert [recorded(us) for us in (5.0, 6.0, 4.0)] == [5.0, 5.0, 4.0]
    assert recorded(7.0, replace=True) == 7.0
    assert recorded(9.0, triton="3.7.1") == 9.0  # of another release, so the old one says nothing
    assert store.best(DEVICE, KEY, "3.6.0") is None


def test_the_user_wins_over_defaults(folder):
    faster = dataclasses.replace(ENTRY, us=1.0)
    commit({KEY: {ENTRY.impl: faster, PLAIN.impl: PLAIN}, OTHER: {PLAIN.impl: PLAIN}})
    assert store.best(DEVICE, KEY, "3.6.0") == faster
    store.record(DEVICE, KEY, ENTRY)
    assert store.lookup(DEVICE, KEY, "3.6.0") == {ENTRY.impl: ENTRY, PLAIN.impl: PLAIN}
    assert store.lookup(DEVICE, OTHER, "3.6.0") == {PLAIN.impl: PLAIN}
    assert store.read(folder / FILE) == {KEY: {ENTRY.impl: ENTRY}}  # defaults are not copied
    store.record(DEVICE, KEY, dataclasses.replace(ENTRY, triton="3.5.0"))
    assert store.best(DEVICE, KEY, "3.6.0") == faster  # what does not count hides nothing
    store.forget(DEVICE)
    assert store.best(DEVICE, KEY, "3.6.0") == faster


@pytest.mark.parametrize(
    ("recorded", "running", "counts"),
    [
        ("3.6.0", "3.6.0", True),
        ("3.6.0", "3.6.1+git1234", True),
        ("3.6.0", "3.7.0", False),
        ("3.6.0", "3.60.0", False),
        ("3.6.0", None, False),
        (None, "3.6.0", False),
        (None, None, True),
    ],
)
def test_entries_count_for_their_triton_release(recorded, running, counts, monkeypatch):
    store.record(DEVICE, KEY, dataclasses.replace(ENTRY, triton=recorded))
    assert bool(store.lookup(DEVICE, KEY, running)) is counts
    monkeypatch.setattr(store, "triton_version", lambda: running)
    assert (store.best(DEVICE, KEY) is not None) is counts


def test_forgetting(folder):
    for key in (KEY, OTHER):
        store.record(DEVICE, key, ENTRY)
    store.forget(DEVICE, KEY)
    assert store.best(DEVICE, KEY, "3.6.0") is None
    assert store.read(folder / FILE) == {OTHER: {ENTRY.impl: ENTRY}}
    store.forget(DEVICE, KEY)
    store.forget(DEVICE)
    assert store.best(DEVICE, OTHER, "3.6.0") is None
    assert names_in(folder) == [f"{FILE}.lock"]


def test_the_version_changes_with_the_entries():
    seen = [store.version()]
    for call in (store.record, store.forget):
        call(DEVICE, KEY, *([ENTRY] if call is store.record else []))
        seen.append(store.version())
        store.lookup(DEVICE, KEY)
        assert store.version() == seen[-1]
    store.refresh()
    assert len({*seen, store.version()}) == 4


def test_other_processes_are_seen_after_a_refresh(folder):
    store.record(DEVICE, KEY, PLAIN)
    theirs = to_json(DEVICE, {KEY: {ENTRY.impl: ENTRY}, OTHER: {ENTRY.impl: ENTRY}})
    (folder / FILE).write_text(theirs)
    assert store.lookup(DEVICE, KEY, "3.6.0") == {PLAIN.impl: PLAIN}
    store.refresh()
    assert store.lookup(DEVICE, KEY, "3.6.0") == {ENTRY.impl: ENTRY}
    store.record(DEVICE, KEY, PLAIN)
    assert store.lookup(DEVICE, KEY, "3.6.0") == {ENTRY.impl: ENTRY, PLAIN.impl: PLAIN}


@pytest.mark.parametrize("key", [KEY, OTHER], ids=["tuned", "untuned"])
def test_repeated_lookups_leave_the_disk_alone(key, monkeypatch):
    store.record(DEVICE, KEY, ENTRY)
    known = store.lookup(DEVICE, key, "3.6.0"), store.lookup(DEVICE, key)
    touched = []
    for module, name in [(builtins, "open"), (io, "open"), (os, "open"), (os, "stat"), (os, "lstat"), (os, "listdir")]:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, **k: touched.append(a) or real(*a, **k))
    found = [(store.lookup(DEVICE, Key(*key), "3.6.0"), store.lookup(DEVICE, key)) for _ in range(10_000)]
    monkeypatch.undo()
    assert touched == []
    assert all(each == known for each in found)


def test_processes_and_threads_lose_nothing(folder, run_child):
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: run_child("-W", "error", "-c", RECORDER, name), ("left", "right")))
    writers = [f"{process}_{thread}" for process in ("left", "right") for thread in range(8)]
    table = store.read(folder / "card.json")
    for number in range(1, 7):
        shared = table.pop(Key("blast", 16, number, 8, (2, 2), 4, "float16"))
        assert sorted(shared) == writers
        assert all(entry.config == {"number": number} for entry in shared.values())
        for name in writers:
            assert list(table.pop(Key("dense", 1, number, 8, (1, 1), 0, name))) == [name]
    assert table == {}
    assert names_in(folder) == ["card.json", "card.json.lock"]


def test_a_kill_in_the_middle_of_writes_leaves_a_valid_file(folder, child_environment):
    entry = dataclasses.replace(ENTRY, config={"text": "long " * 100_000})  # most of the time is spent writing
    store.record("card", KEY, entry)
    for pause_s in (0.0, 0.011, 0.023, 0.037, 0.05):
        command = [sys.executable, "-W", "error", "-c", ENDLESS]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=child_environment, text=True) as child:
            assert child.stdout is not None
            said = [child.stdout.readline()]
            time.sleep(pause_s)
            child.send_signal(signal.SIGKILL)
            said += child.stdout.readlines()
        table = store.read(folder / "card.json")
        assert table[KEY] == {entry.impl: entry}
        for number in range(1, len([line for line in said if line.endswith("\n")]) + 1):
            assert Key("dense", 1, number, 8, (1, 1), 0, "float16") in table
    store.record("card", OTHER, ENTRY)  # the killed ones hold no lock
    assert OTHER in store.read(folder / "card.json")


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limits to the size of files")
def test_a_kill_within_a_write_leaves_the_old_file(folder, run_child):
    store.record(DEVICE, KEY, ENTRY)
    run_child("-c", CUT_SHORT, status=-signal.SIGXFSZ)
    assert [path.stat().st_size for path in folder.glob("*.tmp")] == [100]
    assert store.read(folder / FILE) == {KEY: {ENTRY.impl: ENTRY}}
    store.record(DEVICE, OTHER, ENTRY)
    assert OTHER in store.read(folder / FILE)


def test_what_killed_writers_leave_is_swept(folder):
    store.record(DEVICE, KEY, ENTRY)
    old, new, unrelated = (folder / name for name in (f"{FILE}.a.tmp", f"{FILE}.b.tmp", "other.json.a.tmp"))
    for path in (old, new, unrelated):
        path.write_text("{")
    for path in (old, unrelated):
        os.utime(path, (0, 0))
    store.record(DEVICE, OTHER, ENTRY)
    assert names_in(folder) == sorted([FILE, f"{FILE}.lock", new.name, unrelated.name])


FIRST = {
    "lookup": lambda: store.lookup(DEVICE, KEY),
    "record": lambda: store.record(DEVICE, KEY, dataclasses.replace(PLAIN, us=99.0)),
}


def damaged_texts():
    """Kinds of damage by name: (bytes of the file, what the warning says)."""
    whole = json.loads(to_json(DEVICE, {KEY: {ENTRY.impl: ENTRY}}))

    def changed(*path, to):
        content = json.loads(json.dumps(whole))
        *parents, last = path
        inner = content
        for parent in parents:
            inner = inner[parent]
        inner[last] = to
        return json.dumps(content).encode()

    row = ("entries", str(KEY), ENTRY.impl)
    return {
        "empty": (b"", "Expecting value"),
        "half": (json.dumps(whole).encode()[:200], "Expecting|Unterminated"),
        "binary": (b"\x80\xff\x00", "utf-8"),
        "deep": (b"[" * 200_000, "nested too deeply"),
        "list": (b"[]", "one object of version, device and entries"),
        "lacks_entries": (b'{"version": 1, "device": "card"}', "one object of version, device and entries"),
        "newer": (changed("version", to=2), "version 2 is not 1"),
        "version_true": (changed("version", to=True), "version True is not 1"),
        "device_number": (changed("device", to=5), "device 5 is no name"),
        "device_nameless": (changed("device", to="-"), "must be a name as CUDA reports it"),
        "other_device": (changed("device", to="NVIDIA A40"), r"belongs in nvidia_a40\.json"),
        "entries_list": (changed("entries", to=[]), "object of objects"),
        "impls_list": (changed("entries", str(KEY), to=[]), "object of objects"),
        "key": (changed("entries", "monarch/16", to={}), "key 'monarch/16' must look like"),
        "tokens": (changed("entries", str(KEY._replace(tokens=17)), to={}), "must be their bucket 32"),
        "impl": (changed("entries", str(KEY), "Triton two", to={}), "small letters"),
        "lacks_fields": (changed(*row, to={"us": 1.0}), "must have the fields config, us,"),
        "unknown_field": (changed(*row, "speed", to=1), "and no other"),
        "us_text": (changed(*row, "us", to="5"), "us of triton_two_stage cannot be '5'"),
        "us_nan": (changed(*row, "us", to=float("nan")), "us of triton_two_stage cannot be nan"),
        "us_zero": (changed(*row, "us", to=0), "us of triton_two_stage cannot be 0"),
        "us_none": (changed(*row, "us", to=None), "us of triton_two_stage cannot be None"),
        "us_huge": (changed(*row, "us", to=10**400), "us of triton_two_stage cannot be 1"),
        "dense_us_true": (changed(*row, "dense_us", to=True), "dense_us of triton_two_stage cannot be True"),
        "triton_number": (changed(*row, "triton", to=3.6), "triton of triton_two_stage cannot be 3.6"),
        "config_list": (changed(*row, "config", to=[1]), "config of triton_two_stage cannot be"),
        "config_float": (changed(*row, "config", "tile", to=1.5), "config of triton_two_stage cannot be"),
        "config_deep": (changed(*row, "config", "first", to={"a": {"b": 1}}), "config of triton_two_stage cannot be"),
    }


@pytest.mark.parametrize(("content", "why"), damaged_texts().values(), ids=list(damaged_texts()))
@pytest.mark.parametrize("first", FIRST)
def test_damaged_files_are_set_aside(folder, content, why, first):
    folder.mkdir(parents=True)
    (folder / FILE).write_bytes(content)
    with pytest.warns(UserWarning, match=why) as caught:
        FIRST[first]()
    assert len(caught) == 1
    store.record(DEVICE, KEY, PLAIN)
    aside = next(path for path in folder.iterdir() if ".damaged-" in path.name)
    assert aside.name.startswith(f"{FILE}.damaged-20")
    assert aside.read_bytes() == content
    assert str(folder / FILE) in str(caught[0].message)
    assert aside.name in str(caught[0].message)
    assert store.lookup(DEVICE, KEY, "3.6.0") == {PLAIN.impl: PLAIN}
    assert store.read(folder / FILE) == {KEY: {PLAIN.impl: PLAIN}}


def test_a_file_damaged_twice_is_kept_twice(folder):
    for content in ("first", "second"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(content)
        with pytest.warns(UserWarning, match="was renamed to"):
            store.forget(DEVICE)
    assert sorted(path.read_text() for path in folder.glob("*.damaged-*")) == ["first", "second"]


def test_a_good_file_that_replaces_a_damaged_one_stays(folder, monkeypatch):
    good = to_json(DEVICE, {KEY: {ENTRY.impl: ENTRY}})
    folder.mkdir(parents=True)
    (folder / FILE).write_text("damaged")
    locked = store._locked

    def mended_while_waiting(file):
        file.write_text(good)
        return locked(file)

    monkeypatch.setattr(store, "_locked", mended_while_waiting)
    assert store.best(DEVICE, KEY, "3.6.0") == ENTRY
    assert (folder / FILE).read_text() == good


def test_damaged_defaults_stay_where_they_are(folder):
    commit({})
    (store.DEFAULTS / FILE).write_text("{")
    with pytest.warns(UserWarning, match="came with the package but is damaged"):
        assert store.lookup(DEVICE, KEY) == {}
    assert store.lookup(DEVICE, OTHER) == {}  # warned once, even if read again
    store.refresh()
    assert store.lookup(DEVICE, KEY) == {}
    assert names_in(store.DEFAULTS) == [FILE]
    assert not folder.exists()


def test_unwritable_folders_keep_entries_in_memory(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match=r"cannot be written \(.*\): what is tuned is kept in memory only"):
        store.record(DEVICE, KEY, ENTRY)
    store.record(DEVICE, OTHER, ENTRY)  # warned once
    for key in (KEY, OTHER):
        assert store.best(DEVICE, key, "3.6.0") == ENTRY
    store.refresh()
    store.forget(DEVICE, OTHER)
    assert store.best(DEVICE, KEY, "3.6.0") == ENTRY
    assert store.best(DEVICE, OTHER, "3.6.0") is None
    (tmp_path / "cache").unlink()
    store.record(DEVICE, KEY, PLAIN)  # it has become writable: all is written
    assert store.read(store.path(DEVICE)) == {KEY: {ENTRY.impl: ENTRY, PLAIN.impl: PLAIN}}


def test_a_write_that_fails_leaves_the_old_file(folder, monkeypatch):
    store.record(DEVICE, KEY, ENTRY)
    before = (folder / FILE).read_bytes()

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "replace", refuse)
    with pytest.warns(UserWarning, match="No space left on device"):
        store.record(DEVICE, OTHER, ENTRY)
    assert (folder / FILE).read_bytes() == before
    assert names_in(folder) == [FILE, f"{FILE}.lock"]
    assert store.best(DEVICE, KEY, "3.6.0") == store.best(DEVICE, OTHER, "3.6.0") == ENTRY


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can become another user")
def test_a_folder_of_somebody_else(child_environment):
    with tempfile.TemporaryDirectory() as shared:  # pytest's own folders hide their contents from others
        os.chmod(shared, 0o755)
        environment = {**child_environment, "BLRLAB_OPS_CACHE": shared}
        command = [sys.executable, "-c", AS_NOBODY]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        if done.returncode == 77:
            pytest.skip("a container that has no other user")
        assert done.returncode == 0, done.stderr
        assert os.listdir(shared) == []
    assert done.stdout.splitlines() == [
        f"{shared}/tuning/{FILE} cannot be written (Permission denied): what is tuned is kept in memory only"
    ]


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may read and write everything")
def test_read_only_files(folder):
    store.record(DEVICE, KEY, ENTRY)
    store.refresh()
    for path in (*folder.iterdir(), folder):
        path.chmod(0o500)
    try:
        assert store.best(DEVICE, KEY, "3.6.0") == ENTRY
        with pytest.warns(UserWarning, match="cannot be written"):
            store.record(DEVICE, OTHER, ENTRY)
    finally:
        folder.chmod(0o700)


def test_unreadable_files_are_said_and_kept(folder):
    (folder / FILE).mkdir(parents=True)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert store.lookup(DEVICE, KEY) == {}
    assert store.lookup(DEVICE, OTHER) == {}  # warned once
    assert names_in(folder) == [FILE]


@pytest.mark.parametrize(
    "change", [{"us": -1.0}, {"us": "1"}, {"impl": "Two Stage"}, {"config": {"a": 1.5}}, {"torch": None}, {"time": ""}]
)
def test_wrong_entries_are_refused(folder, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        store.record(DEVICE, KEY, dataclasses.replace(ENTRY, **change))
    assert not folder.exists()


def test_paths(tmp_path, monkeypatch):
    assert store.path(DEVICE) == tmp_path / "cache" / "tuning" / FILE
    assert store.path("Orin (nvgpu)").name == "orin_nvgpu.json"
    with pytest.raises(ValueError, match="must be a name as CUDA reports it"):
        store.path("--")
    monkeypatch.setenv("BLRLAB_OPS_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert store.path(DEVICE) == tmp_path / "xdg" / "blrlab_ops" / "tuning" / FILE
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert store.path(DEVICE) == tmp_path / ".cache" / "blrlab_ops" / "tuning" / FILE


def test_threads_agree_while_others_record():
    store.record(DEVICE, KEY, dataclasses.replace(ENTRY, us=100.0))
    wrong, done = [], threading.Event()

    def watch():
        last = 100.0
        while not done.wait(1e-4):  # spinning would starve the writer
            found = store.best(DEVICE, KEY, "3.6.0")
            if found is None or found.us > last:
                wrong.append(found)
            last = found.us if found else last

    watchers = [threading.Thread(target=watch) for _ in range(2)]
    for watcher in watchers:
        watcher.start()
    for us in range(60, 30, -1):
        store.record(DEVICE, KEY, dataclasses.replace(ENTRY, us=float(us)))
        found = store.best(DEVICE, KEY, "3.6.0")
        assert found is not None
        assert found.us == us
    done.set()
    for watcher in watchers:
        watcher.join()
    assert wrong == []


def test_nothing_but_python_is_loaded(run_child):
    run_child(
        "-c", "import sys; from blrlab_ops.tuning import lookup; assert not {'torch', 'triton'} & set(sys.modules)"
    )


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.name)
def test_committed_defaults_are_valid(file):
    table = store.read(file)
    assert table
    assert all(key == key.checked() and impls for key, impls in table.items())
    device, _ = from_json(file.read_text())
    assert file.read_text() == to_json(device, table)  # in order, so that a change shows as what it is
