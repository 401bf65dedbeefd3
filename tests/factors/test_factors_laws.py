"""Laws of the projections, for weights of any kind: zeros, repeated values, low rank, and what else is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from blrlab import factors
from blrlab.factors import Spec

# Few sizes, since each is a compilation; (12, 20) with blocks [4, 10], (15, 14) with [5, 2], (6, 10) with [6, 5].
SIZES = (((12, 20), (3, 2)), ((15, 14), (3, 7)), ((6, 10), (1, 2)))
ROUNDING = 1e-13  # of float64, in units of the weight's norm
laws = settings(deadline=None, max_examples=40, derandomize=True)


@st.composite
def weights(draw):
    """Draw a float64 weight, as hypothesis likes them or as a product of low rank, and the blocks to cut it in."""
    (height, width), blocks = draw(st.sampled_from(SIZES))
    if draw(st.booleans()):
        numbers = st.floats(-8, 8, allow_subnormal=False, width=32)
        return draw(arrays.arrays(np.float64, (height, width), elements=numbers)), blocks
    seed, rank, scale = draw(st.integers(0, 99)), draw(st.integers(1, 6)), draw(st.sampled_from([1e-9, 1, 1e9]))
    random = np.random.default_rng(seed)
    return scale * random.normal(size=(height, rank)) @ random.normal(size=(rank, width)), blocks


def _spec(format, weight, blocks, rank):
    return Spec(format, *weight.shape, blocks if format == "monarch" else (1, 1), rank)


def _fit(format, weight, blocks, rank):
    kernel = factors.project(jnp.asarray(weight), _spec(format, weight, blocks, rank))
    return np.asarray(factors.to_dense(kernel))


def _cut(weight, blocks):
    """Cut a weight into its b1 b2 blocks [p, q]."""
    return [block for rows in np.split(weight, blocks[0]) for block in np.split(rows, blocks[1], axis=1)]


closed_forms = pytest.mark.parametrize("format", ["low_rank", "monarch"])


@closed_forms
@given(drawn=weights())
@laws
def test_more_rank_never_hurts_and_full_rank_is_exact(format, drawn):
    weight, blocks = drawn
    size = np.linalg.norm(weight)
    sides = weight.shape if format == "low_rank" else _cut(weight, blocks)[0].shape
    ranks = sorted({1, 2, min(sides) // 2, min(sides), min(sides) + 3})
    with jax.enable_x64(True):
        errors = [np.linalg.norm(weight - _fit(format, weight, blocks, rank)) for rank in ranks]
    for less, more in zip(errors, errors[1:], strict=False):
        assert more <= less + ROUNDING * size
    assert errors[-2] <= ROUNDING * size
    assert errors[-1] <= ROUNDING * size


@closed_forms
@given(drawn=weights(), rank=st.integers(1, 5))
@laws
def test_the_error_is_the_tail_of_the_singular_values(format, drawn, rank):
    weight, blocks = drawn
    with jax.enable_x64(True):
        found = np.linalg.norm(weight - _fit(format, weight, blocks, rank))
    pieces = _cut(weight, blocks) if format == "monarch" else [weight]
    tails = [np.linalg.svd(piece, compute_uv=False)[rank:] for piece in pieces]
    wanted = np.linalg.norm(np.concatenate(tails))
    assert found == pytest.approx(wanted, rel=1e-12, abs=ROUNDING * np.linalg.norm(weight))


@given(drawn=weights(), rank=st.integers(1, 5))
@laws
def test_every_monarch_block_is_the_best_of_its_rank(drawn, rank):
    weight, blocks = drawn
    with jax.enable_x64(True):
        found = _fit("monarch", weight, blocks, rank)
    for block, fit in zip(_cut(weight, blocks), _cut(found, blocks), strict=True):
        tail = np.linalg.norm(np.linalg.svd(block, compute_uv=False)[rank:])
        assert np.linalg.norm(block - fit) == pytest.approx(tail, rel=1e-12, abs=ROUNDING * np.linalg.norm(weight))
        assert np.linalg.matrix_rank(fit, tol=1e-12 * np.linalg.norm(weight)) <= rank


@closed_forms
@given(seed=st.integers(0, 2**31 - 1), rank=st.integers(1, 8), sizes=st.sampled_from(SIZES))
@laws
def test_projecting_what_has_the_format_gives_it_back(format, seed, rank, sizes):
    shape, blocks = sizes
    with jax.enable_x64(True):
        spec = _spec(format, np.empty(shape), blocks, rank)
        weight = np.asarray(factors.to_dense(factors.init(jax.random.key(seed), spec, jnp.float64)))
        again = _fit(format, weight, blocks, rank)
    assert np.linalg.norm(weight - again) <= ROUNDING * np.linalg.norm(weight)


@closed_forms
@given(drawn=weights(), rank=st.integers(1, 5))
@laws
def test_both_sides_carry_the_same_part_of_the_singular_values(format, drawn, rank):
    weight, blocks = drawn
    with jax.enable_x64(True):
        kernel = factors.project(jnp.asarray(weight), _spec(format, weight, blocks, rank))
    V, U = np.asarray(kernel["V"]), np.asarray(kernel["U"])
    left, right = np.swapaxes(V, -1, -2) @ V, U @ np.swapaxes(U, -1, -2)
    np.testing.assert_allclose(left, right, rtol=0, atol=ROUNDING * np.linalg.norm(weight))


def _grouped(V, U, blocks):
    """Write monarch factors as blast factors of rank max(b1, b2) r': block [l, k] uses rank group (l + k) mod b."""
    (b1, b2), (p, rank), q = blocks, V.shape[-2:], U.shape[-1]
    groups = max(b1, b2)
    left, right = np.zeros((b1, p, groups, rank)), np.zeros((b2, groups, rank, q))
    chosen = np.zeros((b1, b2, groups, rank))
    for l in range(b1):
        for k in range(b2):
            group = (l + k) % groups
            left[l, :, group], right[k, group], chosen[l, k, group] = V[l, k], U[l, k], 1
    total = groups * rank
    return {
        "V": jnp.asarray(left.reshape(b1, p, total)),
        "S": jnp.asarray(chosen.reshape(b1, b2, total)),
        "U": jnp.asarray(right.reshape(b2, total, q)),
    }


