"""What a model is trained for: how a batch becomes the model's arguments, and what its output costs.

Both are functions of the batch and one random key, so what is drawn for the input (noise, mixtures) is drawn again for
the loss. Shapes: B examples, T tokens, N words, K classes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.core import FrozenDict
from jaxtyping import Array, Float, Int

Batch = Any


@dataclasses.dataclass(frozen=True)
class Objective:
    """A task as functions of a batch.

    Attributes:
      inputs: (batch, key) -> the model's arguments.
      losses: (output, batch, key) -> the loss of every prediction, [B, ...].
      measures: {name: (output, batch) -> a number of every example [B]}, for evaluation.
    """

    inputs: Callable[[Batch, Array], tuple[Any, ...]]
    losses: Callable[[Any, Batch, Array], Array]
    measures: Mapping[str, Callable[[Any, Batch], Array]] = FrozenDict()


def next_token_loss(logits: Float[Array, "B T N"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Return the loss of every prediction, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


# A batch is windows [B, T + 1] of text.
NEXT_TOKEN = Objective(
    inputs=lambda windows, key: (windows[:, :-1],),
    losses=lambda logits, windows, key: next_token_loss(logits, windows[:, 1:]),
)


def classes(smoothing: float = 0.0, mixup: float = 0.0) -> Objective:
    """Return the objective of telling classes: a batch is {"image": [B, S, S, C], "label": [B]}.

    Args:
      smoothing: the share of every label that is spread over all classes (Szegedy et al., arXiv 1512.00567).
      mixup: 0, or the parameter of the Beta distribution by which pairs of images are mixed (Zhang et al., arXiv
        1710.09412); one share is drawn for each pair.
    """

    def partner(batch: Batch, key: Array) -> tuple[Array, Array]:
        drawn, order = jax.random.split(key)
        count = batch["label"].shape[0]
        share = jax.random.beta(drawn, mixup, mixup, (count,)) if mixup else jnp.ones(count)
        return share, jax.random.permutation(order, count)

    def inputs(batch: Batch, key: Array) -> tuple[Array]:
        images = batch["image"]
        if not mixup:
            return (images,)
        share, other = partner(batch, key)
        share = share[:, None, None, None].astype(images.dtype)
        return (share * images + (1 - share) * images[other],)

    def losses(logits: Array, batch: Batch, key: Array) -> Float[Array, "B"]:
        wanted = optax.smooth_labels(jax.nn.one_hot(batch["label"], logits.shape[-1]), smoothing)
        if mixup:
            share, other = partner(batch, key)
            wanted = share[:, None] * wanted + (1 - share[:, None]) * wanted[other]
        return optax.softmax_cross_entropy(logits, wanted)

    return Objective(inputs, losses, FrozenDict({"top1": _among(1), "top5": _among(5)}))


def _among(most: int) -> Callable[[Any, Batch], Array]:
    """Return whether the label is among the likeliest `most` classes."""

    def measure(logits: Float[Array, "B K"], batch: Batch) -> Float[Array, "B"]:
        own = jnp.take_along_axis(logits, batch["label"][:, None], axis=-1)
        return (jnp.sum(logits > own, axis=-1) < most).astype(jnp.float32)

    return measure
