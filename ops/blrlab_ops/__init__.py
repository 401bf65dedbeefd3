"""Block low-rank linear layers for PyTorch: y = x @ W + bias, where W is kept as small factors.

Formats (W [i, o] cut in b1 x b2 blocks W[l,k] [p, q], contiguous and in order, p = i/b1, q = o/b2):
- `low_rank`: V [i, r], U [r, o]; W = V U.
- `monarch`: V [b1, b2, p, r'], U [b1, b2, r', q]; W[l,k] = V[l,k] U[l,k].
- `blast`: V [b1, p, r], S [b1, b2, r], U [b2, r, q]; W[l,k] = V[l] diag(S[l,k]) U[k].

Importing this package, `algorithms`, `cost`, `devices` and `shapes` of it needs nothing but Python; everything else
loads PyTorch when first touched, and Triton only when a Triton implementation is considered.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import algorithms, blast, cost, devices, files, int8, joined, low_rank, monarch, nn, testing
    from .dispatch import CannotRun, impls, why_not
    from .explaining import Explanation, explain
    from .factored import linear, pack, to_dense

__version__ = "0.1.0"
__all__ = [
    "CannotRun",
    "Explanation",
    "algorithms",
    "blast",
    "cost",
    "devices",
    "explain",
    "files",
    "impls",
    "int8",
    "joined",
    "linear",
    "low_rank",
    "monarch",
    "nn",
    "pack",
    "testing",
    "to_dense",
    "why_not",
]

_MODULES = ("algorithms", "blast", "cost", "devices", "files", "int8", "joined", "low_rank", "monarch", "nn", "testing")
_HOMES = {
    "CannotRun": "dispatch",
    "Explanation": "explaining",
    "explain": "explaining",
    "impls": "dispatch",
    "why_not": "dispatch",
    "linear": "factored",
    "pack": "factored",
    "to_dense": "factored",
}


def __getattr__(name: str) -> Any:
    """Load a public module or function on first use."""
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
