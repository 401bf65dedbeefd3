"""The thin Flax shell over `blrlab.factors`: a dense layer whose kernel may be factored.

A factored layer keeps its factors as one parameter: `{"kernel": {"V": ..., "U": ...}, "bias": ...}`. So
compressing a model is replacing its `kernel` leaves by dicts, and a tree of factors maps like any other.
`FactoredDense` is for models one writes; `factored_dense` runs models made of `flax.linen.Dense` on a factored
tree without editing them; `to_nnx` puts factors into a layer of a `flax.nnx` model.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

from blrlab import factors
from blrlab.errors import InputError, did_you_mean
from blrlab.factors import Kernel, Spec

FactorInit = Callable[[Array, Spec, Any], Kernel]


class FactoredDense(nn.Dense):
    """A linear layer, y = x W + bias, with W in the format of `spec`; otherwise `nn.Dense`, with its arguments.

    What only a dense product has, `precision`, `kernel_init` and the `dot_general`s, is not used by a factored one.

    Attributes:
      spec: format and sizes, or None for a dense layer, which is `nn.Dense` to the bit.
      factor_init: of a factored kernel: `(key, spec, dtype) -> kernel`.
    """

    spec: Spec | None = None
    factor_init: FactorInit = factors.init

    @nn.compact
    def __call__(self, inputs: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
        """Map inputs [..., in_features] -> [..., features].

        Raises:
          InputError: the spec is for another input or output size.
        """
        if self.spec is not None:
            _check_sizes(self, self.spec, inputs.shape[-1])
        if self.spec is None or self.spec.format == "dense":
            return super().__call__(inputs)
        kernel = self.param("kernel", self.factor_init, self.spec, self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        return linear(kernel, bias, inputs, self.dtype)


def _check_sizes(module: nn.Dense, spec: Spec, in_features: int) -> None:
    if (spec.in_features, spec.out_features) != (in_features, module.features):
        path = "/".join(module.path) or "the layer"
        raise InputError(
            f"{path} is {in_features} x {module.features}, but its spec {spec.in_features} x {spec.out_features}."
        )


def linear(
    kernel: Kernel, bias: Float[Array, "o"] | None, x: Float[Array, "*n i"], dtype: Any = None
) -> Float[Array, "*n o"]:
    """Compute x W + bias for a kernel of any format, in `dtype` (by default what the arguments promote to)."""
    names = tuple(kernel) if isinstance(kernel, Mapping) else ()
    leaves = kernel.values() if isinstance(kernel, Mapping) else (kernel,)
    x, bias, *leaves = promote_dtype(x, bias, *leaves, dtype=dtype)
    y = factors.apply(dict(zip(names, leaves, strict=True)) if names else leaves[0], x)
    return y if bias is None else y + _along(bias, y)


def _along(bias: Array, y: Array) -> Array:
    """Give a bias [o] the dimensions of y, since rank promotion may be forbidden."""
    return jnp.reshape(bias, (1,) * (y.ndim - 1) + bias.shape)


@contextlib.contextmanager
def factored_dense(specs: Mapping[str, Spec] | None = None) -> Iterator[None]:
    """Let every `nn.Dense` inside the block take a factored kernel, without editing the model.

    Applying needs no specs: a layer whose `kernel` parameter is a dict of factors runs factored, every other one
    as before. To initialise factored layers from scratch, give `specs`, `{"path/of/layer": Spec}`.

    >>> import flax.linen as nn, jax
    >>> from blrlab.factors import Spec
    >>> from blrlab.layers import factored_dense
    >>> model, x = nn.Sequential([nn.Dense(12), nn.relu, nn.Dense(4)]), jax.numpy.ones((2, 8))
    >>> with factored_dense({"layers_0": Spec("monarch", 8, 12, (2, 2), 3)}):
    ...     params = model.init(jax.random.key(0), x)
    ...     y = model.apply(params, x)
    >>> params["params"]["layers_0"]["kernel"]["V"].shape
    (2, 2, 4, 3)

    Raises:
      InputError: a spec is for another size, or, at the end of a block that initialised, for no layer at all.
    """

    specs, initialised = dict(specs or {}), set()

    def intercept(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if not isinstance(module, nn.Dense) or context.method_name != "__call__":
            return call(*args, **kwargs)
        inputs = args[0] if args else kwargs["inputs"]
        if module.is_initializing() and not module.has_variable("params", "kernel"):
            path = "/".join(module.path)
            initialised.add(path)
            if path not in specs:
                return call(*args, **kwargs)
            _check_sizes(module, specs[path], inputs.shape[-1])
            if specs[path].format == "dense":
                return call(*args, **kwargs)
            _init_dense(module, specs[path])
        kernel = module.get_variable("params", "kernel")
        if not isinstance(kernel, Mapping):
            return call(*args, **kwargs)
        bias = module.get_variable("params", "bias") if module.use_bias else None
        return linear(kernel, bias, inputs, module.dtype)

    with nn.intercept_methods(intercept):
        yield
    unknown = [path for path in specs if path not in initialised]
    if initialised and unknown:
        raise InputError(f"the model has no nn.Dense {unknown[0]}.{did_you_mean(unknown[0], initialised)}")


def _init_dense(module: nn.Dense, spec: Spec) -> None:
    """Give an `nn.Dense` that is being initialised a factored kernel, and its bias."""
    assert module.scope is not None
    module.scope.param("kernel", factors.init, spec, module.param_dtype)
    if module.use_bias:
        module.scope.param("bias", module.bias_init, (module.features,), module.param_dtype)


def to_nnx(layer: nnx.Linear, kernel: Kernel) -> nnx.Module:
    """Make an NNX layer that runs a factored kernel in the place of an `nnx.Linear`.

    The result is `FactoredDense` behind `nnx.bridge.ToNNX`, its parameters being the kernel and the old layer's
    bias; assign it where the old layer was.

    Raises:
      InputError: the kernel is for another input or output size.
    """
    spec = factors.spec_of(kernel)
    if (spec.in_features, spec.out_features) != (layer.in_features, layer.out_features):
        raise InputError(
            f"the layer is {layer.in_features} x {layer.out_features}, "
            f"but the kernel {spec.in_features} x {spec.out_features}."
        )
    shell = FactoredDense(
        layer.out_features, spec=spec, use_bias=layer.use_bias, dtype=layer.dtype, param_dtype=layer.param_dtype
    )
    module: Any = nnx.bridge.ToNNX(shell, rngs=nnx.Rngs(0))
    module.lazy_init(jnp.zeros((1, layer.in_features), layer.param_dtype))
    module.kernel = jax.tree.map(nnx.Param, kernel)
    if layer.bias is not None:
        module.bias = layer.bias
    return module
