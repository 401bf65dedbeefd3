"""What a forward-only kernel needs to be a full PyTorch operator: shapes for tracing, and gradients."""

from collections.abc import Callable

from torch import Tensor


def register(op, out_features: Callable[..., int], gradients: Callable[..., tuple]) -> None:
    """Give `op(x, *factors, bias) -> y` its shape rule and its backward.

    Args:
      op: a `torch.library.custom_op` over x [n, i], factors and bias [o] or None, with y [n, o].
      out_features: o, from the factors.
      gradients: `(grad, x, *factors, needs=...) -> (dx, *dfactors)`.
    """

    def fake(x: Tensor, *factors_and_bias: Tensor | None) -> Tensor:
        return x.new_empty(x.shape[0], out_features(*factors_and_bias[:-1]))

    def remember(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:-1])

    def backward(ctx, grad: Tensor):
        *needs, needs_bias = ctx.needs_input_grad
        bias_gradient = grad.sum(0) if needs_bias else None
        return *gradients(grad, *ctx.saved_tensors, needs=needs), bias_gradient

    op.register_fake(fake)
    op.register_autograd(backward, setup_context=remember)
