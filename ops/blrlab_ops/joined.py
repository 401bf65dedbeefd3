"""Factored layers that share their input, multiplied together: q, k and v, or gate and up.

>>> import torch
>>> from blrlab_ops import joined, testing
>>> q, k, v = (testing.random_factors("monarch", 64, 96, (4, 4), 8) for _ in range(3))
>>> together = joined.join([q, k, v])
>>> [each.shape for each in joined.linear(torch.randn(2, 64), together)]
[torch.Size([2, 96]), torch.Size([2, 96]), torch.Size([2, 96])]

A layer costs a few launches however small it is, so g layers as one cost a g-th of them, and what is left is the time
of their weights. `join` stores the layers as one, once:
- monarch: their output blocks side by side, V [b1, g b2, p, r'], U [b1, g b2, r', q], a monarch layer of g o columns;
- low_rank: a monarch layer of one input block and g output blocks, V [1, g, i, r], U [1, g, r, o];
- blast: their ranks side by side in V [b1, p, g r] and S [b1, b2, g r], and U [g, b2, r, q].
"""

import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, dispatch, factored
from . import epilogue as after
from .epilogue import Epilogue

JOINED_BLAST = ("triton_streaming", "triton_three_stage")


class Joined(NamedTuple):
    """Layers that share their input, stored as one.

    Attributes:
      format: of the layers.
      count: g, of layers.
      factors: of all of them, as the docstring of this module says.
    """

    format: str
    count: int
    factors: dict[str, Tensor]


def join(layers: Sequence[Mapping[str, Tensor]]) -> Joined:
    """Store layers of one format and equal shapes as one.

    Raises:
      ValueError: there is no layer, or they differ in format, shape, dtype or device; the sentence names the layer.
    """
    if not layers:
        raise ValueError("no layer is given to join")
    format, first = factored.recognise(layers[0]), layers[0]
    for number, layer in enumerate(layers):
        if _kind(layer) != _kind(first):
            raise ValueError(
                f"layers that are joined must be alike: layer 0 has {_kind(first)}, layer {number} has {_kind(layer)}"
            )
    V, U = ([layer[name] for layer in layers] for name in ("V", "U"))
    if format == "low_rank":
        factors = {"V": torch.stack(V)[None], "U": torch.stack(U)[None]}
    elif format == "monarch":
        factors = {"V": torch.cat(V, 1), "U": torch.cat(U, 1)}
    else:
        together = factored.pack({"V": torch.cat(V, 2), "S": torch.cat([layer["S"] for layer in layers], 2), "U": U[0]})
        rows = torch.stack([each.transpose(1, 2) for each in U]).contiguous()
        return Joined(format, len(layers), {**together, "U": rows.transpose(2, 3)})
    return Joined(format, len(layers), factored.pack(factors))


def split(together: Joined) -> list[dict[str, Tensor]]:
    """Return the factors of every layer, views of the joined ones."""
    factors, count = together.factors, together.count
    V, U = factors["V"], factors["U"]
    if together.format == "low_rank":
        return [{"V": V[0, at], "U": U[0, at]} for at in range(count)]
    if together.format == "monarch":
        return [{"V": v, "U": u} for v, u in zip(V.chunk(count, 1), U.chunk(count, 1), strict=True)]
    parts = zip(V.chunk(count, 2), factors["S"].chunk(count, 2), U, strict=True)
    return [{"V": v, "S": s, "U": u} for v, s, u in parts]


def linear(
    x: Tensor,
    together: Joined,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    multiply: Tensor | None = None,
    residual: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, ...]:
    """Multiply by all layers: g results [..., o], views of one tensor [..., g o].

    Args:
      x: [..., i].
      together: as `join` returns it.
      bias: [g o] or None, those of the layers one after the other.
      activation: as in `blrlab_ops.linear`, of every layer.
      multiply: [..., g o] or None.
      residual: [..., g o] or None.
      impl: a name from `impls("monarch")` for low_rank and monarch, for blast one of `JOINED_BLAST`, or None.

    Blast layers are multiplied one by one where PyTorch's products are likely faster, gradients are recorded, or a
    compiler traces and no `impl` is named. Joined, they run with tiles by fixed rules: no layer alone is like them.

    Raises:
      ValueError: shapes do not fit, or `impl` or `activation` is unknown.
      CannotRun: when the named `impl` cannot run on this device or dtype.
    """
    epilogue, count = Epilogue(activation, multiply, residual), together.count
    if together.format != "blast":
        y = factored.linear(x, together.factors, bias, **epilogue._asdict(), impl=impl)
    else:
        y = _blast(x, together, bias, epilogue, impl)
    return y.unflatten(-1, (count, -1)).unbind(-2)


def _blast(x: Tensor, together: Joined, bias: Tensor | None, epilogue: Epilogue, impl: str | None) -> Tensor:
    factors, count = together.factors, together.count
    V, S, U = factors["V"], factors["S"], factors["U"]
    out_features = count * U.shape[1] * U.shape[3]
    checks.operands("blast", x, factors, bias, V.shape[0] * V.shape[1], out_features, epilogue)
    if impl is not None and impl not in JOINED_BLAST:
        raise ValueError(f"impl {impl!r} of joined blast layers is not one of {JOINED_BLAST}")
    chosen = impl or _likely(x, together)
    if chosen is None or after.records_gradients(x, bias, *factors.values(), *epilogue.tensors().values()):
        biases = [None] * count if bias is None else bias.chunk(count)
        columns = [factored.linear(x, layer, b, impl=impl) for layer, b in zip(split(together), biases, strict=True)]
        return after.apply(torch.cat(columns, -1), epilogue)
    if torch.compiler.is_compiling():
        from .tracing import choose_as_constant

        name = choose_as_constant("blast", chosen, x.device, x.dtype)
    else:
        name = dispatch.choose("blast", chosen, x.device, x.dtype)
    return sys.modules[f"blrlab_ops.blast.{name}"].linear(x, V, S, U, bias, epilogue=epilogue)


def _likely(x: Tensor, together: Joined) -> str | None:
    """Return the implementation that multiplies joined blast layers; None: layer by layer."""
    if torch.compiler.is_compiling():
        return None
    layer = split(together)[0]
    sizes = dispatch.layer("blast", x.numel() // max(x.shape[-1], 1), [layer["V"], layer["U"]])
    name, _ = dispatch.likely("blast", sizes)
    return name if name in JOINED_BLAST and dispatch.runs_natively("blast", name, str(x.device), str(x.dtype)) else None


def _kind(layer: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(each.shape)} {each.dtype} on {each.device}" for name, each in sorted(layer.items()))
