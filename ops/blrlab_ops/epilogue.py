"""What follows a product, y = activation(x W + bias) * multiply + residual, fused into a kernel or done by PyTorch."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS = ("gelu", "gelu_tanh", "silu")


class Epilogue(NamedTuple):
    """What follows x W + bias.

    Attributes:
      activation: "gelu" (exact, by erf), "gelu_tanh", "silu", or None.
      multiply: [..., o], such as what a gate is multiplied by, or None.
      residual: [..., o], added last, or None.
    """

    activation: str | None = None
    multiply: Tensor | None = None
    residual: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing follows."""
        return self == NOTHING

    def tensors(self) -> dict[str, Tensor]:
        """Return the operands that are given, by name."""
        found = {"multiply": self.multiply, "residual": self.residual}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def rows(self, out_features: int) -> "Epilogue":
        """Return the same with operands [n, o], contiguous."""
        flat = {name: each.reshape(-1, out_features).contiguous() for name, each in self.tensors().items()}
        return self._replace(**flat)


NOTHING = Epilogue()


def check(format: str, epilogue: Epilogue, shape: tuple[int, ...], x: Tensor) -> None:
    """Check what follows a product against its result.

    Args:
      format: named in the sentence.
      epilogue: what follows.
      shape: of the result, [..., o].
      x: the input, whose dtype and device the operands share.

    Raises:
      ValueError: the activation is unknown, or an operand differs from the result in shape, dtype or device.
    """
    if epilogue.activation is not None and epilogue.activation not in ACTIVATIONS:
        raise ValueError(f"{format}: activation {epilogue.activation!r} is not one of {ACTIVATIONS}, or None")
    for name, tensor in epilogue.tensors().items():
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{format}: {name} must be {list(shape)}, as the result, not {list(tensor.shape)}")
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"{format}: x is {x.dtype} on {x.device} and {name} is {tensor.dtype} on {tensor.device}; "
                "they must agree, cast or move one of them"
            )


def apply(y: Tensor, epilogue: Epilogue) -> Tensor:
    """Do by PyTorch what follows a product: y [..., o] is x W + bias.

    >>> apply(torch.tensor([0.0, 2.0]), Epilogue("silu", residual=torch.ones(2)))
    tensor([1.0000, 2.7616])
    """
    if epilogue.activation == "silu":
        y = functional.silu(y)
    elif epilogue.activation is not None:
        y = functional.gelu(y, approximate="tanh" if epilogue.activation == "gelu_tanh" else "none")
    if epilogue.multiply is not None:
        y = y * epilogue.multiply
    return y if epilogue.residual is None else y + epilogue.residual


def records_gradients(*tensors: Tensor | None) -> bool:
    """Say whether autograd records an operation on these tensors."""
    return torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors)
