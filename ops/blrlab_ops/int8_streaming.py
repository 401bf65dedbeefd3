"""The streaming kernels on int8 factors: `blrlab_ops.int8.linear` with `impl="triton_streaming"`.

Shapes as in `<format>.triton_streaming`; the scales of the columns are applied to the float32 sums, so that what is
read of V and U is one byte a number. Weights are V, S for blast, U, and then the scales of V and U, as `int8.quantise`
names them. Tuned configurations are kept under the dtype "int8".
"""

import functools
import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from . import dispatch
from .configs import Config
from .epilogue import NOTHING, Epilogue
from .launching import Launch
from .plans import Plans

PLANS = Plans()


class Implementation(NamedTuple):
    """The streaming implementation of a format on int8 weights, with what tuning asks of an implementation's module."""

    format: str

    @property
    def module(self) -> ModuleType:
        """That of the same format on weights of the dtype of x."""
        return importlib.import_module(f"blrlab_ops.{self.format}.triton_streaming")

    def pack(self, *weights: Tensor) -> tuple[Tensor, ...]:
        """Store V, S and U as the kernels read them."""
        return *self.module.pack(*weights[:-2]), *weights[-2:]

    def launches(
        self,
        x: Tensor,
        *operands: Any,
        epilogue: Epilogue = NOTHING,
        config: Config | None = None,
    ) -> list[Launch]:
        """Describe the launches that fill y [n, o] from x [n, i], of operands (*weights, bias or None, y)."""
        *weights, V_scale, U_scale, bias, y = operands
        if self.format == "low_rank":
            V_scale, U_scale = V_scale[None], U_scale[None]
        scales = (V_scale.flatten(1).contiguous(), U_scale)
        return self.module.launches(x, *weights, bias, y, epilogue, config, scales=scales)

    def candidates(self, x: Tensor, *weights: Tensor) -> dict[str, list]:
        """List the tiles worth a measurement, by launch."""
        return self.module.candidates(x, *weights[:-2])


def run(format: str, x: Tensor, quantised: Mapping[str, Tensor], bias: Tensor | None, epilogue: Epilogue) -> Tensor:
    """Multiply, x [..., i] -> [..., o]."""
    weights = in_order(quantised)
    rows = x.reshape(-1, x.shape[-1])
    columns = dispatch.layer(format, rows.shape[0], weights[:-2]).out_features
    y = rows.new_empty(rows.shape[0], columns)
    flat, kernels = epilogue.rows(columns), Implementation(format)
    tensors = (rows, *weights, bias, flat.multiply, flat.residual, y)
    describe = functools.partial(kernels.launches, rows, *weights, bias, y, epilogue=flat)
    PLANS.run(tensors, (format, flat.activation), describe)
    return y.view(*x.shape[:-1], columns)


def in_order(quantised: Mapping[str, Tensor]) -> list[Tensor]:
    """Return V, S for blast, U and the scales of V and U."""
    return [quantised[name] for name in ("V", "S", "U", "V_scale", "U_scale") if name in quantised]
