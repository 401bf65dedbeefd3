"""A family of models as checkpoints have it: sizes in `config.json`, names and layouts of tensors.

Each parameter of a Flax model lies in one tensor of a checkpoint or, where the model fuses layers that the checkpoint
keeps apart (q, k and v), in several, one after another along its last axis.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Array

from blrlab.errors import InputError
from blrlab.models import parts
from blrlab.models.parts import ALL_DENSE, Part, Specs

Given = Mapping[str, Any]  # a config.json
FACTORS = ("V", "S", "U")
LINEAR = (1, 0)  # torch.nn.Linear keeps W [i, o] as [o, i]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a parameter lies.

    Attributes:
      names: the tensors; several are joined along the parameter's last axis.
      axes: of the tensor, in the order of the parameter's; empty: the same order.
      copies: tensors that hold the same numbers as the one of `names` again; a checkpoint may lack them.
    """

    names: tuple[str, ...]
    axes: tuple[int, ...] = ()
    copies: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
      name: its `model_type`, or what stands for it.
      config: the class of its sizes.
      model: the Flax module, made of (config, specs).
      inputs: config -> arguments of the model, as small as they may be, to draw parameters with.
      read: `config.json` -> config.
      written: config -> `config.json`.
      source: (path of a parameter, config) -> where it lies; the path of a factor is that of its dense kernel.
      known: (name of a tensor, config) -> its usual name, or None for a tensor that holds no parameter.
      stem: how the names of its files begin.
    """

    name: str
    config: type
    model: type[Part]
    inputs: Callable[[Any], tuple[Any, ...]]
    read: Callable[[Given], Any]
    written: Callable[[Any], dict[str, Any]]
    source: Callable[[str, Any], Source]
    known: Callable[[str, Any], str | None]
    stem: str = "model"

    def init(self, config: Any, key: Array, specs: Specs = ALL_DENSE) -> dict[str, Any]:
        """Draw the parameters of a model, as nested dicts."""
        return parts.init(self.model(config, specs), key, *self.inputs(config))

    def shapes(self, config: Any, specs: Specs = ALL_DENSE) -> dict[str, Any]:
        """Return the shapes of a model's parameters without computing them."""
        return parts.shapes(self.model(config, specs), *self.inputs(config))


def agree(given: Given, wanted: Given) -> None:
    """Check settings that a model has in one way only.

    Raises:
      InputError: one is another.
    """
    for name, value in wanted.items():
        if given.get(name, value) != value:
            raise InputError(f"{name} is {given[name]!r}; this model has {value!r}.")


def whole(given: Given, name: str, default: int | None = None) -> int:
    """Return a size.

    Raises:
      KeyError: it is missing.
      InputError: it is no whole number.
    """
    value = given[name] if default is None or given.get(name) is not None else default
    if type(value) is not int:
        raise InputError(f"{name} is {value!r}, not a whole number.")
    return value


def number(given: Given, name: str, default: float | None = None) -> float:
    """Return a setting that is a number.

    Raises:
      KeyError: it is missing.
      InputError: it is no number.
    """
    value = given[name] if default is None or given.get(name) is not None else default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{name} is {value!r}, not a number.")
    return float(value)
