"""What is benchmarked: layers at a number of tokens, in several formats, on the same input.

A `Group` says by sizes alone what is to be compared; `problems` makes the tensors of it. Nothing here loads JAX.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from blrlab_ops import cost, factored, shapes
from blrlab_ops.testing import Case
from torch import Tensor

from blrlab.errors import InputError, one_of

OPS = cost.FORMATS
DTYPES = ("bfloat16", "float16", "float32")
Kernel = Tensor | dict[str, Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """One layer in one format: y [n, o] = x [n, i] W.

    Attributes:
      net: own, custom, or a net of the table of shapes.
      layer: the layer's name in it.
      case: format, n, i, o, blocks and rank (r; for monarch r', of one block; 0 for dense).
      kernel: W [i, o], or its factors, in the dtype it is run in.
      x: [n, i], of unit variance, in the same dtype and on the same device.
    """

    net: str
    layer: str
    case: Case
    kernel: Kernel
    x: Tensor

    @property
    def op(self) -> str:
        """The format."""
        return self.case.format

    @property
    def dtype(self) -> str:
        """The dtype of kernel, input and output."""
        return str(self.x.dtype).removeprefix("torch.")

    @property
    def weight_bytes(self) -> int:
        """The bytes of the kernel."""
        return sum(leaf.numel() * leaf.element_size() for leaf in leaves(self.kernel))


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """One layer at one number of tokens, whose formats and backends are compared with each other.

    Attributes:
      net: own, custom, or a net of the table of shapes.
      layer: the layer's name in it.
      dtype: of everything.
      cases: sizes by format, dense among them or not.
      kernels: {format: kernel} where the numbers are given ones; None: random numbers.
      seed: of the random numbers.
    """

    net: str
    layer: str
    dtype: str
    cases: tuple[Case, ...]
    kernels: Mapping[str, Kernel] | None = None
    seed: int = 0

    @property
    def tokens(self) -> int:
        """n."""
        return self.cases[0].tokens

    def problems(self, device: torch.device) -> list[Problem]:
        """Make the tensors: one input for all formats, weights of variance 1 / i where they are random."""
        generator = torch.Generator(device).manual_seed(self.seed)
        dtype = getattr(torch, self.dtype)
        first = self.cases[0]
        x = torch.randn(first.tokens, first.in_features, device=device, generator=generator).to(dtype)
        given = self.kernels or {}
        made = (given.get(case.format, None) for case in self.cases)
        kernels = [
            _random(case, device, generator) if kernel is None else kernel
            for case, kernel in zip(self.cases, made, strict=True)
        ]
        return [
            Problem(self.net, self.layer, case, map_leaves(lambda leaf: leaf.detach().to(device, dtype), kernel), x)
            for case, kernel in zip(self.cases, kernels, strict=True)
        ]


def leaves(kernel: Kernel) -> list[Tensor]:
    """Return the tensors of a kernel."""
    return list(kernel.values()) if isinstance(kernel, dict) else [kernel]


def map_leaves(change: Callable[[Tensor], Tensor], kernel: Kernel) -> Kernel:
    """Apply a function to every tensor of a kernel."""
    return {name: change(leaf) for name, leaf in kernel.items()} if isinstance(kernel, dict) else change(kernel)


def dense_weight(kernel: Kernel) -> Tensor:
    """Multiply factors out in float64, W [i, o]."""
    wide = map_leaves(lambda leaf: leaf.double(), kernel)
    return factored.to_dense(wide) if isinstance(wide, dict) else wide


def _random(case: Case, device: torch.device, generator: torch.Generator) -> Kernel:
    b1, b2 = case.blocks
    i, o, r = case.in_features, case.out_features, case.rank
    sizes = {
        "dense": {"": (i, o)},
        "low_rank": {"V": (i, r), "U": (r, o)},
        "monarch": {"V": (b1, b2, i // b1, r), "U": (b1, b2, r, o // b2)},
        "blast": {"V": (b1, i // b1, r), "S": (b1, b2, r), "U": (b2, r, o // b2)},
    }[case.format]
    scales = {"": i**-0.5, "V": i**-0.5, "S": 1.0, "U": max(r, 1) ** -0.5}
    drawn = {name: torch.randn(size, device=device, generator=generator) * scales[name] for name, size in sizes.items()}
    return drawn.get("", drawn)


def named_groups(
    nets: Sequence[str], layers: Sequence[str], ops: Sequence[str], tokens: Sequence[int], dtype: str
) -> list[Group]:
    """Return the groups of named nets with their ranks and blocks.

    Args:
      nets: names in the table of shapes.
      layers: names of layers to keep; none: all of the nets.
      ops: formats.
      tokens: numbers of rows; 0 is the number that the literature times the layer at.
      dtype: of everything.

    Raises:
      InputError: a net, layer or format is unknown.
    """
    for op in ops:
        one_of(op, OPS, "op")
    rows = [row for net in nets for row in shapes.layers(one_of(net, shapes.NETS, "net"))]
    known = tuple(dict.fromkeys(row.name for row in rows))
    for name in layers:
        one_of(name, known, f"layer of {', '.join(nets)}")
    wanted = [row for row in rows if not layers or row.name in layers]
    return [
        Group(row.net, row.name, dtype, tuple(published_case(row, op, count) for op in ops))
        for row in wanted
        for count in sorted({count or row.tokens for count in tokens})
    ]


def published_case(row: shapes.Layer, op: str, tokens: int) -> Case:
    """Return the sizes of a layer of the table in a format."""
    rank, blocks = row.choice(op)
    return custom_case(op, tokens, row.in_features, row.out_features, (blocks, blocks), rank)


def custom_case(op: str, tokens: int, in_features: int, out_features: int, blocks: tuple[int, int], rank: int) -> Case:
    """Return the sizes of a layer, from its total rank r.

    Raises:
      InputError: blocks do not divide the features, the larger number of blocks does not divide monarch's rank, or
        a rank is not positive.
    """
    if op != "dense" and rank < 1:
        raise InputError(f"rank is {rank}: {op} needs a positive one.")
    if op in ("dense", "low_rank"):
        return Case(op, tokens, in_features, out_features, (1, 1), rank if op == "low_rank" else 0)
    if in_features % blocks[0] or out_features % blocks[1]:
        raise InputError(f"{blocks[0]} x {blocks[1]} blocks do not divide a {in_features} x {out_features} layer.")
    if op == "monarch":
        if rank % max(blocks):
            raise InputError(f"monarch's rank {rank} is not a multiple of its {max(blocks)} blocks.")
        rank //= max(blocks)
    return Case(op, tokens, in_features, out_features, blocks, rank)


def total_rank(case: Case) -> int | None:
    """Return r as the papers count it: r of low rank and BLAST, b r' of square Monarch; None where there is none."""
    if case.format == "monarch":
        return case.rank * case.blocks[0] if case.blocks[0] == case.blocks[1] else None
    return case.rank or None


def given_group(net: str, layer: str, kernel: dict[str, Tensor], tokens: int, seed: int = 0) -> Group:
    """Return the group of a model's own layer: its factors, and the dense weight they multiply out to."""
    op = factored.recognise(kernel)
    V, U = kernel["V"], kernel["U"]
    weight = dense_weight(kernel)
    i, o = weight.shape
    blocks = {"low_rank": (1, 1), "monarch": tuple(V.shape[:2]), "blast": (V.shape[0], U.shape[0])}[op]
    cases = (Case("dense", tokens, i, o, (1, 1), 0), Case(op, tokens, i, o, blocks, V.shape[-1]))
    dtype = str(V.dtype).removeprefix("torch.")
    return Group(net, layer, dtype, cases, {"dense": weight, op: kernel}, seed)


def fields(net: str, layer: str, case: Case, dtype: str) -> dict[str, Any]:
    """Return what a record says of a layer: net, layer, format and sizes."""
    return {
        "op": case.format,
        "net": net,
        "layer": layer,
        "in_features": case.in_features,
        "out_features": case.out_features,
        "blocks": list(case.blocks),
        "rank": total_rank(case),
        "block_rank": case.rank if case.format == "monarch" else None,
        "tokens": case.tokens,
        "dtype": dtype,
    }
