"""Image classification: pictures with labels, the share of right answers."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blrlab import train
from blrlab.data import images
from blrlab.data.images import ImageBatches, Images
from blrlab.errors import InputError, one_of
from blrlab.experiments.tasks import Metric, Task
from blrlab.train import Objective

if TYPE_CHECKING:
    from blrlab.experiments.build import Experiment


def _check(made: "Experiment") -> None:
    config = made.config
    one_of(config.data.source, images.SOURCES, "data source")
    if made.model.channels not in (1, 3):
        raise InputError(f"model.channels is {made.model.channels}; pictures have 1 or 3.")
    if not made.model.classes:
        raise InputError("model.classes is 0; give the number of classes of the data.")
    for field, value, least, most in (
        ("data.smallest", config.data.smallest, 1e-3, 1.0),
        ("train.smoothing", config.train.smoothing, 0.0, 0.999),
        ("train.mixup", config.train.mixup, 0.0, 100.0),
        ("data.workers", config.data.workers, 1, 1024),
    ):
        if not least <= value <= most:
            raise InputError(f"config.{field} is {value}; it must lie between {least:g} and {most:g}.")


def prepared(made: "Experiment", folder: Path) -> dict[str, Any]:
    """Prepare the pictures of a config's source, and return their summary."""
    config = made.config.data
    found = images.prepare(
        folder,
        config.source,
        path=config.path if config.source == "folder" else "",
        name=config.name if config.source == "huggingface" else "",
        subset=config.subset if config.source == "huggingface" else "",
        valid_fraction=config.valid_fraction,
    )
    return found.summary


def told(made: "Experiment", summary: Mapping[str, Any], what: str = "images") -> str:
    """Write a sentence on prepared data.

    Raises:
      InputError: it has more or fewer classes than the model.
    """
    classes = len(summary["classes"])
    if classes != made.model.classes:
        raise InputError(f"the data has {classes} classes, the model {made.model.classes}: set model.classes.")
    counts = f"{summary['train']:,} + {summary['valid']:,} {what} of {classes} classes"
    return f"{summary['source']}, {counts}, hash {summary['hash'][:12]}"


def _prepare(made: "Experiment", folder: Path) -> str:
    return told(made, prepared(made, folder))


def _batches(made: "Experiment", dataset: Images, batch: int, seed: int) -> ImageBatches:
    config, model = made.config.data, made.model
    return ImageBatches(
        dataset.train,
        model.image_size,
        model.channels,
        batch,
        seed,
        smallest=config.smallest,
        flip=config.flip,
        workers=config.workers,
    )


def _held_out(made: "Experiment", dataset: Images, most: int) -> Any:
    return images.held_out(dataset.valid, made.model.image_size, made.model.channels, most)


def _calibration(made: "Experiment", dataset: Images, most: int) -> Any:
    return images.held_out(dataset.train, made.model.image_size, made.model.channels, most)


def _objective(made: "Experiment", training: bool) -> Objective:
    config = made.config.train
    return train.classes(config.smoothing, config.mixup) if training else train.classes()


def _metrics(made: "Experiment", dataset: Images, measured: dict[str, float], examples: Any) -> list[Metric]:
    return [("loss", measured["loss"], "nats/image"), ("top1", measured["top1"], ""), ("top5", measured["top5"], "")]


TASK = Task(
    window=lambda made: made.model.patches + 1,
    check=_check,
    prepare=_prepare,
    load=images.load,
    batches=_batches,
    held_out=_held_out,
    calibration=_calibration,
    objective=_objective,
    metrics=_metrics,
)
