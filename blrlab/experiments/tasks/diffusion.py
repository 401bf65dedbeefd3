"""Diffusion: images or latents with labels, the noise in them and its variance."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from blrlab import train
from blrlab.data import Stream, images, latents
from blrlab.data.batches import evenly
from blrlab.data.images import ImageBatches
from blrlab.data.latents import LatentBatches, Latents
from blrlab.errors import InputError, one_of
from blrlab.experiments.tasks import Dataset, Metric, Task
from blrlab.experiments.tasks import images as pictures
from blrlab.models.noise import Schedule
from blrlab.records import write_text
from blrlab.train import Objective

if TYPE_CHECKING:
    from blrlab.experiments.build import Experiment

SOURCES = (*images.SOURCES, latents.SOURCE)
WHOLE = 1.0  # the square in the middle of a picture, up to its shorter side


def schedule(made: "Experiment") -> Schedule:
    """Return the noise that the config gives."""
    config = made.config.noise
    return Schedule(config.steps, config.first, config.last)


def _check(made: "Experiment") -> None:
    config, model = made.config, made.model
    one_of(config.data.source, SOURCES, "data source")
    if config.data.source != latents.SOURCE and model.channels not in (1, 3):
        raise InputError(f"model.channels is {model.channels}; pictures have 1 or 3, data.source=latents any number.")
    if model.out_channels != 2 * model.channels:
        raise InputError(
            f"model.out_channels is {model.out_channels}; it must be {2 * model.channels}, twice model.channels: "
            "the noise and its variance."
        )
    schedule(made)
    if config.heal.distil == "logits":
        raise InputError("heal.distil=logits compares predictions of classes, which a denoiser has not: take outputs.")
    for field, value, least, most in (
        ("noise.dropped", config.noise.dropped, 0.0, 1.0),
        ("data.scale", config.data.scale, 1e-6, 1e6),
        ("data.workers", config.data.workers, 1, 1024),
    ):
        if not least <= value <= most:
            raise InputError(f"config.{field} is {value}; it must lie between {least:g} and {most:g}.")


def _prepare(made: "Experiment", folder: Path) -> str:
    config = made.config.data
    if config.source != latents.SOURCE:
        pictures.prepared(made, folder)
        return pictures.told(made, _told_apart(made, folder))
    summary = latents.prepare(folder, config.path, config.valid_fraction).summary
    _check_latents(tuple(summary["shape"]), made.model)
    return pictures.told(made, _told_apart(made, folder), "latents")


def _told_apart(made: "Experiment", folder: Path) -> dict[str, Any]:
    """Mix into the data's hash what else a denoiser's loss depends on, so that unlike losses share no table.

    Nothing else of what was prepared changes: it says how the data is opened again.
    """
    config, model, file = made.config.data, made.model, folder / "data.json"
    summary = json.loads(file.read_text(encoding="utf-8"))
    scale = config.scale if config.source == latents.SOURCE else 1.0
    also = (*dataclasses.astuple(schedule(made)), model.size, model.out_channels, scale)
    summary["hash"] = hashlib.sha256(f"{summary['hash']} {also}".encode()).hexdigest()
    write_text(file, json.dumps(summary, indent=1))
    return summary


def _check_latents(shape: tuple[int, ...], model: Any) -> None:
    wanted = (model.channels, model.size, model.size)
    if shape != wanted:
        found, seen = (" x ".join(map(str, sizes)) for sizes in (shape, wanted))
        raise InputError(f"the latents are {found}, but the model sees {seen}: set model.channels and model.size.")


def _load(folder: Path) -> Dataset:
    return latents.load(folder) if latents.prepared(folder) else images.load(folder)


def _batches(made: "Experiment", dataset: Any, batch: int, seed: int) -> Stream:
    config, model = made.config.data, made.model
    if isinstance(dataset, Latents):
        return LatentBatches(dataset.train, batch, seed, config.scale, config.workers)
    return ImageBatches(
        dataset.train,
        model.size,
        model.channels,
        batch,
        seed,
        flip=config.flip,
        workers=config.workers,
        margin=WHOLE,
    )


def _examples(made: "Experiment", part: Any, most: int) -> dict[str, np.ndarray]:
    if isinstance(part, latents.Part):
        return latents.held_out(part, most, made.config.data.scale)
    return images.held_out(part, made.model.size, made.model.channels, most, WHOLE)


def held_out_images(made: "Experiment", dataset: Any, most: int, batch: int) -> Iterator[np.ndarray]:
    """Yield the images [n, h, h, C] of up to `most` held-out examples, those of evaluation, `batch` at a time."""
    chosen = evenly(len(dataset.valid), most)
    for start in range(0, len(chosen), batch):
        yield _examples(made, dataset.valid.at(chosen[start : start + batch]), batch)["image"]


def _fixed(made: "Experiment", dataset: Any, part: str, most: int) -> dict[str, np.ndarray]:
    """Return examples of a part with a time and noise of their own, which are the same at every call.

    The times are spread evenly over the examples, in no order: fewer of them than of draws tell the mean as well.
    """
    found = _examples(made, getattr(dataset, part), most)
    count, random = len(found["label"]), np.random.default_rng(0)
    times = random.permutation(((np.arange(count) + 0.5) * made.config.noise.steps / count).astype(np.int32))
    return {**found, "time": times, "noise": random.standard_normal(found["image"].shape, np.float32)}


def _objective(made: "Experiment", training: bool) -> Objective:
    dropped = made.config.noise.dropped if training else 0.0
    return train.denoising(schedule(made), made.model.classes, dropped)


def _metrics(made: "Experiment", dataset: Dataset, measured: dict[str, float], examples: Any) -> list[Metric]:
    return [
        ("loss", measured["loss"], "mse + T/1000 vb"),
        ("mse", measured["mse"], "per value"),
        ("vb", measured["vb"], "bits/value"),
    ]


TASK = Task(
    window=lambda made: made.model.side**2,
    check=_check,
    prepare=_prepare,
    load=_load,
    batches=_batches,
    held_out=lambda made, dataset, most: _fixed(made, dataset, "valid", most),
    calibration=lambda made, dataset, most: _fixed(made, dataset, "train", most),
    objective=_objective,
    metrics=_metrics,
)
