"""The average of the parameters: what it is, that it changes no training, and that a resumed one is the same."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blrlab import train
from blrlab.errors import InputError

KEPT = 0.8


class Setting:
    """A setting whose optimiser keeps an average."""

    def __init__(self, setting: Any):
        self.setting = setting
        self.optimizer = train.make_optimizer(setting.schedule, 0.1, 1.0, ema=KEPT)
        self.step = train.make_step(setting.model, self.optimizer)

    def state(self) -> train.State:
        return train.init_state(self.setting.params(), self.optimizer, jax.random.key(1))

    def fit(self, folder: Path, say=lambda line: None) -> train.State:
        folder.mkdir(exist_ok=True)
        setting = self.setting
        return train.fit(setting.plan(), self.state(), self.step, setting.batches(), setting.schedule, folder, say)


@pytest.fixture(scope="module")
def averaging(setting) -> Setting:
    return Setting(setting)


def numbers(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def average(state: train.State) -> Any:
    return train.averaged(state.params, state.opt_state)


def test_an_average_is_of_the_parameters_after_every_step(averaging, setting) -> None:
    state, windows = averaging.state(), setting.windows(4)
    wanted = numbers(setting.params())
    for found, start in zip(numbers(average(state)), wanted, strict=True):
        assert np.array_equal(found, start)
    for _ in range(5):
        state, _ = averaging.step(state, windows)
        now = numbers(state.params)
        wanted = [KEPT * old + (1 - KEPT) * new for old, new in zip(wanted, now, strict=True)]
    for found, mean, last in zip(numbers(average(state)), wanted, now, strict=True):
        np.testing.assert_allclose(found, mean, rtol=1e-5, atol=1e-7)
        assert np.abs(found - last).max() > 1e-4


def test_an_average_changes_no_training(averaging, setting) -> None:
    with_average, without = averaging.state(), setting.state()
    for _ in range(3):
        with_average, _ = averaging.step(with_average, setting.windows(4))
        without, _ = setting.step(without, setting.windows(4))
    for one, other in zip(numbers(with_average.params), numbers(without.params), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)
    assert average(without) is without.params


def test_a_step_takes_over_the_memory_of_an_average(averaging, setting) -> None:
    state = averaging.state()
    averaging.step(state, setting.windows(4))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, average(state))))


def test_a_killed_training_goes_on_to_the_same_average(averaging, tmp_path: Path) -> None:
    straight = averaging.fit(tmp_path / "straight")

    def kill(line: str) -> None:
        if "step 12/" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        averaging.fit(tmp_path / "killed", kill)
    said: list[str] = []
    resumed = averaging.fit(tmp_path / "killed", said.append)
    assert "going on from step 10" in said[0]
    for wanted, found in ((straight, resumed), (average(straight), average(resumed))):
        assert [leaf.tobytes() for leaf in numbers(wanted)] == [leaf.tobytes() for leaf in numbers(found)]
    assert not np.array_equal(numbers(average(resumed))[0], numbers(resumed.params)[0])


def test_an_average_is_of_the_dtype_of_its_parameters() -> None:
    params = {"kernel": jnp.ones((2, 2), jnp.bfloat16)}
    optimizer = train.make_optimizer(lambda step: 0.1, 0.0, 1.0, ema=0.5)
    updates, state = optimizer.update(params, optimizer.init(params), params)
    assert train.averaged(updates, state)["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize("kept", [-0.1, 1.0, 1.5, float("nan")])
def test_an_average_that_cannot_be(kept: float) -> None:
    with pytest.raises(InputError, match=f"ema is {kept}; it must be at least 0 and below 1"):
        train.make_optimizer(lambda step: 0.1, 0.0, 1.0, ema=kept)
