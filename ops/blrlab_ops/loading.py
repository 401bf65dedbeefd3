"""A factored checkpoint as a torch model, without JAX: the model of `transformers` or `diffusers`, its layers factored.

>>> model = load_factored("runs/llama7b_blast", "cuda")  # doctest: +SKIP

A checkpoint is what `python -m blrlab.compress` or `blrlab.models.hf.save` writes: safetensors with `<layer>.V`, `.S`
and `.U` in the place of `<layer>.weight`, and the `config.json` of the library that has the model. A factored layer
`<attention>.qkv` stands for the three of queries, keys and values. The model is made without memory for its weights,
then filled tensor by tensor, so the most that is held is the factored model and one tensor of it.
Needs `pip install 'blrlab-ops[models]'`, for models of diffusers `'blrlab-ops[diffusers]'`.
"""

import contextlib
import importlib
import json
import os
import pathlib
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import fused
from .dispatch import CannotRun
from .nn import FactoredLinear, layer

SINGLES, KEY = ("model.safetensors", "diffusion_pytorch_model.safetensors"), "blrlab_ops"
FACTORS = ("V", "S", "U")
FUSED = ".qkv"
EMBEDDERS = re.compile(r"transformer_blocks\.\d+\.norm1\.emb\.")  # of times and labels, in a DiT of diffusers
# Masks, frequencies and positions in older files.
COMPUTED = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq", "pos_embed.pos_embed")
# A ViT has other names in the memory of transformers 5 than in files and in transformers 4.
RENAMED = (
    (r"\bencoder\.layer\.", "layers."),
    (r"\battention\.attention\.(query|key|value)\b", lambda found: f"attention.{found[1][0]}_proj"),
    (r"\battention\.attention$", "attention"),
    (r"\battention\.output\.dense\b", "attention.o_proj"),
    (r"\bintermediate\.dense\b", "mlp.fc1"),
    (r"\boutput\.dense\b", "mlp.fc2"),
)


