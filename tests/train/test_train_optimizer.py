"""The learning rate's schedule, decoupled weight decay on kernels alone, and clipping."""

import math
from typing import Any

import jax
import numpy as np
import optax
import pytest

from blrlab import train
from blrlab.errors import InputError

PEAK, STEPS, WARMUP, FINAL = 1e-2, 20, 4, 0.1
HALFWAY = PEAK * (FINAL + (1 - FINAL) / 2)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.0),
        (1, PEAK / 4),
        (3, PEAK * 3 / 4),
        (4, PEAK),
        (12, HALFWAY),
        (8, PEAK * (FINAL + (1 - FINAL) * (1 + math.cos(math.pi / 4)) / 2)),
        (20, PEAK * FINAL),
        (1000, PEAK * FINAL),
    ],
)
def test_a_schedule_warms_up_linearly_and_falls_as_a_cosine(step: int, rate: float) -> None:
    schedule = train.make_schedule(PEAK, STEPS, WARMUP, FINAL)
    assert float(schedule(step)) == pytest.approx(rate, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(("step", "rate"), [(0, PEAK), (10, HALFWAY), (20, PEAK * FINAL)])
def test_without_a_warm_up_the_first_step_is_at_the_peak(step: int, rate: float) -> None:
    assert float(train.make_schedule(PEAK, STEPS, 0, FINAL)(step)) == pytest.approx(rate, rel=1e-5)


@pytest.mark.parametrize(("steps", "warmup"), [(20, 20), (20, 21), (1, 1), (20, -1)])
def test_a_warm_up_that_does_not_fit_is_an_error(steps: int, warmup: int) -> None:
    with pytest.raises(InputError, match=f"warm-up of {warmup} steps does not fit into {steps} steps"):
        train.make_schedule(PEAK, steps, warmup, FINAL)


@pytest.mark.parametrize("warmup", [0, 1, 100])
def test_no_steps_at_all_need_no_schedule_that_fits(warmup: int) -> None:
    """A plan may have 0 steps, and then the warm-up that a config has does not matter."""
    assert math.isfinite(float(train.make_schedule(PEAK, 0, warmup, FINAL)(0)))


def update(optimizer: optax.GradientTransformation, gradient: Any, params: Any) -> tuple[Any, Any]:
    """Do one update and return (parameters, optimiser state)."""

    @jax.jit
    def first(gradient: Any, params: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(gradient, optimizer.init(params), params)
        return optax.apply_updates(params, updates), state

    return first(gradient, params)


def two(*shape: int) -> np.ndarray:
    return np.full(shape, 2.0, np.float32)


PARAMS = {
    "wte": {"embedding": two(5, 4)},
    "h_0": {
        "ln_1": {"scale": two(4), "bias": two(4)},
        "dense": {"kernel": two(4, 4), "bias": two(4)},
        "low_rank": {"kernel": {"V": two(4, 2), "U": two(2, 4)}, "bias": two(4)},
        "blast": {"kernel": {name: two(2, 2, 2) for name in "VSU"}},
    },
}
DECAYING = {
    "h_0/dense/kernel", "h_0/low_rank/kernel/V", "h_0/low_rank/kernel/U",
    "h_0/blast/kernel/V", "h_0/blast/kernel/S", "h_0/blast/kernel/U",
}  # fmt: skip


def test_without_a_gradient_only_kernels_shrink_dense_and_factored() -> None:
    optimizer = train.make_optimizer(lambda _: 0.5, weight_decay=0.1, clip_norm=1.0)
    after, _ = update(optimizer, jax.tree.map(np.zeros_like, PARAMS), PARAMS)
    found = {}
    for path, leaf in jax.tree.leaves_with_path(after):
        (found[jax.tree_util.keystr(path, simple=True, separator="/")],) = np.unique(leaf)
    assert len(found) == 11
    for path, value in found.items():
        assert value == pytest.approx(2.0 * (1 - 0.5 * 0.1) if path in DECAYING else 2.0, abs=1e-7), path
    assert set(found) >= DECAYING


@pytest.mark.parametrize(("clip", "scale"), [(100.0, 1.0), (13.0, 1.0), (1.0, 1 / 13), (0.26, 0.02)])
def test_gradients_are_clipped_by_their_norm_over_all_parameters(clip: float, scale: float) -> None:
    gradient = {"a": {"kernel": np.float32([[3.0], [4.0]])}, "b": {"bias": np.float32([12.0])}}  # norm 13
    optimizer = train.make_optimizer(lambda _: 0.1, weight_decay=0.0, clip_norm=clip)
    _, state = update(optimizer, gradient, gradient)
    moments, squares = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(optax.tree.get(state, name))])
        for name in ("mu", "nu")
    )
    seen = scale * np.array([3.0, 4.0, 12.0])
    np.testing.assert_allclose(moments, (1 - 0.9) * seen, rtol=1e-5)
    np.testing.assert_allclose(squares, (1 - 0.95) * seen**2, rtol=1e-5)


def test_the_first_update_is_as_large_as_the_learning_rate() -> None:
    params, gradient = {"bias": np.float32([0, 0, 0])}, {"bias": np.float32([1.0, -0.1, 10.0])}
    schedule = train.make_schedule(PEAK, STEPS, 0, FINAL)
    optimizer = train.make_optimizer(schedule, weight_decay=0.1, clip_norm=1.0)
    after, _ = update(optimizer, gradient, params)
    np.testing.assert_allclose(after["bias"], [-PEAK, PEAK, -PEAK], rtol=1e-4)
