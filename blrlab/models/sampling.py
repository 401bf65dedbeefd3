"""Images out of noise: the reverse of diffusion, with labels that guide it.

Sources: DDPM, Ho et al., arXiv 2006.11239 (algorithm 2), with learned variances and fewer steps after Nichol and
Dhariwal, arXiv 2102.09672; DDIM without noise, Song et al., arXiv 2010.02502 (eq. 12, eta 0); guidance without a
classifier, Ho and Salimans, arXiv 2207.12598 (eq. 6). Shapes: B images, h height and width, C channels, E what the
model gives: C, or 2 C where it tells a variance, too.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from blrlab.errors import InputError, one_of
from blrlab.models import noise as noises
from blrlab.models.noise import Schedule, Tables
from blrlab.models.parts import Part

SAMPLERS = ("ddpm", "ddim")


def ddpm_step(
    found: Tables,
    output: Float[Array, "B h h E"],
    x: Float[Array, "B h h C"],
    place: Int[Array, ""],
    drawn: Float[Array, "B h h C"],
    clip: bool = False,
) -> Float[Array, "B h h C"]:
    """Draw from p(x_before | x_t) with standard normal numbers `drawn`; the first time has none.

    Args:
      found: tables of the times that are kept.
      output: of the model at x and that time, 2 C channels.
      x: x_t.
      place: of t among the kept times.
      drawn: the numbers.
      clip: keep the image that is foreseen within -1 and 1, as pixels are.
    """
    noise, told = jnp.split(output, 2, axis=-1)
    places = jnp.broadcast_to(place, x.shape[:1])
    mean = noises.mean_before(found, _foreseen(found, x, noise, places, clip), x, places)
    deviation = jnp.exp(0.5 * noises.log_variance(found, told, places))
    return mean + jnp.where(place > 0, deviation, 0.0) * drawn


def ddim_step(
    found: Tables,
    output: Float[Array, "B h h E"],
    x: Float[Array, "B h h C"],
    place: Int[Array, ""],
    clip: bool = False,
) -> Float[Array, "B h h C"]:
    """Go from x_t to the kept time before without drawing; arguments as of `ddpm_step`, the variance is not used."""
    noise = output[..., : x.shape[-1]]
    places = jnp.broadcast_to(place, x.shape[:1])
    image = _foreseen(found, x, noise, places, clip)
    if clip:  # the noise that leads from the image as it was clipped
        noise = (x - noises.at(found.signal, places) * image) / noises.at(found.noise, places)
    return noises.at(found.signal_before, places) * image + noises.at(found.noise_before, places) * noise


def _foreseen(found: Tables, x: Array, noise: Array, places: Array, clip: bool) -> Float[Array, "B h h C"]:
    image = noises.told_image(found, x, noise, places)
    return jnp.clip(image, -1.0, 1.0) if clip else image


def guided(
    model: Part, params: Any, x: Float[Array, "B h h C"], times: Int[Array, "B"], labels: Int[Array, "B"], scale: Array
) -> Float[Array, "B h h E"]:
    """Run the model with labels and without: noise = without + scale (with - without), the variance is with labels."""
    none = jnp.full_like(labels, model.config.classes)
    twice: Any = model.apply(
        {"params": params}, *(jnp.concatenate(pair) for pair in ((x, x), (times, times), (labels, none)))
    )
    given, free = jnp.split(twice, 2)
    channels = x.shape[-1]
    noise = free[..., :channels] + scale * (given[..., :channels] - free[..., :channels])
    return jnp.concatenate([noise, given[..., channels:]], axis=-1)


def sample(
    model: Part,
    params: Any,
    labels: Int[Array, "B"],
    key: Array,
    schedule: Schedule,
    *,
    steps: int = 250,
    sampler: str = "ddpm",
    guidance: float = 1.0,
    clip: bool = False,
) -> Float[Array, "B h h C"]:
    """Make an image for every label.

    Args:
      model: such as `dit.DiT(config)`.
      params: its parameters.
      labels: 0 to `model.config.classes`, which stands for none.
      key: of the noise.
      schedule: that the model was trained with.
      steps: how many of its times are taken.
      sampler: ddpm or ddim.
      guidance: how far to go from no label towards the label and past it; 1: with the label as it is, 0: without.
      clip: see `ddpm_step`.

    Raises:
      InputError: the sampler is unknown, the steps are too many, or the model lacks the variance that ddpm draws with.
    """
    config = model.config
    one_of(sampler, SAMPLERS, "sampler")
    times = noises.spread(schedule, steps)
    if sampler == "ddpm" and config.out_channels != 2 * config.channels:
        raise InputError(
            f"ddpm draws with a learned variance, which a model of {config.channels} channels in and "
            f"{config.out_channels} out does not tell: take ddim."
        )
    return _sample(model, params, labels, key, guidance, schedule, times, sampler, clip, guidance != 1)


@functools.partial(jax.jit, static_argnames=("model", "schedule", "times", "sampler", "clip", "guide"))
def _sample(
    model: Part,
    params: Any,
    labels: Int[Array, "B"],
    key: Array,
    guidance: Array,
    schedule: Schedule,
    times: tuple[int, ...],
    sampler: str,
    clip: bool,
    guide: bool,
) -> Float[Array, "B h h C"]:
    found = noises.tables(schedule, times)
    shape = (labels.shape[0], *model.config.shape)

    def step(x: Array, place: Array) -> tuple[Array, None]:
        now = jnp.broadcast_to(jnp.asarray(found.times)[place], labels.shape)
        if guide:
            output: Any = guided(model, params, x, now, labels, guidance)
        else:
            output = model.apply({"params": params}, x, now, labels)
        if sampler == "ddim":
            return ddim_step(found, output, x, place, clip), None
        drawn = jax.random.normal(jax.random.fold_in(key, place), shape)
        return ddpm_step(found, output, x, place, drawn, clip), None

    first = jax.random.normal(jax.random.fold_in(key, len(times)), shape)
    return jax.lax.scan(step, first, jnp.arange(len(times) - 1, -1, -1))[0]
