"""Tokens after tokens: greedy or drawn, with keys and values kept from one to the next.

Shapes: B batch, T tokens of the longest prompt, N vocabulary size. Prompts of a batch may be of different lengths: each
row's tokens begin on the left, what follows them is filler, which no row sees.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from blrlab.errors import InputError
from blrlab.models.parts import Cache, KeyValues, Part


def empty_cache(config: Any, batch: int, room: int, dtype: Any = None) -> Cache:
    """Make room for keys and values of `room` tokens a row, in the dtype of the computation unless one is given."""
    heads, width = config.kept
    blank = jnp.zeros((batch, room, heads, width), dtype or config.dtype)
    return tuple(KeyValues(blank, blank) for _ in range(config.layers))


def choose(
    logits: Float[Array, "B N"], key: Array, temperature: float | Array = 1.0, top_p: float | Array = 1.0
) -> Int[Array, "B"]:
    """Draw a token of each row: the likeliest at temperature 0, else from the likeliest that together have `top_p`.

    The likeliest token is always among them (nucleus sampling, Holtzman et al., arXiv 1904.09751).
    """
    scaled = logits.astype(jnp.float32) / jnp.maximum(temperature, 1e-6)
    order = jnp.argsort(-scaled, axis=-1)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    shares = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares  # what the likelier ones have
    drawn = jax.random.categorical(key, jnp.where(before < top_p, ranked, -jnp.inf), axis=-1)
    place = jnp.where(jnp.asarray(temperature) > 0, drawn, 0)
    return jnp.take_along_axis(order, place[:, None], axis=-1)[:, 0].astype(jnp.int32)


def generate(
    model: Part,
    params: Any,
    tokens: Int[Array, "B T"],
    steps: int,
    *,
    lengths: Int[Array, "B"] | None = None,
    key: Array | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: int | None = None,
) -> Int[Array, "B steps"]:
    """Continue prompts by `steps` tokens.

    Args:
      model: a language model, such as `gpt2.GPT2(config)`.
      params: its parameters.
      tokens: the prompts.
      steps: how many tokens follow each.
      lengths: of the prompts, where they differ; the rest of a row is filler.
      key: of the draws; a temperature of 0 needs none.
      temperature: 0 takes the likeliest token.
      top_p: the share of probability that is drawn from.
      stop: a token after which a row holds nothing but it.

    Returns:
      The tokens that follow each prompt.

    Raises:
      InputError: there is no prompt, prompt and continuation are longer than the model's context, or a setting is out
        of range.
    """
    batch, length = tokens.shape
    context = model.config.context
    if not length or not batch:
        raise InputError("there is no prompt: give at least one token.")
    if steps < 1:
        raise InputError(f"{steps} tokens cannot be generated: ask for at least 1.")
    if length + steps > context:
        raise InputError(
            f"a prompt of {length} tokens and {steps} more are longer than the model's context of {context}."
        )
    if temperature < 0 or not 0 < top_p <= 1:
        raise InputError(f"a temperature of {temperature} and a top_p of {top_p} cannot be: at least 0, and 0 to 1.")
    if lengths is None:
        lengths = jnp.full(batch, length, jnp.int32)
    elif not bool(jnp.all((lengths >= 1) & (lengths <= length))):
        raise InputError(f"the prompts have lengths from {lengths.min()} to {lengths.max()}, their rows {length}.")
    key = jax.random.key(0) if key is None else key
    return _generate(model, params, tokens, lengths, key, temperature, top_p, -1 if stop is None else stop, steps)


@functools.partial(jax.jit, static_argnames=("model", "steps"))
def _generate(
    model: Part,
    params: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    key: Array,
    temperature: Array,
    top_p: Array,
    stop: Array,
    steps: int,
) -> Int[Array, "B steps"]:
    batch, length = tokens.shape
    cache = empty_cache(model.config, batch, length + steps)
    places = jnp.broadcast_to(jnp.arange(length)[None], tokens.shape)
    logits: Any
    logits, cache = model.apply({"params": params}, tokens, cache=cache, positions=places, only=lengths - 1)

    def ended(token: Array) -> Array:
        return (token == stop) & (stop >= 0)

    def step(state: Any) -> Any:
        at, logits, cache, done, found = state
        token = choose(logits[:, 0], jax.random.fold_in(key, at), temperature, top_p)
        token = jnp.where(done, stop, token)
        found = found.at[:, at].set(token)
        # The last token's logits are not used: the loop could stop before, for one more branch.
        logits, cache = model.apply({"params": params}, token[:, None], cache=cache, positions=(lengths + at)[:, None])
        return at + 1, logits, cache, done | ended(token), found

    def more(state: Any) -> Array:
        at, _, _, done, _ = state
        return (at < steps) & ~done.all()

    found = jnp.full((batch, steps), jnp.maximum(stop, 0), jnp.int32)
    start = (jnp.zeros((), jnp.int32), logits, cache, jnp.zeros(batch, bool), found)
    return jax.lax.while_loop(more, step, start)[-1]
