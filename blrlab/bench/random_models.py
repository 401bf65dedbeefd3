"""Models of any size with random weights, made where they run; and what is cut from them to be verified.

Entries of linear layers have variance 1 / i, those of factors such that their product's have about that: every layer
then adds to what the model gives, and a wrong one shows. Only what a model keeps ever takes memory: a factored layer
has no dense twin.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from blrlab_ops import factored, nn
from blrlab_ops.nn import FactoredLinear
from torch import Tensor

from blrlab.bench.nets import Model, Running

if TYPE_CHECKING:
    from blrlab.factors import Spec

Maker = Callable[[str, str, tuple[int, ...]], Tensor]  # (path of a module, name of its parameter, shape) -> values


def draw(
    running: Running,
    sizes: Any,
    specs: Mapping[str, "Spec"],
    impl: str | None,
    generator: torch.Generator,
    dtype: torch.dtype,
) -> Model:
    """Draw a model on the generator's device.

    Args:
      running: how the family runs.
      sizes: of the model.
      specs: {path of a linear layer: its spec}; the others are dense.
      impl: of the factored layers, None for the best.
      generator: whose seed decides all weights, whatever `impl`.
      dtype: of the weights, and of the computation.
    """
    model = running.skeleton(sizes)
    places = running.places(model, sizes, specs)
    for path, spec in specs.items():
        old: Any = model.get_submodule(places[path])
        if spec.format != "dense":
            bias = None if old.bias is None else _normal(old.bias.shape, 0.1, generator, dtype)
            made = nn.layer(_factors(spec, generator, dtype), bias, impl)
            model.set_submodule(places[path], made.requires_grad_(False).eval())
    modules = dict(model.named_modules())

    def make(path: str, name: str, shape: tuple[int, ...]) -> Tensor:
        mean, scale = _moments(modules[path], name, shape)
        return _normal(shape, scale, generator, dtype).add_(mean)

    return _fill(model, make, generator.device)


def dense_copy(running: Running, sizes: Any, model: Model, dtype: torch.dtype) -> Model:
    """Copy what the states of the first blocks need, as many as `sizes` has, factors multiplied out in float64."""
    modules = dict(model.named_modules())

    def make(path: str, name: str, shape: tuple[int, ...]) -> Tensor:
        source: Any = modules[path]
        if name == "weight" and isinstance(source, FactoredLinear):
            wide = {each: tensor.double() for each, tensor in source.factors.items()}
            return factored.to_dense(wide).T.to(dtype).contiguous()
        return source.get_parameter(name).detach().to(dtype)

    copy = running.skeleton(sizes)
    for path in running.aside:
        copy.set_submodule(path, torch.nn.Identity())
    return _fill(copy, make, next(model.parameters()).device)


@contextlib.contextmanager
def few_blocks(running: Running, model: Model, count: int) -> Iterator[None]:
    """Let a model have its first blocks only while this lasts."""
    every: Any = model.get_submodule(running.blocks)
    model.set_submodule(running.blocks, torch.nn.ModuleList(list(every)[:count]))
    try:
        yield
    finally:
        model.set_submodule(running.blocks, every)


@contextlib.contextmanager
def run_by(model: Model, impl: str) -> Iterator[None]:
    """Let all factored layers run an implementation while this lasts."""
    layers = [module for module in model.modules() if isinstance(module, FactoredLinear)]
    before = [layer.impl for layer in layers]
    try:
        for layer in layers:
            layer.impl = impl
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.impl = own


def _fill(model: Model, make: Maker, device: torch.device) -> Model:
    """Give every parameter outside factored layers its values, and move the tables that were computed."""
    for path, module in list(model.named_modules()):
        own = [] if isinstance(module, FactoredLinear) else list(module.named_parameters(recurse=False))
        for name, parameter in own:
            values = make(path, name, tuple(parameter.shape))
            module.register_parameter(name, torch.nn.Parameter(values, requires_grad=False))
    if getattr(model.config, "tie_word_embeddings", False) and next(model.lm_head.parameters(), None) is not None:
        model.tie_weights()
    return model.to(device)


def _moments(module: torch.nn.Module, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Return mean and deviation of a parameter's values."""
    if name == "bias":
        return 0.0, 0.1
    if name != "weight" or isinstance(module, torch.nn.Embedding):
        return 0.0, 0.02
    if len(shape) == 1:  # of a norm
        return 1.0, 0.1
    return 0.0, torch.Size(shape[1:]).numel() ** -0.5


def _factors(spec: "Spec", generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    """Draw the factors of one layer, in the shapes of `blrlab_ops`."""
    (b1, b2), (p, q), r = spec.blocks, spec.block_sizes, spec.rank
    shapes = {
        "low_rank": {"V": (p, r), "U": (r, q)},
        "monarch": {"V": (b1, b2, p, r), "U": (b1, b2, r, q)},
        "blast": {"V": (b1, p, r), "S": (b1, b2, r), "U": (b2, r, q)},
    }[spec.format]
    scales = {"V": spec.in_features**-0.5, "S": 1.0, "U": r**-0.5}
    return {name: _normal(shape, scales[name], generator, dtype) for name, shape in shapes.items()}


def _normal(shape: tuple[int, ...], scale: float, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    empty = torch.empty(shape, dtype=dtype, device=generator.device)
    return empty.normal_(0.0, scale, generator=generator)
