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
    Spec("monarch", 7, 11, (1, 1), 2),
    Spec("blast", 12, 20, (3, 2), 5),
    Spec("blast", 15, 14, (3, 7), 17),
    Spec("blast", 10, 6, (1, 3), 4),
    Spec("blast", 6, 5, (6, 5), 1),
    Spec("blast", 7, 11, (1, 1), 2),
)
ONE_OF_EACH = tuple(next(spec for spec in TABLE if spec.format == name) for name in factors.FORMATS)
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


def _draw(spec, dtype=jnp.float32, leading=(5,), seed=0):
    kernel = factors.init(jax.random.key(seed), spec, dtype)
    x = jax.random.normal(jax.random.key(seed + 1), (*leading, spec.in_features), dtype)
    return kernel, x


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
    kernel, _ = _draw(spec)
    held = sum(leaf.size for leaf in jax.tree.leaves(kernel))
    assert _sizes(kernel) == factors.shapes(spec)
    assert isinstance(kernel, dict) == (spec.format != "dense")
    assert held == factors.parameter_count(spec)
    assert held == cost.params(spec.format, spec.in_features, spec.out_features, spec.blocks, spec.rank)


@each_spec
def test_a_kernel_tells_its_format_and_spec(spec):
    kernel, _ = _draw(spec)
    assert factors.format_of(kernel) == spec.format
    assert factors.spec_of(kernel) == spec
    assert factors.is_kernel(kernel)
    shapes = jax.eval_shape(lambda: kernel)
    assert factors.is_kernel(shapes)
    assert factors.spec_of(shapes) == spec


@each_spec
def test_to_dense_follows_the_definition_of_the_format(spec):
    with jax.enable_x64(True):
        kernel, _ = _draw(spec, jnp.float64)
        found = factors.to_dense(kernel)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, _by_hand(kernel, spec), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("leading", LEADING, ids=str)
@each_spec
def test_apply_multiplies_by_the_weight(spec, leading):
    with jax.enable_x64(True):
        kernel, x = _draw(spec, jnp.float64, leading)
        wanted = np.asarray(x) @ _by_hand(kernel, spec)
        for run in (factors.apply, jax.jit(factors.apply)):
            y = run(kernel, x)
            assert y.shape == (*leading, spec.out_features)
            assert y.dtype == jnp.float64
            np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-13)


@each_spec
def test_apply_under_vmap_over_inputs_and_over_kernels(spec):
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 3)
        kernels = jax.vmap(lambda key: factors.init(key, spec, jnp.float64))(keys)
        x = jax.random.normal(jax.random.key(1), (3, 4, spec.in_features), jnp.float64)
        weights = [_by_hand(jax.tree.map(lambda leaf: leaf[n], kernels), spec) for n in range(3)]
        found = jax.vmap(factors.apply)(kernels, x)
        np.testing.assert_allclose(found, np.asarray(x) @ np.stack(weights), rtol=0, atol=1e-13)
        first = jax.tree.map(lambda leaf: leaf[0], kernels)
        found = jax.vmap(factors.apply, in_axes=(None, 1), out_axes=1)(first, x)
        np.testing.assert_allclose(found, np.asarray(x) @ weights[0], rtol=0, atol=1e-13)


@each_spec
def test_gradients_are_those_of_the_dense_product(spec):
    with jax.enable_x64(True):
        kernel, x = _draw(spec, jnp.float64, (2, 3))
        slope = np.asarray(jax.random.normal(jax.random.key(2), (2, 3, spec.out_features), jnp.float64))

        def value(kernel, x):
            return jnp.sum(slope * jnp.tanh(factors.apply(kernel, x)))

        def dense_value(kernel, x):
            return jnp.sum(slope * jnp.tanh(x @ factors.to_dense(kernel)))

        found = jax.jit(jax.grad(value, argnums=(0, 1)))(kernel, x)
        wanted = jax.grad(dense_value, argnums=(0, 1))(kernel, x)
        assert jax.tree.structure(found) == jax.tree.structure((kernel, x))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), found, wanted)


@pytest.mark.parametrize("dtype", FLOATS, ids=_name)
@each_spec
def test_dtypes_are_kept_and_rounding_is_all_the_error(spec, dtype):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        kernel, x = _draw(spec, dtype)
        y, weight = jax.jit(factors.apply)(kernel, x), factors.to_dense(kernel)
        slopes = jax.grad(lambda *args: factors.apply(*args).sum(), argnums=(0, 1))(kernel, x)
    assert {leaf.dtype for leaf in jax.tree.leaves((kernel, y, weight, slopes))} == {jnp.dtype(dtype)}
    magnitudes = _by_hand(jax.tree.map(jnp.abs, kernel), spec)
    bound = _roundings(spec, dtype)
    # float16 has no fewer digits than its eps only above its smallest normal number.
    floor = 4 * float(jnp.finfo(dtype).smallest_normal)
    exact = _by_hand(kernel, spec)
    assert np.all(np.abs(np.asarray(weight, np.float64) - exact) <= bound * magnitudes + floor)
    x64 = np.asarray(x, np.float64)
    assert np.all(np.abs(np.asarray(y, np.float64) - x64 @ exact) <= bound * (np.abs(x64) @ magnitudes) + floor)


