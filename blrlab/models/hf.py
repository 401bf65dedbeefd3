"""Import Hugging Face checkpoints: safetensors and `config.json`, by folder or by hub name.

Only safetensors are read; a pickle file can run code and is refused. Tensors are read one at a time.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from blrlab.errors import InputError, home_expanded
from blrlab.models import gpt2

FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_GPT2_SETTINGS = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
    "add_cross_attention": False,
}
_GPT2_BUFFERS = (".attn.bias", ".attn.masked_bias")


def find(name: str) -> Path:
    """Return the folder of a checkpoint: `name` itself if it is a folder, else a download from the hub.

    Raises:
      InputError: there is no such folder, and no such checkpoint can be had from the hub.
    """
    folder = home_expanded(name)
    if folder.is_dir():
        return folder
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f'no checkpoint at "{name}": it is not a folder.')
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(
            f'no folder "{name}", and the hub needs huggingface-hub: pip install huggingface-hub.'
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:  # the hub client raises many kinds: offline, unknown name, no permission
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f'no folder "{name}", and the hub did not give it: {reason}') from None


def gpt2_config(folder: Path, dtype: str, dropout: float) -> gpt2.Config:
    """Read the sizes of a GPT-2 checkpoint.

    Raises:
      InputError: `config.json` is missing or damaged, or describes another architecture.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} is not a checkpoint: it has no config.json.")
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        for name, wanted in _GPT2_SETTINGS.items():
            if given.get(name, wanted) != wanted:
                raise InputError(f"{path}: {name} is {given[name]!r}; this model has {wanted!r}.")
        for name in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd"):
            if type(given[name]) is not int:
                raise InputError(f"{path}: {name} is {given[name]!r}, not a whole number.")
        width, inner = given["n_embd"], given.get("n_inner")
        if inner not in (None, 4 * width):
            raise InputError(f"{path}: n_inner is {inner}; this model has 4 n_embd = {4 * width}.")
        return gpt2.Config(
            vocab_size=given["vocab_size"],
            context=given["n_positions"],
            layers=given["n_layer"],
            heads=given["n_head"],
            width=width,
            dropout=dropout,
            dtype=dtype,
        )
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def load_gpt2(folder: Path, config: gpt2.Config) -> dict[str, Any]:
    """Read the parameters of a GPT-2 checkpoint as nested dicts of float32 arrays.

    Raises:
      InputError: a file is missing or damaged, or a tensor is missing, unknown, of another shape, or not finite.
    """
    wanted: dict[str, Any] = flatten_dict(gpt2.parameter_shapes(config), sep="/")
    found: dict[str, jax.Array] = {}
    for name, tensor in tensors(folder):
        path = _gpt2_path(name)
        if path is None:
            continue
        if path not in wanted:
            raise InputError(f'{folder}: the tensor "{name}" has no place in this model.')
        if tensor.shape != wanted[path].shape:
            raise InputError(f'{folder}: the tensor "{name}" is {tensor.shape}, not {wanted[path].shape}.')
        if not bool(jnp.isfinite(tensor).all()):
            raise InputError(f'{folder}: the tensor "{name}" holds NaN or infinity.')
        found[path] = tensor.astype(jnp.float32)
    missing = [path for path in wanted if path not in found]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(f"{folder}: the checkpoint lacks {', '.join(missing[:3])}{more}.")
    return unflatten_dict(found, sep="/")


def tensors(folder: Path) -> Iterator[tuple[str, jax.Array]]:
    """Yield (name, tensor) of every tensor of a checkpoint, one file or sharded.

    Raises:
      InputError: there are no safetensors, a shard is missing, or a file is damaged.
    """
    for path in files(folder):
        try:
            with safe_open(path, framework="flax") as file:
                for name in file.keys():  # noqa: SIM118 (a safetensors file is not a mapping)
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is damaged or cannot be read: {error}") from None


def files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint: one, or those of its index.

    Raises:
      InputError: there are none, a shard is missing, or the index is damaged.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
        if pickles:
            raise InputError(f"{pickles[0]} is a pickle, which can run code: convert it to safetensors.")
        raise InputError(f"{folder} has neither {SINGLE} nor {INDEX}.")
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        shards = sorted(map(Path, set(index["weight_map"].values())))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{folder / INDEX} is damaged: {type(error).__name__}: {error}") from None
    for shard in shards:
        if not (folder / shard).is_file():
            raise InputError(f"{folder} lacks the shard {shard}.")
    return [folder / shard for shard in shards]


def _gpt2_path(name: str) -> str | None:
    """Turn `transformer.h.0.attn.c_attn.weight` into `h_0/attn/c_attn/kernel`; None for what is not a weight."""
    name = name.removeprefix("transformer.")
    if name.endswith(_GPT2_BUFFERS) or name == "lm_head.weight":
        return None
    *parts, leaf = name.split(".")
    if parts[:1] == ["h"] and len(parts) > 2:
        parts = [f"h_{parts[1]}", *parts[2:]]
    if leaf == "weight" and parts:
        tables, norms = ("wte", "wpe"), parts[-1].startswith("ln_")
        leaf = "embedding" if parts[-1] in tables else "scale" if norms else "kernel"
    return "/".join((*parts, leaf))
