"""Factored linear layers as torch modules, and their way into a model that is there already.

>>> import torch, blrlab_ops.testing
>>> from blrlab_ops.nn import BlastLinear, replace_linears
>>> BlastLinear(48, 36, blocks=(4, 3), rank=5, bias=False)
BlastLinear(format=blast, in_features=48, out_features=36, blocks=(4, 3), rank=5, bias=False, impl=None)
>>> model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.GELU(), torch.nn.Linear(48, 8))
>>> factors = blrlab_ops.testing.random_factors("monarch", 32, 48, (4, 4), 3)
>>> replace_linears(model, {"0": factors})[0]
MonarchLinear(format=monarch, in_features=32, out_features=48, blocks=(4, 4), rank=3, bias=True, impl=None)

Shapes: x [..., i], y [..., o]; factors as in `blrlab_ops`.
"""

import difflib
import os
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .dispatch import CannotRun
from .factored import linear, pack, recognise

if TYPE_CHECKING:
    from typing import Self


class FactoredLinear(nn.Module):
    """A linear layer whose weight is kept as factors, y = x W + bias; `layer` makes the class of their format.

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

    format: str
    bias: Tensor | None

    def __init__(self, factors: Mapping[str, Tensor], bias: Tensor | None = None, impl: str | None = None):
        super().__init__()
        self.format, self.impl = recognise(factors), impl
        self.in_features, self.out_features, self.blocks, self.rank = sizes(factors)
        check_fit(factors, bias)
        for name, factor in pack({name: factor.detach() for name, factor in factors.items()}, impl=impl).items():
            self.register_parameter(name, nn.Parameter(factor))
        self._names = tuple(self._parameters)
        shared = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach())
        self.register_parameter("bias", shared)

    @property
    def factors(self) -> dict[str, Tensor]:
        """The factors by name."""
        return {name: getattr(self, name) for name in self._names}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw V ~ N(0, 1/i), U ~ N(0, 1/rank) and signs S: entries of W have variance 1/i; the bias becomes 0.

        A seed gives the same numbers for every `impl`.
        """
        for name, factor in self.factors.items():
            # Drawn contiguously: in place, the order of the numbers would follow the strides.
            if name == "S":
                factor.copy_(torch.randint(2, factor.shape, device=factor.device) * 2 - 1)
            else:
                drawn = torch.randn(factor.shape, dtype=factor.dtype, device=factor.device)
                factor.copy_(drawn.mul_((self.in_features if name == "V" else self.rank) ** -0.5))
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply, x [..., i] -> [..., o]."""
        return linear(x, self.factors, self.bias, impl=self.impl)

    def extra_repr(self) -> str:
        """Return format, sizes and implementation."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}, blocks={self.blocks}"
        return f"format={self.format}, {shape}, rank={self.rank}, bias={self.bias is not None}, impl={self.impl}"


class _OfOneFormat(FactoredLinear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        blocks: int | tuple[int, int],
        rank: int,
        bias: bool = True,
        *,
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        """Make a layer from its sizes, with fresh parameters (`reset_parameters`).

        Args:
          in_features: i, a multiple of b1.
          out_features: o, a multiple of b2.
          blocks: (b1, b2), or one number for both.
          rank: r; for monarch r', of one block.
          bias: whether there is one.
          impl: as in `FactoredLinear`.
          device: of the parameters; on "meta" no numbers are drawn.
          dtype: of the parameters.

        Raises:
          ValueError: a size is no whole number of at least 1, or the blocks do not divide the features.
          CannotRun: the named `impl` cannot run on this device or dtype.
        """
        shapes = _shapes(self.format, in_features, out_features, blocks, rank)
        factors = {name: torch.empty(shape, device=device, dtype=dtype) for name, shape in shapes.items()}
        super().__init__(factors, torch.empty(out_features, device=device, dtype=dtype) if bias else None, impl)
        self.reset_parameters()

    @classmethod
    def from_factors(cls, factors: Mapping[str, Tensor], bias: Tensor | None = None, impl: str | None = None) -> "Self":
        """Make a layer as `FactoredLinear` does; a ValueError refuses factors of another format."""
        format = recognise(factors)
        if format != cls.format:
            raise ValueError(f"these factors are {format}, not {cls.format}: use {CLASSES[format].__name__} for them")
        made = cls.__new__(cls)
        FactoredLinear.__init__(made, factors, bias, impl)
        return made


class LowRankLinear(_OfOneFormat):
    """W = V U: parameters V [i, r] and U [r, o]; sizes and errors as in `MonarchLinear`, without blocks."""

    format = "low_rank"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, 1, rank, bias, impl=impl, device=device, dtype=dtype)


class MonarchLinear(_OfOneFormat):
    """W[l,k] = V[l,k] U[l,k]: parameters V [b1, b2, p, r'] and U [b1, b2, r', q]; its rank is r', of one block."""

    format = "monarch"


class BlastLinear(_OfOneFormat):
    """W[l,k] = V[l] diag(S[l,k]) U[k]: parameters V [b1, p, r], S [b1, b2, r] and U [b2, r, q]."""

    format = "blast"


CLASSES = {"low_rank": LowRankLinear, "monarch": MonarchLinear, "blast": BlastLinear}


def layer(factors: Mapping[str, Tensor], bias: Tensor | None = None, impl: str | None = None) -> FactoredLinear:
    """Make the layer of the factors' format; arguments and errors as in `FactoredLinear`."""
    return CLASSES[recognise(factors)].from_factors(factors, bias, impl)


