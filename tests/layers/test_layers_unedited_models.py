"""`factored_dense`: models of `nn.Dense` that know nothing of factors, run on trees that hold them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ScopeParamShapeError

from blrlab import compress, factors
from blrlab.errors import InputError
from blrlab.factors import Spec
from blrlab.layers import FactoredDense, factored_dense

MONARCH = Spec("monarch", 8, 12, (2, 3), 2)
BLAST = Spec("blast", 12, 8, (3, 2), 4)


class MLP(nn.Module):
    """Two layers: x [..., 8] -> [..., 8]."""

    use_bias: bool = True
    dtype: str | None = None

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(12, self.use_bias, self.dtype, name="up", bias_init=nn.initializers.normal())(x)
        return nn.Dense(8, self.use_bias, self.dtype, name="down")(nn.tanh(y))


class Nested(nn.Module):
    """Layers of every kind of declaration, one of them used twice: x [..., 8] -> [..., 8]."""

    def setup(self):
        self.blocks = [MLP() for _ in range(2)]
        self.shared = nn.Dense(8)
        self.norm = nn.LayerNorm()

    def __call__(self, x):
        for block in self.blocks:
            x = x + self.shared(block(self.norm(x)))
        return x


SPECS = {"blocks_0/up": MONARCH, "blocks_1/down": BLAST, "shared": Spec("low_rank", 8, 8, rank=3)}


def _x(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=(*shape, 8)), jnp.float32)


def _key(seed):
    """Make a key of the generator that compiles fastest."""
    return jax.random.key(seed, impl="unsafe_rbg")


def _shapes(model, specs, x=None):
    with factored_dense(specs):
        return jax.eval_shape(model.init, jax.random.key(0), _x(2) if x is None else x)


def _numbers(model, specs, x=None):
    """Draw parameters in numpy, which compiles nothing."""
    random = np.random.default_rng(1)

    def draw(leaf):
        return random.normal(size=leaf.shape, scale=0.5).astype(leaf.dtype)

    return jax.tree.map(draw, _shapes(model, specs, x))


def _losses(model, x, expand=None):
    """Make one program of a factored model and of Flax's on the multiplied-out tree: values and gradients."""

    def loss(params):
        y = model.apply(params, x)
        return jnp.sum(jnp.sin(y)), y

    def expanded_loss(params):
        return loss({"params": (expand or compress.expand)(params["params"])})

    @jax.jit
    def run(params):
        with factored_dense():
            found = jax.value_and_grad(loss, has_aux=True)(params)
        return found, jax.value_and_grad(expanded_loss, has_aux=True)(params)

    return run


def _check_losses(model, params, x, expand=None):
    ((_, y), slopes), ((_, wanted), wanted_slopes) = _losses(model, x, expand)(params)
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-5)
    assert jax.tree.structure(slopes) == jax.tree.structure(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), slopes, wanted_slopes)
    return slopes


def test_an_unedited_model_runs_factored_with_its_gradients():
    _check_losses(Nested(), _numbers(Nested(), SPECS), _x(2, 3))


def test_an_unedited_model_needs_no_jit():
    params, x = _numbers(MLP(), {"up": MONARCH}), _x(2)
    with factored_dense():
        found = MLP().apply(params, x)
    wanted = MLP().apply({"params": compress.expand(params["params"])}, x)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


@functools.cache
def _nested_init():
    @jax.jit
    def run(key):
        plain = Nested().init(key, _x(2))["params"]
        with factored_dense(SPECS | {"blocks_1/up": MONARCH}):
            return plain, Nested().init(key, _x(2))["params"]

    return run


def test_init_makes_factors_where_specs_say_and_what_flax_makes_elsewhere():
    plain, params = _nested_init()(_key(0))
    specs = SPECS | {"blocks_1/up": MONARCH}
    assert factors.spec_of(params["shared"].pop("kernel")) == specs["shared"]
    assert factors.spec_of(params["blocks_0"]["up"].pop("kernel")) == specs["blocks_0/up"]
    assert factors.spec_of(params["blocks_1"]["up"].pop("kernel")) == specs["blocks_1/up"]
    assert factors.spec_of(params["blocks_1"]["down"].pop("kernel")) == specs["blocks_1/down"]
    for layer in (plain["shared"], plain["blocks_0"]["up"], plain["blocks_1"]["up"], plain["blocks_1"]["down"]):
        del layer["kernel"]
    assert jax.tree.structure(params) == jax.tree.structure(plain)
    assert params["blocks_0"]["down"]["kernel"].shape == (12, 8)
    jax.tree.map(np.testing.assert_array_equal, params, plain)


