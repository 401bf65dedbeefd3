"""Which tile sizes an implementation runs a layer with: those measured best on this GPU, else fixed rules.

A configuration is {launch: {field: value}}, such as {"first": {"rows": 64, ...}, "second": {...}}: plain numbers, kept
in `tuning`. An implementation takes what it names and leaves the rest to its own rules.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

Config = Mapping[str, Mapping[str, Any]]
Sizes = TypeVar("Sizes")
NO_CONFIG: Config = {}


def size(config: Config, launch: str, kind: type[Sizes]) -> Sizes | None:
    """Return the tiles of a launch; None where there are none, or those of another release, or such as never run."""
    try:
        found = kind(**config[launch]) if config.get(launch) else None
    except TypeError:
        return None
    runs = getattr(found, "runs", None)
    return found if runs is None or runs() else None


def tuned(
    format: str,
    impl: str,
    tokens: int,
    features: tuple[int, int],
    blocks: tuple[int, int],
    rank: int,
    dtype: torch.dtype | None,
    device: torch.device,
) -> Config:
    """Return what tuning found best for a layer on a GPU, by the dtype of `dtype_of`, or no configuration."""
    if device.type != "cuda" or dtype is None:
        return NO_CONFIG
    from . import tuning

    key = tuning.Key(format, tuning.bucket(tokens), *features, blocks, rank, str(dtype).removeprefix("torch."))
    entry = tuning.lookup(torch.cuda.get_device_name(device), key).get(impl)
    return entry.config if entry else NO_CONFIG


def dtype_of(x: Tensor, V: Tensor) -> torch.dtype | None:
    """Return the dtype that a layer is tuned under, that of its weights; None for int8 ones beside a float32 x.

    What is kept of int8 weights is for a 16-bit x: the tiles would not fit the shared memory beside a float32 one.
    """
    return V.dtype if x.element_size() <= 2 * V.element_size() else None
