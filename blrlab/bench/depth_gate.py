"""The gate before the clock of a model too large for float64: its first blocks against float64, then all of it.

The first two blocks, at full width, with the weights and kernels that are timed and on the same inputs, must give what
those blocks give in float64, for every token (norms and rotary angles are float32 there too, as the libraries have them
in any dtype). Errors and budgets are those of `blrlab.bench.model_gate`: the yardstick is the dense PyTorch model of
these blocks with the multiplied-out weights.

In the whole model every factored layer must then give, on what it is given there, what `torch_bmm` gives: of so many
layers the output alone would not show one that is wrong. The budget is what two libraries' results may differ by.

The whole model's output must be finite, and near that of the same weights by plain PyTorch: with all factored layers on
`torch_bmm` and without a compiler. Each of the two may be as wrong as the budget of the first blocks times
sqrt((6 L + 1) / (6 l + 1)), L blocks against l, errors of products in sequence adding up as their root sum of squares;
and what is between them sqrt(2) times that. Nothing is set against a dense model, or one of `torch_bmm`, that PyTorch
runs without a compiler.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from blrlab_ops import budgets
from blrlab_ops.nn import FactoredLinear
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from blrlab.bench.model_gate import TIMES, Allowed, Errors, Verdict, errors
from blrlab.bench.nets import Family, Inputs, Model
from blrlab.bench.random_models import dense_copy, few_blocks

VERIFIED_LAYERS = 2


class Judge:
    """Holds the truth of a model's first blocks on given inputs while the programs that run them are judged."""

    def __init__(self, family: Family, sizes: Any, model: Model, phase: str, inputs: Inputs, dtype: torch.dtype):
        """Compute the truth.

        Args:
          family: with its `running`.
          sizes: of the model.
          model: whose weights count, in `dtype`.
          phase: as `Running.call` has it.
          inputs: floating ones in `dtype`.
          dtype: that is judged.
        """
        assert family.running is not None
        self._running, self._model, self._phase, self._inputs = family.running, model, phase, inputs
        self.layers, self._depth = min(VERIFIED_LAYERS, sizes.layers), sizes.layers
        few = dataclasses.replace(sizes, layers=self.layers)
        self.truth = self._states(few, torch.float64)
        found = errors(self._states(few, dtype), self.truth)
        terms = max(size for size, _ in family.linears(few).values())
        self._allowed = Allowed(self.layers, terms, dtype, found)

    def _states(self, few: Any, dtype: torch.dtype) -> Tensor:
        model = dense_copy(self._running, few, self._model, dtype)
        inputs = tuple(each.to(dtype) if each.is_floating_point() else each for each in self._inputs)
        with torch.no_grad(), _HeadByHead():
            return self._running.call(model, self._phase, inputs, True)()

    def first_blocks(self) -> contextlib.AbstractContextManager[None]:
        """Let the model have the blocks that are judged only."""
        return few_blocks(self._running, self._model, self.layers)

    def judge(self, states: Tensor, is_yardstick: bool) -> Verdict:
        """Judge what the first blocks give, [B, T, D].

        Args:
          states: what came out.
          is_yardstick: they are dense, and PyTorch's own.
        """
        allowed = self._allowed.library if is_yardstick else self._allowed.times(TIMES)
        return Verdict(*errors(states, self.truth), *allowed)

    def depth_budget(self, is_yardstick: bool) -> float:
        """Return the relative Frobenius error that a whole model may have against the same weights in plain PyTorch."""
        allowed = (self._allowed.library if is_yardstick else self._allowed.times(TIMES)).error
        return math.sqrt(2 * (6 * self._depth + 1) / (6 * self.layers + 1)) * allowed


def wrong_layer(model: Model, call: Callable[[], Tensor], plain: str) -> str | None:
    """Run a model, and say which factored layer does not give what `plain` gives on the same input; None where all do.

    Args:
      model: whose layers are judged.
      call: that runs it, without a compiler.
      plain: an implementation of every format.
    """
    wrong: list[str] = []

    def judge(path: str, layer: Any, given: Any, result: Any) -> None:
        own, layer.impl = layer.impl, plain
        try:
            wanted = FactoredLinear.forward(layer, *given)  # whatever the layer itself runs
        finally:
            layer.impl = own
        allowed = layer_budget(layer, wanted.dtype)
        found = errors(*(each.reshape(1, -1, each.shape[-1]) for each in (result, wanted.double())))
        if not (found.error <= allowed.error and found.error_max <= allowed.error_max):  # nor is NaN
            wrong.append(f"{path} is off by {found.error:.1e}, of which {allowed.error:.1e} are allowed")

    hooks = []
    for path, layer in model.named_modules():
        if isinstance(layer, FactoredLinear):
            hooks.append(layer.register_forward_hook(functools.partial(judge, path)))
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return wrong[0] if wrong else None


def layer_budget(layer: FactoredLinear, dtype: torch.dtype) -> Errors:
    """Return what two results of a layer may differ by, each of as many products in sequence as it has factors."""
    terms = max(layer.in_features, layer.out_features, max(layer.blocks) * layer.rank)
    allowed = budgets.of_library(torch.finfo(dtype).eps, terms)
    return Errors(*(math.sqrt(2 * len(layer.factors)) * each for each in allowed))


class _HeadByHead(TorchFunctionMode):
    """Attend in float64 one head after another: PyTorch then holds all products of queries and keys at once."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is not scaled_dot_product_attention or args[0].dtype != torch.float64:
            return function(*args, **kwargs)
        operands = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        query, key, value = (operands.pop(name) for name in ("query", "key", "value"))
        times = query.shape[1] // key.shape[1]
        operands.pop("enable_gqa", None)
        heads = [
            function(query[:, head, None], key[:, head // times, None], value[:, head // times, None], **operands)
            for head in range(query.shape[1])
        ]
        return torch.cat(heads, 1)
