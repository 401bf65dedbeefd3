"""Parameters into a checkpoint: safetensors, an index where there are several, `config.json`, and `blrlab.json`.

    config.json                      sizes, as the family's own library reads them
    model.safetensors                all tensors, or model-00001-of-00004.safetensors ... and their index
    blrlab.json                      where a layer is factored: {"version": 1, "layers": {name of the layer: its spec}}

A factored layer has `<name>.V`, `.S` and `.U` in the place of `<name>.weight`; y = x W, W [i, o] what the factors make.
Layers that the model fuses are one there, `<attention>.qkv`, its bias too.
A file's metadata is that of `blrlab_ops.files`, whose `load` reads its factored layers.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from blrlab import factors
from blrlab.errors import InputError
from blrlab.factors import Spec
from blrlab.models.hf import folders, stored
from blrlab.models.hf.family import FACTORS, Family, Source
from blrlab.models.hf.reading import factored_name, source_of
from blrlab.models.hf.stored import Content

SHARD_BYTES = 5 << 30


def save(
    folder: Path,
    family: Family,
    config: Any,
    params: Mapping[str, Any],
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model; one parameter at a time leaves its device.

    Args:
      folder: new or empty.
      family: of the model.
      config: its sizes.
      params: nested dicts, kernels dense or factored.
      dtype: of all tensors; None: as they are.
      shard_bytes: the most that a file holds, unless one layer is more.

    Raises:
      InputError: the folder holds something, the family cannot have these sizes, or a parameter is of a dtype that
        checkpoints of weights do not have.
    """
    told = family.written(config)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty: take another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    specs = specs_of(params)
    names = {path: factored_name(f"{path}/kernel", family, config) for path in specs}
    shards = _shards(list(_units(family, config, params, dtype, specs)), shard_bytes)
    endings = [f"-{number:05d}-of-{len(shards):05d}" for number in range(1, len(shards) + 1)]
    files = [f"{family.stem}{ending if len(shards) > 1 else ''}.safetensors" for ending in endings]
    layers = {names[path]: spec for path, spec in specs.items()}
    for file, contents in zip(files, shards, strict=True):
        stored.write(folder / file, contents, _metadata(contents, layers))
    if len(shards) > 1:
        placed = {content.name: file for file, contents in zip(files, shards, strict=True) for content in contents}
        total = sum(content.size for contents in shards for content in contents)
        index = folder / f"{family.stem}.safetensors.index.json"
        _write_json(index, {"metadata": {"total_size": total}, "weight_map": placed})
    if specs:
        formats = {name: factors.described(spec) for name, spec in layers.items()}
        _write_json(folder / folders.LAYERS, {"version": 1, "layers": formats})
    _write_json(folder / folders.CONFIG, {**told, "torch_dtype": _name(params, dtype)})


def specs_of(params: Mapping[str, Any]) -> dict[str, Spec]:
    """Return {path: spec} of the factored kernels of a tree."""
    found: dict[str, dict[str, Any]] = {}
    for path, leaf in _leaves(params).items():
        kernel, _, part = path.rpartition("/")
        if part in FACTORS and kernel.endswith("/kernel"):
            found.setdefault(kernel.removesuffix("/kernel"), {})[part] = leaf
    return {path: factors.spec_of(kernel) for path, kernel in found.items()}


def _leaves(params: Mapping[str, Any]) -> dict[str, Any]:
    return dict(flatten_dict(dict(params), sep="/"))


def _units(
    family: Family, config: Any, params: Mapping[str, Any], dtype: Any, specs: Mapping[str, Spec]
) -> Iterator[list[Content]]:
    """Yield the tensors of one layer after another, which stay in one file."""
    layers: dict[str, list[Content]] = {}
    for path, leaf in _leaves(params).items():
        layer = path.split("/kernel")[0] if "/kernel" in path else path.rpartition("/")[0]
        source = source_of(path, family, config, specs)
        layers.setdefault(layer, []).extend(_contents(path, leaf, source, dtype))
    yield from layers.values()


def _contents(path: str, leaf: Any, source: Source, dtype: Any) -> Iterator[Content]:
    wide = jnp.dtype(leaf.dtype if dtype is None else dtype)
    try:
        kind = stored.dtype_name(wide)
    except StopIteration:
        known = ", ".join(str(jnp.dtype(each)) for each in stored.DTYPES.values())
        raise InputError(f"{path} is {wide}; a checkpoint holds {known}.") from None
    each = leaf.shape[-1] // len(source.names) if leaf.shape else 0
    for piece, name in [*enumerate(source.names), *((0, copy) for copy in source.copies)]:
        shape = (*leaf.shape[:-1], each) if leaf.shape else ()
        shape = tuple(shape[source.axes.index(axis)] for axis in range(len(shape))) if source.axes else shape
        yield Content(name, kind, shape, _Pieces(leaf, piece, each, source.axes, wide))


class _Pieces:
    """The bytes of a tensor, which are had from the device when they are asked for."""

    def __init__(self, leaf: Any, piece: int, each: int, axes: tuple[int, ...], dtype: np.dtype):
        self.leaf, self.piece, self.each, self.axes, self.dtype = leaf, piece, each, axes, dtype

    def __iter__(self) -> Iterator[bytes]:
        part = self.leaf[..., self.piece * self.each : (self.piece + 1) * self.each] if self.leaf.shape else self.leaf
        numbers = np.asarray(jax.device_get(part)).astype(self.dtype, copy=False)
        if self.axes:
            numbers = numbers.transpose([self.axes.index(axis) for axis in range(numbers.ndim)])
        yield np.ascontiguousarray(numbers).tobytes()


def _shards(units: list[list[Content]], most: int) -> list[list[Content]]:
    shards: list[list[Content]] = [[]]
    for unit in units:
        size = sum(content.size for content in unit)
        if shards[-1] and sum(content.size for content in shards[-1]) + size > most:
            shards.append([])
        shards[-1] += unit
    return shards


def _metadata(contents: list[Content], layers: Mapping[str, Spec]) -> dict[str, str]:
    """Return the metadata by which `blrlab_ops.files` reads the factored layers of a file."""
    entries: dict[str, Any] = {}
    for content in contents:
        layer, _, part = content.name.rpartition(".")
        if layer in layers:
            entry = entries.setdefault(layer, {"format": layers[layer].format, "impl": None, "permute": {}})
            entry["permute"][part] = list(range(len(content.shape)))
    return {"format": "pt", **({stored.PACKED: json.dumps({"version": 1, "layers": entries})} if entries else {})}


def _name(params: Mapping[str, Any], dtype: Any) -> str:
    """Name the dtype that most numbers are of."""
    sizes: dict[str, int] = {}
    for leaf in _leaves(params).values():
        name = str(jnp.dtype(leaf.dtype if dtype is None else dtype))
        sizes[name] = sizes.get(name, 0) + math.prod(leaf.shape)
    return max(sizes, key=lambda name: sizes[name])


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
