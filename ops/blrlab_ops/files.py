"""Packed factors in safetensors files: `load` gives back the strides that `save` was given.

>>> import pathlib, tempfile
>>> from blrlab_ops import files, nn
>>> with tempfile.TemporaryDirectory() as folder:
...     path = pathlib.Path(folder, "model.safetensors")
...     files.save(path, {"mlp.fc": nn.MonarchLinear(64, 128, blocks=4, rank=3, impl="torch_bmm")})
...     factors, bias = files.load(path)["mlp.fc"]
>>> factors["U"].shape, factors["U"].stride(), bias.shape
(torch.Size([4, 4, 3, 32]), (3, 384, 1, 12), torch.Size([128]))
>>> nn.layer(factors, bias)
MonarchLinear(format=monarch, in_features=64, out_features=128, blocks=(4, 4), rank=3, bias=True, impl=None)

safetensors stores contiguous tensors only. A file therefore holds `<layer>.V`, `<layer>.S`, `<layer>.U` and
`<layer>.bias` with their dimensions in the order of memory, and its metadata has as "blrlab_ops" the JSON of

    {"version": 1, "layers": {"mlp.fc": {"format": "monarch", "impl": null,
                                         "permute": {"V": [0, 2, 3, 1], "U": [2, 0, 3, 1], "bias": [0]}}}}

A factor is `stored.permute(permute)`, in NumPy `stored.transpose(permute)`; where that is 0, 1, ... it is stored as
it is. "impl" is the implementation that the factors are packed for, null for `pack(factors)`.
Needs `pip install 'blrlab-ops[files]'`.
"""

import importlib
import json
import os
import pathlib
import uuid
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .dispatch import CannotRun, impls, why_not
from .factored import pack, recognise
from .nn import FactoredLinear, check_fit

KEY = "blrlab_ops"
VERSION = 1
PARTS = ("V", "S", "U", "bias")
Entry = dict[str, Any]  # of one layer in the metadata: format, impl and permute


