"""Families of models that are measured whole, by the class of their sizes."""

import dataclasses
from typing import Any

from blrlab.bench.nets import dit, gpt2, llama, vit
from blrlab.bench.nets.family import Family, Inputs, Model, Product, Running

FAMILIES = {family.name: family for family in (gpt2.FAMILY, llama.FAMILY, vit.FAMILY, dit.FAMILY)}
# Sizes that change neither the layers nor what they cost.
ASIDE = (
    "context", "rope_scaling", "dropout", "dtype", "remat", "scan", "fused", "frequency_shift", "epsilon",
    "mlp_epsilon", "size",
)  # fmt: skip


def of(sizes: Any) -> Family:
    """Return the family that sizes are of."""
    return next(family for family in FAMILIES.values() if isinstance(sizes, family.sizes))


def name(sizes: Any) -> str:
    """Name a net by its sizes, those that are not known by family, depth and width; q, k and v may lie apart.

    >>> from blrlab.models.llama import LLAMA_1B, Config
    >>> name(LLAMA_1B), name(Config(layers=2, heads=4, kv_heads=4, width=64))
    ('llama1b', 'llama_2x64')
    """
    family = of(sizes)
    found = (net for net, known in family.nets.items() if _compared(known) == _compared(sizes))
    together = getattr(sizes, "fused", True)
    return next(found, f"{family.name}_{sizes.layers}x{sizes.width}") + ("" if together else "_apart")


def _compared(sizes: Any) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(sizes).items() if name not in ASIDE}


__all__ = ["FAMILIES", "Family", "Inputs", "Model", "Product", "Running", "name", "of"]