def load_factored(
    folder: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> Any:
    """Make the model of a checkpoint, in evaluation mode.

    Args:
      folder: of the checkpoint; it may hold no factored layer at all.
      device: where the model goes.
      dtype: of its weights; None: as they are stored.
      impl: of the factored layers, as in `FactoredLinear`.

    Returns:
      The class of the library that `config.json` names, such as `transformers.LlamaForCausalLM` or
      `diffusers.DiTTransformer2DModel`.

    Raises:
      FileNotFoundError: a file of the checkpoint is missing.
      ValueError: `config.json` is damaged or names no model, or a tensor is missing, has no place or another shape;
        the sentence names it.
      CannotRun: the named `impl` cannot run on this device or dtype.
      ImportError: transformers, diffusers or safetensors is not installed, whichever is needed.
    """
    checkpoint = _Checkpoint(pathlib.Path(folder), _places(pathlib.Path(folder)), device, dtype)
    model = _blank(checkpoint.folder)
    shared = _shared(model, checkpoint)
    checkpoint = checkpoint.without(shared)
    factored = [_put_factored(checkpoint, model, name, impl) for name in checkpoint.factored()]
    used = {name for names, _ in factored for name in names}
    filled, extra = _put_dense(checkpoint, model, [name for name in checkpoint.places if name not in used])
    for path, first in shared.items():
        model.set_submodule(path, model.get_submodule(first))
    filled |= {path for _, paths in factored for path in paths}
    _check(checkpoint.folder, [path for path, _ in model.named_parameters() if path not in filled], extra)
    if _tied(model):
        model.tie_weights()
    return model.to(device).eval()


class _Checkpoint(NamedTuple):
    """Where tensors lie, and what becomes of them.

    Attributes:
      folder: of the checkpoint.
      places: {tensor: file}.
      device: where tensors go.
      dtype: of weights; None: as they are stored.
    """

    folder: pathlib.Path
    places: dict[str, pathlib.Path]
    device: torch.device | str
    dtype: torch.dtype | None

    def read(self, name: str) -> Tensor:
        """Read one tensor; its file is opened anew, since what was read of a mapped file counts while it is open."""
        with _open(self.places[name]) as file:
            metadata = json.loads((file.metadata() or {}).get(KEY, "{}")).get("layers", {})
            layer, _, part = name.rpartition(".")
            order = metadata.get(layer, {}).get("permute", {}).get(part)
            found = file.get_tensor(name)
            dtype = self.dtype if found.is_floating_point() else None
            moved = found.to(device=self.device, dtype=dtype, copy=True)
            return moved.permute(order) if order else moved

    def factored(self) -> list[str]:
        """Return the names of factored layers."""
        return sorted({name.removesuffix(".V") for name in self.places if name.endswith(".V")})

    def without(self, layers: Iterable[str]) -> "_Checkpoint":
        """Return the same without the tensors of some layers."""
        left = {name: file for name, file in self.places.items() if name.rpartition(".")[0] not in layers}
        return self._replace(places=left)


def _places(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Return {tensor: file} of a checkpoint."""
    for single in SINGLES:
        if (folder / single).is_file():
            with _open(folder / single) as file:
                return dict.fromkeys(file.keys(), folder / single)
    found = [folder / f"{single}.index.json" for single in SINGLES if (folder / f"{single}.index.json").is_file()]
    if not found:
        raise FileNotFoundError(f"{folder} has neither {' nor '.join(SINGLES)}, nor an index of either")
    return _indexed(found[0])


def _indexed(index: pathlib.Path) -> dict[str, pathlib.Path]:
    """Return {tensor: file} of a checkpoint of several files."""
    try:
        weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        found = {name: index.parent / file for name, file in weights.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged: {error!r}") from None
    for file in sorted(set(found.values())):
        if not file.is_file():
            raise FileNotFoundError(f"{index.parent} lacks the shard {file.name}")
    return found


@contextlib.contextmanager
def _open(path: pathlib.Path) -> Iterator[Any]:
    safetensors = _library("safetensors", "models")
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None


def _library(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} cannot be imported ({error}): pip install 'blrlab-ops[{extra}]'") from None


class Weightless(TorchFunctionMode):
    """Let what is made without values, as weights are, take no memory; tables that are computed are made as ever."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.empty:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


def _blank(folder: pathlib.Path) -> Any:
    """Make the model that `config.json` names, its weights on the meta device."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a checkpoint: it has no config.json")
    try:
        given = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from None
    if "_class_name" in given:
        kind = _class(path, "diffusers", "diffusers", given["_class_name"])
        sizes = {name: value for name, value in given.items() if name != "torch_dtype"}  # which diffusers has not
        with Weightless():
            return kind.from_config(sizes)
    kind = _class(path, "transformers", "models", next(iter(given.get("architectures") or []), None))
    config = _library("transformers", "models").AutoConfig.from_pretrained(folder)
    with Weightless():
        return kind(config)


def _class(path: pathlib.Path, library: str, extra: str, name: Any) -> Any:
    """Return the model of a library that a `config.json` names."""
    found = getattr(_library(library, extra), str(name), None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"{path} names no model of {library}: its class is {name!r}")
    return found


def _shared(model: Any, checkpoint: _Checkpoint) -> dict[str, str]:
    """Return {layer: that of the first block} of a DiT's embedders that a checkpoint leaves out, or has again.

    In diffusers every block has its own embedders of times and labels; in published weights they are all the same.
    """
    found: dict[str, str] = {}
    for path, module in model.named_modules() if type(model).__name__ == "DiTTransformer2DModel" else ():
        first = EMBEDDERS.sub("transformer_blocks.0.norm1.emb.", path)
        if first != path and list(module.parameters(recurse=False)):
            own = [name for name in checkpoint.places if name.rpartition(".")[0] == path]
            if all(_same(checkpoint, name, f"{first}.{name.rpartition('.')[2]}") for name in own):
                found[path] = first
    return found


def _same(checkpoint: _Checkpoint, name: str, other: str) -> bool:
    """Tell whether two tensors of a checkpoint are there and hold the same."""
    as_stored = checkpoint._replace(device="cpu", dtype=None)
    return other in checkpoint.places and torch.equal(as_stored.read(name), as_stored.read(other))


def path_of(model: Any, name: str, known: Container[str]) -> str:
    """Name a module or a parameter as the whole model in memory does; a checkpoint of its body lacks the prefix."""
    prefix, renamed = f"{getattr(model, 'base_model_prefix', '')}.", name
    for pattern, there in RENAMED:
        renamed = re.sub(pattern, there, renamed)
    return next((path for path in (name, prefix + name, renamed, prefix + renamed) if path in known), name)


def _put_factored(checkpoint: _Checkpoint, model: Any, name: str, impl: str | None) -> tuple[set[str], set[str]]:
    """Put a factored layer in the place of a dense one, or of those of q, k and v.

    Returns:
      The tensors that are used, and the paths of the layer's parameters.
    """
    parts = {part: [f"{name}.{part}"] for part in (*FACTORS, "bias") if f"{name}.{part}" in checkpoint.places}
    modules = dict(model.named_modules())
    path = path_of(model, name, modules)
    attention = path_of(model, name.removesuffix(FUSED), modules)
    old: Any = modules.get(path)
    if isinstance(old, nn.Linear) or hasattr(old, "nf"):
        shape = tuple(old.weight.shape)
        wanted = shape if not isinstance(old, nn.Linear) else shape[::-1]  # Conv1D keeps W [i, o]
        made = _made(checkpoint, name, parts, impl, wanted, old.bias is not None)
        model.set_submodule(path, made)
    elif name.endswith(FUSED) and attention in modules and (dense := fused.parts(modules[attention])):
        if "bias" not in parts:
            parts |= _biases(checkpoint, name)
        wanted = dense[0].in_features, sum(each.out_features for each in dense)
        made = _made(checkpoint, name, parts, impl, wanted, dense[0].bias is not None)
        path = fused.fuse(model, attention, made)
    else:
        raise ValueError(f"{checkpoint.folder}: the model has no layer {name!r} for the factors of that name")
    return {each for names in parts.values() for each in names}, {f"{path}.{part}" for part in parts}


def _biases(checkpoint: _Checkpoint, name: str) -> dict[str, list[str]]:
    """Find the bias of a fused layer in three tensors, where a checkpoint keeps those of q, k and v apart."""
    for parts in fused.PARTS.values():
        names = [f"{name.removesuffix(FUSED)}.{part}.bias" for part in parts]
        if all(each in checkpoint.places for each in names):
            return {"bias": names}
    return {}


def _made(
    checkpoint: _Checkpoint,
    name: str,
    parts: Mapping[str, list[str]],
    impl: str | None,
    wanted: tuple[int, ...],
    biased: bool,
) -> FactoredLinear:
    """Make a factored layer of the features that a model wants, with a bias where it has one."""
    if biased and "bias" not in parts:
        raise ValueError(f"{checkpoint.folder} lacks {name}.bias")
    factors = {part: checkpoint.read(names[0]) for part, names in parts.items() if part != "bias"}
    biases = [checkpoint.read(each) for each in parts.get("bias", ())]
    try:
        made = layer(factors, torch.cat(biases) if biases else None, impl)
    except (ValueError, CannotRun) as error:
        raise type(error)(f"{checkpoint.folder}: {name}: {error}") from None
    if (made.in_features, made.out_features) != wanted:
        found = f"{made.in_features} x {made.out_features}"
        raise ValueError(f"{checkpoint.folder}: {name} is {found}, and the model's {wanted[0]} x {wanted[1]}")
    return made.requires_grad_(False)


def _put_dense(checkpoint: _Checkpoint, model: Any, names: Iterable[str]) -> tuple[set[str], list[str]]:
    """Put tensors in the place of a model's parameters; return the paths that have theirs, and names without a place.

    Parameters that are others' have theirs too.
    """
    parameters, tied = dict(model.named_parameters(remove_duplicate=False)), _tied(model)
    filled, extra = set(tied), list[str]()
    for name in names:
        path = path_of(model, name, parameters)
        if path in parameters and path not in tied:
            _put(checkpoint, model, path, name)
            filled.add(path)
        elif path not in tied and not name.endswith(COMPUTED):
            extra.append(name)
    return filled, extra


def _put(checkpoint: _Checkpoint, model: nn.Module, path: str, name: str) -> None:
    parent, _, own = path.rpartition(".")
    module, tensor = model.get_submodule(parent), checkpoint.read(name)
    wanted = module.get_parameter(own).shape
    if tensor.shape != wanted:
        raise ValueError(f"{checkpoint.folder}: {name} is {list(tensor.shape)}, and the model's {list(wanted)}")
    module.register_parameter(own, nn.Parameter(tensor, requires_grad=False))


def _tied(model: Any) -> set[str]:
    """Return the names of parameters that are others'."""
    tied = getattr(model.config, "tie_word_embeddings", False)
    return set(getattr(model, "_tied_weights_keys", None) or ()) if tied else set()


def _check(folder: pathlib.Path, missing: list[str], extra: list[str]) -> None:
    """Check that every weight has come, and that every tensor had its place."""
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"{folder} lacks {', '.join(missing[:3])}{more}")
    if extra:
        raise ValueError(f"{folder}: the tensor {extra[0]!r} has no place in this model")


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters, shared ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def factored_layers(model: nn.Module) -> dict[str, FactoredLinear]:
    """Return {path: layer} of a model's factored layers."""
    return {path: module for path, module in model.named_modules() if isinstance(module, FactoredLinear)}
