"""The loss of a language model on fixed windows."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from blrlab.train.step import Params, next_token_loss


def evaluate(model: nn.Module, params: Params, windows: Int[np.ndarray, "w T1"], batch: int) -> float:
    """Return the mean loss over all predictions of the windows, in nats per token.

    Args:
      model: tokens [B, T] -> logits [B, T, N].
      params: its parameters.
      windows: [w, T + 1].
      batch: windows run at once; the last batch is filled up with windows that do not count.
    """

    @jax.jit
    def total(params: Params, windows: Array, counted: Array) -> Array:
        logits: Any = model.apply({"params": params}, windows[:, :-1])
        losses = next_token_loss(logits, windows[:, 1:])
        return jnp.sum(losses * counted[:, None])

    sums = []
    for start in range(0, len(windows), batch):
        part = windows[start : start + batch]
        padding = batch - len(part)
        counted = np.pad(np.ones(len(part), np.float32), (0, padding))
        sums.append(total(params, np.pad(part, ((0, padding), (0, 0))), counted))
    return math.fsum(float(value) for value in sums) / (len(windows) * (windows.shape[1] - 1))
