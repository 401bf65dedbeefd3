"""One optimiser step on a language model, as a pure function of state and batch."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

Params = Any
Loss = Callable[..., tuple[Array, dict[str, Array]]]


class State(NamedTuple):
    """All that training needs to go on.

    Attributes:
      step: steps done, a scalar.
      params: nested dicts of arrays.
      opt_state: optax's.
      seed: uint32 key data; the randomness of a step is drawn from it and the step's number.
    """

    step: Array
    params: Params
    opt_state: optax.OptState
    seed: Array


def init_state(params: Params, optimizer: optax.GradientTransformation, key: Array) -> State:
    """Start training from parameters."""
    return State(jnp.zeros((), jnp.int32), params, optimizer.init(params), jax.random.key_data(key))


def next_token_loss(logits: Float[Array, "B T N"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Return the loss of every prediction, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def data_loss(model: nn.Module) -> Loss:
    """Return the loss of predicting the text: (params, windows [B, T + 1], key) -> (mean nats per token, {})."""

    def loss(params: Params, windows: Array, key: Array) -> tuple[Array, dict[str, Array]]:
        logits: Any = model.apply({"params": params}, windows[:, :-1], train=True, rngs={"dropout": key})
        return next_token_loss(logits, windows[:, 1:]).mean(), {}

    return loss


def make_step(model: nn.Module, optimizer: optax.GradientTransformation, loss: Loss | None = None) -> Callable:
    """Return the jitted step: (state, windows [B, T + 1]) -> (state, {"loss", "grad_norm"}); it donates the state.

    Args:
      model: tokens [B, T] -> logits [B, T, N].
      optimizer: optax's.
      loss: (params, windows, key, ...) -> (what is made small, metrics that replace `loss` or are added to it); what
        it takes besides is given to the step after the windows. `data_loss(model)` if None.
    """
    loss = data_loss(model) if loss is None else loss

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: State, windows: Int[Array, "B T1"], *given: Any) -> tuple[State, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.seed), state.step)
        (value, more), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, windows, key, *given)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(gradient), **more}
        return State(state.step + 1, params, opt_state, state.seed), metrics

    return step
