"""What every format promises, on one table of awkward sizes, against block-by-block sums in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blrlab_ops import cost

from blrlab import factors
from blrlab.errors import InputError
from blrlab.factors import Spec

# Sizes that are no powers of two, b1 != b2, ranks above a block's (and a layer's) smaller side, 1 x 1 blocks.
TABLE = (
    Spec("dense", 12, 20),
    Spec("dense", 7, 1),
    Spec("low_rank", 12, 20, rank=5),
    Spec("low_rank", 7, 15, rank=1),
    Spec("low_rank", 6, 10, rank=9),
    Spec("monarch", 12, 20, (3, 2), 3),
    Spec("monarch", 15, 14, (3, 7), 7),
    Spec("monarch", 10, 6, (1, 3), 4),
    Spec("monarch", 6, 5, (6, 5), 1),
    Spec("blast", 12, 20, (3, 2), 5),
    Spec("blast", 15, 14, (3, 7), 17),
    Spec("blast", 6, 5, (6, 5), 1),
    Spec("blast", 7, 11, (1, 1), 2),
)
ONE_OF_EACH = tuple(next(spec for spec in TABLE if spec.format == name) for name in factors.FORMATS)
SPREAD = tuple(spec for spec in TABLE if spec in ONE_OF_EACH or spec.rank > min(spec.block_sizes))
FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)
LEADING = ((), (3,), (2, 3), (0,))


def _name(value) -> str:
    if isinstance(value, Spec):
        b1, b2 = value.blocks
        return f"{value.format}-{value.in_features}x{value.out_features}-{b1}x{b2}-{value.rank}"
    return getattr(value, "__name__", str(value))


each_spec = pytest.mark.parametrize("spec", TABLE, ids=_name)


def _by_hand(kernel, spec):
    """Multiply a kernel out in numpy's float64, block by block, straight from the definition of each format."""
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), kernel)
    if spec.format == "dense":
        return wide
    V, U = wide["V"], wide["U"]
    if spec.format == "low_rank":
        return V @ U

    def block(l, k):
        return V[l, k] @ U[l, k] if spec.format == "monarch" else V[l] @ np.diag(wide["S"][l, k]) @ U[k]

    b1, b2 = spec.blocks
    return np.block([[block(l, k) for k in range(b2)] for l in range(b1)])


def _numbers(spec, dtype=np.float64, seed=0):
    """Draw a kernel in numpy, which compiles nothing."""
    random = np.random.default_rng(seed)
    sizes = factors.shapes(spec)
    if not isinstance(sizes, dict):
        return random.normal(size=sizes).astype(dtype)
    return {name: random.normal(size=size).astype(dtype) for name, size in sizes.items()}


def _inputs(spec, leading, dtype=np.float64):
    return np.random.default_rng(7).normal(size=(*leading, spec.in_features)).astype(dtype)


def _slopes(spec):
    return np.random.default_rng(8).normal(size=(2, 3, spec.out_features))


def _stacked(spec):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *(_numbers(spec, seed=seed) for seed in range(3)))


@functools.cache
def _in_float64(spec):
    """Run everything a format computes as one program, compiled once."""

    @jax.jit
    def run(kernel, kernels, inputs, slope):
        def value(kernel, x, product):
            return jnp.sum(slope * jnp.tanh(product(kernel, x)))

        def dense_product(kernel, x):
            return x @ factors.to_dense(kernel)

        x = inputs[(2, 3)]
        slopes_of = jax.grad(value, argnums=(0, 1))
        return {
            "dense": factors.to_dense(kernel),
            "y": {leading: factors.apply(kernel, x) for leading, x in inputs.items()},
            "over kernels": jax.vmap(factors.apply, in_axes=(0, None))(kernels, x),
            "over inputs": jax.vmap(factors.apply, in_axes=(None, 1), out_axes=1)(kernel, x),
            "slopes": slopes_of(kernel, x, factors.apply),
            "dense slopes": slopes_of(kernel, x, dense_product),
        }

    with jax.enable_x64(True):
        inputs = {leading: _inputs(spec, leading) for leading in LEADING}
        return jax.device_get(run(_numbers(spec), _stacked(spec), inputs, _slopes(spec)))


