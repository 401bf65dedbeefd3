"""Fits of one weight: closed forms against numpy, calibration inputs, storage in 16 bits, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blrlab import compress, factors
from blrlab.compress import lean
from blrlab.compress import statistics as sums
from blrlab.errors import InputError
from blrlab.factors import Spec

SPECS = {
    "low_rank": Spec("low_rank", 24, 30, rank=6),
    "monarch": Spec("monarch", 24, 30, (3, 2), 3),
    "blast": Spec("blast", 24, 30, (3, 2), 6),
}
each_format = pytest.mark.parametrize("format", SPECS)
KEY = jax.random.key(0)


def _weight(seed=0, size=(24, 30)):
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


def _inputs(rows=400, features=24, seed=1):
    """Correlated inputs of very different sizes, with a mean."""
    random = np.random.default_rng(seed)
    mix = np.linalg.qr(random.normal(size=(features, features)))[0] * np.logspace(0, -2, features)[:, None]
    return (random.normal(size=(rows, features)) @ mix + 0.3 * random.normal(size=features)).astype(np.float32)


def _statistics(x):
    return sums.add(sums.empty(x.shape[-1]), jnp.asarray(x))


def _output_error(x, weight, kernel):
    product = np.asarray(factors.to_dense(kernel), np.float64)
    return np.linalg.norm(x @ (weight - product)) / np.linalg.norm(x @ weight)


@each_format
def test_inputs_lower_the_error_of_the_output(format):
    weight, x = _weight(), _inputs()
    plain = compress.fit(weight, SPECS[format], KEY)
    aware = compress.fit(weight, SPECS[format], KEY, _statistics(x))
    assert _output_error(x, weight, aware.kernel) < 0.6 * _output_error(x, weight, plain.kernel)
    assert float(aware.output_error) == pytest.approx(_output_error(x, weight, aware.kernel), rel=1e-3)
    assert float(aware.relative_error) > float(plain.relative_error)
    assert plain.output_error is None
    assert aware.shift is None


def test_whitened_low_rank_is_the_optimum():
    weight, x = _weight(), _inputs()
    found = compress.fit(weight, SPECS["low_rank"], KEY, _statistics(x))
    values = np.linalg.svd(x.astype(np.float64) @ weight, compute_uv=False)
    best = np.linalg.norm(values[6:]) / np.linalg.norm(values)
    error = _output_error(x.astype(np.float64), weight, found.kernel)
    assert best * (1 - 1e-5) <= error < best * 1.01  # damping gives up a little


def test_monarch_is_a_loop_of_singular_value_decompositions():
    weight, spec = _weight(), SPECS["monarch"]
    product = np.asarray(factors.to_dense(compress.fit(weight, spec, KEY).kernel))
    for row in range(3):
        for column in range(2):
            block = np.s_[8 * row : 8 * row + 8, 15 * column : 15 * column + 15]
            left, values, right = np.linalg.svd(weight[block].astype(np.float64), full_matrices=False)
            best, lost = left[:, :3] * values[:3] @ right[:3], np.linalg.norm(values[3:])
            assert np.linalg.norm(weight[block] - product[block]) == pytest.approx(lost, rel=1e-5)
            # float32 turns singular vectors by eps s_1 / gap (Wedin), the more the nearer the next value is
            near = np.finfo(np.float32).eps * values[0] ** 2 / (values[2] - values[3])
            np.testing.assert_allclose(product[block], best, rtol=0, atol=near)


@pytest.mark.parametrize("format", ["monarch", "blast"])
def test_no_single_factor_can_be_bettered_on_the_inputs(format):
    """With the full Gram matrix: U, solved for by numpy's least squares on the inputs themselves, gains nothing."""
    weight, x, spec = _weight().astype(np.float64), _inputs().astype(np.float64), SPECS[format]
    kernel = {
        name: np.asarray(leaf, np.float64)
        for name, leaf in compress.fit(weight.astype(np.float32), spec, KEY, _statistics(x)).kernel.items()
    }
    b1, b2 = spec.blocks
    lost = 0.0
    for k in range(b2):
        if format == "blast":
            left = np.concatenate([kernel["V"][l] * kernel["S"][l, k] for l in range(b1)])
        else:
            left = np.zeros((24, b1 * spec.rank))
            for l in range(b1):
                left[8 * l : 8 * l + 8, 3 * l : 3 * l + 3] = kernel["V"][l, k]
        target = x @ weight[:, 15 * k : 15 * k + 15]
        fitted = np.linalg.lstsq(x @ left, target, rcond=None)[0]
        lost += np.sum((target - x @ left @ fitted) ** 2)
    best = np.sqrt(lost) / np.linalg.norm(x @ weight)
    assert _output_error(x, weight, kernel) < 1.02 * best


