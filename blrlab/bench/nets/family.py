"""What a family of models is to the benchmark: its linear layers, its phases, and how PyTorch runs it.

`Running` makes models of `transformers` or `diffusers` whose weights take no memory yet; `blrlab.bench.random_models`
fills them. Where a config has q, k and v as one layer, the dense model has them so too.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from blrlab_ops import fused, loading
from torch import Tensor, nn

from blrlab.models.hf import Family as Checkpoints

if TYPE_CHECKING:
    from blrlab.bench.model_rows import Group

Model = Any  # of transformers or diffusers, which are only imported where one is made
Inputs = tuple[Tensor, ...]
QKV = ("qkv", "to_qkv")  # what `blrlab_ops.fused` calls one layer for q, k and v


class Product(NamedTuple):
    """A linear layer [i, o] in one call of a model, by its path.

    Attributes:
      rows: n of its input [n, i].
      written: elements of its output that certainly go to memory.
    """

    path: str
    in_features: int
    out_features: int
    rows: int
    written: int = 0


@dataclasses.dataclass(frozen=True)
class Running:
    """How PyTorch runs a family.

    Attributes:
      library: that has the model.
      checkpoints: what the library calls the layers.
      blank: sizes -> model, its weights without memory, its tables computed.
      blocks: path of the list of blocks in it.
      inputs: (sizes, group, generator) -> what a phase takes, floating tensors in float32.
      call: (model, phase, inputs, states) -> a call, which returns what the model gives [B, T, N] or [B, 1, N] or, with
        `states`, what its blocks make of every token it sees [B, T, D].
      attention: of a block, the path of what can have one layer for q, k and v; empty where nothing can.
      kept: (sizes, group) -> elements of the keys and values that a phase keeps.
      sharing: last parts of paths of layers that share their input, in the order of their calls.
      since: the major version of the library from which on its model is laid out so.
      aside: paths of modules without which a call still returns the states.
    """

    library: str
    checkpoints: Checkpoints
    blank: Callable[[Any], Model]
    blocks: str
    inputs: Callable[[Any, "Group", torch.Generator], Inputs]
    call: Callable[[Model, str, Inputs, bool], Callable[[], Tensor]]
    attention: str = ""
    kept: Callable[[Any, "Group"], int] = lambda sizes, group: 0
    sharing: tuple[tuple[str, ...], ...] = ()
    since: int = 0
    aside: tuple[str, ...] = ()

    def skeleton(self, sizes: Any) -> Model:
        """Make a model in evaluation mode, its weights on the meta device."""
        with loading.Weightless():
            model = self.blank(sizes).eval().requires_grad_(False)
        if self.attention and sizes.fused:
            for number in range(sizes.layers):
                path = f"{self.blocks}.{number}.{self.attention}"
                q = fused.parts(model.get_submodule(path))[0]
                whole = nn.Linear(q.in_features, 3 * q.out_features, q.bias is not None, device="meta")
                fused.fuse(model, path, whole.requires_grad_(False))
        return model

    def places(self, model: Model, sizes: Any, paths: Mapping[str, Any]) -> dict[str, str]:
        """Return {path of a linear layer: path of its module} in a model of `skeleton`."""
        modules = dict(model.named_modules())
        return {path: self._place(model, sizes, path, modules) for path in paths}

    def _place(self, model: Model, sizes: Any, path: str, modules: Mapping[str, nn.Module]) -> str:
        names = self.checkpoints.source(f"{path}/kernel", sizes).names
        name = names[0].removesuffix(".weight")
        if len(names) == 1:
            return loading.path_of(model, name, modules)
        attention = loading.path_of(model, name.rpartition(".")[0], modules)
        return next(f"{attention}.{own}" for own in QKV if f"{attention}.{own}" in modules)


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
      name: as `config.model.family` has it.
      sizes: the class of its sizes.
      nets: {name of a net: its sizes}.
      phases: that there are.
      linears: sizes -> {path: (in_features, out_features)} of every linear layer.
      products: (sizes, group) -> the linear layers of one call, the output layer too.
      tokens: sizes -> the number that is measured unless told otherwise.
      sized: (sizes, tokens) -> the sizes of a model that sees so many tokens.
      why_not: (sizes, group) -> why a phase does not fit the model, or None.
      running: how PyTorch runs it; None for GPT-2, all of which is verified in `blrlab.bench.end_to_end`.
      shows: whether it sees images, which a row then counts.
    """

    name: str
    sizes: type
    nets: Mapping[str, Any]
    phases: tuple[str, ...]
    linears: Callable[[Any], Mapping[str, tuple[int, int]]]
    products: Callable[[Any, "Group"], list[Product]]
    tokens: Callable[[Any], int]
    sized: Callable[[Any, int], Any]
    why_not: Callable[[Any, "Group"], str | None]
    running: Running | None = None
    shows: bool = False
