"""The stage that draws images with every model there is: sample.

All models are given the same noise and labels, so what differs between two of them at one place is the model's doing.
`samples.npz` has what was drawn, float32 [n, h, h, C] by model, and the labels [n]; `samples.png` a row for each class
and a group of columns for each model, of many the first.
"""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blrlab import records
from blrlab.data import latents
from blrlab.errors import InputError, one_of
from blrlab.experiments import decoding, fid
from blrlab.experiments.build import Experiment
from blrlab.experiments.model_stages import EVALUATED, Run
from blrlab.experiments.tasks import diffusion
from blrlab.models import noise, sampling
from blrlab.report.words import STAGES

MOST_ROWS = 10  # of the picture, where no labels are named
SHOWN = (40, 8)  # rows and columns of a model that the picture has at most


def check(made: Experiment) -> None:
    """Check `config.sample`.

    Raises:
      InputError: the model makes no images, a value is unknown or out of range, or there is no such autoencoder.
    """
    config = made.config.get("sample")
    if config is None:
        raise InputError(f"stage sample draws images, which a {made.config.model.family} does not: leave it out.")
    one_of(config.sampler, sampling.SAMPLERS, "sample.sampler")
    noise.spread(diffusion.schedule(made), config.steps)
    labels(made)
    decoding.check(made)
    for field, least, most in (
        ("each", 1, 10000),
        ("batch", 1, 2**20),
        ("seed", 0, 2**31 - 1),
        ("guidance", 0.0, 1e3),
        ("fid_guidance", 0.0, 1e3),
        ("fid", 0, 10**7),
    ):
        if not least <= config[field] <= most:
            raise InputError(f"config.sample.{field} is {config[field]}; it must lie between {least:g} and {most:g}.")
    if config.fid == 1:
        raise InputError("config.sample.fid is 1; a distance needs at least 2 images, and 0 measures none.")


def labels(made: Experiment) -> list[int]:
    """Read `config.sample.labels`.

    Raises:
      InputError: one is no number of a class.
    """
    count, given = made.model.classes, str(made.config.sample.labels)
    words = [word.strip() for word in given.split(",") if word.strip()]
    if not all(word.isdecimal() and int(word) < count for word in words):
        raise InputError(f'sample.labels is numbers of classes, 0 to {count - 1}, commas between; not "{given}".')
    return [int(word) for word in words] or np.linspace(0, count - 1, min(count, MOST_ROWS)).astype(int).tolist()


def sample(run: Run, folder: Path) -> None:
    """Draw the same labels with the same noise by every model, and make one picture of them."""
    made, config = run.made, run.made.config.sample
    wanted = np.repeat(labels(made), config.each)
    decode, reason = decoding.decoder(made)
    drawn = {}
    for stage, name in EVALUATED.items():
        if run.workdir.done(stage):
            drawn[name] = np.concatenate(list(draw(run, stage, wanted, config.seed, config.guidance)))
            run.say(f"sample: {name}, {len(wanted)} images in {config.steps} steps of {config.sampler}")
    np.savez(folder / "samples.npz", label=wanted, **drawn)
    again = functools.partial(draw, run)
    records.rewrite(folder / "records.jsonl", fid.rows(run, list(drawn), again, decode, reason) if config.fid else [])
    if decode is None:
        run.say(f"sample: no picture, {reason}; the latents are in {folder / 'samples.npz'}")
        return
    rows, each = SHOWN
    shown = np.arange(len(wanted)).reshape(-1, config.each)[:rows, :each].ravel()
    path = folder / "samples.png"
    picture({STAGES[name]: decode(images[shown]) for name, images in drawn.items()}, labels(made)[:rows]).save(path)
    of = f"{len(shown)} of {len(wanted)}, " if len(shown) < len(wanted) else ""
    run.say(f"sample: {path}, {of}a row for each class, {' | '.join(STAGES[name] for name in drawn)}")


def draw(run: Run, stage: str, wanted: np.ndarray, seed: int, guidance: float) -> Iterator[np.ndarray]:
    """Draw an image for every label with the model that a stage left, float32 [b, h, h, C] a batch."""
    made, config = run.made, run.made.config.sample
    model, params = run.model(dense=stage in ("dense", "continue")), run.params(stage)
    size = min(config.batch, len(wanted))
    for start in range(0, len(wanted), size):
        part = wanted[start : start + size]
        images = sampling.sample(
            model,
            params,
            jnp.asarray(np.pad(part, (0, size - len(part)))),
            jax.random.fold_in(jax.random.key(seed), start),
            diffusion.schedule(made),
            steps=config.steps,
            sampler=config.sampler,
            guidance=guidance,
            clip=made.config.data.source != latents.SOURCE,
        )
        yield np.asarray(images)[: len(part)]


def picture(drawn: Mapping[str, np.ndarray], rows: list[int]) -> Any:
    """Lay out images, uint8 [rows x each, h, w, 3] by name: a row for each label, the models side by side.

    Small images are enlarged, without smoothing.
    """
    from PIL import Image, ImageDraw

    first = next(iter(drawn.values()))
    each, side = len(first) // len(rows), first.shape[1]
    scale = max(1, 48 // side)
    cell, gap, margin = side * scale + 2, 12, 34
    wide = each * cell + gap
    sheet = Image.new("RGB", (margin + wide * len(drawn), 18 + cell * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (name, images) in enumerate(drawn.items()):
        pen.text((margin + column * wide, 3), name, fill="black")
        for index, pixels in enumerate(images):
            row, place = divmod(index, each)
            large = Image.fromarray(pixels).resize((side * scale, side * scale), Image.Resampling.NEAREST)
            sheet.paste(large, (margin + column * wide + place * cell, 18 + row * cell))
    for row, label in enumerate(rows):
        pen.text((4, 18 + row * cell + cell // 2 - 6), str(label), fill="black")
    return sheet
