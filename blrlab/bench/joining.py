"""Factored layers that share their input, in the launches of one (`blrlab_ops.joined`): q, k and v, or gate and up.

The model is left as it is: the first layer of a group multiplies by all of them, and the others hand on what it found.
A layer that is told to run an implementation by name runs it alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from blrlab_ops import joined
from blrlab_ops.nn import FactoredLinear
from torch import Tensor
from torch.nn import Parameter

if TYPE_CHECKING:
    from blrlab.factors import Spec


def groups(specs: Mapping[str, "Spec"], sharing: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    """Return the paths of layers that can be one: alike, and named in `sharing` as called one after another.

    >>> from blrlab.factors import Spec
    >>> up = Spec("low_rank", 8, 24, rank=4)
    >>> groups({"layers_0/mlp/gate_proj": up, "layers_0/mlp/up_proj": up}, [("gate_proj", "up_proj")])
    [('layers_0/mlp/gate_proj', 'layers_0/mlp/up_proj')]
    """
    found = []
    for names in sharing:
        for path in specs:
            parent, _, last = path.rpartition("/")
            paths = tuple(f"{parent}/{name}" for name in names)
            alike = {specs.get(each) for each in paths} == {specs[path]} and specs[path].format != "dense"
            found += [paths] if last == names[0] and alike else []
    return found


def join(layers: Sequence[Any]) -> None:
    """Let layers without bias, called one after another on the same input, run as one, in place.

    Args:
      layers: of equal format and shapes; their factors become views of the joined ones.
    """
    together = joined.join([layer.factors for layer in layers])
    for layer, factors in zip(layers, joined.split(together), strict=True):
        for name, factor in factors.items():
            setattr(layer, name, Parameter(factor, requires_grad=False))
    found: list[Tensor] = []

    def first(x: Tensor) -> Tensor:
        if layers[0].impl:
            return FactoredLinear.forward(layers[0], x)
        found[:] = joined.linear(x, together)
        return found.pop(0)

    def following(layer: Any, x: Tensor) -> Tensor:
        return FactoredLinear.forward(layer, x) if layer.impl else found.pop(0)

    layers[0].forward = first
    for layer in layers[1:]:
        layer.forward = lambda x, layer=layer: following(layer, x)