def load_factored(
    folder: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> Any:
    """Make the torch model of a factored checkpoint; `blrlab_ops.loading` tells how, and what it raises."""
    from .loading import load_factored

    return load_factored(folder, device, dtype, impl)


def sizes(factors: Mapping[str, Tensor]) -> tuple[int, int, tuple[int, int], int]:
    """Return (in_features, out_features, (b1, b2), rank) of factors; monarch: the rank r' of one block."""
    format, V, U = recognise(factors), factors["V"], factors["U"]
    b1, b2 = {"low_rank": (1, 1), "monarch": tuple(V.shape[:2]), "blast": (V.shape[0], U.shape[0])}[format]
    return b1 * V.shape[-2], b2 * U.shape[-1], (b1, b2), V.shape[-1]


def check_fit(factors: Mapping[str, Tensor], bias: Tensor | None) -> None:
    """Raise ValueError where factors and bias are no layer: their shapes, dtypes or devices disagree."""
    # The format's own checks see every operand, on a device where nothing is computed.
    x = torch.empty(1, sizes(factors)[0], dtype=factors["V"].dtype, device="meta")
    operands = {name: factor.to("meta") for name, factor in factors.items()}
    linear(x, operands, None if bias is None else bias.to("meta"), impl="torch_bmm")
    for name, tensor in ({**factors} if bias is None else {**factors, "bias": bias}).items():
        if tensor.device != factors["V"].device:
            raise ValueError(f"V is on {factors['V'].device} and {name} on {tensor.device}: move one of them")


def _shapes(
    format: str, in_features: int, out_features: int, blocks: int | tuple[int, int], rank: int
) -> dict[str, tuple[int, ...]]:
    b1, b2 = blocks if isinstance(blocks, tuple | list) and len(blocks) == 2 else (blocks, blocks)
    named = (
        ("in_features", in_features),
        ("out_features", out_features),
        ("blocks", b1),
        ("blocks", b2),
        ("rank", rank),
    )
    for name, size in named:
        if not isinstance(size, Integral) or size < 1:
            also = ", and they are one number or (b1, b2)" if name == "blocks" else ""
            raise ValueError(f"{name} must be whole and at least 1{also}, not {size!r}")
    p, q = in_features // b1, out_features // b2
    if (p * b1, q * b2) != (in_features, out_features):
        what = f"blocks ({b1}, {b2}) do not divide {in_features} x {out_features} features"
        raise ValueError(f"{what}: b1 must divide in_features and b2 out_features")
    return {
        "low_rank": {"V": (p, rank), "U": (rank, q)},
        "monarch": {"V": (b1, b2, p, rank), "U": (b1, b2, rank, q)},
        "blast": {"V": (b1, p, rank), "S": (b1, b2, rank), "U": (b2, rank, q)},
    }[format]


def replace_linears(
    model: nn.Module, layers: Mapping[str, nn.Module | Mapping[str, Tensor]], impl: str | None = None
) -> nn.Module:
    """Put modules or factors in the place of a model's linear layers, in place; nothing changes where it raises.

    Args:
      model: any module; a layer may be an `nn.Linear`, a `Conv1D` of Hugging Face's GPT-2 or a `FactoredLinear`.
      layers: {path: what comes there}, paths as in `model.named_modules()`. Factors W [i, o] take over the bias of
        the layer they replace, and are to be on its device and of its dtype. A module is taken as it is. A layer that
        the model has at several paths is replaced at all of them, and any one of the paths names it.
      impl: of the layers given as factors.

    Returns:
      The model.

    Raises:
      ValueError: a path leads to no such layer, or sizes, dtypes or devices do not fit; the sentence names the path.
      CannotRun: the named `impl` cannot run on the factors' device or dtype.
    """
    known = {path: old for path, old in model.named_modules(remove_duplicate=False) if path and _features(old)}
    paths: dict[nn.Module, str] = {}
    made: dict[nn.Module, nn.Module] = {}
    for path, new in layers.items():
        if path not in known:
            raise ValueError(f"the model has no linear layer {path!r}{_nearest(path, known)}")
        first = paths.setdefault(known[path], path)
        if new is not layers[first]:
            raise ValueError(f"{path}: it is the same layer as {first}, whose replacement is another: name one of them")
        if path == first:
            made[known[path]] = _in_place_of(path, known[path], new, impl)
    # All parents are found before anything changes: a linear layer may itself hold others.
    places = [(model.get_submodule(path.rpartition(".")[0]), path) for path, old in known.items() if old in made]
    for parent, path in places:
        setattr(parent, path.rpartition(".")[2], made[known[path]])
    return model


def _in_place_of(path: str, old: Any, new: nn.Module | Mapping[str, Tensor], impl: str | None) -> nn.Module:
    try:
        wanted, found = _features(old), _features(new) if isinstance(new, nn.Module) else sizes(new)[:2]
        if found != wanted:
            was, is_to_be = (f"{size[0]} x {size[1]}" if size else "no linear layer" for size in (wanted, found))
            raise ValueError(f"it is {was}, and what is to replace it is {is_to_be}")
        if isinstance(new, nn.Module):
            return new
        _check_like(old, new)
        return layer(new, old.bias, impl).train(old.training)
    except (ValueError, CannotRun) as error:
        raise type(error)(f"{path}: {error}") from None


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
