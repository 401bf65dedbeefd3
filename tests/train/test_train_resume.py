"""A training that was killed and goes on ends with the same bits and the same records as one that was not."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from blrlab import records, train

STEPS = 20


class Killed(Exception):
    """What a kill is here."""


def fit(setting, folder: Path, killed_at: int | None = None) -> train.State:
    """Train for 20 steps of dropout and warm-up, with a checkpoint every 5."""

    def say(line: str) -> None:
        if killed_at is not None and f"step {killed_at}/" in line:
            raise Killed

    folder.mkdir(exist_ok=True)
    return train.fit(setting.plan(), setting.state(), setting.step, setting.batches(), setting.schedule, folder, say)


def rows(folder: Path) -> list[records.Record]:
    """Return the records without their speeds."""
    return [
        {name: value for name, value in record.items() if name != "tokens_per_s"}
        for record in records.read(folder / "records.jsonl")
    ]


@pytest.fixture(scope="module")
def straight(setting, tmp_path_factory: pytest.TempPathFactory) -> tuple[train.State, list[records.Record]]:
    folder = tmp_path_factory.mktemp("straight")
    state = jax.device_get(fit(setting, folder))
    found = rows(folder)
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    assert len({record["loss"] for record in found}) == STEPS
    return state, found


def assert_same(straight: tuple[train.State, list[records.Record]], state: train.State, folder: Path) -> None:
    assert jax.tree.structure(state) == jax.tree.structure(straight[0])
    for path, leaf in jax.tree.leaves_with_path(state):
        wanted = dict(jax.tree.leaves_with_path(straight[0]))[path]
        assert leaf.dtype == wanted.dtype
        assert np.asarray(leaf).tobytes() == wanted.tobytes(), jax.tree_util.keystr(path)
    assert rows(folder) == straight[1]


@pytest.mark.parametrize(
    ("kills", "resumed_at"),
    [((12,), (10,)), ((3,), (0,)), ((5,), (0,)), ((6,), (5,)), ((20,), (15,)), ((7, 9, 13), (5, 5, 10))],
    ids=["12", "before a checkpoint", "at a checkpoint", "just after", "at the end", "thrice"],
)
def test_a_killed_training_goes_on_to_the_same_bits(
    setting, straight, tmp_path: Path, kills: tuple[int, ...], resumed_at: tuple[int, ...]
) -> None:
    for kill, start in zip(kills, resumed_at, strict=True):
        with pytest.raises(Killed):
            fit(setting, tmp_path, killed_at=kill)
        assert rows(tmp_path)[-1]["step"] == kill
        checkpoints = train.Checkpoints(tmp_path / "checkpoints")
        assert (checkpoints.latest() or 0) == start
        checkpoints.close()
    assert_same(straight, fit(setting, tmp_path), tmp_path)


@pytest.mark.parametrize("tail", ["torn", "longer", "longer and torn"])
def test_records_past_the_checkpoint_and_torn_ones_are_cut_back(setting, straight, tmp_path: Path, tail: str) -> None:
    with pytest.raises(Killed):
        fit(setting, tmp_path, killed_at=12)
    line = json.dumps({"kind": "train", "phase": "dense", "step": 13, "loss": 0.0})
    tails = {"torn": line[:20], "longer": f"{line}\n" * 3, "longer and torn": f"{line}\n{line[:20]}"}
    with (tmp_path / "records.jsonl").open("a", encoding="utf-8") as file:
        file.write(tails[tail])
    assert_same(straight, fit(setting, tmp_path), tmp_path)


def test_a_folder_left_by_a_killed_save_is_passed_over(setting, straight, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        fit(setting, tmp_path, killed_at=12)
    step = tmp_path / "checkpoints" / "10"
    for name in ("15.orbax-checkpoint-tmp", "15.orbax-checkpoint-tmp-1700000000"):
        (step.with_name(name) / "state" / "d").mkdir(parents=True)
        (step.with_name(name) / "state" / "d" / "0f").write_bytes(b"half")
    assert_same(straight, fit(setting, tmp_path), tmp_path)
