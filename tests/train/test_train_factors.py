"""What an optimiser may know of factors: learning rates by fan-in, and the decay of the weight they stand for."""

from typing import Any

import jax
import numpy as np
import optax
import pytest

from blrlab import factors, train
from blrlab.errors import InputError
from blrlab.factors import Spec

RATE, DECAY = 0.01, 0.3
SPECS = {
    "low_rank": Spec("low_rank", 12, 20, rank=5),
    "monarch": Spec("monarch", 12, 20, (3, 2), 3),
    "blast": Spec("blast", 12, 20, (3, 2), 5),
}


def drawn(seed: int) -> Any:
    """Draw parameters, or gradients, of dense and factored layers and of what is no layer."""
    random = np.random.default_rng(seed)
    sizes = {name: {"kernel": factors.shapes(spec), "bias": (20,)} for name, spec in SPECS.items()}
    sizes |= {"dense": {"kernel": (12, 20), "bias": (20,)}, "wte": {"embedding": (7, 12)}, "ln": {"scale": (12,)}}
    return jax.tree.map(
        lambda size: random.normal(size=size).astype(np.float32), sizes, is_leaf=lambda size: isinstance(size, tuple)
    )


def change(gradients: list[Any], **options: Any) -> Any:
    """Return what steps on these gradients change of the parameters."""
    optimizer = train.make_optimizer(lambda _: RATE, clip_norm=1e9, **{"weight_decay": DECAY, **options})
    params, after = drawn(0), drawn(0)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, after)
        after = optax.apply_updates(after, updates)
    return jax.tree.map(lambda new, old: np.asarray(new) - old, after, params)


def assert_equal(found: Any, wanted: Any, rtol: float = 0.0, atol: float = 0.0) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, wanted)


def nothing() -> Any:
    return jax.tree.map(np.zeros_like, drawn(0))


def test_without_options_it_is_optax_s_adamw_and_its_state() -> None:
    """So checkpoints of one are checkpoints of the other."""
    optimizer = train.make_optimizer(lambda _: RATE, DECAY, clip_norm=1.0)
    masked = optax.adamw(lambda _: RATE, b1=0.9, b2=0.95, weight_decay=DECAY, mask=train.optimizer._kernels)
    usual = optax.chain(optax.clip_by_global_norm(1.0), masked)
    params = drawn(0)
    both = optimizer, usual
    states = [each.init(params) for each in both]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    run = jax.jit(lambda gradient, states: [e.update(gradient, s, params) for e, s in zip(both, states, strict=True)])
    for seed in (1, 2):
        found, wanted = run(drawn(seed), states)
        assert_equal(found, wanted)
        states = [found[1], wanted[1]]


def test_adam_s_first_steps_are_as_large_as_their_learning_rates() -> None:
    found = change([drawn(1)], factor_rates=True, weight_decay=0.0)
    for name, spec in SPECS.items():
        for factor, rate in factors.learning_rates(spec).items():
            step = -RATE * rate * np.sign(drawn(1)[name]["kernel"][factor])
            np.testing.assert_allclose(found[name]["kernel"][factor], step, rtol=2e-3)


def test_learning_rates_of_factors_leave_all_else_as_it_was() -> None:
    gradients = [drawn(1), drawn(2)]
    found, usual = change(gradients, factor_rates=True), change(gradients)
    for name in SPECS:
        assert not np.allclose(found[name].pop("kernel")["U"], usual[name].pop("kernel")["U"])
    assert_equal(found, usual)


@pytest.mark.parametrize("decay", train.optimizer.DECAYS)
def test_learning_rates_of_factors_do_not_scale_the_decay(decay: str) -> None:
    assert_equal(change([nothing()], factor_rates=True, decay=decay), change([nothing()], decay=decay))


def test_the_decay_of_the_product_is_its_gradient_by_the_factors() -> None:
    found = change([nothing()], decay="product")
    for name in SPECS:
        norm = jax.jit(jax.grad(lambda kernel: (factors.to_dense(kernel) ** 2).sum() / 2))
        slope = norm(drawn(0)[name]["kernel"])
        wanted = jax.tree.map(lambda each: -RATE * DECAY * np.asarray(each), slope)
        assert_equal(found[name].pop("kernel"), wanted, rtol=1e-4, atol=1e-5)
    usual = change([nothing()])
    for name in SPECS:
        usual[name].pop("kernel")
    assert np.any(usual["dense"]["kernel"])
    assert_equal(found, usual)


def test_the_decay_of_the_product_does_not_pass_through_adam() -> None:
    """With a gradient the change is the sum of both: Adam's moments hold nothing of the decay."""
    both = change([drawn(1)], decay="product")
    apart = (change([drawn(1)], weight_decay=0.0), change([nothing()], decay="product"))
    assert_equal(both, jax.tree.map(np.add, *apart), atol=1e-6)


def test_a_decay_of_something_else_is_an_error() -> None:
    with pytest.raises(InputError, match='unknown decay "weights": it is one of factors, product'):
        train.make_optimizer(lambda _: RATE, DECAY, 1.0, decay="weights")