def test_factors_are_drawn_by_the_key_and_each_layer_draws_its_own():
    one, again, other = (_nested_init()(_key(seed))[1] for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, again)
    for name in ("V", "U"):
        first, second = (one[block]["up"]["kernel"][name] for block in ("blocks_0", "blocks_1"))
        assert not np.array_equal(first, second)
        assert not np.array_equal(first, other["blocks_0"]["up"]["kernel"][name])


def test_a_dense_model_is_left_as_it_is():
    @jax.jit
    def run(key):
        found = [MLP().init_with_output(key, _x(2))]
        with factored_dense({"up": Spec("dense", 8, 12)}):
            found.append(MLP().init_with_output(key, _x(2)))
        with factored_dense():
            found.append((MLP().apply(found[0][1], _x(2)), found[0][1]))
        return found

    plain, *inside = run(_key(0))
    for found in inside:
        jax.tree.map(np.testing.assert_array_equal, found, plain)


def test_compressed_and_dense_kernels_mix_without_specs():
    params = _numbers(MLP(), {})["params"]
    small, _ = compress.compress(params, {"up": Spec("low_rank", 8, 12, rank=8)})
    with factored_dense():
        found = MLP().apply({"params": small}, _x(2))
    assert set(small["up"]["kernel"]) == {"V", "U"}
    np.testing.assert_allclose(found, MLP().apply({"params": params}, _x(2)), rtol=0, atol=1e-5)


def test_outside_the_block_flax_refuses_factors():
    with pytest.raises(ScopeParamShapeError, match="kernel"):
        jax.eval_shape(MLP().apply, _shapes(MLP(), {"up": MONARCH}), _x(2))


@pytest.mark.parametrize(
    ("use_bias", "dtype", "computed"),
    [(False, None, jnp.float32), (True, "bfloat16", jnp.bfloat16), (False, "float16", jnp.float16)],
    ids=str,
)
def test_the_layers_own_arguments_hold(use_bias, dtype, computed):
    model = MLP(use_bias, dtype)
    with factored_dense({"up": MONARCH, "down": BLAST}):
        y, params = jax.eval_shape(model.init_with_output, jax.random.key(0), _x(2))
    assert y.dtype == computed
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert ("bias" in params["params"]["up"]) == use_bias


def test_param_dtype_is_that_of_the_factors():
    params = _shapes(nn.Dense(12, param_dtype=jnp.bfloat16), {"": MONARCH})["params"]
    assert factors.spec_of(params["kernel"]) == MONARCH
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


