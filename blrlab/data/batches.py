"""Batches of examples, shuffled by a seed, with a position that a checkpoint can hold (grain)."""

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from blrlab.errors import InputError


class _Windows:
    """Windows of context + 1 tokens, one after another with a token shared; grain's random access source."""

    def __init__(self, tokens: np.ndarray, context: int):
        self._tokens, self._context = tokens, context

    def __len__(self) -> int:
        return max(len(self._tokens) - 1, 0) // self._context

    def __getitem__(self, index: int) -> np.ndarray:
        start = index * self._context
        return np.asarray(self._tokens[start : start + self._context + 1], np.int32)


class Stream(Iterator[Any]):
    """An endless stream of batches; `position` is all that resuming needs.

    Attributes:
      unit: what is counted for speed: token or image.
      units: how many of them an example has.
    """

    unit: str
    units: int

    def __init__(self, batches: grain.IterDataset, unit: str, units: int):
        self.unit, self.units = unit, units
        self._stream = iter(batches)

    def __next__(self) -> Any:
        return next(self._stream)

    @property
    def position(self) -> dict:
        """Where the stream stands, as JSON."""
        return self._stream.get_state()

    @position.setter
    def position(self, state: dict) -> None:
        self._stream.set_state(state)


READING = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


class Batches(Stream):
    """An endless stream of shuffled batches of text, int32 [batch, context + 1]; every epoch is shuffled anew.

    Args:
      tokens: [n].
      context: tokens a window predicts.
      batch: windows a batch.
      seed: of the shuffle.

    Raises:
      InputError: the text is too short for one batch.
    """

    def __init__(self, tokens: np.ndarray, context: int, batch: int, seed: int):
        windows = _Windows(tokens, context)
        if len(windows) < batch:
            raise InputError(
                f"the training text has {len(tokens)} tokens: {len(windows)} windows of {context}, "
                f"less than one batch of {batch}."
            )
        shuffled = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()
        super().__init__(shuffled.batch(batch).to_iter_dataset(READING), "token", context)


def validation_windows(tokens: np.ndarray, context: int, most: int) -> np.ndarray:
    """Return up to `most` windows [w, context + 1], spread evenly over the validation text.

    Raises:
      InputError: the text is too short for one window.
    """
    windows = _Windows(tokens, context)
    if not len(windows):
        raise InputError(f"the validation text has {len(tokens)} tokens, less than one window of {context} + 1.")
    return np.stack([windows[index] for index in evenly(len(windows), most)])


def evenly(count: int, most: int) -> list[int]:
    """Return up to `most` indices below `count`, evenly spread.

    >>> evenly(10, 4)
    [0, 3, 6, 9]
    """
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(int)).tolist()
