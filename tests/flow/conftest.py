"""A tiny experiment: one block of width 24 on a few kilobytes of text."""

import random

import pytest

CONFIG = "configs/gpt2_monarch.py:small"


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A folder of text files that a model can learn something from."""
    folder = tmp_path_factory.mktemp("text")
    random.seed(0)
    for number in range(8):
        words = [random.choice(["alpha", "beta", "gamma", "delta"]) for _ in range(400)]
        (folder / f"{number}.txt").write_text(" ".join(words))
    return folder


@pytest.fixture(scope="session")
def tiny(text):
    """The flags of a run that takes seconds."""
    fields = {
        "data.source": "folder",
        "data.path": text,
        "model.width": 24,
        "model.heads": 2,
        "model.layers": 1,
        "model.context": 16,
        "train.steps": 12,
        "train.batch": 4,
        "train.warmup": 2,
        "train.log_every": 2,
        "train.checkpoint_every": 4,
        "heal.steps": 6,
        "heal.batch": 4,
        "heal.warmup": 1,
        "heal.log_every": 2,
        "heal.checkpoint_every": 2,
        "eval.windows": 8,
        "eval.batch": 4,
        "bench.impls": "xla,torch_eager",
        "bench.nets": "own",
        "bench.seconds": 0.001,
    }
    return [f"--config={CONFIG}", *(f"--config.{name}={value}" for name, value in fields.items())]
