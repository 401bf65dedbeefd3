"""BLAST linear layer: blocks share their side factors and differ in a diagonal (arXiv 2410.21262).

Shapes: x [..., i], V [b1, p, r], S [b1, b2, r], U [b2, r, q], bias [o], with i = b1 p and o = b2 q.
W[l,k] = V[l] diag(S[l,k]) U[k] maps input block l to output block k; blocks are contiguous and in order.
"""

from torch import Tensor

from blrlab_ops import checks, dispatch
from blrlab_ops.epilogue import NOTHING, Epilogue

from .ref import to_dense

__all__ = ["linear", "to_dense"]


def linear(
    x: Tensor,
    V: Tensor,
    S: Tensor,
    U: Tensor,
    bias: Tensor | None = None,
    *,
    epilogue: Epilogue = NOTHING,
    impl: str | None = None,
) -> Tensor:
    """Multiply by a BLAST weight, x [..., i] -> [..., o].

    Args:
      x: [..., b1 p], any leading shape and strides.
      V: [b1, p, r].
      S: [b1, b2, r].
      U: [b2, r, q].
      bias: [b2 q] or None.
      epilogue: what follows the product, fused where the implementation can.
      impl: a name from `blrlab_ops.impls("blast")`, or None for the best that can run.

    Raises:
      ValueError: when shapes, dtypes or devices do not fit, or `impl` is unknown.
      CannotRun: when the named `impl` cannot run here.
    """
    _check(x, V, S, U, bias, epilogue)
    return dispatch.run("blast", impl, x, (V, S, U), bias, epilogue)


def _check(x: Tensor, V: Tensor, S: Tensor, U: Tensor, bias: Tensor | None, epilogue: Epilogue) -> None:
    fits = V.ndim == S.ndim == U.ndim == 3 and S.shape == (V.shape[0], U.shape[0], V.shape[2])
    if not fits or U.shape[1] != V.shape[2]:
        raise ValueError(
            "blast: V must be [b1, p, r], S [b1, b2, r] and U [b2, r, q] of the same blocks and rank, "
            f"not {list(V.shape)}, {list(S.shape)} and {list(U.shape)}"
        )
    b1, p, _ = V.shape
    checks.operands("blast", x, {"V": V, "S": S, "U": U}, bias, b1 * p, U.shape[0] * U.shape[2], epilogue)
