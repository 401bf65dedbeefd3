"""Which tile sizes an implementation runs a layer with: those measured best on this GPU, else fixed rules.

A configuration is {launch: {field: value}}, such as {"first": {"rows": 64, ...}, "second": {...}}: plain numbers, kept
in `tuning`. An implementation takes what it names and leaves the rest to its own rules.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch

Config = Mapping[str, Mapping[str, Any]]
Sizes = TypeVar("Sizes")
NO_CONFIG: Config = {}


def size(config: Config, launch: str, kind: type[Sizes]) -> Sizes | None:
    """Return the tiles of a launch, or None where the configuration has none."""
    found = config.get(launch)
    return kind(**found) if found else None


def tuned(
    format: str,
    impl: str,
    tokens: int,
    features: tuple[int, int],
    blocks: tuple[int, int],
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Config:
    """Return what tuning found best for a layer on a GPU, or no configuration."""
    if device.type != "cuda":
        return NO_CONFIG
    from . import tuning

    key = tuning.Key(format, tuning.bucket(tokens), *features, blocks, rank, str(dtype).removeprefix("torch."))
    entry = tuning.lookup(torch.cuda.get_device_name(device), key).get(impl)
    return entry.config if entry else NO_CONFIG
