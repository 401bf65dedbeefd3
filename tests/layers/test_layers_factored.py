"""`FactoredDense`: `nn.Dense` to the bit where it is dense, the product of its factors where it is not."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ScopeParamShapeError

from blrlab import factors
from blrlab.errors import InputError
from blrlab.factors import Spec
from blrlab.layers import FactoredDense, linear

FACTORED = (
    Spec("low_rank", 12, 20, rank=5),
    Spec("monarch", 12, 20, (3, 2), 3),
    Spec("blast", 12, 20, (3, 2), 5),
)
each_format = pytest.mark.parametrize("spec", FACTORED, ids=lambda spec: spec.format)


def _x(*shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(0).normal(size=(*shape, 12)), dtype)


def _key(seed):
    """Make a key of the generator that compiles fastest."""
    return jax.random.key(seed, impl="unsafe_rbg")


def _numbers(spec):
    random = np.random.default_rng(1)
    return {name: random.normal(size=size).astype(np.float32) for name, size in factors.shapes(spec).items()}


def _halving_dot(left, right, dimensions, precision=None):
    assert precision == jax.lax.Precision.HIGH
    return jax.lax.dot_general(left / 2, right, dimensions, precision=precision)


ARGUMENTS = {
    "defaults": {},
    "no bias": {"use_bias": False},
    "dtype": {"dtype": jnp.bfloat16},
    "dtype and param_dtype": {"dtype": "float16", "param_dtype": jnp.bfloat16},
    "param_dtype": {"param_dtype": jnp.bfloat16},
    "precision": {"precision": "highest"},
    "initialisers": {"kernel_init": nn.initializers.normal(0.2), "bias_init": nn.initializers.normal(0.5)},
    "dot_general": {"dot_general": _halving_dot, "precision": jax.lax.Precision.HIGH},
}
DENSE = (nn.Dense, FactoredDense, functools.partial(FactoredDense, spec=Spec("dense", 12, 20)))


@functools.cache
def _dense_layers():
    """Initialise and run Flax's layer and both of ours with all arguments, as one program."""

    @jax.jit
    def run(key, x):
        return {
            name: [kind(20, **arguments).init_with_output(key, x) for kind in DENSE]
            for name, arguments in ARGUMENTS.items()
        }

    return run(_key(1), _x(2, 3))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_dense_layer_is_flaxs_to_the_bit(name):
    theirs, *ours = _dense_layers()[name]
    for found in ours:
        assert jax.tree.structure(found) == jax.tree.structure(theirs)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(theirs), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["dtype", "dtype and param_dtype", "param_dtype", "initialisers", "dot_general"])
def test_the_arguments_above_matter(name):
    """Else the test before this one could not fail."""
    plain, changed = (np.asarray(_dense_layers()[key][1][0], np.float32) for key in ("defaults", name))
    assert not np.array_equal(plain, changed)


@pytest.mark.parametrize("leading", [(), (2, 3), (0,)], ids=str)
@each_format
def test_a_factored_layer_multiplies_by_its_factors_and_adds_its_bias(spec, leading):
    layer, kernel, bias = FactoredDense(20, spec=spec), _numbers(spec), np.arange(20, dtype=np.float32)
    y = jax.jit(layer.apply)({"params": {"kernel": kernel, "bias": bias}}, _x(*leading))
    wanted = np.asarray(_x(*leading)) @ np.asarray(factors.to_dense(kernel)) + bias
    assert y.shape == (*leading, 20)
    assert y.dtype == jnp.float32
    # Three sums of at most 12 and 15 float32 products of numbers of size 1.
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-4)


@each_format
def test_a_factored_layer_makes_its_factors_and_its_bias(spec):
    layer = FactoredDense(20, spec=spec, bias_init=nn.initializers.constant(0.5))
    params = jax.jit(layer.init)(_key(1), _x(2))["params"]
    assert set(params) == {"kernel", "bias"}
    assert factors.spec_of(params["kernel"]) == spec
    np.testing.assert_array_equal(params["bias"], np.full(20, 0.5))
    assert all(float(jnp.std(leaf)) > 0 for leaf in params["kernel"].values())


