"""GPT-2 in Flax Linen: a decoder of pre-norm blocks with learned positions and tied embeddings.

Source: Radford et al., 2019, with the parameter names and sizes of the released checkpoints. Shapes: B batch,
T tokens, D width, H heads, N vocabulary size. Linear layers have the paths `h_0/attn/c_attn` [D, 3 D],
`h_0/attn/c_proj` [D, D], `h_0/mlp/c_fc` [D, 4 D] and `h_0/mlp/c_proj` [4 D, D].
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from blrlab.errors import InputError
from blrlab.layers import FactoredDense
from blrlab.models import parts
from blrlab.models.parts import ALL_DENSE, Cache, KeyValues, Part, Specs


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
      remat: compute a block's activations again for the gradient, instead of keeping them.
      scan: one program for all blocks.

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
    remat: bool = False
    scan: bool = False

    def __post_init__(self) -> None:
        parts.check_sizes(self, "vocab_size", "context", "layers", "heads", "width")
        if self.width % self.heads:
            raise InputError(f"the model's {self.heads} heads do not divide its width of {self.width}.")
        if not 0 <= self.dropout < 1:
            raise InputError(f"the model's dropout is {self.dropout}; it must be at least 0 and below 1.")

    @property
    def kept(self) -> tuple[int, int]:
        """Heads of keys and values, and their width."""
        return self.heads, self.width // self.heads


class _Part(Part):
    config: Config

    def residual(self, name: str) -> FactoredDense:
        """Make a projection into the residual stream."""
        # It starts smaller, so that the sum over the depth keeps its size (GPT-2, section 2.3).
        return self.linear(name, self.config.width, parts.DEVIATION / (2 * self.config.layers) ** 0.5)

    def norm(self, name: str) -> nn.LayerNorm:
        """Make a layer norm, computed in float32."""
        return nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, name=name)

    def dropout(self, x: Array, train: bool) -> Array:
        """Drop activations while training."""
        return nn.Dropout(self.config.dropout, deterministic=not train)(x)


class Attention(_Part):
    """Causal self-attention: x [B, T, D] -> [B, T, D]."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], positions: Array, kept: KeyValues | None = None, train: bool = False
    ) -> tuple[Float[Array, "B T D"], KeyValues | None]:
        """Attend; each position sees itself and those before it."""
        qkv = self.linear("c_attn", 3 * self.config.width)(x)
        q, k, v = rearrange(qkv, "B T (three H d) -> three B T H d", three=3, H=self.config.heads)
        mixed, kept = parts.attend(q, k, v, positions, kept)
        mixed = rearrange(mixed, "B T H d -> B T (H d)")
        return self.dropout(self.residual("c_proj")(mixed), train), kept


class MLP(_Part):
    """Two linear layers with a tanh-approximated GELU between: x [B, T, D] -> [B, T, D]."""

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], train: bool = False) -> Float[Array, "B T D"]:
        """Map every position by itself."""
        hidden = jax.nn.gelu(self.linear("c_fc", 4 * self.config.width)(x), approximate=True)
        return self.dropout(self.residual("c_proj")(hidden), train)


class Block(_Part):
    """One pre-norm block: x [B, T, D] -> [B, T, D]."""

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], positions: Array, kept: KeyValues | None, train: bool) -> Any:
        """Add attention, then the MLP; with `kept`, return it too."""
        dtype = self.config.dtype
        attention = Attention(self.config, self.specs, name="attn")
        mixed, kept = attention(self.norm("ln_1")(x).astype(dtype), positions, kept, train)
        x = x + mixed
        x = x + MLP(self.config, self.specs, name="mlp")(self.norm("ln_2")(x).astype(dtype), train)
        return x if kept is None else (x, kept)


class GPT2(_Part):
    """The language model: tokens [B, T] -> logits [B, T, N] in float32.

    `specs` gives the linear layers their formats, `{"h_0/attn/c_attn": Spec(...)}`; all others are dense.
    Training with dropout needs `rngs={"dropout": key}`.
    """

    PREFIX = "h"

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        train: bool = False,
        cache: Cache | None = None,
        positions: Int[Array, "B T"] | None = None,
        only: Int[Array, "B"] | None = None,
    ) -> Any:
        """Score the next token at every position.

        Args:
          tokens: words.
          train: whether activations drop out.
          cache: keys and values of earlier calls; with it the result is (logits, cache).
          positions: of the tokens, by default 0, 1, ...
          only: in each row the place of the one token to score, for logits [B, 1, N].

        Raises:
          InputError: the sequence is longer than the model's context.
        """
        config, length = self.config, tokens.shape[1]
        parts.check_length(length, config.context)
        places = jnp.arange(length)[None] if positions is None else positions
        embed = nn.Embed(config.vocab_size, config.width, embedding_init=nn.initializers.normal(0.02), name="wte")
        placed = nn.Embed(config.context, config.width, embedding_init=nn.initializers.normal(0.01), name="wpe")
        x = embed(tokens) + placed(places)
        x = self.dropout(x.astype(config.dtype), train)
        x, cache = self.blocks(Block, x, places, cache, train)
        x = self.norm("ln_f")(parts.at_rows(x, only)).astype(config.dtype)
        table = embed.embedding.astype(config.dtype)
        logits = jnp.einsum("BTD,ND->BTN", x, table, preferred_element_type=jnp.float32)
        return logits if cache is None else (logits, cache)


def init(config: Config, key: Array, specs: Specs = ALL_DENSE) -> dict[str, Any]:
    """Draw the parameters of a model, as nested dicts."""
    return parts.init(GPT2(config, specs), key, jnp.zeros((1, 1), jnp.int32))


def parameter_shapes(config: Config, specs: Specs = ALL_DENSE) -> dict[str, Any]:
    """Return the shapes of the parameters without computing them."""
    return parts.shapes(GPT2(config, specs), jnp.zeros((1, 1), jnp.int32))