@functools.cache
def _in_every_float(spec):
    """Run apply and to_dense in each dtype, with JAX at its strictest, as one program."""

    @jax.jit
    def run(kernel, x):
        found = {}
        for dtype in FLOATS:
            narrow, inputs = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), (kernel, x))
            found[_name(dtype)] = narrow, inputs, factors.apply(narrow, inputs), factors.to_dense(narrow)
        return found

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        return jax.device_get(run(_numbers(spec, np.float32), _inputs(spec, (5,), np.float32)))


def _key(seed):
    """Make a key of the generator that compiles fastest."""
    return jax.random.key(seed, impl="unsafe_rbg")


def _sizes(kernel):
    return jax.tree.map(lambda leaf: leaf.shape, kernel)


def _roundings(spec, dtype):
    """Bound the relative error of a product against the product of magnitudes, whatever the order of its sums.

    Up to three contractions, whose sums of at most i + r + b1 terms are kept in float32, and whose results (and
    the partial sums of a split contraction) are rounded to `dtype`.
    """
    summed = (spec.in_features + spec.rank + spec.blocks[0]) * float(jnp.finfo(jnp.float32).eps)
    return summed + 4 * float(jnp.finfo(dtype).eps)


@each_spec
def test_kernels_have_the_shapes_and_the_count_that_are_promised(spec):
    kernel = jax.eval_shape(lambda: factors.init(jax.random.key(0), spec))
    held = sum(leaf.size for leaf in jax.tree.leaves(kernel))
    assert _sizes(kernel) == factors.shapes(spec)
    assert isinstance(kernel, dict) == (spec.format != "dense")
    assert held == factors.parameter_count(spec)
    assert held == cost.params(spec.format, spec.in_features, spec.out_features, spec.blocks, spec.rank)


@each_spec
def test_a_kernel_tells_its_format_and_spec(spec):
    kernel = _numbers(spec)
    assert factors.format_of(kernel) == spec.format
    for given in (kernel, jax.eval_shape(lambda: kernel)):
        assert factors.is_kernel(given)
        assert factors.spec_of(given) == spec


@each_spec
def test_to_dense_follows_the_definition_of_the_format(spec):
    found = _in_float64(spec)["dense"]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, _by_hand(_numbers(spec), spec), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("leading", LEADING, ids=str)
@each_spec
def test_apply_multiplies_by_the_weight(spec, leading):
    y = _in_float64(spec)["y"][leading]
    assert y.shape == (*leading, spec.out_features)
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, _inputs(spec, leading) @ _by_hand(_numbers(spec), spec), rtol=0, atol=1e-12)


@pytest.mark.parametrize("spec", ONE_OF_EACH, ids=_name)
def test_apply_needs_no_jit(spec):
    with jax.enable_x64(True):
        y = factors.apply(jax.tree.map(jnp.asarray, _numbers(spec)), jnp.asarray(_inputs(spec, (2, 3))))
    np.testing.assert_allclose(y, _in_float64(spec)["y"][2, 3], rtol=0, atol=1e-12)


@each_spec
def test_apply_under_vmap_over_inputs_and_over_kernels(spec):
    found, x = _in_float64(spec), _inputs(spec, (2, 3))
    weights = [_by_hand(_numbers(spec, seed=seed), spec) for seed in range(3)]
    np.testing.assert_allclose(found["over kernels"], [x @ weight for weight in weights], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found["over inputs"], x @ weights[0], rtol=0, atol=1e-12)


