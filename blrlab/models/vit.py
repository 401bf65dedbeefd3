"""A Vision Transformer in Flax Linen: patches of an image through pre-norm blocks, then a class.

Source: Dosovitskiy et al., arXiv 2010.11929, with the sizes of the checkpoints on Hugging Face. Shapes: B batch, S an
image's height and width, C channels, P a patch's height and width, N = (S / P)^2 patches, T = N + 1 tokens, D width,
H heads, d a head's width, F the MLP's width, K classes. Linear layers have the paths `layer_0/attention/qkv` [D, 3 D]
(or `layer_0/attention/{query,key,value}` [D, D]), `layer_0/attention/output` [D, D], `layer_0/fc1` [D, F],
`layer_0/fc2` [F, D] and `classifier` [D, K].
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from blrlab.errors import InputError
from blrlab.models import parts
from blrlab.models.parts import ALL_DENSE, Part, Specs


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a Vision Transformer; the defaults are ViT-B/16, 87 million parameters.

    Attributes:
      image_size: S.
      patch: P, dividing S.
      channels: C.
      classes: K; 0: no classifier, the model returns the feature it would see.
      layers: number of blocks.
      heads: H, dividing the width.
      width: D.
      inner: F.
      dropout: share of activations dropped while training, after the embeddings and every residual branch.
      fused: whether queries, keys and values are one layer, `qkv`, or three.
      epsilon: of the norms.
      dtype: of the computation; parameters are float32, norms and softmax are computed in float32.
      remat: compute a block's activations again for the gradient, instead of keeping them.
      scan: one program for all blocks.

    Raises:
      InputError: a size is below 1, or the sizes do not fit together.
    """

    image_size: int = 224
    patch: int = 16
    channels: int = 3
    classes: int = 1000
    layers: int = 12
    heads: int = 12
    width: int = 768
    inner: int = 3072
    dropout: float = 0.0
    fused: bool = True
    epsilon: float = 1e-12
    dtype: str = "float32"
    remat: bool = False
    scan: bool = False

    def __post_init__(self) -> None:
        parts.check_sizes(self, "image_size", "patch", "channels", "layers", "heads", "width", "inner")
        if self.classes < 0:
            raise InputError(f"the model's classes is {self.classes}; it must be at least 0.")
        if self.image_size % self.patch:
            raise InputError(f"the model's patch of {self.patch} does not divide its image_size of {self.image_size}.")
        if self.width % self.heads:
            raise InputError(f"the model's {self.heads} heads do not divide its width of {self.width}.")
        if not 0 <= self.dropout < 1:
            raise InputError(f"the model's dropout is {self.dropout}; it must be at least 0 and below 1.")

    @property
    def shape(self) -> tuple[int, int, int]:
        """An image's height, width and channels."""
        return self.image_size, self.image_size, self.channels

    @property
    def patches(self) -> int:
        """N."""
        return (self.image_size // self.patch) ** 2


class _Part(Part):
    config: Config

    def norm(self, name: str) -> nn.LayerNorm:
        """Make a layer norm, computed in float32."""
        # E[x^2] - E[x]^2 would lose the variance of a token whose mean is large, and epsilon does not hide it.
        return nn.LayerNorm(epsilon=self.config.epsilon, dtype=jnp.float32, use_fast_variance=False, name=name)

    def dropout(self, x: Array, train: bool) -> Array:
        """Drop activations while training."""
        return nn.Dropout(self.config.dropout, deterministic=not train)(x)


class Attention(_Part):
    """Self-attention: x [B, T, D] -> [B, T, D]."""

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], train: bool = False) -> Float[Array, "B T D"]:
        """Attend; each position sees all."""
        config = self.config
        if config.fused:
            layers = jnp.split(self.linear("qkv", 3 * config.width)(x), 3, axis=-1)
        else:
            layers = [self.linear(name, config.width)(x) for name in ("query", "key", "value")]
        q, k, v = (rearrange(layer, "B T (H d) -> B T H d", H=config.heads) for layer in layers)
        mixed = rearrange(jax.nn.dot_product_attention(q, k, v), "B T H d -> B T (H d)")
        return self.dropout(self.linear("output", config.width)(mixed), train)


class Block(_Part):
    """One pre-norm block: x [B, T, D] -> [B, T, D]."""

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], shared: None, kept: None, train: bool) -> Float[Array, "B T D"]:
        """Add attention, then two linear layers with a GELU between; `shared` and `kept` are not used."""
        config = self.config
        attention = Attention(config, self.specs, name="attention")
        x = x + attention(self.norm("layernorm_before")(x).astype(config.dtype), train)
        hidden = self.linear("fc1", config.inner)(self.norm("layernorm_after")(x).astype(config.dtype))
        hidden = jax.nn.gelu(hidden, approximate=False)
        return x + self.dropout(self.linear("fc2", config.width)(hidden), train)


class ViT(_Part):
    """The classifier: images [B, S, S, C] -> logits [B, K] in float32, or [B, D] where there are no classes.

    `specs` gives the linear layers their formats, `{"layer_0/fc1": Spec(...)}`; all others are dense.
    Training with dropout needs `rngs={"dropout": key}`.
    """

    PREFIX = "layer"

    @nn.compact
    def __call__(self, images: Float[Array, "B S S C"], train: bool = False) -> Float[Array, "B K"]:
        """Score the classes of every image.

        Args:
          images: pixels, in the range that the weights were trained on.
          train: whether activations drop out.

        Raises:
          InputError: the images are of another size than the config's.
        """
        config = self.config
        _check_images(images.shape, config)
        x, _ = self.blocks(Block, self._embedded(images, train), train=train)
        feature = self.norm("layernorm")(x[:, 0])
        if not config.classes:
            return feature
        return self.linear("classifier", config.classes)(feature.astype(config.dtype)).astype(jnp.float32)

    def _embedded(self, images: Float[Array, "B S S C"], train: bool) -> Float[Array, "B T D"]:
        config, size = self.config, (self.config.patch, self.config.patch)
        drawn = nn.initializers.normal(parts.DEVIATION)
        patch = nn.Conv(config.width, size, size, "VALID", dtype=config.dtype, kernel_init=drawn, name="patch")
        cls = self.param("cls", drawn, (1, 1, config.width))
        positions = self.param("positions", drawn, (1, config.patches + 1, config.width))
        x = rearrange(patch(images), "B rows columns D -> B (rows columns) D").astype(jnp.float32)
        x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, config.width)), x], axis=1) + positions
        return self.dropout(x.astype(config.dtype), train)


def _check_images(shape: tuple[int, ...], config: Config) -> None:
    """Check that images [B, S, S, C] are of a model's size."""
    if shape[1:] != config.shape:
        found, wanted = (" x ".join(map(str, size)) for size in (shape[1:], config.shape))
        raise InputError(f"images are {found}, but the model sees {wanted} (height, width, channels).")


def init(config: Config, key: Array, specs: Specs = ALL_DENSE) -> dict[str, Any]:
    """Draw the parameters of a model, as nested dicts."""
    return parts.init(ViT(config, specs), key, jnp.zeros((1, *config.shape)))


def parameter_shapes(config: Config, specs: Specs = ALL_DENSE) -> dict[str, Any]:
    """Return the shapes of the parameters without computing them."""
    return parts.shapes(ViT(config, specs), jnp.zeros((1, *config.shape)))
