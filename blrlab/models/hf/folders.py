"""The folder of a checkpoint: where it is, its `config.json`, its safetensors files.

Only safetensors are read; a pickle file can run code and is refused.
"""

import json
from pathlib import Path
from typing import Any

from blrlab.errors import InputError, home_expanded

FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json")
CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
STEMS = ("model", "diffusion_pytorch_model")  # how the names of files begin, diffusers' the second


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


def described(folder: Path) -> dict[str, Any]:
    """Read the `config.json` of a checkpoint.

    Raises:
      InputError: it is missing or damaged.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{folder} is not a checkpoint: it has no config.json.")
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
