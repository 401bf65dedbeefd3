"""Data parallelism over all local devices: the state on each, the batch cut between them."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from blrlab.errors import InputError


def data_parallel(batch: int) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Return (replicate, shard): how to place a state, and a batch (arrays [batch, ...]), on the local devices.

    A jitted step on what they return runs on every device and gives the losses of one.

    Raises:
      InputError: the devices do not divide the batch.
    """
    devices = jax.local_devices()
    if batch % len(devices):
        below = max(batch // len(devices), 1) * len(devices)
        raise InputError(f"a batch of {batch} cannot be shared out over {len(devices)} devices; {below} can.")
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    everywhere, cut = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    return lambda tree: jax.device_put(tree, everywhere), lambda arrays: jax.device_put(arrays, cut)
