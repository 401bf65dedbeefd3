"""GPT-2 in Flax Linen: a decoder of pre-norm blocks with learned positions and tied embeddings.

Source: Radford et al., 2019, with the parameter names and sizes of the released checkpoints. Shapes: B batch,
T tokens, D width, H heads, N vocabulary size. Linear layers have the paths `h_0/attn/c_attn` [D, 3 D],
`h_0/attn/c_proj` [D, D], `h_0/mlp/c_fc` [D, 4 D] and `h_0/mlp/c_proj` [4 D, D].
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from flax.core import FrozenDict
from jaxtyping import Array, Float, Int

from blrlab import factors
from blrlab.errors import InputError
from blrlab.factors import Kernel, Spec
from blrlab.layers import FactoredDense, FactorInit

Specs = Mapping[str, Spec]
ALL_DENSE: Specs = FrozenDict()


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a GPT-2; the defaults are GPT2-S, 124 million parameters.

    Attributes:
      vocab_size: N.
      context: the most tokens a sequence may have.
      layers: number of blocks.
      heads: H, dividing the width.
      width: D.
      dropout: share of activations dropped while training, after the embeddings and every residual branch.
      dtype: of the computation; parameters are float32, norms and softmax are computed in float32.

    Raises:
      InputError: a size is below 1, or the heads do not divide the width.
    """

    vocab_size: int = 50257
    context: int = 1024
    layers: int = 12
    heads: int = 12
    width: int = 768
    dropout: float = 0.1
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "layers", "heads", "width"):
            if getattr(self, name) < 1:
                raise InputError(f"the model's {name} is {getattr(self, name)}; it must be at least 1.")
        if self.width % self.heads:
            raise InputError(f"the model's {self.heads} heads do not divide its width of {self.width}.")
        if not 0 <= self.dropout < 1:
            raise InputError(f"the model's dropout is {self.dropout}; it must be at least 0 and below 1.")


def _drawn(deviation: float) -> FactorInit:
    """Return `factors.init` scaled to weights of this deviation; the last factor takes the scale."""

    def init(key: Array, spec: Spec, dtype: Any) -> Kernel:
        kernel: Any = factors.init(key, spec, dtype)
        return {**kernel, "U": kernel["U"] * (deviation * spec.in_features**0.5)}

    return init


class _Part(nn.Module):
    """What all parts of the model share: its sizes, and the specs of its linear layers by path."""

    config: Config
    specs: Specs = ALL_DENSE

    def linear(self, name: str, features: int, residual: bool = False) -> FactoredDense:
        """Make the linear layer `name` of this part, in the format its path is given."""
        # Residual projections start smaller, so that the sum over the depth keeps its size (GPT-2, section 2.3).
        deviation = 0.02 / (2 * self.config.layers) ** 0.5 if residual else 0.02
        spec = self.specs.get("/".join((*self.path, name)))
        init = nn.initializers.normal(deviation)
        return FactoredDense(
            features, spec=spec, dtype=self.config.dtype, kernel_init=init, factor_init=_drawn(deviation), name=name
        )

    def norm(self, name: str) -> nn.LayerNorm:
        """Make a layer norm, computed in float32."""
        return nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, name=name)

    def dropout(self, x: Array, train: bool) -> Array:
        """Drop activations while training."""
        return nn.Dropout(self.config.dropout, deterministic=not train)(x)


class Attention(_Part):
    """Causal self-attention: x [B, T, D] -> [B, T, D]."""

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], train: bool = False) -> Float[Array, "B T D"]:
        """Attend; each position sees itself and those before it."""
        qkv = self.linear("c_attn", 3 * self.config.width)(x)
        q, k, v = rearrange(qkv, "B T (three H d) -> three B T H d", three=3, H=self.config.heads)
        mixed = rearrange(jax.nn.dot_product_attention(q, k, v, is_causal=True), "B T H d -> B T (H d)")
        return self.dropout(self.linear("c_proj", self.config.width, residual=True)(mixed), train)


class MLP(_Part):
    """Two linear layers with a tanh-approximated GELU between: x [B, T, D] -> [B, T, D]."""

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], train: bool = False) -> Float[Array, "B T D"]:
        """Map every position by itself."""
        hidden = jax.nn.gelu(self.linear("c_fc", 4 * self.config.width)(x), approximate=True)
        return self.dropout(self.linear("c_proj", self.config.width, residual=True)(hidden), train)


class Block(_Part):
    """One pre-norm block: x [B, T, D] -> [B, T, D]."""

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], train: bool = False) -> Float[Array, "B T D"]:
        """Add attention, then the MLP."""
        dtype = self.config.dtype
        x = x + Attention(self.config, self.specs, name="attn")(self.norm("ln_1")(x).astype(dtype), train)
        return x + MLP(self.config, self.specs, name="mlp")(self.norm("ln_2")(x).astype(dtype), train)


class GPT2(_Part):
    """The language model: tokens [B, T] -> logits [B, T, N] in float32.

    `specs` gives the linear layers their formats, `{"h_0/attn/c_attn": Spec(...)}`; all others are dense.
    Training with dropout needs `rngs={"dropout": key}`.
    """

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"], train: bool = False) -> Float[Array, "B T N"]:
        """Score the next token at every position.

        Raises:
          InputError: the sequence is longer than the model's context.
        """
        config, length = self.config, tokens.shape[1]
        if length > config.context:
            raise InputError(f"a sequence of {length} tokens is longer than the model's context of {config.context}.")
        embed = nn.Embed(config.vocab_size, config.width, embedding_init=nn.initializers.normal(0.02), name="wte")
        positions = nn.Embed(config.context, config.width, embedding_init=nn.initializers.normal(0.01), name="wpe")
        x = embed(tokens) + positions(jnp.arange(length))[None]
        x = self.dropout(x.astype(config.dtype), train)
        for index in range(config.layers):
            x = Block(config, self.specs, name=f"h_{index}")(x, train)
        x = self.norm("ln_f")(x).astype(config.dtype)
        table = embed.embedding.astype(config.dtype)
        return jnp.einsum("BTD,ND->BTN", x, table, preferred_element_type=jnp.float32)


def init(config: Config, key: Array, specs: Specs = ALL_DENSE) -> dict[str, Any]:
    """Draw the parameters of a model, as nested dicts."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    variables: Any = GPT2(config, specs).init(key, tokens)
    return variables["params"]


def parameter_shapes(config: Config, specs: Specs = ALL_DENSE) -> dict[str, Any]:
    """Return the shapes of the parameters without computing them."""
    return jax.eval_shape(lambda key: init(config, key, specs), jax.random.key(0))
