"""Language modelling: windows of text, the next token, perplexity."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from blrlab import data
from blrlab.data import Dataset, text, tokenizer
from blrlab.errors import InputError, one_of
from blrlab.experiments.tasks import Metric, Task
from blrlab.train import NEXT_TOKEN, Objective

if TYPE_CHECKING:
    from blrlab.experiments.build import Experiment


def _check(made: "Experiment") -> None:
    config = made.config
    one_of(config.data.source, text.SOURCES, "data source")
    one_of(config.data.tokenizer, tokenizer.KINDS, "tokenizer")
    if config.data.vocab_size < 257:
        raise InputError(f"config.data.vocab_size is {config.data.vocab_size}; it must be at least 257.")
    if made.window < 1:
        raise InputError(f"config.model.context is {made.window}; it must be at least 1.")
    if made.tokenizer_kind == "checkpoint" and not made.checkpoint:
        raise InputError("data.tokenizer=checkpoint needs a checkpoint: set init_from, or use byte or bpe.")
    least = {"byte": 256, "bpe": config.data.vocab_size}.get(made.tokenizer_kind, 0)
    if made.model.vocab_size < least:
        raise InputError(
            f"model.vocab_size is {made.model.vocab_size}, less than the {least} tokens of data.tokenizer="
            f"{made.tokenizer_kind}."
        )


def _prepare(made: "Experiment", folder: Path) -> str:
    config = made.config.data
    dataset = data.prepare(
        folder,
        source=config.source,
        path=config.path if config.source == "folder" else "",
        name=config.name if config.source == "huggingface" else "",
        subset=config.subset,
        valid_fraction=config.valid_fraction,
        tokenizer_kind=made.tokenizer_kind,
        vocab_size=config.vocab_size,
        checkpoint=made.checkpoint,
    )
    if dataset.vocab_size > made.model.vocab_size:
        raise InputError(
            f"the tokenizer has {dataset.vocab_size} tokens, the model's vocabulary {made.model.vocab_size}."
        )
    summary = dataset.summary
    return (
        f"{summary['source']}, {summary['files']:,} files, {summary['bytes'] / 1e6:.1f} MB, "
        f"{len(dataset.train):,} + {len(dataset.valid):,} {summary['unit']}s, "
        f"unigram entropy {summary['unigram_entropy']:.3f} nats/byte, hash {summary['hash'][:12]}"
    )


def _batches(made: "Experiment", dataset: Dataset, batch: int, seed: int) -> data.Batches:
    return data.Batches(dataset.train, made.window, batch, seed)


def _held_out(made: "Experiment", dataset: Dataset, most: int) -> np.ndarray:
    return data.validation_windows(dataset.valid, made.window, most)


def _calibration(made: "Experiment", dataset: Dataset, most: int) -> np.ndarray:
    return data.validation_windows(dataset.train, made.window, most)


def _objective(made: "Experiment", training: bool) -> Objective:
    return NEXT_TOKEN


def _metrics(made: "Experiment", dataset: Dataset, measured: dict[str, float], windows: Any) -> list[Metric]:
    loss, unit, targets = measured["loss"], dataset.summary["unit"], windows[:, 1:]
    bits = loss / math.log(2) * targets.size / int(dataset.token_bytes[targets].sum())
    return [
        ("loss", loss, f"nats/{unit}"),
        ("perplexity", math.exp(min(loss, 700.0)), f"per {unit}"),
        ("bits_per_byte", bits, "bits/byte"),
    ]


TASK = Task(
    window=lambda made: min(made.config.model.context, made.model.context),
    check=_check,
    prepare=_prepare,
    load=data.load,
    batches=_batches,
    held_out=_held_out,
    calibration=_calibration,
    objective=_objective,
    metrics=_metrics,
)
