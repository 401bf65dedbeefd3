"""Text in, batches of token windows out, with a seed and a position to resume from."""

from blrlab.data.batches import Batches, Stream, validation_windows
from blrlab.data.prepare import Dataset, load, prepare

__all__ = ["Batches", "Dataset", "Stream", "load", "prepare", "validation_windows"]
