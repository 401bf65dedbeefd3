"""Low-rank linear layer: W = V U.

Shapes: x [..., i], V [i, r], U [r, o], bias [o], y = x V U + bias [..., o].
"""

from torch import Tensor

from blrlab_ops import checks, dispatch
from blrlab_ops.epilogue import NOTHING, Epilogue

from .ref import to_dense

__all__ = ["linear", "to_dense"]


def linear(
    x: Tensor,
    V: Tensor,
    U: Tensor,
    bias: Tensor | None = None,
    *,
    epilogue: Epilogue = NOTHING,
    impl: str | None = None,
) -> Tensor:
    """Multiply by a low-rank weight, x [..., i] -> [..., o].

    Args:
      x: [..., i], any leading shape and strides.
      V: [i, r].
      U: [r, o].
      bias: [o] or None.
      epilogue: what follows the product, fused where the implementation can.
      impl: a name from `blrlab_ops.impls("low_rank")`, or None for the best that can run.

    Raises:
      ValueError: when shapes, dtypes or devices do not fit, or `impl` is unknown.
      CannotRun: when the named `impl` cannot run here.
    """
    _check(x, V, U, bias, epilogue)
    return dispatch.run("low_rank", impl, x, (V, U), bias, epilogue)


def _check(x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None, epilogue: Epilogue) -> None:
    if V.ndim != 2 or U.ndim != 2 or V.shape[1] != U.shape[0]:
        raise ValueError(f"low_rank: V must be [i, r] and U [r, o], not {list(V.shape)} and {list(U.shape)}")
    checks.operands("low_rank", x, {"V": V, "U": U}, bias, V.shape[0], U.shape[1], epilogue)
