"""What the models share: linear layers in the format their path is given, blocks in a row, keys and values kept.

Shapes: B batch, T tokens, D width, H heads, K heads of keys and values, d a head's width, S tokens a cache has room
for. A block maps `(x, shared, kept, train)` to x, or to (x, kept) where `kept` is given: `shared` is what all blocks
read (positions, a conditioning vector), `kept` what one keeps between calls.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jaxtyping import Array, Float, Int

from blrlab import factors
from blrlab.errors import InputError
from blrlab.factors import Kernel, Spec
from blrlab.layers import FactoredDense, FactorInit

Specs = Mapping[str, Spec]
ALL_DENSE: Specs = FrozenDict()
DEVIATION = 0.02  # of the weights of a fresh model, unless a paper gives another


class KeyValues(NamedTuple):
    """What one attention layer keeps: keys and values [B, S, K, d] by position."""

    keys: Float[Array, "B S K d"]
    values: Float[Array, "B S K d"]


Cache = tuple[KeyValues, ...]


def drawn(deviation: float) -> FactorInit:
    """Return `factors.init` scaled to weights of this deviation; the last factor takes the scale."""

    def init(key: Array, spec: Spec, dtype: Any) -> Kernel:
        kernel: Any = factors.init(key, spec, dtype)
        return {**kernel, "U": kernel["U"] * (deviation * spec.in_features**0.5)}

    return init


class Part(nn.Module):
    """What all parts of a model share: its config, and the specs of its linear layers by path.

    Attributes:
      config: of the model; it has `dtype`, and where there are blocks `remat` and `scan`.
      specs: {path: spec} of the factored layers; all others are dense.
    """

    PREFIX: ClassVar[str] = ""  # of a whole model: how the names of its blocks begin

    config: Any
    specs: Specs = ALL_DENSE

    def __post_init__(self) -> None:
        if not isinstance(self.specs, FrozenDict):
            object.__setattr__(self, "specs", FrozenDict(self.specs))  # a model is hashable: static under jit
        super().__post_init__()

    def linear(self, name: str, features: int, deviation: float = DEVIATION, bias: bool = True) -> FactoredDense:
        """Make the linear layer `name` of this part, in the format its path is given."""
        return FactoredDense(
            features,
            use_bias=bias,
            spec=self.specs.get("/".join((*self.path, name))),
            dtype=self.config.dtype,
            kernel_init=nn.initializers.normal(deviation),
            factor_init=drawn(deviation),
            name=name,
        )

    def blocks(
        self,
        block: type["Part"],
        x: Array,
        shared: Any = None,
        kept: Sequence[Any] | None = None,
        train: bool = False,
    ) -> tuple[Array, tuple[Any, ...] | None]:
        """Run blocks `<PREFIX>_0`, `<PREFIX>_1`, ... one after another.

        With `config.remat` a block's activations are computed again for the gradient instead of kept; with
        `config.scan` one program runs for all blocks, which compiles faster (parameters keep their paths).

        Raises:
          InputError: with `scan`, the blocks are not all of the same formats and ranks.
        """
        if self.config.scan and not self.is_initializing():
            return self._scanned(block, x, shared, kept, train)
        wrapped: Any = (
            nn.remat(block, static_argnums=(4,)) if self.config.remat and not self.is_initializing() else block
        )
        found = []
        for index in range(self.config.layers):
            own = None if kept is None else kept[index]
            x = wrapped(self.config, self.specs, name=f"{self.PREFIX}_{index}")(x, shared, own, train)
            if kept is not None:
                x, own = x
                found.append(own)
        return x, None if kept is None else tuple(found)

    def _scanned(
        self, block: type["Part"], x: Array, shared: Any, kept: Sequence[Any] | None, train: bool
    ) -> tuple[Array, tuple[Any, ...] | None]:
        names = [f"{self.PREFIX}_{index}" for index in range(self.config.layers)]
        params: Any = self.variables["params"]
        own = [params[name] for name in names]
        _check_alike(names, own)
        start = "/".join((*self.path, names[0])) + "/"
        specs = {path.removeprefix(start): spec for path, spec in self.specs.items() if path.startswith(start)}
        one = block(self.config, FrozenDict(specs), parent=None)
        keys = jax.random.split(self.make_rng("dropout"), len(names)) if train and self.has_rng("dropout") else None

        def step(x: Array, each: Any) -> tuple[Array, Any]:
            params, kept, key = each
            rngs = None if key is None else {"dropout": key}
            result: Any = one.apply({"params": params}, x, shared, kept, train, rngs=rngs)
            return (result, None) if kept is None else result

        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)
        stacked_kept = None if kept is None else jax.tree.map(lambda *leaves: jnp.stack(leaves), *kept)
        x, found = jax.lax.scan(jax.checkpoint(step) if self.config.remat else step, x, (stacked, stacked_kept, keys))
        if kept is None:
            return x, None
        return x, tuple(jax.tree.map(lambda leaf, at=index: leaf[at], found) for index in range(len(names)))


def _check_alike(names: Sequence[str], params: Sequence[Any]) -> None:
    """Check that blocks may be run by one program."""
    first = jax.tree.map(jnp.shape, params[0])
    for name, other in zip(names, params, strict=True):
        if jax.tree.map(jnp.shape, other) != first:
            raise InputError(f"scan runs all blocks as one, but {name} has other formats or ranks than {names[0]}.")


def attend(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T K d"],
    v: Float[Array, "B T K d"],
    positions: Int[Array, "#B T"],
    kept: KeyValues | None = None,
) -> tuple[Float[Array, "B T H d"], KeyValues | None]:
    """Attend causally: each position sees itself and those before it, and with `kept` those of earlier calls.

    Keys and values are written to `kept` at their positions; what lies there past a row's own position is not seen.
    Several heads share one of keys and values where K < H (grouped queries).
    """
    if kept is None:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True), None
    positions = jnp.broadcast_to(positions, q.shape[:2])
    rows = jnp.arange(q.shape[0])[:, None]
    kept = KeyValues(
        kept.keys.at[rows, positions].set(k.astype(kept.keys.dtype)),
        kept.values.at[rows, positions].set(v.astype(kept.values.dtype)),
    )
    seen = jnp.arange(kept.keys.shape[1])[None, None, None] <= positions[:, None, :, None]
    keys, values = kept.keys.astype(q.dtype), kept.values.astype(q.dtype)
    return jax.nn.dot_product_attention(q, keys, values, mask=seen), kept


def check_length(length: int, context: int) -> None:
    """Check that a sequence fits a model.

    Raises:
      InputError: it is longer than the model's context.
    """
    if length > context:
        raise InputError(f"a sequence of {length} tokens is longer than the model's context of {context}.")


def check_sizes(config: Any, *names: str) -> None:
    """Check that sizes of a config are at least 1.

    Raises:
      InputError: one is not.
    """
    for name in names:
        if getattr(config, name) < 1:
            raise InputError(f"the model's {name} is {getattr(config, name)}; it must be at least 1.")


def at_rows(x: Float[Array, "B T D"], only: Int[Array, "B"] | None) -> Float[Array, "B t D"]:
    """Keep one position of each row, [B, 1, D]; all of them where `only` is None."""
    return x if only is None else jnp.take_along_axis(x, only[:, None, None], axis=1)


def init(model: nn.Module, key: Array, *inputs: Any) -> dict[str, Any]:
    """Draw the parameters of a model, as nested dicts."""
    variables: Any = model.init(key, *inputs)
    return variables["params"]


def shapes(model: nn.Module, *inputs: Any) -> dict[str, Any]:
    """Return the shapes of a model's parameters without computing them."""
    return jax.eval_shape(lambda key: init(model, key, *inputs), jax.random.key(0))
