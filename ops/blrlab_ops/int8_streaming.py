"""The streaming kernels on int8 factors: `blrlab_ops.int8.linear` with `impl="triton_streaming"`.

Shapes as in `<format>.triton_streaming`; the scales of the columns are applied to the float32 sums, so that what
is read of V and U is one byte a number.
"""

import importlib
from collections.abc import Mapping

from torch import Tensor

from . import dispatch, launching
from .epilogue import Epilogue


def run(format: str, x: Tensor, quantised: Mapping[str, Tensor], bias: Tensor | None, epilogue: Epilogue) -> Tensor:
    """Multiply, x [..., i] -> [..., o]."""
    module = importlib.import_module(f"blrlab_ops.{format}.triton_streaming")
    names = [name for name in ("V", "S", "U") if name in quantised]
    weights = [quantised[name] for name in names]
    rows = x.reshape(-1, x.shape[-1])
    sizes = dispatch.layer(format, rows.shape[0], weights)
    y = rows.new_empty(rows.shape[0], sizes.out_features)
    first = quantised["V_scale"].flatten(1) if format != "low_rank" else quantised["V_scale"][None]
    last = quantised["U_scale"] if format != "low_rank" else quantised["U_scale"][None]
    flat = epilogue.rows(sizes.out_features)
    launches = module.launches(rows, *weights, bias, y, flat, config={}, scales=(first.contiguous(), last))
    launching.run(launches, x.device)
    return y.view(*x.shape[:-1], sizes.out_features)