class Keyword(nn.Module):
    """Calls its layer with a keyword, as one may."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(12, name="up")(inputs=x)


@pytest.mark.parametrize("specs", [{}, {"up": MONARCH}], ids=["dense", "factored"])
def test_inputs_may_be_a_keyword(specs):
    params = _shapes(Keyword(), specs)
    with factored_dense():
        assert jax.eval_shape(Keyword().apply, params, _x(2)).shape == (2, 12)


@pytest.mark.parametrize(
    "spec", [BLAST, Spec("low_rank", 8, 10, rank=2), Spec("dense", 12, 8)], ids=["both", "output", "dense"]
)
def test_a_spec_of_other_sizes_is_refused_by_path(spec):
    with pytest.raises(InputError) as caught:
        _shapes(MLP(), {"up": spec})
    assert str(caught.value) == f"up is 8 x 12, but its spec {spec.in_features} x {spec.out_features}."


class Scanned(nn.Module):
    """Three blocks as one, their parameters stacked: x [..., 8] -> [..., 8]."""

    rematerialised: bool = False

    @nn.compact
    def __call__(self, x):
        def step(block, carry, _):
            return carry + block(carry), None

        block = (nn.remat(MLP) if self.rematerialised else MLP)(name="block")
        scan = nn.scan(step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan(block, x, None)[0]


class Rematerialised(nn.Module):
    """A block and a layer that are computed again on the way back: x [..., 8] -> [..., 8]."""

    @nn.compact
    def __call__(self, x):
        return nn.remat(nn.Dense)(8, name="last")(nn.remat(MLP)(name="block")(x))


def _expand_stacked(params):
    layers = params["block"]
    return {
        "block": {
            name: layer | {"kernel": jax.vmap(factors.to_dense)(layer["kernel"])} for name, layer in layers.items()
        }
    }


@pytest.mark.parametrize("rematerialised", [False, True], ids=["scan", "scan of remat"])
def test_scanned_blocks_have_stacked_factors(rematerialised):
    model, specs = Scanned(rematerialised), {"block/up": MONARCH, "block/down": BLAST}
    block = _shapes(model, specs)["params"]["block"]
    for name in ("up", "down"):
        wanted = {factor: (3, *size) for factor, size in factors.shapes(specs[f"block/{name}"]).items()}
        assert jax.tree.map(lambda leaf: leaf.shape, block[name]["kernel"]) == wanted
    _check_losses(model, _numbers(model, specs), _x(2), _expand_stacked)


def test_each_scanned_layer_draws_its_own_factors():
    with factored_dense({"block/up": MONARCH}):
        params = jax.jit(Scanned().init)(jax.random.key(0), _x(2))["params"]
    first, second, _ = params["block"]["up"]["kernel"]["V"]
    assert not np.array_equal(first, second)


def test_rematerialised_blocks_and_layers():
    model, specs = Rematerialised(), {"block/up": MONARCH, "last": Spec("low_rank", 8, 8, rank=3)}
    slopes = _check_losses(model, _numbers(model, specs), _x(2))["params"]
    assert factors.spec_of(slopes["block"]["up"]["kernel"]) == MONARCH
    assert factors.spec_of(slopes["last"]["kernel"]) == specs["last"]


def test_intermediates_are_still_captured():
    with factored_dense():
        run = functools.partial(MLP().apply, capture_intermediates=True)
        _, state = jax.eval_shape(run, _shapes(MLP(), {"up": MONARCH}), _x(2))
    assert state["intermediates"]["up"]["__call__"][0].shape == (2, 12)


def test_the_block_ends_with_an_error():
    with pytest.raises(RuntimeError, match="mine"), factored_dense():
        raise RuntimeError("mine")
    with pytest.raises(ScopeParamShapeError, match="kernel"):
        jax.eval_shape(MLP().apply, _shapes(MLP(), {"up": MONARCH}), _x(2))


def test_a_spec_for_no_layer_is_refused():
    """A path with a typing error would leave its layer dense and say nothing."""
    with pytest.raises(InputError, match="upp"):
        _shapes(MLP(), {"upp": MONARCH})


class Ours(nn.Module):
    """A dense and a factored layer of this project's own: x [..., 8] -> [..., 8]."""

    @nn.compact
    def __call__(self, x):
        return FactoredDense(8, spec=BLAST, name="down")(FactoredDense(12, name="up")(x))


def test_our_own_layers_take_factors_too():
    _check_losses(Ours(), _numbers(Ours(), {"up": MONARCH}), _x(2), _without_down)


def _without_down(params):
    """Multiply out what the model takes as dense."""
    return params | {"up": compress.expand(params["up"])}


class Others(nn.Module):
    """Layers with kernels that are no `nn.Dense`: x [B, T, 8] -> [B, T, 8]."""

    @nn.compact
    def __call__(self, x):
        return nn.Conv(8, (3,), name="conv")(nn.DenseGeneral(8, name="general")(x))


def test_other_layers_are_untouched():
    @jax.jit
    def run(key):
        plain = Others().init_with_output(key, _x(2, 4))
        with factored_dense():
            return plain, Others().init_with_output(key, _x(2, 4))

    plain, inside = run(_key(0))
    jax.tree.map(np.testing.assert_array_equal, plain, inside)
