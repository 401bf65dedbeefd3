"""Distillation: a loss that draws a model towards another one, its teacher, beside the text.

Two terms, of which one is chosen. logits: the divergence of the student's predictions from the teacher's (Hinton et
al., arXiv 1503.02531). outputs: the error of the outputs of the blocks, which the compression has changed, as in
layer-wise distillation (Jiao et al., arXiv 1909.10351). Shapes: B batch, T tokens, N vocabulary size, D width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from blrlab.errors import InputError, one_of
from blrlab.train.objective import NEXT_TOKEN, Objective
from blrlab.train.step import Loss, Params, drawn_keys

TERMS = ("logits", "outputs")


def divergence(
    teacher: Float[Array, "... N"], student: Float[Array, "... N"], temperature: float = 1.0
) -> Float[Array, "..."]:
    """Return T^2 KL(teacher || student) of every prediction, in nats, both softened by the temperature T.

    T^2 keeps the gradient's size as T grows (Hinton et al., section 2).
    """
    wanted = jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature)
    found = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    return temperature**2 * jnp.sum(jnp.exp(wanted) * (wanted - found), axis=-1)


def output_error(teacher: Mapping[str, Array], student: Mapping[str, Array]) -> Float[Array, ""]:
    """Return ||student - teacher||^2 / ||teacher||^2 of one position's output [D], the mean over positions and blocks.

    Each position is measured by its own size, as the norms that read it do: a few positions of a language model are
    so large that they would be all that counts.
    """

    def of_block(wanted: Array, found: Array) -> Array:
        wanted, found = wanted.astype(jnp.float32), found.astype(jnp.float32)
        energy = jnp.maximum(jnp.sum(wanted**2, axis=-1), jnp.finfo(jnp.float32).tiny)
        return jnp.mean(jnp.sum((found - wanted) ** 2, axis=-1) / energy)

    return jnp.mean(jnp.stack([of_block(teacher[path], student[path]) for path in teacher]))


def distil_loss(
    model: nn.Module,
    teacher: nn.Module,
    term: str,
    weight: float,
    temperature: float = 1.0,
    blocks: Sequence[str] = (),
    objective: Objective = NEXT_TOKEN,
) -> Loss:
    """Return the loss (params, batch, key, the teacher's params) -> (mixed, {"loss", "distil_loss"}).

    What is made small is (1 - weight) loss + weight distil_loss; `loss` alone is of the data, as without a teacher.
    The teacher runs without dropout, and no gradient goes to it.

    Args:
      model: the student, such as tokens [B, T] -> logits [B, T, N].
      teacher: the same, of its own shape.
      term: logits or outputs.
      weight: the share of the distillation, 0 to 1.
      temperature: of the logits.
      blocks: paths of the modules whose outputs are compared, the same in both models.
      objective: what both are trained for.

    Raises:
      InputError: the term is unknown, or a model has no such block.
    """
    one_of(term, TERMS, "distillation")
    watched = tuple(blocks) if term == "outputs" else ()
    if term == "outputs" and not watched:
        raise InputError("no blocks are named whose outputs are to be distilled.")

    def loss(params: Params, batch: Any, key: Array, given: Params) -> tuple[Array, dict[str, Array]]:
        drawn, dropped = drawn_keys(key)
        inputs = objective.inputs(batch, drawn)
        logits, outputs = _run(model, params, inputs, watched, train=True, rngs={"dropout": dropped})
        wanted, wanted_outputs = jax.lax.stop_gradient(_run(teacher, given, inputs, watched))
        of_data = objective.losses(logits, batch, drawn).mean()
        if term == "logits":
            of_teacher = divergence(wanted, logits, temperature).mean()
        else:
            of_teacher = output_error(wanted_outputs, outputs)
        mixed = (1 - weight) * of_data + weight * of_teacher
        return mixed, {"loss": of_data, "distil_loss": of_teacher}

    return loss


def _run(
    model: nn.Module, params: Params, inputs: tuple[Any, ...], blocks: Sequence[str], **given: Any
) -> tuple[Array, dict[str, Array]]:
    """Return the output of a model and the outputs of some of its modules, by path."""
    found: dict[str, Array] = {}

    def watch(method: Callable, args: tuple, kwargs: dict[str, Any], context: nn.module.InterceptorContext) -> Any:
        output, path = method(*args, **kwargs), "/".join(context.module.path)
        if context.method_name == "__call__" and path in blocks:
            found[path] = output
        return output

    with nn.intercept_methods(watch):
        logits: Any = model.apply({"params": params}, *inputs, **given)
    for path in blocks:
        if path not in found:
            raise InputError(f"the model has no block {path} to distil.")
    return logits, found
