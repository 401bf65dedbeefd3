"""GPT-2 as `blrlab.models.gpt2` has it, under `jax.jit`, on the weights of `blrlab.bench.gpt2_torch`."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from flax.traverse_util import unflatten_dict
from torch import Tensor

from blrlab.bench.gpt2_torch import Weights
from blrlab.bench.xla import to_jax
from blrlab.factors import Spec
from blrlab.models import gpt2

# (model, parameters) -> (state, jitted step: (state, windows) -> (state, {"loss", "grad_norm"})), as in blrlab.train
Trainer = Callable[[gpt2.GPT2, dict[str, Any]], tuple[Any, Any]]


class Ready(NamedTuple):
    """A compiled program: its call, and the bytes it holds beside its arguments (None where XLA does not say)."""

    call: Callable[[], Any]
    peak_bytes: int | None


def forward(sizes: gpt2.Config, specs: Mapping[str, Spec], weights: Weights, ids: Tensor) -> Ready:
    """Compile the logits [B, T, N] of ids [B, T]; all parameters in the dtype of the weights, float32 being IEEE."""
    model = _model(sizes, specs, weights.others["wte/embedding"])
    params, tokens = parameters(weights), to_jax(ids.int())
    program = jax.jit(jax.default_matmul_precision("highest")(lambda held, ids: model.apply({"params": held}, ids)))
    compiled = program.lower(params, tokens).compile()
    return Ready(lambda: compiled(params, tokens), _peak_bytes(compiled))


def train_step(
    sizes: gpt2.Config, specs: Mapping[str, Spec], weights: Weights, windows: Tensor, dtype: str, trainer: Trainer
) -> Ready:
    """Compile an optimiser step on windows [B, T + 1]: float32 parameters, computation in `dtype`, no dropout.

    Every call goes on from the state of the one before, and returns {"loss", "grad_norm"} of the state it found.
    """
    model = gpt2.GPT2(dataclasses.replace(sizes, dtype=dtype, dropout=0.0), FrozenDict(specs))
    state, step = trainer(model, parameters(weights.map(lambda leaf: leaf.float())))
    tokens = to_jax(windows.int())
    with jax.default_matmul_precision("highest"):
        compiled = step.lower(state, tokens).compile()
    held = [state]

    def call() -> dict[str, jax.Array]:
        held[0], metrics = compiled(held[0], tokens)
        return metrics

    return Ready(call, _peak_bytes(compiled))


def parameters(weights: Weights) -> dict[str, Any]:
    """Copy weights to JAX, as the model's nested dicts."""
    flat: dict[str, Any] = {path: to_jax(tensor) for path, tensor in weights.others.items()}
    for path, kernel in weights.kernels.items():
        held = to_jax(kernel) if isinstance(kernel, Tensor) else {name: to_jax(leaf) for name, leaf in kernel.items()}
        flat[f"{path}/kernel"] = held
    return unflatten_dict(flat, sep="/")


def _model(sizes: gpt2.Config, specs: Mapping[str, Spec], like: Tensor) -> gpt2.GPT2:
    dtype = str(like.dtype).removeprefix("torch.")
    return gpt2.GPT2(dataclasses.replace(sizes, dtype=dtype, dropout=0.0), FrozenDict(specs))


def _peak_bytes(compiled: Any) -> int | None:
    found = compiled.memory_analysis()
    return None if found is None else int(found.temp_size_in_bytes + found.output_size_in_bytes)


def poison(sizes: Sequence[int], dtype: str) -> None:
    """Leave NaN in JAX's memory that arrays of these numbers of elements are likely to get next."""
    blocks = jax.block_until_ready([jnp.full(size, math.nan, dtype) for size in sizes])
    for block in blocks:
        block.delete()


def wait(call: Callable[[], Any]) -> Callable[[], Any]:
    """Make a call return only when its work is done."""
    return lambda: jax.block_until_ready(call())


def finite(metrics: Mapping[str, jax.Array]) -> dict[str, float]:
    """Return the numbers of a step."""
    return {name: float(jnp.asarray(value)) for name, value in metrics.items()}
