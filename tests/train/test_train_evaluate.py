"""Evaluation: the mean loss of every prediction, whatever the batch."""

import jax
import numpy as np
import pytest

from blrlab import factors, train


def reference(setting, params, windows: np.ndarray) -> float:
    """The bigram model and its loss, in NumPy and float64."""
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    weight = np.asarray(factors.to_dense(params["head"]["kernel"]), np.float64)
    logits = wide["wte"]["embedding"][windows[:, :-1]] @ weight + wide["head"]["bias"]
    shifted = logits - logits.max(-1, keepdims=True)
    log_probability = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return float(-np.take_along_axis(log_probability, windows[:, 1:, None], -1).mean())


@pytest.mark.parametrize("batch", [1, 3, 7, 10, 64])
def test_the_loss_is_that_of_a_plain_computation_whatever_the_batch(setting, batch: int) -> None:
    params, windows = setting.params(), setting.windows(10)
    # Large weights, so that the loss of the filling, if it counted, would show.
    params["head"]["bias"] = params["head"]["bias"].at[0].set(-9.0)
    wanted = reference(setting, params, windows)
    assert train.evaluate(setting.model, params, windows, batch)["loss"] == pytest.approx(wanted, rel=2e-6)


def test_evaluation_drops_nothing_and_changes_nothing(setting) -> None:
    params, windows = setting.params(), setting.windows(8)
    losses = {train.evaluate(setting.model, params, windows, 4)["loss"] for _ in range(3)}
    assert len(losses) == 1
    for before, after in zip(jax.tree.leaves(setting.params()), jax.tree.leaves(params), strict=True):
        assert np.array_equal(before, after)


def test_every_window_counts_the_same(setting) -> None:
    params, windows = setting.params(), setting.windows(5)
    alone = [train.evaluate(setting.model, params, windows[place : place + 1], 2)["loss"] for place in range(5)]
    assert len(set(alone)) > 1
    assert train.evaluate(setting.model, params, windows, 2)["loss"] == pytest.approx(np.mean(alone), rel=2e-6)
