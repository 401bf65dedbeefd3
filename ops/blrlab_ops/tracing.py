"""The choice of an implementation as a tracer sees it: a constant, instead of imports and device queries."""

import importlib

import torch

from . import dispatch


@torch.compiler.assume_constant_result
def choose_as_constant(format: str, impl: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """Return `dispatch.choose` of the same arguments; every graph fixes the answer."""
    name = dispatch.choose(format, impl, device, dtype)
    if dispatch.is_triton(name):
        importlib.import_module("blrlab_ops.best")
    return name