@each_spec
def test_gradients_are_those_of_the_dense_product(spec):
    found, wanted = _in_float64(spec)["slopes"], _in_float64(spec)["dense slopes"]
    assert _sizes(found) == (factors.shapes(spec), (2, 3, spec.in_features))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-11), found, wanted)
    # And both are right: that of x, by hand.
    weight = _by_hand(_numbers(spec), spec)
    outside = _slopes(spec) / np.cosh(_inputs(spec, (2, 3)) @ weight) ** 2
    np.testing.assert_allclose(found[1], outside @ weight.T, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", FLOATS, ids=_name)
@each_spec
def test_dtypes_are_kept_under_strict_promotion(spec, dtype):
    def everything(key, x):
        kernel = factors.init(key, spec, dtype)
        y, weight = factors.apply(kernel, x), factors.to_dense(kernel)
        slopes = jax.grad(lambda *args: factors.apply(*args).sum(), argnums=(0, 1))(kernel, x)
        return kernel, y, weight, slopes

    x = jax.ShapeDtypeStruct((2, 3, spec.in_features), dtype)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        found = jax.eval_shape(everything, jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("dtype", FLOATS, ids=_name)
@pytest.mark.parametrize("spec", ONE_OF_EACH, ids=_name)
def test_rounding_is_all_the_error(spec, dtype):
    kernel, x, y, weight = _in_every_float(spec)[_name(dtype)]
    assert {leaf.dtype for leaf in jax.tree.leaves((kernel, x, y, weight))} == {jnp.dtype(dtype)}
    exact, x = _by_hand(kernel, spec), np.asarray(x, np.float64)
    magnitudes, bound = _by_hand(jax.tree.map(np.abs, kernel), spec), _roundings(spec, dtype)
    # Below its smallest normal number, float16 has an absolute spacing instead.
    floor = 4 * float(jnp.finfo(dtype).smallest_normal)
    assert np.all(np.abs(np.asarray(weight, np.float64) - exact) <= bound * magnitudes + floor)
    error = np.abs(np.asarray(y, np.float64) - x @ exact)
    assert np.all(error <= bound * (np.abs(x) @ magnitudes) + floor)


@pytest.mark.parametrize("spec", ONE_OF_EACH, ids=_name)
def test_strict_promotion_refuses_to_mix_dtypes(spec):
    kernel, x = _numbers(spec, jnp.bfloat16), _inputs(spec, (3,), np.float32)
    with jax.numpy_dtype_promotion("strict"), pytest.raises(Exception, match="no available implicit dtype promotion"):
        jax.eval_shape(factors.apply, kernel, x)


@pytest.mark.parametrize("spec", ONE_OF_EACH, ids=_name)
def test_project_keeps_the_dtype_and_works_in_float32(spec):
    @jax.jit
    def run(weights):
        # One program, so that what is computed in float32 is the same, and only its rounding differs.
        return [factors.project(weight, spec) for weight in weights]

    weight = np.random.default_rng(3).normal(size=(spec.in_features, spec.out_features)).astype(jnp.bfloat16)
    with jax.numpy_rank_promotion("raise"):
        exact, kernel = run([weight.astype(np.float32), weight])
    assert {leaf.dtype for leaf in jax.tree.leaves(exact)} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(kernel)} == {jnp.dtype(jnp.bfloat16)}
    for narrow, wide in zip(jax.tree.leaves(kernel), jax.tree.leaves(exact), strict=True):
        rounding = 2.0**-8  # half a unit in the last of bfloat16's 8 digits
        np.testing.assert_allclose(narrow.astype(np.float32), wide, rtol=rounding, atol=1e-4)


@pytest.mark.parametrize("dtype", FLOATS, ids=_name)
@pytest.mark.parametrize("spec", ONE_OF_EACH, ids=_name)
def test_project_under_strict_promotion(spec, dtype):
    weight = jax.ShapeDtypeStruct((spec.in_features, spec.out_features), dtype)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        kernel = jax.eval_shape(lambda weight: factors.project(weight, spec), weight)
    assert {leaf.dtype for leaf in jax.tree.leaves(kernel)} == {jnp.dtype(dtype)}
    assert _sizes(kernel) == factors.shapes(spec)


def test_project_names_a_weight_of_the_wrong_shape():
    with pytest.raises(InputError, match=r"shape \(20, 12\) is not 12 x 20, as its monarch spec says"):
        factors.project(jnp.zeros((20, 12)), Spec("monarch", 12, 20, (3, 2), 3))


def test_a_random_start_is_the_keys():
    weight = np.random.default_rng(3).normal(size=(6, 4)).astype(np.float32)
    run = jax.jit(lambda key: factors.project(weight, Spec("blast", 6, 4, (3, 2), 1), key)["V"])
    first, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


DRAWS = 4000


@functools.partial(jax.jit, static_argnums=1)
def _moments(key, spec):
    """Return the mean and the mean square, of every draw, of the weight's entries in units of 1 / sqrt(i)."""

    def moments(key):
        scaled = factors.to_dense(factors.init(key, spec)) * spec.in_features**0.5
        return scaled.mean(), (scaled**2).mean()

    return jax.lax.map(moments, jax.random.split(key, DRAWS))


@pytest.mark.parametrize("spec", SPREAD, ids=_name)
def test_initial_weights_have_mean_0_and_variance_1_over_in_features(spec):
    means, squares = (np.asarray(found, np.float64) for found in _moments(_key(4), spec))
    for found, wanted in ((means, 0), (squares, 1)):
        # Draws are independent, so their mean strays by its own standard error; 5 of them happen once in 10^6.
        standard_error = found.std(ddof=1) / DRAWS**0.5
        assert standard_error < 0.04
        assert abs(found.mean() - wanted) < 5 * standard_error


@pytest.mark.parametrize("spec", ONE_OF_EACH, ids=_name)
def test_init_depends_on_the_key_alone(spec):
    run = jax.jit(lambda key: factors.init(key, spec))
    first, again, other = (jax.tree.leaves(run(_key(seed))) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    # Two draws with the same numbers would come of a key used twice.
    leaves = [np.ravel(leaf / leaf.std()) for leaf in (*first, *other)]
    for left, right in itertools.combinations(leaves, 2):
        few = min(left.size, right.size)
        assert not np.allclose(left[:few], right[:few], atol=0.1)


@pytest.mark.parametrize(
    "node",
    [
        jnp.zeros(3),
        jnp.zeros((2, 3, 4)),
        0.5,
        None,
        {},
        {"V": jnp.zeros((2, 3))},
        {"V": jnp.zeros((2, 3)), "U": jnp.zeros((1, 3, 4))},
        {"V": jnp.zeros((2, 3)), "U": jnp.zeros((3, 4)), "bias": jnp.zeros(4)},
        {"V": {"kernel": jnp.zeros((2, 3))}, "U": jnp.zeros((3, 4))},
    ],
    ids=repr,
)
def test_what_is_no_kernel(node):
    assert not factors.is_kernel(node)


def test_unknown_factors_are_named_with_their_shapes():
    with pytest.raises(InputError, match=r"'V': \(2, 3\), 'W': \(3, 4\).*low_rank and monarch have V, U"):
        factors.format_of({"V": jnp.zeros((2, 3)), "W": jnp.zeros((3, 4))})


@pytest.mark.parametrize(
    "sizes",
    [
        {"V": (12, 3), "U": (4, 20)},
        {"V": (3, 2, 4, 3), "U": (3, 2, 5, 10)},
        {"V": (3, 2, 4, 3), "U": (2, 3, 3, 10)},
        {"V": (3, 4, 5), "S": (3, 2, 4), "U": (2, 5, 10)},
        {"V": (3, 4, 5), "S": (2, 3, 5), "U": (2, 5, 10)},
    ],
    ids=str,
)
def test_factors_that_do_not_fit_together_are_named(sizes):
    kernel = {name: jnp.zeros(size) for name, size in sizes.items()}
    with pytest.raises(InputError, match=r"do not fit together; .* would\."):
        factors.spec_of(kernel)