@pytest.mark.parametrize("spec", ONE_OF_EACH, ids=_name)
def test_strict_promotion_refuses_to_mix_dtypes(spec):
    kernel, x = _draw(spec, jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"), pytest.raises(jax.errors.TypePromotionError):
        factors.apply(kernel, x.astype(jnp.float32))


@pytest.mark.parametrize("dtype", FLOATS, ids=_name)
@pytest.mark.parametrize("spec", ONE_OF_EACH, ids=_name)
def test_project_keeps_the_dtype_and_works_in_float32(spec, dtype):
    weight = jax.random.normal(jax.random.key(3), (spec.in_features, spec.out_features), dtype)
    run = jax.jit(factors.project, static_argnums=1)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        kernel = run(weight, spec)
        wide = run(weight.astype(jnp.float32), spec)
    assert _sizes(kernel) == factors.shapes(spec)
    assert {leaf.dtype for leaf in jax.tree.leaves(kernel)} == {jnp.dtype(dtype)}
    # Two programs: what they share is float32, so that rounding its result is all that may differ.
    for narrow, exact in zip(jax.tree.leaves(kernel), jax.tree.leaves(wide), strict=True):
        np.testing.assert_allclose(
            np.asarray(narrow, np.float32),
            np.asarray(exact.astype(dtype), np.float32),
            rtol=2 * float(jnp.finfo(dtype).eps),
            atol=1e-5,
        )


@pytest.mark.parametrize("spec", ONE_OF_EACH, ids=_name)
def test_project_is_in_float64_for_a_float64_weight(spec):
    if spec.format == "blast":
        pytest.skip("an iterative fit has no exact rank")
    full = Spec(spec.format, *spec.block_sizes, rank=0 if spec.format == "dense" else min(spec.block_sizes))
    with jax.enable_x64(True):
        weight = jax.random.normal(jax.random.key(3), spec.block_sizes, jnp.float64)
        kernel = factors.project(weight, full)
        assert {leaf.dtype for leaf in jax.tree.leaves(kernel)} == {jnp.dtype(jnp.float64)}
        np.testing.assert_allclose(factors.to_dense(kernel), weight, rtol=0, atol=1e-13)


def test_project_names_a_weight_of_the_wrong_shape():
    with pytest.raises(InputError, match=r"shape \(20, 12\) is not 12 x 20, as its monarch spec says"):
        factors.project(jnp.zeros((20, 12)), Spec("monarch", 12, 20, (3, 2), 3))


def test_project_is_the_same_for_the_same_key_and_another_for_another():
    spec = Spec("blast", 12, 20, (3, 2), 5)
    weight = jax.random.normal(jax.random.key(3), (12, 20))
    run = jax.jit(factors.project, static_argnums=1)
    fits = [run(weight, spec, key) for key in (None, jax.random.key(0), jax.random.key(1))]
    np.testing.assert_array_equal(fits[0]["V"], fits[1]["V"])
    assert not np.array_equal(fits[0]["V"], fits[2]["V"])


DRAWS = 4000


@functools.partial(jax.jit, static_argnums=1)
def _moments(key, spec):
    """Return the mean and the mean square, of every draw, of the weight's entries in units of 1 / sqrt(i)."""
    weights = jax.vmap(lambda key: factors.to_dense(factors.init(key, spec)))(jax.random.split(key, DRAWS))
    scaled = weights * spec.in_features**0.5
    return scaled.mean((1, 2)), (scaled**2).mean((1, 2))


@each_spec
def test_initial_weights_have_mean_0_and_variance_1_over_in_features(spec):
    means, squares = (np.asarray(found, np.float64) for found in _moments(jax.random.key(4), spec))
    for found, wanted in ((means, 0), (squares, 1)):
        # Draws are independent, so their mean strays by its own standard error; 5 of them happen once in 10^6.
        standard_error = found.std(ddof=1) / DRAWS**0.5
        assert standard_error < 0.04
        assert abs(found.mean() - wanted) < 5 * standard_error


@pytest.mark.parametrize("spec", ONE_OF_EACH, ids=_name)
def test_init_depends_on_the_key_alone(spec):
    once, again, other = (factors.init(jax.random.key(seed), spec) for seed in (0, 0, 1))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), once, again)
    different = jax.tree.map(lambda a, b: bool((a != b).any()), once, other)
    assert all(jax.tree.leaves((same, different)))
    for left, right in itertools.combinations(jax.tree.leaves(once), 2):
        assert not np.isin(np.asarray(left), np.asarray(right)).any()


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
