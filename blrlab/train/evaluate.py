"""The loss of a model, and what else tells how good it is, on fixed examples."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from blrlab.train.objective import NEXT_TOKEN, Objective
from blrlab.train.step import Params


def evaluate(
    model: nn.Module, params: Params, examples: Any, batch: int, objective: Objective = NEXT_TOKEN
) -> dict[str, float]:
    """Return the mean loss over all predictions of the examples, and the mean of every measure over the examples.

    Args:
      model: such as a language model, tokens [B, T] -> logits [B, T, N].
      params: its parameters.
      examples: arrays with one row an example, such as windows [w, T + 1]; or a dict of them.
      batch: examples run at once; the last batch is filled up with examples that do not count.
      objective: what the model is trained for; what it draws is the same at every call.

    Returns:
      {"loss": ..., and the measures by name}.
    """

    @jax.jit
    def total(params: Params, part: Any, counted: Array, key: Array) -> dict[str, Array]:
        output: Any = model.apply({"params": params}, *objective.inputs(part, key))
        found = {"loss": objective.losses(output, part, key)}
        found |= {name: measure(output, part) for name, measure in objective.measures.items()}
        of_each = {name: jnp.mean(values.reshape(batch, -1), axis=1) for name, values in found.items()}
        return {name: jnp.sum(values * counted) for name, values in of_each.items()}

    count = len(jax.tree.leaves(examples)[0])
    sums: list[dict[str, Array]] = []
    for start in range(0, count, batch):
        taken = min(batch, count - start)
        part = jax.tree.map(lambda rows, at=start, size=taken: _filled(rows[at : at + size], batch), examples)
        counted = np.pad(np.ones(taken, np.float32), (0, batch - taken))
        sums.append(total(params, part, counted, jax.random.fold_in(jax.random.key(0), start)))
    return {name: math.fsum(float(part[name]) for part in sums) / count for name in sums[0]}


def _filled(rows: np.ndarray, batch: int) -> np.ndarray:
    """Fill up rows to a whole batch."""
    return np.pad(rows, ((0, batch - len(rows)), *((0, 0) for _ in rows.shape[1:])))
