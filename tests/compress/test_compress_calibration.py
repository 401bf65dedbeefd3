"""Calibration: what layers are given as a model runs, and the fit of one layer after another."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blrlab import compress, factors
from blrlab.compress import statistics as sums
from blrlab.compress.tree import compress_layer
from blrlab.errors import InputError
from blrlab.factors import Spec

KEY = jax.random.key(0)
SPECS = {"up": Spec("low_rank", 12, 20, rank=4), "down": Spec("monarch", 20, 12, (2, 2), 2)}


class Net(nn.Module):
    """Two layers, the first of which runs twice; a third is never reached."""

    twice: bool = False

    @nn.compact
    def __call__(self, x):
        up, down = nn.Dense(20, name="up"), nn.Dense(12, name="down")
        x = down(nn.relu(up(x)))
        return down(nn.relu(up(x))) if self.twice else x


def _params():
    random = np.random.default_rng(0)
    shapes = {"up": (12, 20), "down": (20, 12), "aside": (12, 20)}
    return {
        name: {"kernel": jnp.asarray(random.normal(size=size), jnp.float32), "bias": jnp.ones(size[1])}
        for name, size in shapes.items()
    }


def _batches(count=3):
    return [jnp.asarray(np.random.default_rng(seed).normal(size=(2, 16, 12)), jnp.float32) for seed in range(count)]


def _through(layer, x):
    return x @ np.asarray(factors.to_dense(layer["kernel"])) + np.asarray(layer["bias"])


@pytest.mark.parametrize("twice", [False, True])
def test_layers_are_given_what_numpy_hands_them(twice):
    params, x = _params(), np.concatenate([np.asarray(batch).reshape(-1, 12) for batch in _batches()])
    found = compress.collect(Net(twice), params, _batches(), ("up", "down"))
    rows = {"up": [x], "down": [np.maximum(_through(params["up"], x), 0)]}
    if twice:  # a layer that is used twice meets the rows of both
        rows["up"].append(_through(params["down"], rows["down"][0]))
        rows["down"].append(np.maximum(_through(params["up"], rows["up"][1]), 0))
    for path, met in rows.items():
        wanted = np.concatenate(met).astype(np.float64)
        np.testing.assert_allclose(found[path].moments(), wanted.T @ wanted / len(wanted), rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(found[path].mean, wanted.mean(0), rtol=1e-3, atol=1e-3)
        assert float(found[path].count) == len(wanted)


def test_every_layer_is_fitted_to_what_the_compressed_ones_before_hand_it():
    params, seen = _params(), []
    backwards = dict(reversed(SPECS.items()))  # the model's order counts, not this one
    small, losses = compress.compress_in_sequence(Net(), params, backwards, _batches(), KEY, seen.append)
    assert [loss.path for loss in losses] == ["up", "down"]
    assert seen == losses
    x = np.concatenate([np.asarray(batch).reshape(-1, 12) for batch in _batches()])
    for path in SPECS:
        inputs = sums.add(sums.empty(x.shape[1]), jnp.asarray(x))
        fitted = {path: dict(params[path])}
        own = jax.random.fold_in(KEY, list(backwards).index(path))
        compress_layer(fitted, path, SPECS[path], own, inputs)
        alone, together = (factors.to_dense(tree[path]["kernel"]) for tree in (fitted, small))
        # rounding may stop a fit elsewhere; fitted to the dense model's inputs, down would differ by 0.8
        assert jnp.linalg.norm(alone - together) < 1e-2 * jnp.linalg.norm(alone)
        apart = fitted[path]["bias"] - small[path]["bias"]
        assert jnp.linalg.norm(apart) < 1e-2 * jnp.linalg.norm(small[path]["bias"])
        x = np.maximum(_through(small[path], x), 0)
    assert params["up"]["bias"].tolist() == [1.0] * 20  # what was given is left as it was


def test_a_bias_gains_the_mean_of_what_is_lost():
    params = _params()
    inputs = compress.collect(Net(), params, _batches(), tuple(SPECS))
    small, losses = compress.compress(params, SPECS, KEY, statistics=inputs)
    x = np.concatenate([np.asarray(batch).reshape(-1, 12) for batch in _batches()])
    np.testing.assert_allclose(_through(small["up"], x).mean(0), _through(params["up"], x).mean(0), atol=1e-4)
    assert all(0 < loss.output_error < 1 for loss in losses)
    assert small["aside"]["kernel"] is params["aside"]["kernel"]


def test_what_cannot_be_calibrated_is_said():
    params = _params()
    with pytest.raises(InputError, match="there are no calibration inputs"):
        compress.collect(Net(), params, [], ("up",))
    with pytest.raises(InputError, match="there are no calibration inputs"):
        compress.compress_in_sequence(Net(), params, SPECS, [])
    with pytest.raises(InputError, match="no calibration input reached aside"):
        compress.collect(Net(), params, _batches(), ("up", "aside"))
    with pytest.raises(InputError, match="sideways has no dense kernel"):
        compress.collect(Net(), params, _batches(), ("sideways",))
    with pytest.raises(InputError, match="no calibration input reached aside"):
        compress.compress_in_sequence(Net(), params, {"aside": Spec("low_rank", 12, 20, rank=4)}, _batches())
    broken = [batch.at[0, 0, 0].set(jnp.nan) for batch in _batches(1)]
    with pytest.raises(InputError, match="up: its calibration inputs hold NaN"):
        compress.compress_in_sequence(Net(), params, SPECS, broken)
