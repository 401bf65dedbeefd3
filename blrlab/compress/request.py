"""What is asked of a checkpoint: which tensors become factors of which spec, and which file each goes to."""

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blrlab import factors
from blrlab.compress import naming
from blrlab.compress.fit import ALGORITHMS, algorithm_of
from blrlab.compress.naming import BIAS, WEIGHT, Linear
from blrlab.compress.plan import Rule, natural, plan
from blrlab.errors import InputError, one_of
from blrlab.factors import Spec
from blrlab.models import hf
from blrlab.models.hf import stored
from blrlab.models.hf.stored import Stored

VERSION = 1
SAMPLE = 4096  # bytes of every tensor that tell one checkpoint from another


@dataclasses.dataclass(frozen=True)
class Request:
    """A checkpoint, and what it is to become.

    Attributes:
      source: the checkpoint's folder.
      tensors: {name: tensor} of it.
      layers: {path: linear layer} of it.
      specs: {path: spec} of the layers that become factors, in the order of the model.
      algorithms: {format: algorithm} of their formats.
      dtype: of all factors, such as BF16; empty: of each as its weight's.
      seed: of the random starts.
      shard_bytes: the most that a file holds, unless one layer is more.
    """

    source: Path
    tensors: Mapping[str, Stored]
    layers: Mapping[str, Linear]
    specs: Mapping[str, Spec]
    algorithms: Mapping[str, str]
    dtype: str
    seed: int
    shard_bytes: int

    def dtype_of(self, path: str) -> str:
        """Return the dtype that a layer's factors are stored in."""
        return self.dtype or self.layers[path].stored.dtype

    def described(self) -> dict[str, Any]:
        """Return all that decides what is written, as JSON."""
        return {
            "version": VERSION,
            "checkpoint": _fingerprint(self.tensors),
            "seed": self.seed,
            "shard_bytes": self.shard_bytes,
            "layers": {
                path: {
                    **factors.described(spec),
                    "algorithm": self.algorithms[spec.format],
                    "dtype": self.dtype_of(path),
                }
                for path, spec in self.specs.items()
            },
        }


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file to write: its name, the layers whose factors and biases it holds, and the tensors that are copied."""

    file: str
    paths: tuple[str, ...]
    copied: tuple[str, ...]


def read(
    checkpoint: str,
    rules: Sequence[Rule] | None,
    defaults: Mapping[str, Any],
    net: str = "",
    algorithm: str = "",
    dtype: str = "",
    seed: int = 0,
    shard_bytes: int = 2 << 30,
) -> Request:
    """Look at a checkpoint, its headers alone, and resolve what is asked of it.

    Args:
      checkpoint: a folder or a name on the hub.
      rules: as for `plan`, over paths such as model.layers.0.mlp.up_proj; None: every layer that the net has.
      defaults: the fields that a rule leaves out.
      net: whose published ranks and blocks a 0 stands for.
      algorithm: of the formats that know it; empty: the default of each.
      dtype: of the factors, such as BF16; empty: the weight's own.
      seed: of the random starts.
      shard_bytes: the most that a file holds.

    Raises:
      InputError: the checkpoint cannot be read, no rule says anything, or a layer cannot have what is asked.
    """
    source = hf.find(checkpoint)
    tensors: dict[str, Stored] = {}
    for path in hf.files(source):
        found, metadata = stored.look(path)
        if stored.PACKED in metadata:
            raise InputError(f"{path} holds factors already: compress the dense checkpoint, by one set of rules.")
        tensors |= found
    layers = naming.linears(tensors, naming.model_type(source))
    if rules is None:
        rules = [(path, {}) for path, layer in layers.items() if naming.has_published(path, layer, net)]
    if not rules:
        what = f'nothing is published for a layer of it by the net "{net}"' if net else "no net is given"
        raise InputError(f"which layers of {source}? {what}: give --layers, --rules or another --net.")
    sizes = {path: (layer.in_features, layer.out_features) for path, layer in layers.items()}
    specs = plan(sizes, rules, defaults, net, {path: naming.called(path, net) for path in layers})
    specs = {path: spec for path, spec in specs.items() if spec.format != "dense"}
    if not specs:
        raise InputError("the rules leave every layer dense: there is nothing to compress.")
    for path, spec in specs.items():
        _check_gain(path, spec, tensors)
    algorithms = _algorithms({spec.format for spec in specs.values()}, algorithm)
    return Request(source, tensors, layers, specs, algorithms, dtype, seed, shard_bytes)


def _check_gain(path: str, spec: Spec, tensors: Mapping[str, Stored]) -> None:
    """Refuse factors of more numbers than the weight, and ones whose names are taken."""
    before, after = spec.in_features * spec.out_features, factors.parameter_count(spec)
    if after > before:
        most, rank = before // (after // spec.rank), "block rank" if spec.format == "monarch" else "rank"
        raise InputError(
            f"{path} ({spec.in_features} x {spec.out_features}): {spec.format} of {rank} {spec.rank} has {after:,} "
            f"numbers, more than the weight's {before:,}; a {rank} of {most} has not."
        )
    for name in (f"{path}.{part}" for part in factors.shapes(spec)):
        if name in tensors:
            raise InputError(f'the checkpoint has a tensor "{name}" already, the name of a factor.')


def _algorithms(formats: set[str], name: str) -> dict[str, str]:
    """Return {format: algorithm}, the named one where the format has it."""
    if name:
        one_of(name, (known for format in sorted(formats) for known in ALGORITHMS[format]), "algorithm")
    return {format: algorithm_of(format, name if name in ALGORITHMS[format] else "") for format in sorted(formats)}


def shards(request: Request) -> list[Shard]:
    """Deal a model's tensors out to files, in a reader's order; a layer's factors and bias stay together."""
    inside = {path + ending for path in request.specs for ending in (WEIGHT, BIAS)}
    units = [(path, True) for path in request.specs]
    units += [(name, False) for name in request.tensors if name not in inside]
    groups: list[list[tuple[str, bool]]] = [[]]
    filled = 0
    for unit in sorted(units, key=lambda unit: natural(unit[0])):
        size = _size(request, *unit)
        if groups[-1] and filled + size > request.shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(unit)
        filled += size
    return [
        Shard(
            f"model-{number:05d}-of-{len(groups):05d}.safetensors",
            tuple(name for name, factored in group if factored),
            tuple(name for name, factored in group if not factored),
        )
        for number, group in enumerate(groups, 1)
    ]


def _size(request: Request, name: str, factored: bool) -> int:
    if not factored:
        return request.tensors[name].size
    sizes: Mapping[str, tuple[int, ...]] = factors.shapes(request.specs[name])
    bias = request.tensors.get(name + BIAS)
    own = sum(stored.size_of(request.dtype_of(name), shape) for shape in sizes.values())
    return own + (stored.in_dtype(bias, request.dtype_of(name)).size if bias else 0)


def parameter_counts(request: Request) -> tuple[int, int]:
    """Return how many numbers the model has, before and after."""
    before = sum(math.prod(tensor.shape) for tensor in request.tensors.values())
    gone = sum(spec.in_features * spec.out_features for spec in request.specs.values())
    return before, before - gone + sum(factors.parameter_count(spec) for spec in request.specs.values())


def _fingerprint(tensors: Mapping[str, Stored]) -> str:
    """Return what tells a checkpoint from others, wherever it lies: names, sizes and a few numbers of every tensor."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        with tensor.path.open("rb") as file:
            file.seek(tensor.offset + max(tensor.size - SAMPLE, 0) // 2)
            found.update(file.read(min(SAMPLE, tensor.size)))
    return found.hexdigest()
