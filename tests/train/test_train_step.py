"""One step: the loss it reports, what it changes, and where its randomness comes from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blrlab import train


def copy(state: train.State) -> train.State:
    return jax.tree.map(lambda leaf: jnp.asarray(np.array(leaf)), state)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_the_loss_of_a_prediction_is_minus_its_log_probability() -> None:
    draw = np.random.default_rng(0)
    logits, targets = draw.normal(size=(2, 3, 5)).astype(np.float32), draw.integers(0, 5, (2, 3))
    wanted = -np.take_along_axis(log_softmax(logits), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(jax.jit(train.next_token_loss)(logits, targets), wanted, rtol=1e-5)


def test_a_step_reports_the_loss_and_gradient_before_it(still) -> None:
    windows = still.windows(4)

    @jax.jit
    @jax.value_and_grad
    def loss(params) -> jax.Array:
        logits = still.model.apply({"params": params}, windows[:, :-1])
        return train.next_token_loss(logits, windows[:, 1:]).mean()

    wanted, gradient = loss(still.params())
    norm = np.sqrt(sum(float(np.square(leaf).sum()) for leaf in jax.tree.leaves(gradient)))
    state, metrics = still.step(still.state(), windows)
    assert set(metrics) == {"loss", "grad_norm"}
    assert float(metrics["loss"]) == pytest.approx(float(wanted), rel=1e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5), "not clipped"
    assert int(state.step) == 1
    assert np.array_equal(state.seed, still.state().seed)


def test_steps_on_one_batch_lower_its_loss(still) -> None:
    state, windows, losses = still.state(), still.windows(4), []
    for _ in range(20):
        state, metrics = still.step(state, windows)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 2.5
    assert losses[-1] < 0.7 * losses[0]
    assert int(state.step) == 20
    for before, after in zip(jax.tree.leaves(still.params()), jax.tree.leaves(state.params), strict=True):
        assert not np.array_equal(before, after)
        assert (before.shape, before.dtype) == (after.shape, after.dtype)


def test_a_step_takes_over_the_memory_of_its_state(still) -> None:
    state = still.state()
    still.step(state, still.windows(4))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def loss_at(setting, step: int, seed: int) -> float:
    state = setting.state(seed)._replace(step=jnp.asarray(step, jnp.int32))
    return float(setting.step(state, setting.windows(4))[1]["loss"])


def test_dropout_depends_on_the_seed_and_on_the_step(setting) -> None:
    places = [(step, seed) for step in (0, 1, 7) for seed in (1, 2)]
    losses = {place: loss_at(setting, *place) for place in places}
    assert len(set(losses.values())) == len(places)
    assert {place: loss_at(setting, *place) for place in reversed(places)} == losses, "and on nothing else"


def test_without_dropout_neither_seed_nor_step_changes_the_loss(still) -> None:
    assert len({loss_at(still, step, seed) for step in (0, 7) for seed in (1, 2)}) == 1


def test_the_same_state_and_batch_give_the_same_bits(setting) -> None:
    start = setting.state()
    ends = [setting.step(copy(start), setting.windows(4)) for _ in range(2)]
    for one, other in zip(*map(jax.tree.leaves, ends), strict=True):
        assert np.array_equal(one, other)
