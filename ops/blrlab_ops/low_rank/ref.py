"""Reference low-rank layer: build W, then multiply.

Any floating dtype does; in float64 it is the truth that the others are held to.

Shapes: x [..., i], V [i, r], U [r, o], bias [o], W [i, o].
"""

from torch import Tensor


def to_dense(V: Tensor, U: Tensor) -> Tensor:
    """Build W [i, o]."""
    return V @ U


def linear(x: Tensor, V: Tensor, U: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply, x [..., i] -> [..., o]."""
    y = x @ to_dense(V, U)
    return y if bias is None else y + bias


def pack(V: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors as they are: any strides do."""
    return V, U
