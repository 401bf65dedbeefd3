"""AdamW with warm-up, cosine decay and clipping, from optax; rates and decay that know of factors; averages."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from blrlab import factors
from blrlab.errors import InputError, one_of

DECAYS = ("factors", "product")  # what weight decay makes smaller


def make_schedule(learning_rate: float, steps: int, warmup: int, final_fraction: float) -> Callable:
    """Return step -> learning rate: linear warm-up, then a cosine down to `final_fraction` of the peak.

    Raises:
      InputError: the warm-up is as long as the training.
    """
    if not steps:
        return optax.constant_schedule(learning_rate)
    if not 0 <= warmup < steps:
        raise InputError(f"a warm-up of {warmup} steps does not fit into {steps} steps.")
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else learning_rate,
        peak_value=learning_rate,
        warmup_steps=warmup,
        decay_steps=steps,
        end_value=learning_rate * final_fraction,
    )


def make_optimizer(
    schedule: Callable,
    weight_decay: float,
    clip_norm: float,
    beta2: float = 0.95,
    factor_rates: bool = False,
    decay: str = "factors",
    ema: float = 0.0,
) -> optax.GradientTransformation:
    """Return AdamW behind clipping by the global norm; only kernels decay, not biases, norms or embeddings.

    Args:
      schedule: step -> learning rate.
      weight_decay: decoupled, times the learning rate.
      clip_norm: the largest norm a gradient keeps.
      beta2: of Adam.
      factor_rates: scale Adam's steps of factors as `factors.learning_rates` says, but not their decay.
      decay: of the factors, each by itself, or of the product that they stand for (see `decay_product`).
      ema: 0, or how much of the average of the parameters a step keeps (see `average_params`).

    Raises:
      InputError: the decay is of neither, or the average keeps all or less than nothing.
    """
    one_of(decay, DECAYS, "decay")
    if not 0 <= ema < 1:
        raise InputError(f"ema is {ema}; it must be at least 0 and below 1.")
    adam = [optax.scale_by_adam(b1=0.9, b2=beta2)]
    if factor_rates:
        adam.append(scale_by_fan_in())
    decayed = optax.add_decayed_weights(weight_decay, _kernels) if decay == "factors" else decay_product(weight_decay)
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.chain(*adam, decayed, optax.scale_by_learning_rate(schedule)),  # as optax.adamw chains them
        *([average_params(ema)] if ema else []),
    )


class Average(NamedTuple):
    """What `average_params` keeps: the parameters' average, shaped as they are."""

    params: optax.Params


def average_params(kept: float) -> optax.GradientTransformation:
    """Average the parameters as they come out of every step: average <- kept average + (1 - kept) params.

    It begins as the parameters do, as DiT's (arXiv 2212.09748, section 4), and changes no update; it must be the last
    of a chain. `averaged` finds it in the state.
    """

    def init(params: optax.Params) -> Average:
        return Average(jax.tree.map(jnp.copy, params))  # a step donates both

    def update(updates: optax.Updates, state: Any, params: optax.Params | None = None) -> tuple[optax.Updates, Any]:
        assert params is not None
        after = optax.apply_updates(params, updates)
        return updates, Average(optax.incremental_update(after, state.params, 1 - kept))

    return optax.GradientTransformation(init, update)


def averaged(params: optax.Params, opt_state: optax.OptState) -> optax.Params:
    """Return the average that an optimiser's state holds; the parameters themselves where it holds none."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, Average))
    return next((node.params for node in nodes if isinstance(node, Average)), params)


def scale_by_fan_in() -> optax.GradientTransformation:
    """Multiply the updates of every factor by its learning rate in units of a dense layer's.

    See `factors.learning_rates` (Qiu et al., arXiv 2406.06248); dense kernels and all else are left as they are.
    """

    def scale(node: Any) -> Any:
        if not _factored(node):
            return node
        rates = factors.learning_rates(factors.spec_of(node))
        return {name: update * rates[name] for name, update in node.items()}

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates, is_leaf=_factored))


def decay_product(weight_decay: float) -> optax.GradientTransformation:
    """Add `weight_decay` times the gradient of ||W||_F^2 / 2 to the updates of every kernel.

    W is the weight that the factors stand for: in low rank, V is given W U^T and U is given V^T W, from r x r products
    (see `factors.squared_norm`); a dense kernel W, as in AdamW. It makes W small however the factors share it. The
    decay of the factors themselves also draws them to one size and favours low ranks: the least ||V||^2 + ||U||^2 of
    one W is twice its nuclear norm (Srebro et al., 2005).
    """

    def add(path: Any, kernel: Any, update: Any) -> Any:
        if not _named_kernel(path):
            return update
        slope = jax.grad(lambda kernel: factors.squared_norm(kernel) / 2)(kernel)
        return jax.tree.map(lambda update, slope: update + weight_decay * slope, update, slope)

    def update(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        assert params is not None
        return jax.tree.map_with_path(add, params, updates, is_leaf=_factored)

    return optax.stateless(update)


def _factored(node: Any) -> bool:
    return isinstance(node, Mapping) and factors.is_kernel(node)


def _kernels(params: optax.Params) -> optax.Params:
    return jax.tree.map_with_path(lambda path, _: _named_kernel(path), params)


def _named_kernel(path: Any) -> bool:
    return any(getattr(part, "key", None) == "kernel" for part in path)
