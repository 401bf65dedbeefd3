"""Factored linear layers as torch modules, and their way into a model that is there already.

>>> import torch, blrlab_ops.testing
>>> from blrlab_ops.nn import replace_linears
>>> model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.GELU(), torch.nn.Linear(48, 8))
>>> factors = blrlab_ops.testing.random_factors("monarch", 32, 48, (4, 4), 3)
>>> replace_linears(model, {"0": factors})[0]
FactoredLinear(format=monarch, in_features=32, out_features=48, blocks=(4, 4), rank=3, bias=True, impl=None)

Shapes: x [..., i], y [..., o]; factors as in `blrlab_ops`.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .factored import linear, pack, recognise


class FactoredLinear(nn.Module):
    """A linear layer whose weight is kept as factors, y = x W + bias.

    The factors are parameters of their own names, `V`, `U` and for blast `S`, so a state dict has them as `<path>.V`.
    They are stored as `impl` reads them without a copy (`pack`): shapes and values are those given, strides may
    differ. `load_state_dict` copies values in and keeps that storage, and so do `.to` and `copy.deepcopy`. Move
    factors to their device before they come here: what is read best depends on it. A parameter may share its memory
    with the tensor given; give a clone where that one must not change in training.

    Attributes:
      format: low_rank, monarch or blast.
      in_features: i.
      out_features: o.
      blocks: (b1, b2); (1, 1) for low_rank.
      rank: r; for monarch r', of one block.
      impl: a name from `blrlab_ops.impls(format)`, or None for the best that can run where the input is.

    Raises:
      ValueError: the factors are of no known format, or factors and bias do not fit together.
      CannotRun: the named `impl` cannot run on the factors' device or dtype.
    """

    bias: Tensor | None

    def __init__(self, factors: Mapping[str, Tensor], bias: Tensor | None = None, impl: str | None = None):
        super().__init__()
        self.format, self.impl = recognise(factors), impl
        self.in_features, self.out_features, self.blocks, self.rank = sizes(factors)
        _check(factors, bias, self.in_features)
        for name, factor in pack({name: factor.detach() for name, factor in factors.items()}, impl=impl).items():
            self.register_parameter(name, nn.Parameter(factor))
        self._names = tuple(self._parameters)
        shared = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach())
        self.register_parameter("bias", shared)

    @property
    def factors(self) -> dict[str, Tensor]:
        """The factors by name."""
        return {name: getattr(self, name) for name in self._names}

    def forward(self, x: Tensor) -> Tensor:
        """Multiply, x [..., i] -> [..., o]."""
        return linear(x, self.factors, self.bias, impl=self.impl)

    def extra_repr(self) -> str:
        """Return format, sizes and implementation."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}, blocks={self.blocks}"
        return f"format={self.format}, {shape}, rank={self.rank}, bias={self.bias is not None}, impl={self.impl}"


def sizes(factors: Mapping[str, Tensor]) -> tuple[int, int, tuple[int, int], int]:
    """Return (in_features, out_features, (b1, b2), rank) of factors; monarch: the rank r' of one block."""
    format, V, U = recognise(factors), factors["V"], factors["U"]
    b1, b2 = {"low_rank": (1, 1), "monarch": tuple(V.shape[:2]), "blast": (V.shape[0], U.shape[0])}[format]
    return b1 * V.shape[-2], b2 * U.shape[-1], (b1, b2), V.shape[-1]


def _check(factors: Mapping[str, Tensor], bias: Tensor | None, in_features: int) -> None:
    """Let the format's own checks see every operand, on a device where nothing is computed."""
    x = torch.empty(1, in_features, dtype=factors["V"].dtype, device="meta")
    operands = {name: factor.to("meta") for name, factor in factors.items()}
    linear(x, operands, None if bias is None else bias.to("meta"), impl="torch_bmm")
    for name, tensor in ({**factors} if bias is None else {**factors, "bias": bias}).items():
        if tensor.device != factors["V"].device:
            raise ValueError(f"V is on {factors['V'].device} and {name} on {tensor.device}: move one of them")


def replace_linears(
    model: nn.Module, layers: Mapping[str, nn.Module | Mapping[str, Tensor]], impl: str | None = None
) -> nn.Module:
    """Put modules or factors in the place of a model's linear layers, in place; nothing changes where it raises.

    Args:
      model: any module; a layer may be an `nn.Linear`, a `Conv1D` of Hugging Face's GPT-2 or a `FactoredLinear`.
      layers: {path: what comes there}, paths as in `model.named_modules()`. Factors W [i, o] take over the bias of
        the layer they replace, and are to be on its device and of its dtype. A module is taken as it is.
      impl: of the layers given as factors.

    Returns:
      The model.

    Raises:
      ValueError: a path leads to no such layer, or sizes, dtypes or devices do not fit; the sentence names the path.
      CannotRun: the named `impl` cannot run on the factors' device or dtype.
    """
    known = {path: found for path, module in model.named_modules() if path and (found := _features(module))}
    made: dict[str, nn.Module] = {}
    for path, new in layers.items():
        if path not in known:
            raise ValueError(f"the model has no linear layer {path!r}{_nearest(path, known)}")
        try:
            made[path] = _in_place_of(model.get_submodule(path), known[path], new, impl)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    for path, module in made.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)
    return model


def _in_place_of(
    old: Any, wanted: tuple[int, int], new: nn.Module | Mapping[str, Tensor], impl: str | None
) -> nn.Module:
    found = _features(new) if isinstance(new, nn.Module) else sizes(new)[:2]
    if found != wanted:
        what = "no linear layer" if found is None else f"{found[0]} x {found[1]}"
        raise ValueError(f"it is {wanted[0]} x {wanted[1]}, and what is to replace it is {what}")
    if isinstance(new, nn.Module):
        return new
    _check_like(old, new)
    return FactoredLinear(new, old.bias, impl).train(old.training)


def _check_like(old: Any, factors: Mapping[str, Tensor]) -> None:
    """Refuse factors of another dtype or device than the layer they replace."""
    weight = old.V if isinstance(old, FactoredLinear) else old.weight
    for name, factor in factors.items():
        if factor.dtype != weight.dtype:
            raise ValueError(f"its weight is {weight.dtype} and {name} is {factor.dtype}: convert one of them")
        if factor.device != weight.device:
            raise ValueError(f"its weight is on {weight.device} and {name} on {factor.device}: move one of them")


def _features(module: nn.Module) -> tuple[int, int] | None:
    """Return (in_features, out_features) of a linear layer; None for any other module."""
    if isinstance(module, nn.Linear | FactoredLinear):
        return module.in_features, module.out_features
    weight = getattr(module, "weight", None)
    if hasattr(module, "nf") and isinstance(weight, Tensor) and weight.ndim == 2:  # Conv1D, weight [i, o]
        return weight.shape[0], weight.shape[1]
    return None


def _nearest(path: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(path, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return (
        f"; it has {', '.join(known[:4])}{' and more' if len(known) > 4 else ''}" if known else "; it has none at all"
    )
