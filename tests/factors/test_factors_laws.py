"""Laws of the projections, for weights of any kind: zeros, repeated values, low rank, and what else is drawn."""

import functools
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from blrlab import factors
from blrlab.factors import Spec

# Few sizes, since each is a compilation; blocks are [4, 10] and [5, 2].
SIZES = (((12, 20), (3, 2)), ((15, 14), (3, 7)))
RANKS = {"low_rank": (1, 2, 3, 7, 12, 14, 21), "monarch": (1, 2, 4, 7)}
ROUNDING = 1e-13  # of float64, in units of the weight's norm
laws = settings(deadline=None, max_examples=50, derandomize=True)
closed_forms = pytest.mark.parametrize("format", ["low_rank", "monarch"])


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


@functools.partial(jax.jit, static_argnums=(0, 2))
def _projections(format, weight, blocks):
    found = {}
    for rank in RANKS[format]:
        spec = Spec(format, *weight.shape, blocks if format == "monarch" else (1, 1), rank)
        kernel = factors.project(weight, spec)
        found[rank] = kernel, factors.to_dense(kernel)
    return found


def _project(format, drawn):
    """Return {rank: (kernel, its weight)}, in float64."""
    with jax.enable_x64(True):
        return jax.device_get(_projections(format, *drawn))


def _pieces(format, weight, blocks):
    """Cut a weight into what a format approximates piece by piece: itself, or its b1 b2 blocks [p, q]."""
    if format == "low_rank":
        return [weight]
    return [block for rows in np.split(weight, blocks[0]) for block in np.split(rows, blocks[1], axis=1)]


@closed_forms
@given(drawn=weights())
@laws
def test_every_piece_is_as_near_as_its_rank_allows(format, drawn):
    weight, blocks = drawn
    size = np.linalg.norm(weight)
    pieces = _pieces(format, weight, blocks)
    values = [np.linalg.svd(piece, compute_uv=False) for piece in pieces]
    for rank, (_, product) in _project(format, drawn).items():
        for piece, fit, value in zip(pieces, _pieces(format, product, blocks), values, strict=True):
            nearest = np.linalg.norm(value[rank:])  # Eckart and Young
            assert np.linalg.norm(piece - fit) == pytest.approx(nearest, rel=1e-12, abs=ROUNDING * size)
            assert np.linalg.matrix_rank(fit, tol=ROUNDING * size) <= rank


@closed_forms
@given(drawn=weights())
@laws
def test_more_rank_never_hurts_and_full_rank_is_exact(format, drawn):
    weight, blocks = drawn
    rounding = ROUNDING * np.linalg.norm(weight)
    errors = {rank: np.linalg.norm(weight - product) for rank, (_, product) in _project(format, drawn).items()}
    for less, more in itertools.pairwise(errors.values()):
        assert more <= less + rounding
    full = min(_pieces(format, weight, blocks)[0].shape)
    exact = [error for rank, error in errors.items() if rank >= full]
    assert len(exact) >= 2
    assert max(exact) <= rounding


@closed_forms
@given(seed=st.integers(0, 99), rank=st.sampled_from([1, 2, 7]), sizes=st.sampled_from(SIZES))
@laws
def test_projecting_what_has_the_format_gives_it_back(format, seed, rank, sizes):
    shape, blocks = sizes
    random = np.random.default_rng(seed)
    sides = factors.shapes(Spec(format, *shape, blocks if format == "monarch" else (1, 1), rank))
    V, U = (random.normal(size=sides[name]) for name in ("V", "U"))
    weight = V @ U if format == "low_rank" else np.block([list(row) for row in V @ U])
    _, again = _project(format, (weight, blocks))[rank]
    assert np.linalg.norm(weight - again) <= ROUNDING * np.linalg.norm(weight)


@closed_forms
@given(drawn=weights())
@laws
def test_both_sides_carry_the_same_part_of_the_singular_values(format, drawn):
    for kernel, _ in _project(format, drawn).values():
        V, U = kernel["V"], kernel["U"]
        left, right = np.swapaxes(V, -1, -2) @ V, U @ np.swapaxes(U, -1, -2)
        np.testing.assert_allclose(left, right, rtol=0, atol=ROUNDING * np.linalg.norm(drawn[0]))


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
        "V": left.reshape(b1, p, total),
        "S": chosen.reshape(b1, b2, total),
        "U": right.reshape(b2, total, q),
    }


def _numbers(spec):
    random = np.random.default_rng(0)
    return {name: random.normal(size=size) for name, size in factors.shapes(spec).items()}


def _agree(one, other):
    """Check that two kernels stand for the same weight and map inputs alike."""

    @jax.jit
    def run(x):
        return [(factors.to_dense(kernel), factors.apply(kernel, x)) for kernel in (one, other)]

    with jax.enable_x64(True):
        (weight, y), (wanted, wanted_y) = run(np.random.default_rng(1).normal(size=(4, 12)))
    np.testing.assert_allclose(weight, wanted, rtol=0, atol=1e-13)
    np.testing.assert_allclose(y, wanted_y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("blocks", [(3, 2), (2, 5), (4, 4), (1, 5), (6, 1)], ids=str)
def test_blast_contains_monarch_at_the_same_rank(blocks):
    kernel = _numbers(Spec("monarch", 12, 20, blocks, 3))
    blast = _grouped(kernel["V"], kernel["U"], blocks)
    assert factors.spec_of(blast) == Spec("blast", 12, 20, blocks, 3 * max(blocks))
    _agree(blast, kernel)


@pytest.mark.parametrize("blocks", [(3, 2), (4, 4), (1, 1), (12, 20)], ids=str)
def test_blast_contains_low_rank(blocks):
    kernel = _numbers(Spec("low_rank", 12, 20, rank=5))
    b1, b2 = blocks
    blast = {
        "V": kernel["V"].reshape(b1, -1, 5),
        "S": np.ones((b1, b2, 5)),
        "U": np.moveaxis(kernel["U"].reshape(5, b2, -1), 1, 0),
    }
    assert factors.spec_of(blast) == Spec("blast", 12, 20, blocks, 5)
    _agree(blast, kernel)