@each_format
def test_more_rank_loses_less(format):
    weight, x, spec = _weight(), _statistics(_inputs()), SPECS[format]
    for inputs in (None, x):
        found = [compress.fit(weight, Spec(format, 24, 30, spec.blocks, rank), KEY, inputs) for rank in (1, 3, 7)]
        errors = [float(each.relative_error if inputs is None else each.output_error) for each in found]
        assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("inputs", [False, True])
def test_a_randomised_decomposition_loses_hardly_more(inputs):
    weight = (_weight(size=(200, 300)) * np.logspace(0, -2, 200)[:, None]).astype(np.float32)
    x = _statistics(_inputs(600, 200)) if inputs else None
    spec = Spec("low_rank", 200, 300, rank=20)
    exact = compress.fit(weight, spec, KEY, x)
    sketched = compress.fit(weight, spec, KEY, x, algorithm="randomized_svd")
    for one, other in ((exact.relative_error, sketched.relative_error), (exact.output_error, sketched.output_error)):
        assert one is None or float(other) <= 1.01 * float(one)


@each_format
@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_last_factor_makes_up_for_rounding(format, inputs, dtype):
    """The factors stored in 16 bits are nearer than those of float32, rounded; to be seen in 8 bits of mantissa."""
    weight, x = _weight(), _inputs()
    stored = jnp.asarray(weight).astype(dtype)
    given = _statistics(x) if inputs else None
    found = compress.fit(stored, SPECS[format], KEY, given)
    wide = compress.fit(stored.astype(jnp.float32), SPECS[format], KEY, given)
    rounded = jax.tree.map(lambda leaf: leaf.astype(dtype).astype(jnp.float32), wide.kernel)
    exact = np.asarray(stored, np.float64)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(found.kernel))
    measured = x if inputs else np.eye(24)
    ours = _output_error(measured, exact, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), found.kernel))
    theirs = _output_error(measured, exact, rounded)
    assert ours < theirs if dtype == jnp.bfloat16 else ours <= 1.0005 * theirs
    assert float(found.output_error if inputs else found.relative_error) == pytest.approx(ours, rel=1e-2)


@each_format
def test_a_bias_takes_up_the_mean(format):
    weight, x = _weight(), _inputs()
    found = compress.fit(weight, SPECS[format], KEY, _statistics(x), has_bias=True)
    before, after = x @ weight, x @ np.asarray(factors.to_dense(found.kernel)) + np.asarray(found.shift)
    np.testing.assert_allclose(after.mean(0), before.mean(0), atol=1e-4)
    without = compress.fit(weight, SPECS[format], KEY, _statistics(x))
    assert np.linalg.norm(after - before) < np.linalg.norm(before) * float(without.output_error)
    assert float(found.output_error) == pytest.approx(np.linalg.norm(after - before) / np.linalg.norm(before), rel=0.02)


@each_format
def test_a_stack_of_weights_is_fitted_as_each_is(format):
    weights = jnp.stack([_weight(seed) for seed in range(3)])
    keys, x = jax.random.split(KEY, 3), _statistics(_inputs())
    batched = jax.vmap(lambda weight, key: compress.fit(weight, SPECS[format], key, x))(weights, keys)
    for index in range(3):
        one = compress.fit(weights[index], SPECS[format], keys[index], x)
        assert float(batched.output_error[index]) == pytest.approx(float(one.output_error), rel=0.01)


