"""Objectives: what a batch becomes, what an output costs, and what is measured of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blrlab import train
from blrlab.train import NEXT_TOKEN, classes

KEY = jax.random.key(0)
BATCH = {
    "image": jnp.asarray(np.random.default_rng(0).normal(size=(6, 4, 4, 1)), jnp.float32),
    "label": jnp.array([0, 1, 2, 3, 4, 5]),
}
LOGITS = jnp.asarray(np.random.default_rng(1).normal(size=(6, 7)), jnp.float32)


def test_text_predicts_its_next_token():
    windows = jnp.arange(12).reshape(2, 6) % 5
    (tokens,) = NEXT_TOKEN.inputs(windows, KEY)
    assert tokens.tolist() == windows[:, :-1].tolist()
    logits = jnp.zeros((2, 5, 5))
    np.testing.assert_allclose(NEXT_TOKEN.losses(logits, windows, KEY), np.full((2, 5), np.log(5)), rtol=1e-6)


def test_classes_cost_what_their_shares_say():
    found = classes().losses(LOGITS, BATCH, KEY)
    shares = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, -np.log(shares[np.arange(6), BATCH["label"]]), rtol=1e-5)


def test_smoothing_spreads_a_share_of_the_label():
    found = classes(smoothing=0.3).losses(LOGITS, BATCH, KEY)
    logs = np.asarray(jax.nn.log_softmax(LOGITS))
    wanted = -(0.7 * logs[np.arange(6), BATCH["label"]] + 0.3 * logs.mean(axis=1))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_mixtures_of_images_cost_the_mixture_of_their_labels():
    objective = classes(mixup=0.8)
    (mixed,) = objective.inputs(BATCH, KEY)
    costs = objective.losses(LOGITS, BATCH, KEY)
    images, logs = np.asarray(BATCH["image"]), np.asarray(jax.nn.log_softmax(LOGITS))
    found = 0
    for row in range(6):
        for other in range(6):
            # The share that explains the image, and whether it explains all of it.
            difference = images[row] - images[other]
            share = (
                1.0
                if other == row
                else float(((mixed[row] - images[other]) * difference).sum() / (difference**2).sum())
            )
            if np.allclose(share * images[row] + (1 - share) * images[other], mixed[row], atol=1e-5):
                np.testing.assert_allclose(
                    costs[row], -share * logs[row, row] - (1 - share) * logs[row, other], rtol=1e-4
                )
                found += 1
                break
    assert found == 6
    assert not np.allclose(mixed, images)
    again = objective.inputs(BATCH, jax.random.key(1))[0]
    assert not np.allclose(mixed, again)


def test_measures_count_right_answers():
    logits = jnp.array([[9.0, 8, 7, 6, 5, 4, 3]] * 6)
    measures = classes().measures
    assert measures["top1"](logits, BATCH).tolist() == [1, 0, 0, 0, 0, 0]
    assert measures["top5"](logits, BATCH).tolist() == [1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("batch", [2, 4, 6, 100])
def test_measures_are_means_over_all_examples_whatever_the_batch(batch):
    class Model:
        def apply(self, variables, images):
            return images[:, 0, :, 0] * variables["params"]

    examples = {"image": np.asarray(BATCH["image"]), "label": np.array([0, 1, 2, 3, 0, 1])}
    measured = train.evaluate(Model(), jnp.float32(3), examples, batch, classes())
    logits = 3 * examples["image"][:, 0, :, 0]
    right = np.argmax(logits, axis=1) == examples["label"]
    assert set(measured) == {"loss", "top1", "top5"}
    assert measured["top1"] == pytest.approx(right.mean())
    assert measured["top5"] == 1
    wanted = classes().losses(jnp.asarray(logits), {"label": jnp.asarray(examples["label"])}, KEY).mean()
    assert measured["loss"] == pytest.approx(float(wanted), rel=1e-5)
