"""GPT-2 by itself: its sizes, what it may see, its dropout, its dtypes, and factored layers in it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict
from jax.extend.core import jaxprs_in_params

from blrlab import compress, factors
from blrlab.errors import InputError
from blrlab.factors import Spec
from blrlab.models import gpt2
from blrlab.models.gpt2 import GPT2, Config

TINY = Config(vocab_size=61, context=16, layers=2, heads=3, width=24, dropout=0.5)
DENSE = FrozenDict()
SPECS = FrozenDict(
    {
        "h_0/attn/c_attn": Spec("monarch", 24, 72, (2, 3), 4),
        "h_0/mlp/c_fc": Spec("blast", 24, 96, (3, 4), 7),
        "h_1/attn/c_proj": Spec("low_rank", 24, 24, rank=5),
        "h_1/mlp/c_proj": Spec("monarch", 96, 24, (4, 2), 3),
    }
)
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 16))


def _numbers(config=TINY, specs=DENSE):
    """Draw parameters in numpy, which compiles nothing, large enough for every part to matter."""
    random = np.random.default_rng(1)

    def draw(leaf):
        return random.normal(size=leaf.shape, scale=0.3).astype(leaf.dtype)

    return {"params": jax.tree.map(draw, gpt2.parameter_shapes(config, specs))}


@functools.cache
def _model(config=TINY, specs=DENSE):
    run = jax.jit(GPT2(config, specs).apply)
    return lambda params, tokens: np.asarray(run(params, tokens))


def test_gpt2_small_has_its_published_size():
    shapes = gpt2.parameter_shapes(Config())
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 124_439_808
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}


def test_parameters_have_the_paths_and_shapes_of_the_docstring():
    found = {path: leaf.shape for path, leaf in flatten_dict(gpt2.parameter_shapes(TINY), sep="/").items()}
    block = {
        "ln_1/scale": (24,),
        "ln_1/bias": (24,),
        "attn/c_attn/kernel": (24, 72),
        "attn/c_attn/bias": (72,),
        "attn/c_proj/kernel": (24, 24),
        "attn/c_proj/bias": (24,),
        "ln_2/scale": (24,),
        "ln_2/bias": (24,),
        "mlp/c_fc/kernel": (24, 96),
        "mlp/c_fc/bias": (96,),
        "mlp/c_proj/kernel": (96, 24),
        "mlp/c_proj/bias": (24,),
    }
    blocks = {f"h_{index}/{path}": shape for index in range(2) for path, shape in block.items()}
    ends = {"wte/embedding": (61, 24), "wpe/embedding": (16, 24), "ln_f/scale": (24,), "ln_f/bias": (24,)}
    assert found == blocks | ends


@functools.cache
def _initial():
    """Initialise a model wide enough for statistics."""
    config = Config(vocab_size=97, context=32, layers=2, heads=2, width=48)
    specs = FrozenDict({"h_0/mlp/c_fc": Spec("monarch", 48, 192, (2, 4), 6)})
    run = jax.jit(lambda key: gpt2.init(config, key, specs))
    return [jax.device_get(run(jax.random.key(seed, impl="unsafe_rbg"))) for seed in (0, 0, 1)]


@pytest.mark.parametrize(
    ("path", "deviation"),
    [
        ("wte/embedding", 0.02),
        ("wpe/embedding", 0.01),
        ("h_0/attn/c_attn/kernel", 0.02),
        ("h_1/mlp/c_fc/kernel", 0.02),
        ("h_1/attn/c_proj/kernel", 0.01),  # 0.02 / sqrt(2 layers), layers being 2
        ("h_1/mlp/c_proj/kernel", 0.01),
    ],
)
def test_initial_weights_have_the_published_deviations(path, deviation):
    numbers = flatten_dict(_initial()[0], sep="/")[path]
    # The standard deviation of a sample strays by 1 / sqrt(2 n) of itself.
    bound = 5 * deviation / (2 * numbers.size) ** 0.5
    assert abs(numbers.std() - deviation) < bound
    assert abs(numbers.mean()) < 5 * deviation / numbers.size**0.5


def test_initial_biases_are_0_scales_1_and_factors_where_specs_say():
    first, again, other = (flatten_dict(tree, sep="/") for tree in _initial())
    for path, numbers in first.items():
        np.testing.assert_array_equal(numbers, again[path])
        if path.endswith(("/bias", "/scale")):
            np.testing.assert_array_equal(numbers, float(path.endswith("/scale")))
        else:
            assert not np.array_equal(numbers, other[path])
    kernel = _initial()[0]["h_0"]["mlp"]["c_fc"]["kernel"]
    assert factors.spec_of(kernel) == Spec("monarch", 48, 192, (2, 4), 6)


def test_logits_are_float32_one_for_every_word_of_every_place():
    logits = _model()(_numbers(), TOKENS)
    assert (logits.shape, logits.dtype) == ((2, 16, 61), jnp.float32)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("specs", [DENSE, SPECS], ids=["dense", "factored"])
def test_a_later_token_never_changes_an_earlier_logit(specs):
    params = _numbers(specs=specs)
    before = _model(specs=specs)(params, TOKENS)
    for place in (1, 7, 15):
        changed = TOKENS.copy()
        changed[:, place] = (changed[:, place] + 1) % 61
        after = _model(specs=specs)(params, changed)
        np.testing.assert_array_equal(after[:, :place], before[:, :place])
        assert (np.abs(after[:, place:] - before[:, place:]).max((0, 2)) > 1e-3).all()


def test_a_shorter_sequence_has_the_same_logits():
    params = _numbers()
    np.testing.assert_allclose(_model()(params, TOKENS[:, :5]), _model()(params, TOKENS)[:, :5], rtol=1e-4, atol=1e-4)


def test_sequences_of_a_batch_do_not_see_each_other():
    params = _numbers()
    np.testing.assert_allclose(_model()(params, TOKENS[::-1]), _model()(params, TOKENS)[::-1], rtol=1e-4, atol=1e-4)


def test_positions_matter():
    logits = _model()(_numbers(), np.zeros((1, 16), int))
    assert np.abs(np.diff(logits[0], axis=0)).max(1).min() > 1e-3


def test_a_factored_model_is_the_dense_one_of_its_multiplied_out_weights():
    params = _numbers(specs=SPECS)
    found = _model(specs=SPECS)(params, TOKENS)
    wide = {"params": compress.expand(params["params"])}
    assert jax.tree.map(jnp.shape, wide["params"]) == jax.tree.map(lambda leaf: leaf.shape, gpt2.parameter_shapes(TINY))
    wanted = _model()(wide, TOKENS)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_factored_parameters_are_where_compress_puts_them():
    found = gpt2.parameter_shapes(TINY, SPECS)
    assert found == compress.shapes_of(gpt2.parameter_shapes(TINY), SPECS)


@functools.cache
def _trained():
    return jax.jit(lambda params, key: GPT2(TINY).apply(params, TOKENS, train=True, rngs={"dropout": key}))


def test_dropout_acts_in_training_only():
    params = _numbers()
    keys = (jax.random.key(seed, impl="unsafe_rbg") for seed in (0, 0, 1))
    one, again, other = (np.asarray(_trained()(params, key)) for key in keys)
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other, atol=1e-2)
    assert not np.allclose(one, _model()(params, TOKENS), atol=1e-2)


def test_evaluation_needs_no_dropout_key_and_is_the_same_whatever_the_share():
    @jax.jit
    def run(params):
        none = Config(**vars(TINY) | {"dropout": 0.0})
        return GPT2(TINY).apply(params, TOKENS), GPT2(none).apply(params, TOKENS, train=True)

    np.testing.assert_array_equal(*run(_numbers()))


def test_training_with_dropout_needs_a_key():
    with pytest.raises(Exception, match="dropout"):
        jax.eval_shape(lambda params: GPT2(TINY).apply(params, TOKENS, train=True), _numbers())


def test_bfloat16_stays_near_float32():
    # Small weights, as real ones are, so that attention does not saturate.
    params = jax.tree.map(lambda leaf: leaf / 3, _numbers(specs=SPECS))
    narrow = Config(**vars(TINY) | {"dtype": "bfloat16"})
    found, wanted = (_model(config, SPECS)(params, TOKENS) for config in (narrow, TINY))
    assert found.dtype == jnp.float32
    # Each of some ten roundings on the way adds 2^-9 of the size of what it rounds.
    difference = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert 0 < difference < 10 * 2.0**-9


@pytest.mark.parametrize("specs", [DENSE, SPECS], ids=["dense", "factored"])
def test_the_model_and_its_gradients_pass_the_strictest_jax(specs):
    model = GPT2(TINY, specs)

    def loss(params, key):
        return model.apply(params, TOKENS, train=True, rngs={"dropout": key}).mean()

    params = {"params": gpt2.parameter_shapes(TINY, specs)}
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        slopes = jax.eval_shape(jax.grad(loss), params, jax.random.key(0))
    assert slopes == params


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("specs", [DENSE, SPECS], ids=["dense", "factored"])
def test_products_are_narrow_and_norms_and_softmax_in_float32(specs, dtype):
    """JAX's own attention and Flax's own norm mix dtypes, so that strict promotion cannot watch over this."""
    model = GPT2(Config(**vars(TINY) | {"dtype": dtype}), specs)
    program = jax.make_jaxpr(lambda params: model.apply(params, TOKENS))(_numbers(specs=specs))
    found = {}
    for equation in _equations(program.jaxpr):
        found.setdefault(equation.primitive.name, []).append(equation)
    # A dense layer is one product, low_rank and monarch two, blast three; attention is two, the logits one.
    assert len(found["dot_general"]) == (2 * 6 + 1 if not specs else 2 * 6 + 1 + 1 + 2 + 1 + 1)
    for name, wanted in (("dot_general", dtype), ("exp", "float32"), ("rsqrt", "float32"), ("tanh", dtype)):
        assert {str(equation.invars[0].aval.dtype) for equation in found[name]} == {wanted}, name


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)


def test_a_sequence_longer_than_the_context_is_refused():
    with pytest.raises(InputError) as caught:
        jax.eval_shape(GPT2(TINY).apply, _numbers(), np.zeros((1, 17), int))
    assert str(caught.value) == "a sequence of 17 tokens is longer than the model's context of 16."


def test_a_spec_of_another_size_names_its_layer():
    specs = FrozenDict({"h_1/mlp/c_fc": Spec("low_rank", 24, 72, rank=2)})
    with pytest.raises(InputError, match="h_1/mlp/c_fc is 24 x 96, but its spec 24 x 72"):
        gpt2.parameter_shapes(TINY, specs)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"vocab_size": 0}, "vocab_size is 0; it must be at least 1"),
        ({"context": -1}, "context is -1; it must be at least 1"),
        ({"layers": 0}, "layers is 0; it must be at least 1"),
        ({"heads": 0}, "heads is 0; it must be at least 1"),
        ({"width": 0}, "width is 0; it must be at least 1"),
        ({"heads": 7}, "7 heads do not divide its width of 768"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout is -0.1; it must be at least 0 and below 1"),
    ],
    ids=str,
)
def test_sizes_that_cannot_be_are_refused(fields, said):
    with pytest.raises(InputError, match=said):
        Config(**fields)


def test_a_config_is_hashable():
    assert hash(Config()) == hash(Config())
    assert {GPT2(TINY, SPECS): 1}[GPT2(TINY, SPECS)] == 1


def test_factored_layers_begin_as_large_as_dense_ones():
    """0.02, and less by the root of twice the depth where a layer adds to the residual stream."""
    draw = jax.jit(lambda key: gpt2.init(TINY, key, SPECS))
    draws = [draw(jax.random.key(seed)) for seed in range(40)]
    for path in SPECS:
        block, part, layer = path.split("/")
        deviation = 0.01 if layer == "c_proj" else 0.02
        weights = np.stack([factors.to_dense(params[block][part][layer]["kernel"]) for params in draws])
        means = (weights.astype(np.float64) ** 2).mean((1, 2)) / deviation**2
        assert abs(means.mean() - 1) < 5 * means.std(ddof=1) / len(draws) ** 0.5 < 0.4, path