@each_format
@pytest.mark.parametrize(
    "weight",
    [np.zeros((24, 30)), np.ones((24, 30)), 1e-20 * np.eye(24, 30), 1e15 * np.ones((24, 30)), np.eye(24, 30)],
    ids=["zeros", "constant", "small", "large", "unit"],
)
def test_weights_that_solvers_break_on(format, weight):
    for inputs in (None, _statistics(_inputs()), _statistics(_inputs(rows=3))):
        found = compress.fit(weight.astype(np.float32), SPECS[format], KEY, inputs)
        assert np.isfinite(float(found.relative_error))
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(found.kernel))
        if np.ptp(weight) == 0:  # of rank 1
            assert float(found.relative_error if inputs is None else found.output_error) < 1e-3


@each_format
def test_inputs_that_are_never_hit_keep_their_weights(format):
    """Their error weighs little, not nothing: with rank to spare they are fitted as well."""
    weight, x = np.zeros((24, 30), np.float32), _inputs()
    weight[:12] = _weight(size=(12, 1)) @ _weight(1, size=(1, 30))
    weight[20] = 1
    x[:, 20] = 0
    found = compress.fit(weight, SPECS[format], KEY, _statistics(x))
    product = np.asarray(factors.to_dense(found.kernel))
    np.testing.assert_allclose(product[20], weight[20], atol=0.05)


@pytest.mark.parametrize("mean", [0.0, 1.0, 1000.0])
def test_sums_of_batches_are_those_of_all_rows(mean):
    """A mean far beyond the spread costs no digits of the spread."""
    x = _inputs(96) + np.float32(mean)
    whole, parts = _statistics(x), sums.empty(24)
    for part in np.split(x, 4):
        parts = sums.add(parts, jnp.asarray(part.reshape(2, 12, 24)))
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-2)
    wide = sums.add(sums.empty(24), jnp.asarray(x).astype(jnp.bfloat16))
    assert wide.scatter.dtype == jnp.float32
    wanted = x.astype(np.float64)
    np.testing.assert_allclose(parts.moments(centred=True), np.cov(wanted.T, bias=True), atol=1e-4)
    np.testing.assert_allclose(parts.moments(), wanted.T @ wanted / 96, rtol=1e-5, atol=1e-4)


@each_format
@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0])
def test_inputs_far_from_zero_are_fitted_about_their_mean(format, spread):
    weight, random = _weight(), np.random.default_rng(2)
    x = (1000 * random.normal(size=24) + spread * random.normal(size=(64, 24))).astype(np.float32)
    found = compress.fit(weight, SPECS[format], KEY, _statistics(x), has_bias=True)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(found.kernel))
    assert 0 <= float(found.output_error) < 0.01


def test_what_is_refused_is_said():
    weight, x = _weight(), _statistics(_inputs())
    with pytest.raises(InputError, match="precgd is published for the weight alone"):
        compress.fit(weight, SPECS["blast"], KEY, x, algorithm="precgd")
    with pytest.raises(InputError, match=r'algorithm of blast.*"presgd".*alternating, precgd'):
        compress.fit(weight, SPECS["blast"], KEY, algorithm="presgd")
    with pytest.raises(InputError, match="is not 24 x 30"):
        compress.fit(weight.T, SPECS["blast"], KEY)
    tree, specs = {"up": {"kernel": weight}}, {"up": SPECS["low_rank"]}
    refused = {
        "up: the statistics are of 5 inputs, and the layer has 24": _statistics(_inputs(9, 5)),
        "up: no calibration input reached the layer": sums.empty(24),
        "up: its calibration inputs hold NaN": _statistics(np.full((3, 24), np.nan, np.float32)),
    }
    for sentence, inputs in refused.items():
        with pytest.raises(InputError, match=sentence):
            compress.compress(tree, specs, statistics={"up": inputs})


def test_a_fit_by_itself_is_compiled_with_options_that_xla_knows(monkeypatch):
    """On every platform: an option that XLA does not know is an error there, too."""
    monkeypatch.setitem(lean.OPTIONS, jax.default_backend(), lean.OPTIONS["gpu"])
    power = lean.lean(lambda x, n: x**n, "n")
    assert float(power(jnp.asarray(3.0), 2)) == 9.0
    assert float(power(jnp.asarray(3.0), n=3)) == 27.0
    monkeypatch.setitem(lean.OPTIONS, jax.default_backend(), {"xla_gpu_no_such_option": True})
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_no_such_option"):
        lean.lean(lambda x, n: x**n, "n")(jnp.asarray(3.0), 2)