@pytest.mark.parametrize("blocks", [(3, 2), (2, 5), (4, 4), (1, 5), (6, 1)], ids=str)
def test_blast_contains_monarch_at_the_same_rank(blocks):
    spec = Spec("monarch", 12, 20, blocks, 3)
    with jax.enable_x64(True):
        kernel = factors.init(jax.random.key(0), spec, jnp.float64)
        blast = _grouped(np.asarray(kernel["V"]), np.asarray(kernel["U"]), blocks)
        assert factors.spec_of(blast) == Spec("blast", 12, 20, blocks, 3 * max(blocks))
        np.testing.assert_allclose(factors.to_dense(blast), factors.to_dense(kernel), rtol=0, atol=1e-14)
        x = jax.random.normal(jax.random.key(1), (4, 12), jnp.float64)
        np.testing.assert_allclose(factors.apply(blast, x), factors.apply(kernel, x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("blocks", [(3, 2), (4, 4), (1, 1), (12, 20)], ids=str)
def test_blast_contains_low_rank(blocks):
    with jax.enable_x64(True):
        kernel = factors.init(jax.random.key(0), Spec("low_rank", 12, 20, rank=5), jnp.float64)
        b1, b2 = blocks
        blast = {
            "V": kernel["V"].reshape(b1, -1, 5),
            "S": jnp.ones((b1, b2, 5), jnp.float64),
            "U": jnp.moveaxis(kernel["U"].reshape(5, b2, -1), 1, 0),
        }
        assert factors.spec_of(blast) == Spec("blast", 12, 20, blocks, 5)
        np.testing.assert_allclose(factors.to_dense(blast), factors.to_dense(kernel), rtol=0, atol=1e-14)
