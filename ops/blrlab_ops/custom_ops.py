"""What turns launches of Triton kernels into a PyTorch operator: a schema, a shape rule for tracing, and gradients."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import epilogue as after
from .epilogue import NOTHING, Epilogue
from .launching import Launch
from .plans import Plans

Launches = Callable[..., list[Launch]]
Linear = Callable[..., Tensor]


def operator(
    format: str,
    impl: str,
    factors: Sequence[str],
    out_features: Callable[..., int],
    launches: Launches | None,
    gradients: Callable[..., tuple[Tensor | None, ...]],
    compute: Callable[..., Tensor] | None = None,
) -> Linear:
    """Make `linear(x, *factors, bias, epilogue)` of an implementation, x [..., i] -> [..., o].

    Args:
      format: of the factors.
      impl: the implementation's name; the operator is `blrlab_ops::<format>_<impl>`.
      factors: their names.
      out_features: o, from the factors.
      launches: `(x [n, i], *factors, bias, y [n, o], epilogue)` -> the launches that fill y.
      gradients: `(grad [n, o], x [n, i], *factors, needs=...)` -> (dx, *dfactors), of the product alone.
      compute: in the place of launches, `(x [n, i], *factors, bias, epilogue)` -> y [n, o].
    """
    named = "".join(f", Tensor {name}" for name in factors)
    follows = "Tensor? bias, Tensor? multiply, Tensor? residual, str activation"
    plans = Plans()

    def forward(x, *rest):
        *weights, bias, multiply, residual, activation = rest
        epilogue = Epilogue(activation or None, multiply, residual)
        if launches is None:
            assert compute is not None
            return compute(x, *weights, bias, epilogue)
        y = x.new_empty(x.shape[0], out_features(*weights))
        describe = functools.partial(launches, x, *weights, bias, y, epilogue)
        plans.run((x, *weights, bias, multiply, residual, y), activation, describe)
        return y

    name, schema = f"blrlab_ops::{format}_{impl}", f"(Tensor x{named}, {follows}) -> Tensor"
    op = torch.library.custom_op(name, forward, mutates_args=(), schema=schema)
    _register(op, out_features, gradients)

    def linear(x: Tensor, *weights_and_bias: Tensor | None, epilogue: Epilogue = NOTHING) -> Tensor:
        *weights, bias = weights_and_bias
        columns, rows, follows = out_features(*weights), x, NOTHING
        if x.ndim != 2:
            rows = x.reshape(-1, x.shape[-1])
        recorded = False
        if epilogue is not NOTHING:
            recorded = after.records_gradients(x, *weights_and_bias, *epilogue.tensors().values())
            follows = NOTHING if recorded else epilogue.rows(columns)
        y = op(rows, *weights, bias, follows.multiply, follows.residual, follows.activation or "")
        if x.ndim != 2:
            y = y.view(*x.shape[:-1], columns)
        return after.apply(y, epilogue) if recorded else y

    linear.operator = op  # type: ignore[attr-defined]  # for torch.library.opcheck
    return linear


def _register(op, out_features: Callable[..., int], gradients: Callable[..., tuple[Tensor | None, ...]]) -> None:
    """Give `op(x, *factors, bias, multiply, residual, activation) -> y [n, o]` its shape rule and its backward."""

    def fake(x: Tensor, *rest) -> Tensor:
        return x.new_empty(x.shape[0], out_features(*rest[:-4]))

    def remember(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:-4])
        ctx.fused = inputs[-1] or inputs[-2] is not None or inputs[-3] is not None

    def backward(ctx, grad: Tensor):
        if ctx.fused:
            raise RuntimeError("a fused epilogue has no gradient: call blrlab_ops.linear, which leaves it to PyTorch")
        *needs, needs_bias = ctx.needs_input_grad[:-3]
        bias_gradient = grad.sum(0) if needs_bias else None
        return *gradients(grad, *ctx.saved_tensors, needs=needs), bias_gradient, None, None, None

    op.register_fake(fake)
    op.register_autograd(backward, setup_context=remember)
