"""Damaged checkpoints, and checkpoints of another model, are an error in one sentence.

They are read in another process, all in one: a read that fails leaves coroutines and threads behind in orbax
and tensorstore, which complain whenever they are collected, also in the middle of another test.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blrlab import train

PARAMS = {
    "wte": {"embedding": np.arange(12, dtype=np.float32).reshape(4, 3) / 7},
    "c_fc": {"kernel": {"V": np.ones((2, 2, 3, 1), np.float32), "U": np.zeros((2, 2, 1, 3), np.float32)}},
    "bias": np.arange(3, dtype=np.float32),
}
Damage = Callable[[Path], object]


def each(folder: Path, change: Callable[[bytes], bytes]) -> None:
    """Change the files that hold the numbers."""
    for path in (folder / "d").iterdir():
        path.write_bytes(change(path.read_bytes()))


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


ARRAYS: dict[str, Damage] = {
    "no arrays": lambda folder: shutil.rmtree(folder / "d"),
    "cut arrays": lambda folder: each(folder, lambda content: content[:-9]),
    "empty arrays": lambda folder: each(folder, lambda content: b""),
    "one bit in the arrays": lambda folder: each(folder, flip),
    "empty manifest": lambda folder: (folder / "manifest.ocdbt").write_bytes(b""),
    "no manifest": lambda folder: (folder / "manifest.ocdbt").unlink(),
    "garbled metadata": lambda folder: (folder / "_METADATA").write_bytes(b"\xff{"),
    "half of the metadata": lambda folder: (folder / "_METADATA").write_text('{"tree_metadata": {'),
}
DAMAGED_PARAMS = ARRAYS | {"emptied": lambda folder: [shutil.rmtree(folder), folder.mkdir()]}
DAMAGED_STEPS: dict[str, Damage] = {
    **{name: lambda step, damage=damage: damage(step / "state") for name, damage in ARRAYS.items()},
    "no position": lambda step: (step / "data" / "metadata").unlink(),
    "half of the position": lambda step: (step / "data" / "metadata").write_text('{"next_in'),
    "no data": lambda step: shutil.rmtree(step / "data"),
    "no state": lambda step: shutil.rmtree(step / "state"),
    "emptied": lambda step: [shutil.rmtree(step), step.mkdir()],
}
OTHERS: dict[str, Mapping[str, Any]] = {
    "another shape": PARAMS | {"wte": {"embedding": np.zeros((4, 5))}},
    "a smaller shape": PARAMS | {"wte": {"embedding": np.zeros((2, 3))}},
    "another number of dimensions": PARAMS | {"wte": {"embedding": np.zeros(12)}},
    "dense for factored": PARAMS | {"c_fc": {"kernel": np.zeros((6, 6))}},
    "one more": PARAMS | {"more": np.zeros(3)},
    "one less": {name: value for name, value in PARAMS.items() if name != "bias"},
}
CASES = [
    *(("params", name) for name in DAMAGED_PARAMS),
    *(("params", name) for name in OTHERS),
    *(("step", name) for name in DAMAGED_STEPS),
    *(("step", name) for name in OTHERS),
]

READ = """
import json, sys
from pathlib import Path
import jax, numpy as np
from blrlab import train
from blrlab.errors import InputError

def shapes(tree):
    if isinstance(tree, dict):
        return {name: shapes(value) for name, value in tree.items()}
    return jax.ShapeDtypeStruct(tuple(tree), np.float32)

found = {}
for kind, name, folder, tree in json.loads(Path(sys.argv[1]).read_text()):
    try:
        if kind == "params":
            train.load_params(Path(folder), shapes(tree))
        else:
            zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes(tree))
            like = train.State(np.zeros((), np.int32), zeros, (), np.zeros(2, np.uint32))
            like = jax.device_put(like)
            train.Checkpoints(Path(folder)).restore(like)
    except InputError as error:
        found[f"{kind}: {name}"] = str(error)
    except Exception as error:
        found[f"{kind}: {name}"] = f"not an InputError but {type(error).__name__}: {error}"
print(json.dumps(found))
"""


def shapes(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {name: shapes(value) for name, value in tree.items()}
    return list(tree.shape)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damage")


@pytest.fixture(scope="module")
def said(child, root: Path) -> dict[str, str]:
    """What is said of every case."""
    train.save_params(root / "params", PARAMS)
    checkpoints = train.Checkpoints(root / "step")
    seed = np.zeros(2, np.uint32)
    checkpoints.save(train.State(np.asarray(4, np.int32), PARAMS, (), seed), {"next_index": 4})
    checkpoints.close()
    work = []
    for place, (kind, name) in enumerate(CASES):
        folder = root / str(place)
        shutil.copytree(root / kind, folder)
        damaged = DAMAGED_PARAMS if kind == "params" else DAMAGED_STEPS
        if name in damaged:
            damaged[name](folder if kind == "params" else folder / "4")
        work.append((kind, name, str(folder), shapes(OTHERS.get(name, PARAMS))))
    for kind in ("params", "step"):
        work.append((kind, "whole", str(root / kind), shapes(PARAMS)))
    (root / "work.json").write_text(json.dumps(work))
    done = child(READ, root / "work.json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("kind", "name"), CASES, ids=lambda value: value.replace(" ", "-"))
def test_a_damaged_one_or_that_of_another_model_is_an_error_that_names_the_folder(
    said: dict[str, str], root: Path, kind: str, name: str
) -> None:
    sentence = said.get(f"{kind}: {name}", "nothing: it was read")
    folder = root / str(CASES.index((kind, name)))
    assert sentence.startswith(f"the checkpoint in {folder} is damaged (")
    assert sentence.endswith("): delete that folder.")
    assert "\n" not in sentence


def test_whole_ones_are_read(said: dict[str, str]) -> None:
    assert not [name for name in said if name.endswith("whole")]
