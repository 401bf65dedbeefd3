"""`to_nnx`: factors in a layer of an NNX model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from blrlab import factors
from blrlab.errors import InputError
from blrlab.factors import Spec
from blrlab.layers import to_nnx

# At full rank, so that the model before and after is the same; blast from monarch's own pieces is in the laws.
FULL = (Spec("low_rank", 8, 12, rank=8), Spec("monarch", 8, 12, (2, 3), 4))
each_format = pytest.mark.parametrize("spec", FULL, ids=lambda spec: spec.format)


class MLP(nnx.Module):
    """Two layers, one of them replaced below: x [..., 8] -> [..., 4]."""

    def __init__(self, rngs, **arguments):
        self.up = nnx.Linear(8, 12, bias_init=nnx.initializers.normal(), rngs=rngs, **arguments)
        self.down = nnx.Linear(12, 4, rngs=rngs, **arguments)

    def __call__(self, x):
        return self.down(nnx.tanh(self.up(x)))


def _x(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=(*shape, 8)), jnp.float32)


def _pair(spec, **arguments):
    """Make a model, and the same one with factors in its first layer."""
    before, after = (MLP(nnx.Rngs(0), **arguments) for _ in range(2))
    kernel = jax.jit(factors.project, static_argnums=1)(after.up.kernel[...], spec)
    after.up = to_nnx(after.up, kernel)
    return before, after


@each_format
def test_at_full_rank_a_model_is_the_same_before_and_after(spec):
    before, after = _pair(spec)
    np.testing.assert_allclose(after(_x(2, 3)), before(_x(2, 3)), rtol=0, atol=1e-5)


def test_jit_split_and_merge():
    before, after = _pair(FULL[1])
    wanted = np.asarray(before(_x(2)))
    np.testing.assert_allclose(nnx.jit(lambda model, x: model(x))(after, _x(2)), wanted, rtol=0, atol=1e-5)
    definition, state = nnx.split(after)
    np.testing.assert_allclose(nnx.merge(definition, state)(_x(2)), wanted, rtol=0, atol=1e-5)
    doubled = jax.tree.map(lambda leaf: 2 * leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, state)
    assert not np.allclose(nnx.merge(definition, doubled)(_x(2)), wanted, atol=1e-3)


@each_format
def test_the_factors_and_the_bias_are_the_parameters(spec):
    _, after = _pair(spec)
    params = nnx.to_pure_dict(nnx.state(after, nnx.Param))
    assert set(params["up"]) == {"kernel", "bias"}
    assert factors.spec_of(params["up"]["kernel"]) == spec
    assert params["down"]["kernel"].shape == (12, 4)


def test_gradients_reach_the_factors():
    before, after = _pair(FULL[1])

    def loss(model):
        return jnp.sum(jnp.sin(model(_x(2, 3))))

    slopes = nnx.to_pure_dict(nnx.jit(nnx.grad(loss))(after))
    wanted = nnx.to_pure_dict(nnx.grad(loss)(before))
    kernel = nnx.to_pure_dict(nnx.state(after.up, nnx.Param))["kernel"]
    _, back = jax.vjp(factors.to_dense, kernel)
    (through,) = back(jnp.asarray(wanted["up"]["kernel"]))
    assert set(slopes["up"]["kernel"]) == set(kernel)
    for name, slope in slopes["up"]["kernel"].items():
        np.testing.assert_allclose(slope, through[name], rtol=0, atol=1e-4)
    np.testing.assert_allclose(slopes["up"]["bias"], wanted["up"]["bias"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(slopes["down"]["kernel"], wanted["down"]["kernel"], rtol=0, atol=1e-4)


def test_blast_runs():
    spec, random = Spec("blast", 8, 12, (2, 3), 5), np.random.default_rng(1)
    kernel = {name: jnp.asarray(random.normal(size=size), jnp.float32) for name, size in factors.shapes(spec).items()}
    model = MLP(nnx.Rngs(0))
    bias = np.asarray(model.up.bias[...])
    model.up = to_nnx(model.up, kernel)
    wanted = np.asarray(_x(2)) @ np.asarray(factors.to_dense(kernel)) + bias
    np.testing.assert_allclose(model.up(_x(2)), wanted, rtol=1e-5, atol=1e-4)
    assert model(_x(2)).shape == (2, 4)


def test_a_dense_kernel_stays_one():
    before, after = MLP(nnx.Rngs(0)), MLP(nnx.Rngs(0))
    after.up = to_nnx(after.up, after.up.kernel[...])
    np.testing.assert_array_equal(after(_x(2)), before(_x(2)))


@pytest.mark.parametrize(
    "arguments",
    [{"use_bias": False}, {"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}],
    ids=lambda arguments: next(iter(arguments)),
)
def test_the_layers_own_arguments_hold(arguments):
    before, after = _pair(FULL[1], **arguments)
    found, wanted = after(_x(2)), before(_x(2))
    assert found.dtype == wanted.dtype
    # bfloat16 rounds the factors, and what lies between two products, to 2^-9 of themselves.
    rounding = 4 * 2.0**-9 if jnp.bfloat16 in arguments.values() else 1e-6
    found, wanted = (np.asarray(y, np.float64) for y in (found, wanted))
    assert np.linalg.norm(found - wanted) <= rounding * np.linalg.norm(wanted)
    params = nnx.to_pure_dict(nnx.state(after.up, nnx.Param))
    assert ("bias" in params) == arguments.get("use_bias", True)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(arguments.get("param_dtype", jnp.float32))}


def test_a_kernel_of_another_size_is_refused():
    layer = nnx.Linear(8, 12, rngs=nnx.Rngs(0))
    with pytest.raises(InputError) as caught:
        to_nnx(layer, {"V": jnp.zeros((12, 3)), "U": jnp.zeros((3, 8))})
    assert str(caught.value) == "the layer is 8 x 12, but the kernel 12 x 8."
