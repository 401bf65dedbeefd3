"""Monarch linear layer: every block of W has its own two factors of rank r'.

Shapes: x [..., i], V [b1, b2, p, r'], U [b1, b2, r', q], bias [o], with i = b1 p and o = b2 q. W[l,k] =
V[l,k] U[l,k] maps input block l to output block k; blocks and their columns are contiguous and in order.
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
    """Multiply by a Monarch weight, x [..., i] -> [..., o].

    Args:
      x: [..., b1 p], any leading shape and strides.
      V: [b1, b2, p, r'].
      U: [b1, b2, r', q].
      bias: [b2 q] or None.
      epilogue: what follows the product, fused where the implementation can.
      impl: a name from `blrlab_ops.impls("monarch")`, or None for the best that can run.

    Raises:
      ValueError: when shapes, dtypes or devices do not fit, or `impl` is unknown.
      CannotRun: when the named `impl` cannot run here.
    """
    _check(x, V, U, bias, epilogue)
    return dispatch.run("monarch", impl, x, (V, U), bias, epilogue)


def _check(x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None, epilogue: Epilogue) -> None:
    if V.ndim != 4 or U.ndim != 4 or V.shape[:2] != U.shape[:2] or V.shape[3] != U.shape[2]:
        raise ValueError(
            "monarch: V must be [b1, b2, p, r'] and U [b1, b2, r', q] of the same blocks and rank, "
            f"not {list(V.shape)} and {list(U.shape)}"
        )
    b1, b2, p, _ = V.shape
    checks.operands("monarch", x, {"V": V, "U": U}, bias, b1 * p, b2 * U.shape[3], epilogue)
