"""Llama in Flax Linen: a decoder of pre-norm blocks with rotary positions, grouped queries and a gated MLP.

Source: Touvron et al., arXiv 2302.13971 (Llama-7B) and Dubey et al., arXiv 2407.21783 (Llama 3: grouped queries, scaled
rotary frequencies), with the parameter names of the checkpoints on Hugging Face. Shapes: B batch, T tokens, D width,
H heads, K heads of keys and values, d a head's width, F the MLP's width, N vocabulary size. Linear layers have no bias
and the paths `layers_0/self_attn/{q,k,v,o}_proj` [D, H d], [D, K d], [D, K d], [H d, D] and
`layers_0/mlp/{gate,up,down}_proj` [D, F], [D, F], [F, D].
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from blrlab.errors import InputError
from blrlab.models import parts
from blrlab.models.parts import ALL_DENSE, Cache, KeyValues, Part, Specs


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 and later stretch the rotary frequencies, beyond the context they were first trained on.

    Wavelengths beyond `context / low` are stretched by `factor`, those below `context / high` are left, and those
    between are blended.
    """

    factor: float
    low: float = 1.0
    high: float = 4.0
    context: int = 8192

    def __post_init__(self) -> None:
        if self.factor < 1 or not 0 < self.low < self.high or self.context < 1:
            raise InputError(f"rotary frequencies cannot be scaled by {self}.")


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a Llama; the defaults are Llama-7B, 6.7 billion parameters.

    Attributes:
      vocab_size: N.
      context: the most tokens a sequence may have.
      layers: number of blocks.
      heads: H.
      kv_heads: K, dividing H.
      width: D.
      inner: F.
      head_width: d, even; 0 stands for D / H.
      rope_theta: the base of the rotary wavelengths.
      rope_scaling: how they are stretched, or None.
      epsilon: of the norms.
      tied: whether the output layer is the embedding.
      dtype: of the computation; norms, rotary angles and softmax are computed in float32.
      remat: compute a block's activations again for the gradient, instead of keeping them.
      scan: one program for all blocks.

    Raises:
      InputError: a size is below 1, or the sizes do not fit together.
    """

    vocab_size: int = 32000
    context: int = 2048
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    width: int = 4096
    inner: int = 11008
    head_width: int = 0
    rope_theta: float = 1e4
    rope_scaling: RopeScaling | None = None
    epsilon: float = 1e-5
    tied: bool = False
    dtype: str = "float32"
    remat: bool = False
    scan: bool = False

    def __post_init__(self) -> None:
        parts.check_sizes(self, "vocab_size", "context", "layers", "heads", "kv_heads", "width", "inner")
        if self.heads % self.kv_heads:
            raise InputError(f"the model's {self.kv_heads} heads of keys do not divide its {self.heads} heads.")
        if not self.head_width:
            if self.width % self.heads:
                raise InputError(f"the model's {self.heads} heads do not divide its width of {self.width}.")
            object.__setattr__(self, "head_width", self.width // self.heads)
        if self.head_width < 2 or self.head_width % 2:
            raise InputError(f"a head's width is {self.head_width}; rotary positions need an even one.")

    @property
    def kept(self) -> tuple[int, int]:
        """Heads of keys and values, and their width."""
        return self.kv_heads, self.head_width


LLAMA_1B = Config(
    vocab_size=128256, context=131072, layers=16, heads=32, kv_heads=8, width=2048, inner=8192, rope_theta=5e5,
    rope_scaling=RopeScaling(32.0), tied=True,
)  # fmt: skip


def frequencies(config: Config) -> Float[Array, "h"]:
    """Return the rotary frequencies [d / 2], in radians a position."""
    exponents = jnp.arange(0, config.head_width, 2, dtype=jnp.float32) / config.head_width
    plain = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    turns = scaling.context * plain / (2 * math.pi)  # of each over the first context
    share = jnp.clip((turns - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
    return (1 - share) * plain / scaling.factor + share * plain


def rotate(x: Float[Array, "B T H d"], angles: Float[Array, "B T h"]) -> Float[Array, "B T H d"]:
    """Turn the pairs (j, j + d/2) of every head by their angles, in float32."""
    one, other = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    return jnp.concatenate([one * cos - other * sin, other * cos + one * sin], axis=-1).astype(x.dtype)


class _Part(Part):
    config: Config

    def norm(self, name: str) -> nn.RMSNorm:
        """Make an RMS norm, computed in float32."""
        return nn.RMSNorm(epsilon=self.config.epsilon, dtype=jnp.float32, name=name)


class Attention(_Part):
    """Causal self-attention of grouped queries: x [B, T, D] -> [B, T, D]."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], positions: Array, kept: KeyValues | None = None
    ) -> tuple[Float[Array, "B T D"], KeyValues | None]:
        """Attend; each position sees itself and those before it."""
        config = self.config
        sizes = {"q": config.heads, "k": config.kv_heads, "v": config.kv_heads}
        q, k, v = (
            rearrange(
                self.linear(f"{name}_proj", heads * config.head_width, bias=False)(x), "B T (H d) -> B T H d", H=heads
            )
            for name, heads in sizes.items()
        )
        angles = positions.astype(jnp.float32)[:, :, None] * frequencies(config)[None, None]
        mixed, kept = parts.attend(rotate(q, angles), rotate(k, angles), v, positions, kept)
        return self.linear("o_proj", config.width, bias=False)(rearrange(mixed, "B T H d -> B T (H d)")), kept


