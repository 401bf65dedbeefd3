"""The folder of a checkpoint: where it is, its `config.json`, its safetensors files.

Only safetensors are read; a pickle file can run code and is refused.
"""

import json
from pathlib import Path
from typing import Any

from blrlab.errors import InputError, home_expanded

FILES = (
    "config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json", "model_index.json",
    "transformer/config.json",
)  # fmt: skip
CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
LAYERS = "blrlab.json"  # what is factored, by the layers' names
PIPELINE, DENOISER = "model_index.json", "transformer"  # of diffusers: a folder for each part of a pipeline
OTHER_PARTS = ("vae/*", "unet/*", "text_encoder*", "image_encoder/*", "safety_checker/*", "scheduler/*", "tokenizer*/*")
STEMS = ("model", "diffusion_pytorch_model")  # how the names of files begin, diffusers' the second


def find(name: str) -> Path:
    """Return the folder of a checkpoint: `name` itself if it is a folder, else a download from the hub.

    Of a pipeline of diffusers it is the folder of the denoiser.

    Raises:
      InputError: there is no such folder, and no such checkpoint can be had from the hub.
    """
    folder = home_expanded(name)
    if folder.is_dir():
        return _of_pipeline(folder)
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f'no checkpoint at "{name}": it is not a folder.')
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(
            f'no folder "{name}", and the hub needs huggingface-hub: pip install huggingface-hub.'
        ) from None
    try:
        found = snapshot_download(name, allow_patterns=list(FILES), ignore_patterns=list(OTHER_PARTS))
    except Exception as error:  # the hub client raises many kinds: offline, unknown name, no permission
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f'no folder "{name}", and the hub did not give it: {reason}') from None
    return _of_pipeline(Path(found))


def _of_pipeline(folder: Path) -> Path:
    is_pipeline = (folder / PIPELINE).is_file() and not (folder / CONFIG).is_file()
    return folder / DENOISER if is_pipeline and (folder / DENOISER).is_dir() else folder


def described(folder: Path) -> dict[str, Any]:
    """Read the `config.json` of a checkpoint.

    Raises:
      InputError: it is missing or damaged.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{folder} is not a checkpoint: it has no config.json.")
    return _table(path)


def factored(folder: Path) -> list[str]:
    """Read the names of the layers that `blrlab.json` says are factored; none where there is no such file.

    Raises:
      InputError: it is damaged.
    """
    path = folder / LAYERS
    layers = _table(path).get("layers", {}) if path.is_file() else {}
    if not isinstance(layers, dict):
        raise InputError(f"{path} is damaged: its layers are no table.")
    return list(layers)


def _table(path: Path) -> dict[str, Any]:
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    if not isinstance(given, dict):
        raise InputError(f"{path} is damaged: it is no table of settings.")
    return given


def files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint: one, or those of its index.

    Raises:
      InputError: there are none, a shard is missing, or the index is damaged.
    """
    for stem in STEMS:
        if (folder / f"{stem}.safetensors").is_file():
            return [folder / f"{stem}.safetensors"]
        if (folder / f"{stem}.safetensors.index.json").is_file():
            return _shards(folder, folder / f"{stem}.safetensors.index.json")
    pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
    if pickles:
        raise InputError(f"{pickles[0]} is a pickle, which can run code: convert it to safetensors.")
    raise InputError(f"{folder} has neither {SINGLE} nor {INDEX}.")


def _shards(folder: Path, index: Path) -> list[Path]:
    """Return the files that an index tells of."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
        shards = sorted(map(Path, set(found["weight_map"].values())))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index} is damaged: {type(error).__name__}: {error}") from None
    for shard in shards:
        if not (folder / shard).is_file():
            raise InputError(f"{folder} lacks the shard {shard}.")
    return [folder / shard for shard in shards]
