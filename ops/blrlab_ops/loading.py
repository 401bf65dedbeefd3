"""A factored checkpoint as a torch model, without JAX: `transformers`' own model, its layers factored.

>>> model = load_factored("runs/llama7b_blast", "cuda")  # doctest: +SKIP

A checkpoint is what `python -m blrlab.compress` or `blrlab.models.hf.save` writes: safetensors with `<layer>.V`, `.S`
and `.U` in the place of `<layer>.weight`, and the `config.json` of the library that has the model. The model is made
without memory for its weights, then filled tensor by tensor, so the most that is held is the factored model and one
tensor of it.
Needs `pip install 'blrlab-ops[models]'`.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .nn import FactoredLinear, layer

INDEX, SINGLE, KEY = "model.safetensors.index.json", "model.safetensors", "blrlab_ops"
FACTORS = ("V", "S", "U")
COMPUTED = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # masks and frequencies in older files


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
      The class of the library that `config.json` names, such as `transformers.LlamaForCausalLM`.

    Raises:
      FileNotFoundError: a file of the checkpoint is missing.
      ValueError: `config.json` names no model, or a tensor is missing, has no place or another shape; the sentence
        names it.
      CannotRun: the named `impl` cannot run on this device or dtype.
      ImportError: transformers or safetensors is not installed.
    """
    folder = pathlib.Path(folder)
    places = _places(folder)
    model = _blank(folder)
    parameters, modules = dict(model.named_parameters(remove_duplicate=False)), dict(model.named_modules())
    used, filled = set[str](), set[str]()
    factored = sorted({name.rpartition(".")[0] for name in places if name.rpartition(".")[2] == "V"})
    prefix = f"{model.base_model_prefix}."

    def path_of(name: str) -> str:
        """Name a module or a parameter as the whole model does; a checkpoint of its body lacks the first part."""
        known = modules if name in factored else parameters
        return name if name in known or prefix + name not in known else prefix + name

    for name in factored:
        parts = {part: f"{name}.{part}" for part in (*FACTORS, "bias") if f"{name}.{part}" in places}
        used |= set(parts.values())
        tensors = {part: _read(places[full], full, device, dtype) for part, full in parts.items()}
        _put_layer(folder, model, path_of(name), tensors, impl)
        filled |= {f"{path_of(name)}.{part}" for part in tensors}
    tied = _tied(model)
    for name in places:
        path = path_of(name)
        if name in used or path in tied or path not in parameters:
            continue
        used.add(name)
        filled.add(path)
        _put(folder, model, path, _read(places[name], name, device, dtype))
    missing = [path for path, _ in model.named_parameters(remove_duplicate=False) if path not in filled | tied]
    extra = [name for name in places if name not in used and path_of(name) not in tied and not name.endswith(COMPUTED)]
    _check(folder, missing, extra)
    if tied:
        model.tie_weights()
    return model.to(device).eval()


def _places(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Return {tensor: file} of a checkpoint."""
    if (folder / SINGLE).is_file():
        with _open(folder / SINGLE) as file:
            return dict.fromkeys(file.keys(), folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder} has neither {SINGLE} nor {INDEX}")
    try:
        weights = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        found = {name: folder / file for name, file in weights.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / INDEX} is damaged: {error!r}") from None
    for file in sorted(set(found.values())):
        if not file.is_file():
            raise FileNotFoundError(f"{folder} lacks the shard {file.name}")
    return found


@contextlib.contextmanager
def _open(path: pathlib.Path) -> Iterator[Any]:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(f"safetensors cannot be imported ({error}): pip install 'blrlab-ops[models]'") from None
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None


def _read(path: pathlib.Path, name: str, device: torch.device | str, dtype: torch.dtype | None) -> Tensor:
    """Read one tensor; the file is opened anew, since what was read of a mapped file counts while it is open."""
    with _open(path) as file:
        metadata = json.loads((file.metadata() or {}).get(KEY, "{}")).get("layers", {})
        layer, _, part = name.rpartition(".")
        order = metadata.get(layer, {}).get("permute", {}).get(part)
        found = file.get_tensor(name)
        moved = found.to(device=device, dtype=dtype if found.is_floating_point() else None, copy=True)
        return moved.permute(order) if order else moved


class _Weightless(TorchFunctionMode):
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
        import transformers
    except ImportError as error:
        raise ImportError(f"transformers cannot be imported ({error}): pip install 'blrlab-ops[models]'") from None
    given = json.loads(path.read_text(encoding="utf-8"))
    names = given.get("architectures") or []
    kind = getattr(transformers, names[0], None) if names else None
    if kind is None:
        raise ValueError(f"{path} names no model of transformers: its architectures are {names}")
    config = transformers.AutoConfig.from_pretrained(folder)
    with _Weightless():
        return kind(config)


def _put_layer(
    folder: pathlib.Path, model: nn.Module, path: str, tensors: Mapping[str, Tensor], impl: str | None
) -> None:
    """Put a factored layer in the place of a dense one."""
    factors = {part: tensor for part, tensor in tensors.items() if part != "bias"}
    try:
        old: Any = model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"{folder}: the model has no layer {path!r} for the factors of that name") from None
    if getattr(old, "bias", None) is not None and "bias" not in tensors:
        raise ValueError(f"{folder} lacks {path}.bias")
    made = layer(factors, tensors.get("bias"), impl)
    shape = tuple(old.weight.shape)
    wanted = shape if not isinstance(old, nn.Linear) else shape[::-1]  # Conv1D keeps W [i, o]
    if (made.in_features, made.out_features) != wanted:
        raise ValueError(f"{folder}: {path} is {made.in_features} x {made.out_features}, and the model's {wanted}")
    model.set_submodule(path, made.requires_grad_(False))


def _put(folder: pathlib.Path, model: nn.Module, path: str, tensor: Tensor) -> None:
    parent, _, name = path.rpartition(".")
    module = model.get_submodule(parent)
    wanted = module.get_parameter(name).shape
    if tensor.shape != wanted:
        raise ValueError(f"{folder}: {path} is {list(tensor.shape)}, and the model's {list(wanted)}")
    module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def _tied(model: Any) -> set[str]:
    """Return the names of parameters that are others'."""
    return set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()


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