class MLP(_Part):
    """A gated MLP, down(silu(gate) up): x [B, T, D] -> [B, T, D]."""

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Map every position by itself."""
        gate = self.linear("gate_proj", self.config.inner, bias=False)(x)
        up = self.linear("up_proj", self.config.inner, bias=False)(x)
        return self.linear("down_proj", self.config.width, bias=False)(jax.nn.silu(gate) * up)


class Block(_Part):
    """One pre-norm block: x [B, T, D] -> [B, T, D]."""

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], positions: Array, kept: KeyValues | None, train: bool) -> Any:
        """Add attention, then the MLP; with `kept`, return it too."""
        dtype = self.config.dtype
        attention = Attention(self.config, self.specs, name="self_attn")
        mixed, kept = attention(self.norm("input_layernorm")(x).astype(dtype), positions, kept)
        x = x + mixed
        x = x + MLP(self.config, self.specs, name="mlp")(self.norm("post_attention_layernorm")(x).astype(dtype))
        return x if kept is None else (x, kept)


class Llama(_Part):
    """The language model: tokens [B, T] -> logits [B, T, N] in float32.

    `specs` gives the linear layers their formats, `{"layers_0/mlp/up_proj": Spec(...)}`; all others are dense.
    """

    PREFIX = "layers"

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        train: bool = False,
        cache: Cache | None = None,
        positions: Int[Array, "B T"] | None = None,
        only: Int[Array, "B"] | None = None,
    ) -> Any:
        """Score the next token at every position; arguments and errors as of `gpt2.GPT2` (nothing drops out)."""
        config, length = self.config, tokens.shape[1]
        parts.check_length(length, config.context)
        places = jnp.arange(length)[None] if positions is None else positions
        drawn = nn.initializers.normal(parts.DEVIATION)
        embed = nn.Embed(config.vocab_size, config.width, embedding_init=drawn, name="embed_tokens")
        x, cache = self.blocks(Block, embed(tokens).astype(config.dtype), places, cache, train)
        x = self.norm("norm")(parts.at_rows(x, only)).astype(config.dtype)
        if config.tied:
            table = embed.embedding.astype(config.dtype)
            logits = jnp.einsum("BTD,ND->BTN", x, table, preferred_element_type=jnp.float32)
        else:
            logits = self.linear("lm_head", config.vocab_size, bias=False)(x).astype(jnp.float32)
        return logits if cache is None else (logits, cache)


def init(config: Config, key: Array, specs: Specs = ALL_DENSE) -> dict[str, Any]:
    """Draw the parameters of a model, as nested dicts."""
    return parts.init(Llama(config, specs), key, jnp.zeros((1, 1), jnp.int32))


def parameter_shapes(config: Config, specs: Specs = ALL_DENSE) -> dict[str, Any]:
    """Return the shapes of the parameters without computing them."""
    return parts.shapes(Llama(config, specs), jnp.zeros((1, 1), jnp.int32))
