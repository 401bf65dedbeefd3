"""Hugging Face checkpoints: safetensors and `config.json`, by folder or by hub name, read and written.

    >>> folder = find("gpt2")                                        # doctest: +SKIP
    >>> family, config = describe(folder, dtype="bfloat16")          # doctest: +SKIP
    >>> params, specs = load(folder, family, config)                 # doctest: +SKIP
    >>> logits = family.model(config, specs).apply({"params": params}, tokens)  # doctest: +SKIP

A checkpoint may hold factored layers, as `save` and `python -m blrlab.compress` write them; `specs` says which.
"""

from pathlib import Path
from typing import Any

from blrlab.models.hf import dit, reading
from blrlab.models.hf.family import Family
from blrlab.models.hf.folders import FILES, INDEX, SINGLE, files, find
from blrlab.models.hf.gpt2 import FAMILY as GPT2
from blrlab.models.hf.llama import FAMILY as LLAMA
from blrlab.models.hf.reading import load
from blrlab.models.hf.vit import FAMILY as VIT
from blrlab.models.hf.writing import save, specs_of

FAMILIES = {family.name: family for family in (GPT2, LLAMA, VIT, dit.FAMILY, dit.OLDER, dit.ORIGINAL)}

__all__ = [
    "FAMILIES", "FILES", "INDEX", "SINGLE", "Family", "describe", "files", "find", "load", "save", "specs_of",
]  # fmt: skip


def describe(folder: Path, **changes: Any) -> tuple[Family, Any]:
    """Return the family and the config of a checkpoint; `changes` are fields that are the caller's, such as dtype.

    Fields that a family has not are left out.

    Raises:
      InputError: `config.json` is missing or damaged, or describes another architecture.
    """
    return reading.config(folder, FAMILIES, **changes)
