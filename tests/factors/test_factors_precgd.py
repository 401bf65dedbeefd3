"""PrecGD: the published figures, what it gives back, and weights that a solver can break on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blrlab import factors
from blrlab.factors import Spec, precgd

SEEDS = 5


@functools.partial(jax.jit, static_argnums=1)
def _errors(weights, spec, seed=0):
    """Return the relative Frobenius error of every weight's projection, each from its own start."""

    def error(weight, key):
        return jnp.linalg.norm(weight - factors.to_dense(factors.project(weight, spec, key)))

    keys = jax.random.split(jax.random.key(seed), len(weights))
    return jax.vmap(error)(weights, keys) / jnp.linalg.norm(weights, axis=(1, 2))


def _gaussian():
    return np.stack([np.random.default_rng(seed).normal(size=(128, 128)) for seed in range(SEEDS)])


def _decaying():
    """Q1 diag(logspace(0, -2)) Q2, with Q1 and Q2 the orthogonal factors of Gaussian matrices."""
    left, right = (np.random.default_rng(seed).normal(size=(SEEDS, 128, 128)) for seed in (1, 2))
    return np.linalg.qr(left)[0] @ (np.logspace(0, -2, 128)[:, None] * np.linalg.qr(right)[0])


@pytest.mark.parametrize(
    ("weights", "published"),
    [
        (_gaussian, {"blast": 0.463, "low_rank": 0.618, "monarch": 0.605}),
        (_decaying, {"blast": 0.263, "low_rank": 0.313, "monarch": 0.517}),
    ],
    ids=["gaussian", "decaying"],
)
def test_the_published_errors_are_reproduced(weights, published):
    drawn = jnp.asarray(weights(), jnp.float32)
    specs = (
        Spec("blast", 128, 128, (4, 4), 32),
        Spec("low_rank", 128, 128, rank=32),
        Spec("monarch", 128, 128, (4, 4), 8),
    )
    errors = {spec.format: np.asarray(_errors(drawn, spec)) for spec in specs}
    for name, wanted in published.items():
        assert np.median(errors[name]) == pytest.approx(wanted, rel=0.02), name
    assert (errors["blast"] < 0.9 * errors["low_rank"]).all()


@pytest.mark.parametrize(
    ("spec", "most"),
    [
        # One block is low rank, which a descent fits to the last digit; with more it stops near, not at, the weight.
        (Spec("blast", 16, 24, (1, 1), 4), 1e-5),
        (Spec("blast", 12, 20, (3, 2), 5), 0.1),
        (Spec("blast", 32, 48, (4, 4), 8), 0.2),
    ],
    ids=str,
)
def test_what_has_the_format_is_given_back_within_an_error(spec, most):
    keys = jax.random.split(jax.random.key(1), 8)
    weights = jax.vmap(lambda key: factors.to_dense(factors.init(key, spec)))(keys)
    errors = np.asarray(_errors(weights, spec))
    assert errors.max() < most
    if spec.blocks != (1, 1):
        truncated = np.asarray(_errors(weights, Spec("low_rank", *weights.shape[1:], rank=spec.rank)))
        assert (errors < truncated / 2).all()


def test_more_sweeps_come_nearer():
    weight = jnp.asarray(_gaussian()[0, :32, :32], jnp.float32)
    errors = []
    for sweeps in (3, 30, 300):
        kernel = precgd.factorize(weight, (4, 4), 8, jax.random.key(0), sweeps)
        errors.append(float(jnp.linalg.norm(weight - factors.to_dense(kernel))))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("scale", [1e-12, 1e12], ids=str)
def test_the_fit_scales_with_the_weight(scale):
    weight = jnp.asarray(_gaussian()[0, :32, :32], jnp.float32)
    run = jax.jit(lambda weight: factors.to_dense(factors.project(weight, Spec("blast", 32, 32, (4, 4), 8))))
    # Scaling rounds the start of 300 sweeps; each seed ends as near, though not at the same digits.
    near, far = (np.linalg.norm(run(w) / w - 1) for w in (weight, weight * scale))
    assert far == pytest.approx(near, rel=0.05)


def _one_entry(size):
    return np.eye(1, size, 3).T @ np.eye(1, size, 4)


@pytest.mark.parametrize(
    ("weight", "most"),
    [
        (np.zeros((16, 16)), 0.0),
        (np.ones((16, 16)), 1e-4),
        (np.full((16, 16), 1e-12), 1e-4),
        (_one_entry(16), 1e-4),
        (np.outer(np.arange(16), np.ones(16)), 1e-4),
        (np.eye(16), 1e-4),
        (1e-12 * np.eye(16), 1e-4),
        (1e18 * np.eye(16), 1e-4),
        (np.kron(np.eye(2), np.ones((8, 8))), 1e-4),
    ],
    ids=["zero", "constant", "small constant", "one entry", "rank 1", "unit", "small", "large", "block diagonal"],
)
def test_weights_that_a_high_rank_fits_exactly_stay_finite(weight, most):
    """The residual vanishes, and with it the damping that keeps the systems solvable."""
    weight = jnp.asarray(weight, jnp.float32)
    fit = factors.to_dense(factors.project(weight, Spec("blast", 16, 16, (2, 2), 16)))
    assert np.isfinite(fit).all()
    assert np.abs(np.asarray(fit - weight)).max() <= most * float(jnp.abs(weight).max())


@pytest.mark.parametrize("rank", [12, 20, 40])
def test_a_rank_above_the_weights_own_fits_it(rank):
    """Ranks from min(i, o) = 12 on suffice for any weight: with S = 1, blast is low rank."""
    spec = Spec("blast", 12, 20, (3, 2), rank)
    weights = jax.random.normal(jax.random.key(5), (4, 12, 20))
    errors = np.asarray(_errors(weights, spec))
    assert np.isfinite(errors).all()
    assert errors.max() < 1e-2