def save(
    path: str | os.PathLike[str],
    layers: Mapping[str, FactoredLinear | tuple[Mapping[str, Tensor], Tensor | None]],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write factors and biases as they lie in memory; the file is replaced at once or not at all.

    A factor cut out of a larger tensor is stored without the rest, and tensors that share memory are stored each.

    Args:
      path: the file.
      layers: {name: layer} or {name: (factors, bias or None)}.
      metadata: more strings for the file's metadata, read by `safetensors.safe_open(path, "pt").metadata()`.

    Raises:
      ValueError: a name, a layer or the metadata cannot be stored; the sentence names it.
      CannotRun: factors are of a dtype that no implementation takes.
      ImportError: safetensors is not installed.
    """
    save_file, texts = _safetensors().torch.save_file, _texts(metadata)
    tensors: dict[str, Tensor] = {}
    entries: dict[str, Entry] = {}
    for name, given in layers.items():
        try:
            stored, entries[name] = _stored(name, given)
        except (ValueError, CannotRun) as error:
            raise type(error)(f"layer {name!r}: {error}") from None
        tensors.update({f"{name}.{part}": tensor for part, tensor in stored.items()})
    texts[KEY] = json.dumps({"version": VERSION, "layers": entries})
    target = pathlib.Path(path)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        save_file(_unshared(tensors), partial, metadata=texts)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def load(
    path: str | os.PathLike[str], device: torch.device | str = "cpu", impl: str | None = None
) -> dict[str, tuple[dict[str, Tensor], Tensor | None]]:
    """Read {name: (factors, bias or None)} from a file of `save`.

    Args:
      path: the file.
      device: where the tensors go.
      impl: the implementation that the factors are to be packed for; None leaves them as they were saved, and so does
        the one that the file is packed for. Packing for another copies what lies otherwise.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no such file or is damaged, in a sentence that names file and tensor; or `impl` is unknown.
      CannotRun: another `impl` than the file's cannot run on this device or dtype.
      ImportError: safetensors is not installed.
    """
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, "pt", device=str(device)) as file:
            entries = _entries(path, file.metadata() or {})
            return {name: _layer(path, file, name, entry, impl) for name, entry in entries.items()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"safetensors cannot be imported ({error}): pip install 'blrlab-ops[files]'") from None
    return safetensors


def _texts(metadata: Mapping[str, str] | None) -> dict[str, str]:
    texts = {"format": "pt", **(metadata or {})}  # other loaders ask whose tensors these are
    for key, text in texts.items():
        if key == KEY or not isinstance(key, str) or not isinstance(text, str):
            raise ValueError(f"metadata must be strings under other names than {KEY!r}, not {key!r}: {text!r}")
    return texts


def _stored(name: Any, given: Any) -> tuple[dict[str, Tensor], Entry]:
    """Return contiguous tensors by part (V, S, U, bias) and how they become the layer again."""
    if not isinstance(name, str) or not name:
        raise ValueError("its name must be a string and not empty")
    if not isinstance(given, FactoredLinear | tuple):
        raise ValueError(f"it must be a FactoredLinear or a pair (factors, bias or None), not a {type(given).__name__}")
    factors, bias, impl = (*given, None) if isinstance(given, tuple) else (given.factors, given.bias, given.impl)
    check_fit(factors, bias)
    parts = {**factors, "bias": bias}
    stored, permute = {}, {}
    for part, tensor in ((part, parts[part]) for part in PARTS if parts.get(part) is not None):
        if tensor.is_meta:
            raise ValueError(f"{part} is on the meta device and has no values to save")
        # From the largest stride to the smallest; of two dimensions that share one, the inner is of size 1.
        keys = [(-stride, -size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)]
        order = sorted(range(tensor.ndim), key=keys.__getitem__)
        stored[part] = tensor.detach().permute(order).contiguous()
        permute[part] = [order.index(dimension) for dimension in range(tensor.ndim)]
    loaded = {part: stored[part].permute(permute[part]) for part in stored if part != "bias"}
    return stored, {"format": recognise(factors), "impl": _packed_for(loaded, impl), "permute": permute}


def _packed_for(factors: Mapping[str, Tensor], impl: str | None) -> str | None:
    """Name what these factors are packed for: `impl`, None for `pack(impl=None)`, or another that can run here."""
    format, V = recognise(factors), factors["V"]
    # Packing moves no numbers on the meta device.
    blank = [torch.empty_strided(f.shape, f.stride(), dtype=f.dtype, device="meta") for f in factors.values()]
    for name in (impl, None, *reversed(impls(format))):
        if name is None or why_not(format, name, V.device, V.dtype) is None:
            module = importlib.import_module(f"{__package__}.{format}.{name or 'layout'}")
            if [tensor.stride() for tensor in module.pack(*blank)] == [tensor.stride() for tensor in blank]:
                return name
    return None


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy what shares memory with a tensor before it, which safetensors refuses."""
    pointers = {name: tensor.untyped_storage().data_ptr() for name, tensor in tensors.items()}
    owners = {pointer: name for name, pointer in reversed(pointers.items())}
    return {name: tensor if owners[pointers[name]] == name else tensor.clone() for name, tensor in tensors.items()}


def _entries(path: Any, metadata: Mapping[str, str]) -> dict[str, Entry]:
    if KEY not in metadata:
        raise ValueError(f"{path} was not saved by blrlab_ops.files: its metadata has no {KEY!r}")
    try:
        found = json.loads(metadata[KEY])
        if found["version"] == VERSION:
            return {
                name: {"format": entry["format"], "impl": entry["impl"], "permute": dict(entry["permute"])}
                for name, entry in found["layers"].items()
            }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: its metadata {KEY!r} is damaged ({error!r})") from None
    raise ValueError(f"{path} has layout version {found['version']!r}, and this blrlab_ops reads {VERSION}: update it")


def _layer(path: Any, file: Any, name: str, entry: Entry, impl: str | None) -> tuple[dict[str, Tensor], Tensor | None]:
    present, names = file.keys(), {part: f"{name}.{part}" for part in entry["permute"]}
    tensors: dict[str, Tensor] = {}
    for part, order in entry["permute"].items():
        if names[part] not in present:
            raise ValueError(f"{path} lacks the tensor {names[part]!r}")
        stored = file.get_tensor(names[part])
        try:
            tensors[part] = stored.permute(order)
        except (RuntimeError, TypeError):
            raise ValueError(f"{path}: {names[part]!r} {list(stored.shape)} cannot be permuted by {order}") from None
    bias = tensors.pop("bias", None)
    try:
        if recognise(tensors) != entry["format"]:
            raise ValueError(f"they are {recognise(tensors)}, and the metadata says {entry['format']}")
        check_fit(tensors, bias)
    except (ValueError, CannotRun) as error:
        raise ValueError(f"{path}: {', '.join(names.values())} are no layer: {error}") from None
    return tensors if impl in (None, entry["impl"]) else pack(tensors, impl=impl), bias
