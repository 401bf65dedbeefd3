"""PrecGD: the published figures, what it gives back, and weights that a solver can break on."""

import functools

import jax
import numpy as np
import pytest

from blrlab import factors
from blrlab.factors import Spec, precgd

SEEDS = 5


@functools.partial(jax.jit, static_argnums=(1, 2))
def _fits(weights, spec, blast="precgd"):
    """Factor every weight [n, i, o], BLAST from its own random start, and multiply out."""
    keys = jax.random.split(jax.random.key(0, impl="unsafe_rbg"), len(weights))

    def fitted(weight, key):
        if spec.format == "blast" and blast == "precgd":
            return precgd.factorize(weight, spec.blocks, spec.rank, key)
        return factors.project(weight, spec, key)

    return jax.lax.map(lambda pair: factors.to_dense(fitted(*pair)), (weights, keys))


def _errors(weights, spec):
    """Return the relative Frobenius error of every weight's projection."""
    fits = _fits(np.asarray(weights, np.float32), spec)
    return np.linalg.norm(weights - fits, axis=(1, 2)) / np.linalg.norm(weights, axis=(1, 2))


def _gaussian():
    return np.random.default_rng(0).normal(size=(SEEDS, 128, 128))


def _decaying():
    """Q1 diag(logspace(0, -2)) Q2, with Q1 and Q2 the orthogonal factors of Gaussian matrices."""
    left, right = np.random.default_rng(0).normal(size=(2, SEEDS, 128, 128))
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
    drawn = weights()
    specs = (
        Spec("blast", 128, 128, (4, 4), 32),
        Spec("low_rank", 128, 128, rank=32),
        Spec("monarch", 128, 128, (4, 4), 8),
    )
    errors = {spec.format: _errors(drawn, spec) for spec in specs}
    for name, wanted in published.items():
        assert np.median(errors[name]) == pytest.approx(wanted, rel=0.02), name
    assert (errors["blast"] < 0.9 * errors["low_rank"]).all()


@pytest.mark.parametrize(
    ("spec", "typical", "worst"),
    [
        # One block is low rank, which the descent mostly fits to the last digits; with more it stops near the weight.
        (Spec("blast", 12, 20, (1, 1), 5), 1e-6, 0.15),
        (Spec("blast", 12, 20, (3, 2), 5), 0.05, 0.1),
    ],
    ids=["one block", "blocks"],
)
def test_what_has_the_format_is_given_back_within_an_error(spec, typical, worst):
    (b1, b2), (p, q) = spec.blocks, spec.block_sizes
    random = np.random.default_rng(0)
    V, S, U = (random.normal(size=(8, *size)) for size in factors.shapes(spec).values())
    weights = np.einsum("nlpr,nlkr,nkrq->nlpkq", V, S, U).reshape(8, b1 * p, b2 * q)
    errors = _errors(weights, spec)
    assert np.median(errors) < typical
    assert errors.max() < worst
    tails = np.linalg.svd(weights, compute_uv=False)[:, spec.rank :]
    truncated = np.linalg.norm(tails, axis=1) / np.linalg.norm(weights, axis=(1, 2))
    assert spec.blocks == (1, 1) or (errors < truncated / 2).all()


HARD = Spec("blast", 16, 16, (2, 2), 16)


@pytest.mark.parametrize(
    "weight",
    [
        np.zeros((16, 16)),
        np.ones((16, 16)),
        np.full((16, 16), 1e-12),
        np.outer(np.eye(16)[3], np.eye(16)[5]),
        np.outer(np.arange(16), np.ones(16)),
        np.eye(16),
        1e-12 * np.eye(16),
        1e12 * np.eye(16),
        1e20 * np.eye(16),
        1e-25 * np.eye(16),
        np.kron(np.eye(2), np.ones((8, 8))),
        np.random.default_rng(0).normal(size=(16, 16)),
    ],
    ids=[
        "zeros", "constant", "small constant", "one entry", "rank 1", "unit", "small", "large", "very large",
        "very small", "block diagonal", "gaussian",
    ],
)  # fmt: skip
@pytest.mark.parametrize("blast", ["precgd", "alternating"])
def test_what_the_rank_fits_exactly_is_fitted(weight, blast):
    """Rank 16 suffices for any 16 x 16 weight. The error vanishes, and with it what damps the linear systems."""
    fit = np.asarray(_fits(weight[None].astype(np.float32), HARD, blast)[0], np.float64)
    furthest = float(np.abs(fit - weight).max())
    assert furthest <= 1e-4 * np.abs(weight).max()


def test_a_rank_above_both_sides_is_fitted():
    weights = np.random.default_rng(0).normal(size=(2, 12, 20))
    assert float(_errors(weights, Spec("blast", 12, 20, (3, 2), 24)).max()) < 1e-4


@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40], ids=["small", "large"])
def test_the_fit_scales_with_the_weight(scale):
    """By powers of two, which round nothing away."""
    spec, weights = Spec("blast", 12, 20, (3, 2), 5), np.random.default_rng(0).normal(size=(8, 12, 20))
    assert _errors(scale * weights, spec) == pytest.approx(_errors(weights, spec), rel=1e-3)


def test_a_weight_with_an_offset_is_fitted():
    """A common offset adds rank 1 to a weight; its size is not that of what varies."""
    weights = 100 + np.random.default_rng(0).normal(size=(8, 12, 20))
    assert float(_errors(weights, Spec("blast", 12, 20, (3, 2), 5)).max()) < 0.01
