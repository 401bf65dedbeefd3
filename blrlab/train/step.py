"""One optimiser step, as a pure function of state and batch."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from blrlab.train.objective import NEXT_TOKEN, Objective

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


def data_loss(model: nn.Module, objective: Objective = NEXT_TOKEN) -> Loss:
    """Return the loss of what a model is trained for: (params, batch, key) -> (its mean, {})."""

    def loss(params: Params, batch: Any, key: Array) -> tuple[Array, dict[str, Array]]:
        drawn, dropped = drawn_keys(key)
        given = objective.inputs(batch, drawn)
        output: Any = model.apply({"params": params}, *given, train=True, rngs={"dropout": dropped})
        return objective.losses(output, batch, drawn).mean(), {}

    return loss


def drawn_keys(key: Array) -> tuple[Array, Array]:
    """Return the key of what an objective draws, and that of dropout, which is the step's own."""
    return jax.random.fold_in(key, 1), key


def make_step(model: nn.Module, optimizer: optax.GradientTransformation, loss: Loss | None = None) -> Callable:
    """Return the jitted step: (state, batch) -> (state, {"loss", "grad_norm"}); it donates the state.

    Args:
      model: such as a language model, tokens [B, T] -> logits [B, T, N], whose batches are windows [B, T + 1].
      optimizer: optax's.
      loss: (params, batch, key, ...) -> (what is made small, metrics that replace `loss` or are added to it); what it
        takes besides is given to the step after the batch. `data_loss(model)` if None.
    """
    loss = data_loss(model) if loss is None else loss

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: State, batch: Any, *given: Any) -> tuple[State, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.seed), state.step)
        (value, more), gradient = jax.value_and_grad(loss, has_aux=True)(state.params, batch, key, *given)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(gradient), **more}
        return State(state.step + 1, params, opt_state, state.seed), metrics

    return step
