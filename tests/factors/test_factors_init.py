"""How factored layers begin and learn: the variances of what goes through them, and Adam's rates by fan-in."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blrlab import factors
from blrlab.factors import Spec

# Rectangular both ways, b1 != b2, ranks of 1, above a block's smaller side, and above a layer's.
TABLE = (
    Spec("dense", 12, 20),
    Spec("low_rank", 12, 20, rank=5),
    Spec("low_rank", 20, 6, rank=9),
    Spec("low_rank", 8, 8, rank=1),
    Spec("monarch", 12, 20, (3, 2), 3),
    Spec("monarch", 20, 6, (2, 3), 12),
    Spec("monarch", 6, 5, (6, 5), 1),
    Spec("blast", 12, 20, (3, 2), 5),
    Spec("blast", 20, 6, (5, 2), 14),
    Spec("blast", 6, 15, (1, 3), 2),
)
DRAWS = 2000


def _name(value) -> str:
    return "-".join(map(str, (value.format, value.in_features, value.out_features, *value.blocks, value.rank)))


each_spec = pytest.mark.parametrize("spec", TABLE, ids=_name)


def _as_dict(found):
    return found if isinstance(found, dict) else {"W": found}


@functools.partial(jax.jit, static_argnums=1)
def _mean_squares(key, spec):
    """Return {name: [draws]}: the mean squares of y, dL/dx and dL/d(factor), for white x and dL/dy."""

    def one(key):
        k, x, g = jax.random.split(key, 3)
        y, pull = jax.vjp(factors.apply, factors.init(k, spec), jax.random.normal(x, (spec.in_features,)))
        kernel, x = pull(jax.random.normal(g, y.shape))
        return jax.tree.map(lambda leaf: jnp.mean(leaf**2), {"y": y, "x": x, **_as_dict(kernel)})

    return jax.lax.map(one, jax.random.split(key, DRAWS))


@each_spec
def test_outputs_and_gradients_have_the_variance_behind_a_dense_layer(spec):
    """A factor's gradient is a dense weight's times d_out / d_in of the factors after it."""
    wanted, after = {"y": 1.0, "x": spec.out_features / spec.in_features}, 1.0
    for name, (fan_in, fan_out) in reversed(_as_dict(factors.fans(spec)).items()):
        wanted[name] = after
        after *= fan_out / fan_in
    assert after == pytest.approx(wanted["x"])
    found = _mean_squares(jax.random.key(1, impl="unsafe_rbg"), spec)
    assert set(found) == set(wanted)
    for name, squares in found.items():
        # Draws are independent: their mean strays by its standard error, by 5 of them once in 10^6.
        relative = np.asarray(squares, np.float64) / wanted[name]
        standard_error = relative.std(ddof=1) / DRAWS**0.5
        assert standard_error < 0.1, name
        assert abs(relative.mean() - 1) < 5 * standard_error, name


@pytest.mark.parametrize("rank", [1, 4, 24])
def test_rank_changes_the_fourth_moment_and_not_the_variance(rank):
    spec = Spec("low_rank", 8, 8, rank=rank)
    draw = jax.jit(lambda keys: jax.lax.map(lambda key: factors.to_dense(factors.init(key, spec)), keys))
    entries = np.asarray(draw(jax.random.split(jax.random.key(2, impl="unsafe_rbg"), DRAWS)), np.float64) * 8**0.5
    for power, wanted in ((2, 1.0), (4, 3 * (1 + 2 / rank))):
        means = (entries**power).mean((1, 2))
        assert abs(means.mean() - wanted) < 5 * means.std(ddof=1) / DRAWS**0.5


def test_learning_rates_are_the_fan_in_s_over_the_number_of_factors():
    assert factors.learning_rates(Spec("dense", 48, 96)) == 1.0
    assert factors.learning_rates(Spec("low_rank", 48, 96, rank=6)) == {"V": 1 / 2, "U": 48 / 6 / 2}
    found = factors.learning_rates(Spec("monarch", 48, 96, (4, 2), 3))
    assert found == {"V": 48 / 12 / 2, "U": 48 / (4 * 3) / 2}
    found = factors.learning_rates(Spec("blast", 48, 96, (4, 2), 3))
    assert found == pytest.approx({"V": 48 / 12 / 3, "S": 48 / 4 / 3, "U": 48 / 3 / 3})


WIDE = tuple(
    Spec(format, width, 2 * width, blocks, rank)
    for width in (64, 512)
    for format, blocks, rank in (("low_rank", (1, 1), 16), ("monarch", (4, 8), 16), ("blast", (8, 4), width // 4))
)


@functools.partial(jax.jit, static_argnums=1)
def _moves(key, spec):
    """Return the root mean square by which Adam's first step, of rate 1 / i, of each factor alone moves y."""
    rates = _as_dict(factors.learning_rates(spec))

    def one(key):
        k, x, g = jax.random.split(key, 3)
        kernel, x = factors.init(k, spec), jax.random.normal(x, (spec.in_features,))
        y, pull = jax.vjp(lambda kernel: factors.apply(kernel, x), kernel)
        signs = _as_dict(jax.tree.map(jnp.sign, pull(jax.random.normal(g, y.shape))[0]))
        found = {}
        for name, rate in rates.items():
            moved = _as_dict(kernel)[name] + rate / spec.in_features * signs[name]
            moved = {**kernel, name: moved} if isinstance(kernel, dict) else moved
            found[name] = jnp.mean((factors.apply(moved, x) - y) ** 2)
        return found

    squares = jax.lax.map(one, jax.random.split(key, 30))
    return jax.tree.map(lambda each: jnp.sqrt(each.mean()), squares)


@pytest.mark.parametrize("spec", WIDE, ids=_name)
def test_a_step_of_each_factor_moves_the_outputs_alike_at_any_width(spec):
    """A dense layer's step moves every output by the mean of |x|, and each of n factors' by 1 / n of that.

    But a step is turned towards the strong directions of the factors after it, 2 / pi of it (the share that signs
    keep), which a random matrix stretches by 1 + d_in / d_out in the square instead of by 1.
    """
    mean = math.sqrt(2 / math.pi)
    key = jax.random.key(3, impl="unsafe_rbg")
    dense = _moves(key, Spec("dense", spec.in_features, spec.out_features))
    assert float(dense["W"]) == pytest.approx(mean, rel=0.1)
    moves, after = _moves(key, spec), 0.0
    for name, (fan_in, fan_out) in reversed(factors.fans(spec).items()):
        wanted = mean / len(moves) * math.sqrt(1 + 2 / math.pi * after)
        assert float(moves[name]) == pytest.approx(wanted, rel=0.15), name
        after += fan_in / fan_out


@each_spec
def test_the_squared_norm_and_its_gradient_are_those_of_the_product(spec):
    random, sizes = np.random.default_rng(5), factors.shapes(spec)
    kernel = jax.tree.map(lambda size: random.normal(size=size), sizes, is_leaf=lambda size: isinstance(size, tuple))

    def by_hand(kernel):
        return jnp.sum(factors.to_dense(kernel) ** 2)

    run = jax.jit(lambda kernel: [jax.value_and_grad(norm)(kernel) for norm in (factors.squared_norm, by_hand)])
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        found, wanted = run(kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), found, wanted)