@pytest.mark.parametrize(
    ("arguments", "given", "kept", "computed"),
    [
        ({}, jnp.float32, jnp.float32, jnp.float32),
        ({}, jnp.bfloat16, jnp.float32, jnp.float32),
        ({"dtype": "bfloat16"}, jnp.float32, jnp.float32, jnp.bfloat16),
        ({"param_dtype": jnp.bfloat16}, jnp.float32, jnp.bfloat16, jnp.float32),
        ({"param_dtype": jnp.bfloat16}, jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
        ({"dtype": jnp.float16, "param_dtype": jnp.bfloat16}, jnp.float32, jnp.bfloat16, jnp.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("spec", [None, *FACTORED], ids=lambda spec: spec.format if spec else "none")
def test_dtypes_are_those_of_flax(spec, arguments, given, kept, computed):
    for layer in (FactoredDense(20, spec=spec, **arguments), nn.Dense(20, **arguments)):
        y, params = jax.eval_shape(layer.init_with_output, jax.random.key(1), _x(2, dtype=given))
        assert y.dtype == computed
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(kept)}


@each_format
def test_layers_pass_the_strictest_jax(spec):
    layer = FactoredDense(20, spec=spec, dtype=jnp.bfloat16)

    def loss(params, x):
        return layer.apply(params, x).astype(jnp.float32).sum()

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        params = jax.eval_shape(layer.init, jax.random.key(1), _x(2, 3))
        slopes = jax.eval_shape(jax.grad(loss), params, _x(2, 3))
    assert slopes == params


def test_without_a_bias_there_is_none():
    layer = FactoredDense(20, spec=FACTORED[1], use_bias=False)
    params = jax.eval_shape(layer.init, jax.random.key(1), _x(2))["params"]
    assert set(params) == {"kernel"}


def test_factors_can_be_initialised_otherwise():
    def ones(key, spec, dtype):
        return jax.tree.map(lambda size: jnp.ones(size, dtype), factors.shapes(spec), is_leaf=_is_size)

    def _is_size(node):
        return isinstance(node, tuple)

    layer = FactoredDense(20, spec=FACTORED[2], factor_init=ones, param_dtype=jnp.bfloat16)
    y, variables = layer.init_with_output(jax.random.key(1), jnp.ones((1, 12), jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(y, np.full((1, 20), 60))  # 12 inputs x rank 5


class _Outer(nn.Module):
    spec: Spec | None
    features: int = 20

    @nn.compact
    def __call__(self, x):
        return FactoredDense(self.features, spec=self.spec, name="inner")(x)


@pytest.mark.parametrize(
    ("spec", "features", "said"),
    [
        (Spec("monarch", 24, 20, (3, 2), 3), 20, "inner is 12 x 20, but its spec 24 x 20."),
        (Spec("low_rank", 12, 20, rank=5), 21, "inner is 12 x 21, but its spec 12 x 20."),
        (Spec("dense", 20, 12), 20, "inner is 12 x 20, but its spec 20 x 12."),
    ],
    ids=["input", "output", "dense"],
)
def test_a_spec_of_other_sizes_is_refused_by_path(spec, features, said):
    with pytest.raises(InputError) as caught:
        jax.eval_shape(_Outer(spec, features).init, jax.random.key(0), _x(2))
    assert str(caught.value) == said


@each_format
def test_a_factored_kernel_needs_a_factored_layer(spec):
    """Whether a tree fits is Flax's to say; it must not run as something else."""
    dense = FactoredDense(20)
    params = jax.eval_shape(FactoredDense(20, spec=spec).init, jax.random.key(0), _x(2))
    with pytest.raises(ScopeParamShapeError, match="kernel"):
        jax.eval_shape(dense.apply, params, _x(2))


@each_format
def test_linear_computes_in_the_dtype_it_is_given(spec):
    kernel = jax.eval_shape(lambda: factors.init(jax.random.key(0), spec))
    bias = jax.ShapeDtypeStruct((20,), jnp.float32)
    for dtype, wanted in ((None, jnp.float32), (jnp.bfloat16, jnp.bfloat16)):
        found = jax.eval_shape(lambda *args, dtype=dtype: linear(*args, dtype), kernel, bias, _x(3, dtype=jnp.bfloat16))
        assert (found.shape, found.dtype) == ((3, 20), wanted)


def test_linear_takes_a_dense_kernel_and_no_bias():
    kernel = np.random.default_rng(1).normal(size=(12, 20)).astype(np.float32)
    np.testing.assert_allclose(linear(jnp.asarray(kernel), None, _x(3)), np.asarray(_x(3)) @ kernel, atol=1e-5)
