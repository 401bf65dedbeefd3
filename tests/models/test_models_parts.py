"""Blocks run as one program, activations computed again, and what is kept between calls."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

from blrlab.errors import InputError
from blrlab.factors import Spec
from blrlab.models import gpt2, llama, parts
from blrlab.models.parts import KeyValues, attend

SIZES = {"gpt2": gpt2.Config(61, 16, 3, 3, 24, dropout=0.0), "llama": llama.Config(61, 16, 3, 4, 2, 24, 40)}
MODELS = {"gpt2": (gpt2, gpt2.GPT2), "llama": (llama, llama.Llama)}
SPECS = {
    "gpt2": {f"h_{index}/mlp/c_fc": Spec("blast", 24, 96, (3, 4), 7) for index in range(3)},
    "llama": {f"layers_{index}/self_attn/k_proj": Spec("monarch", 24, 12, (2, 3), 3) for index in range(3)},
}
TOKENS = jnp.arange(20).reshape(2, 10)


def _loss(kind, specs, params, key=None, **changes):
    made = MODELS[kind][1](dataclasses.replace(SIZES[kind], **changes), FrozenDict(specs))

    def loss(params):
        given = {} if key is None else {"train": True, "rngs": {"dropout": key}}
        return (made.apply({"params": params}, TOKENS, **given) ** 2).mean()

    return jax.jit(jax.value_and_grad(loss))(params)


@functools.cache
def _params(kind, factored):
    return MODELS[kind][0].init(SIZES[kind], jax.random.key(0), FrozenDict(SPECS[kind] if factored else {}))


@pytest.mark.parametrize("factored", [False, True], ids=["dense", "factored"])
@pytest.mark.parametrize("changes", [{"remat": True}, {"scan": True}, {"remat": True, "scan": True}], ids=str)
@pytest.mark.parametrize("kind", list(SIZES))
def test_how_blocks_are_run_changes_no_number(kind, changes, factored):
    specs, params = SPECS[kind] if factored else {}, _params(kind, factored)
    wanted, found = (_loss(kind, specs, params, **each) for each in ({}, changes))
    assert float(found[0]) == pytest.approx(float(wanted[0]), rel=1e-5)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted[1]))

    def agree(one, other):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=0, atol=1e-4 * largest)

    jax.tree.map(agree, found[1], wanted[1])


@pytest.mark.parametrize("kind", list(SIZES))
def test_parameters_are_drawn_alike(kind):
    module, _ = MODELS[kind]
    scanned = dataclasses.replace(SIZES[kind], scan=True, remat=True)
    jax.tree.map(np.testing.assert_array_equal, module.init(scanned, jax.random.key(0)), _params(kind, False))


def test_what_is_dropped_follows_the_seed():
    params = _params("gpt2", False)
    losses = [float(_loss("gpt2", {}, params, jax.random.key(seed), dropout=0.5, scan=True)[0]) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_unlike_blocks_are_no_one_program():
    specs = FrozenDict({"h_1/mlp/c_fc": Spec("blast", 24, 96, (3, 4), 7)})
    sizes = dataclasses.replace(SIZES["gpt2"], scan=True)
    params = gpt2.init(sizes, jax.random.key(0), specs)
    with pytest.raises(InputError, match="scan runs all blocks as one, but h_1 has other formats or ranks than h_0"):
        gpt2.GPT2(sizes, specs).apply({"params": params}, TOKENS)


def test_keys_and_values_are_written_at_their_positions():
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.normal(size=(2, 6, heads, 4)), jnp.float32) for heads in (4, 2, 2))
    positions = jnp.arange(6)[None]
    wanted, nothing = attend(q, k, v, positions)
    assert nothing is None
    kept = KeyValues(jnp.full((2, 9, 2, 4), 7.0), jnp.full((2, 9, 2, 4), 7.0))  # what lies there is not seen
    first, kept = attend(q[:, :4], k[:, :4], v[:, :4], positions[:, :4], kept)
    second, kept = attend(q[:, 4:], k[:, 4:], v[:, 4:], positions[:, 4:], kept)
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), wanted, atol=1e-6)
    np.testing.assert_array_equal(kept.keys[:, :6], k)
    np.testing.assert_array_equal(kept.values[:, :6], v)


def test_one_position_of_each_row():
    x = jnp.arange(24.0).reshape(2, 4, 3)
    assert parts.at_rows(x, jnp.array([1, 3])).tolist() == [[[3.0, 4, 5]], [[21.0, 22, 23]]]
    assert parts.at_rows(x, None) is x


def test_the_logits_of_one_position_are_those_of_all():
    params, model = _params("llama", False), llama.Llama(SIZES["llama"])
    only = jnp.array([2, 9])
    found = model.apply({"params": params}, TOKENS, only=only)
    wanted = model.apply({"params": params}, TOKENS)[jnp.arange(2), only]
    np.testing.assert_allclose(found[:, 0], wanted, rtol=1e-5, atol=1e-6)
