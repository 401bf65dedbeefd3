"""AdamW with warm-up, cosine decay and clipping, from optax."""

from collections.abc import Callable

import jax
import optax

from blrlab.errors import InputError


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
    schedule: Callable, weight_decay: float, clip_norm: float, beta2: float = 0.95
) -> optax.GradientTransformation:
    """Return AdamW behind clipping by the global norm; only kernels decay, not biases, norms or embeddings."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1=0.9, b2=beta2, weight_decay=weight_decay, mask=_kernels),
    )


def _kernels(params: optax.Params) -> optax.Params:
    return jax.tree.map_with_path(lambda path, _: any(getattr(part, "key", None) == "kernel" for part in path), params)
