"""What models are trained for, a file a task: its data, its objective, its measures.

A stage asks the task of the model's family and knows no more of text or images than that there are examples.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from blrlab.data import Stream
from blrlab.models.hf import dit
from blrlab.train import Objective

if TYPE_CHECKING:
    from blrlab.experiments.build import Experiment

Metric = tuple[str, float, str]  # name, value, unit


class Dataset(Protocol):
    """Prepared data; `summary` has at least source and hash."""

    @property
    def summary(self) -> dict[str, Any]:
        """What was prepared, for the records."""
        ...


@dataclasses.dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
      window: (experiment) -> tokens of an example.
      check: (experiment) -> None; InputError where the config does not fit.
      prepare: (experiment, folder) -> a sentence on the data, written there.
      load: (folder) -> the data.
      batches: (experiment, data, batch, seed) -> training batches.
      held_out: (experiment, data, most) -> up to `most` examples for evaluation, arrays with one row an example.
      calibration: (experiment, data, most) -> up to `most` examples of the training data, as `held_out`.
      objective: (experiment, training) -> what is made small; without what is only for training where not.
      metrics: (experiment, data, measured, examples) -> what is recorded of `train.evaluate`, the loss first.
    """

    window: Callable[["Experiment"], int]
    check: Callable[["Experiment"], None]
    prepare: Callable[["Experiment", Path], str]
    load: Callable[[Path], Dataset]
    batches: Callable[["Experiment", Any, int, int], Stream]
    held_out: Callable[["Experiment", Any, int], Any]
    calibration: Callable[["Experiment", Any, int], Any]
    objective: Callable[["Experiment", bool], Objective]
    metrics: Callable[["Experiment", Any, dict[str, float], Any], Sequence[Metric]]


def of(family: str) -> Task:
    """Return the task of a family of models."""
    from blrlab.experiments.tasks import diffusion, images, language

    laid_out = (dit.FAMILY, dit.OLDER, dit.ORIGINAL)  # DiT has a name for every layout of its checkpoints
    known = {"gpt2": language.TASK, "llama": language.TASK, "vit": images.TASK}
    return {**known, **{each.name: diffusion.TASK for each in laid_out}}[family]
