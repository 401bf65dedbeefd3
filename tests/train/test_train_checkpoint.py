"""Checkpoints: what they hold, whole or not at all."""

import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from blrlab import train

POSITION = {"next_index": 17, "nested": {"names": ["a", None], "share": 0.5}}


def states_equal(one: train.State, other: train.State) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() and a.dtype == b.dtype for a, b in pairs)


def at(state: train.State, step: int) -> train.State:
    moved = jax.tree.map(lambda leaf: np.asarray(leaf) + step if leaf.dtype == np.float32 else leaf, state)
    return moved._replace(step=np.int32(step))


def save(folder: Path, *states: train.State) -> None:
    checkpoints = train.Checkpoints(folder)
    for state in states:
        checkpoints.save(state, POSITION)
    checkpoints.close()


def restore(folder: Path, like: train.State) -> tuple[int | None, train.State, dict]:
    checkpoints = train.Checkpoints(folder)
    try:
        return checkpoints.latest(), *checkpoints.restore(like)
    finally:
        checkpoints.close()


def test_a_state_and_its_position_come_back_to_the_bit(setting, tmp_path: Path) -> None:
    state = setting.state(seed=9)
    state = state._replace(params=state.params | {"half": jnp.arange(5, dtype=jnp.bfloat16) / 3})
    save(tmp_path, state._replace(step=jnp.asarray(3, jnp.int32)))
    latest, found, position = restore(tmp_path, state)
    assert latest == 3
    assert position == POSITION
    assert states_equal(found, state._replace(step=jnp.asarray(3, jnp.int32)))
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert np.array_equal(found.seed, jax.random.key_data(jax.random.key(9)))


def test_a_new_folder_has_no_step(tmp_path: Path) -> None:
    checkpoints = train.Checkpoints(tmp_path / "deep" / "checkpoints")
    assert checkpoints.latest() is None
    checkpoints.close()


def test_the_newest_of_the_last_two_is_restored(setting, tmp_path: Path) -> None:
    states = [at(setting.state(), step) for step in (2, 5, 11)]
    save(tmp_path, *states)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["11", "5"]
    latest, found, _ = restore(tmp_path, setting.state())
    assert latest == 11
    assert states_equal(found, states[2])
    shutil.rmtree(tmp_path / "11")
    assert states_equal(restore(tmp_path, setting.state())[1], states[1])


KILLED_SAVE = """
import os, signal, sys, threading
from pathlib import Path
import jax, numpy as np
from blrlab import train

def state(step):
    big = np.random.default_rng(step).normal(size=(600, 600)).astype(np.float32)
    params = {str(number): big + number for number in range(40)}
    return train.State(np.asarray(step, np.int32), params, (), np.zeros(2, np.uint32))

folder = Path(sys.argv[1])
checkpoints = train.Checkpoints(folder)
checkpoints.save(state(5), {"next_index": 5})

def kill():
    while True:
        try:
            grown = [path for path in folder.glob("10*/**/*") if path.is_file() and path.stat().st_size > 1000]
        except FileNotFoundError:  # moved between the two questions
            continue
        if grown:
            os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=kill, daemon=True).start()
checkpoints.save(state(10), {"next_index": 10})
"""


def test_a_kill_while_saving_leaves_the_step_before_it(tmp_path: Path, child) -> None:
    done = child(KILLED_SAVE, tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = {path.name for path in tmp_path.iterdir()}
    assert "5" in left
    assert "10" not in left
    assert any(name.startswith("10") for name in left), "it was killed inside the save"
    blank = {str(number): np.zeros((600, 600), np.float32) for number in range(40)}
    like = train.State(np.zeros((), np.int32), blank, (), np.zeros(2, np.uint32))
    latest, found, position = restore(tmp_path, like)
    assert (latest, position) == (5, {"next_index": 5})
    big = np.random.default_rng(5).normal(size=(600, 600)).astype(np.float32)
    assert all(np.array_equal(found.params[str(number)], big + number) for number in range(40))
    save(tmp_path, found._replace(step=np.asarray(10, np.int32)))
    assert restore(tmp_path, like)[0] == 10, "the same step can be saved again"
