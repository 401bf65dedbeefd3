"""Predicted times of a layer on a device, from `blrlab_ops`' cost model, algorithms and device table.

A prediction is the least time of one algorithm where every unit runs at its nominal rate; the bound is the least time
of any algorithm. What a kernel reaches takes longer. Nothing here needs a GPU, JAX or PyTorch.
"""

import functools
from typing import NamedTuple

from blrlab_ops import algorithms, cost, devices
from blrlab_ops.algorithms import Prediction, Stage
from blrlab_ops.devices import Device
from blrlab_ops.shapes import Layer

from blrlab.errors import InputError
from blrlab.records import Record

OPS = cost.FORMATS
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
SOURCE = "prediction"


class Factored(NamedTuple):
    """How a layer is factored.

    Attributes:
      op: dense, low_rank, monarch or blast.
      blocks: b, on both sides.
      rank: r as the papers count it; 0 for dense.
    """

    op: str
    blocks: int = 1
    rank: int = 0

    @property
    def pair(self) -> tuple[int, int]:
        """(b1, b2)."""
        return self.blocks, self.blocks

    @property
    def block_rank(self) -> int | None:
        """r' = r / b of one Monarch block; None for other formats."""
        return self.rank // self.blocks if self.op == "monarch" else None

    @property
    def kernel_rank(self) -> int:
        """The rank as the cost model takes it: r' for Monarch, else r."""
        return self.rank if self.block_rank is None else self.block_rank


def chosen(layer: Layer, op: str) -> Factored:
    """Return the layer's own rank and blocks of a format.

    Raises:
      InputError: the blocks do not divide the Monarch rank.
    """
    rank, blocks = layer.choice(op)
    if op == "monarch" and rank % blocks:
        raise InputError(f"{blocks} Monarch blocks share the rank evenly, and do not divide {rank}.")
    return Factored(op, blocks, rank)


def stages(
    device: Device,
    layer: Layer,
    factored: Factored,
    algorithm: str,
    tokens: int,
    dtype: str,
    mixing: tuple[int, int] | None = None,
) -> tuple[Stage, ...]:
    """Return the launches of an algorithm on a device; `mixing` as in `algorithms.stages`."""
    sizes = (tokens, layer.in_features, layer.out_features, factored.pair, factored.kernel_rank)
    shared = algorithms.cluster(device)
    return algorithms.stages(factored.op, algorithm, *sizes, itemsize=ITEMSIZE[dtype], mixing=mixing, cluster=shared)


def fastest(device: Device, layer: Layer, factored: Factored, tokens: int, dtype: str) -> tuple[str, Prediction]:
    """Return the name and prediction of the format's fastest algorithm."""
    found = {
        name: algorithms.predict(stages(device, layer, factored, name, tokens, dtype), device, dtype)
        for name in algorithms.ALGORITHMS[factored.op]
    }
    return min(found.items(), key=lambda item: item[1].us)


def bound(device: Device, layer: Layer, factored: Factored, tokens: int, dtype: str) -> cost.Bound:
    """Return the time in us that no algorithm can beat, and the term that sets it."""
    sizes = (tokens, layer.in_features, layer.out_features, factored.pair, factored.kernel_rank)
    return cost.bound_us(cost.cost(factored.op, *sizes, itemsize=ITEMSIZE[dtype]), device, dtype)


def dense_us(device: Device, layer: Layer, tokens: int, dtype: str) -> float:
    """Return the predicted time in us of the dense layer."""
    return fastest(device, layer, Factored("dense"), tokens, dtype)[1].us


def rows(device: Device, layer: Layer, op: str, tokens: int, dtype: str) -> list[Record]:
    """Return a "bound" record for every algorithm of a format, at the layer's own rank and blocks."""
    factored = chosen(layer, op)
    return [
        row(device, layer, factored, name, stages(device, layer, factored, name, tokens, dtype), tokens, dtype)
        for name in algorithms.ALGORITHMS[op]
    ]


def row(
    device: Device,
    layer: Layer,
    factored: Factored,
    algorithm: str,
    launches: tuple[Stage, ...],
    tokens: int,
    dtype: str,
) -> Record:
    """Return the "bound" record of some launches; a term whose rate the device table lacks is None."""
    found = algorithms.predict(launches, device, dtype)
    least = bound(device, layer, factored, tokens, dtype)
    known = {"l2": device.l2_bytes_per_s, "launch": device.launch_us}
    return {
        **identity("bound", device, layer, factored, dtype),
        "algorithm": algorithm,
        "rank": factored.rank,
        "block_rank": factored.block_rank,
        "tokens": tokens,
        "tensor_flops": sum(stage.tensor_flops for stage in launches),
        "cuda_flops": sum(stage.cuda_flops for stage in launches),
        "dram_bytes": found.dram_bytes,
        "l2_bytes": sum(stage.l2_bytes for stage in launches),
        "launches": len(launches),
        "terms": {name: None if known.get(name, us) is None else us for name, us in found.terms.items()},
        "us": found.us,
        "term": found.term,
        "bound_us": least.us,
        "bound_term": least.term,
        "speedup": dense_us(device, layer, tokens, dtype) / found.us,
        "source": SOURCE,
    }


def identity(kind: str, device: Device, layer: Layer, factored: Factored, dtype: str) -> Record:
    """Return the fields that say which layer a record is about, and where."""
    return {
        "kind": kind,
        "device": short_name(device),
        "device_name": device.name,
        "op": factored.op,
        "net": layer.net,
        "layer": layer.name,
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "blocks": list(factored.pair),
        "dtype": dtype,
    }


@functools.cache
def short_name(device: Device) -> str:
    """Return the name that a device goes by in the device table; its full name where it is not in the table."""
    for listed in (lambda: devices.DEVICES, devices.load):
        found = next((name for name, known in listed().items() if known == device), None)
        if found:
            return found
    return device.name
