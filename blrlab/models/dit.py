"""DiT in Flax Linen: a transformer over patches of latents, told the noise's time and the label by adaptive norms.

Source: Peebles and Xie, arXiv 2212.09748 (adaLN-Zero, section 3.2), and its released code for the details. Shapes:
B batch, h height and width of the latents, C and E channels in and out, p a patch's height and width, T = (h / p)^2
tokens, D width, H heads, d a head's width, F the MLP's width, N labels. Linear layers have the paths
`blocks_0/attn/qkv` [D, 3 D] (or `q`, `k`, `v` [D, D]), `blocks_0/attn/proj` [D, D], `blocks_0/mlp/fc1` [D, F],
`blocks_0/mlp/fc2` [F, D], `blocks_0/adaln` [D, 6 D], and around the blocks `times/linear_1` [256, D],
`times/linear_2` [D, D], `final/modulation` [D, 2 D], `final/linear` [D, p p E].
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int, Num

from blrlab.errors import InputError
from blrlab.models import parts
from blrlab.models.parts import ALL_DENSE, Part, Specs

EPSILON = 1e-6  # of all norms but the one that a config has
LONGEST = 1e4  # of the wavelengths of times and positions, over 2 pi
WAVES = 128  # cosines, and as many sines, that tell a time


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a DiT; the defaults are DiT-XL/2 for images of 256 x 256, 675 million parameters.

    Attributes:
      size: h.
      patch: p, dividing h.
      channels: C.
      out_channels: E, 2 C where the variance is learned too.
      classes: N; one more label, N itself, stands for none.
      layers: number of blocks.
      heads: H, dividing the width.
      width: D, a multiple of 4.
      inner: F.
      mlp_epsilon: of the norm before the MLP; 1e-6 in the paper's code, mostly 1e-5 in diffusers.
      frequency_shift: times have the frequencies 10000^(-j / (128 - shift)); 0 in the paper's code, 1 in diffusers.
      fused: q, k and v are one layer.
      dtype: of the computation; norms, modulation and softmax are computed in float32.
      remat: compute a block's activations again for the gradient, instead of keeping them.
      scan: one program for all blocks.

    Raises:
      InputError: a size is below 1, or the sizes do not fit together.
    """

    size: int = 32
    patch: int = 2
    channels: int = 4
    out_channels: int = 8
    classes: int = 1000
    layers: int = 28
    heads: int = 16
    width: int = 1152
    inner: int = 4608
    mlp_epsilon: float = EPSILON
    frequency_shift: int = 0
    fused: bool = True
    dtype: str = "float32"
    remat: bool = False
    scan: bool = False

    def __post_init__(self) -> None:
        parts.check_sizes(
            self, "size", "patch", "channels", "out_channels", "classes", "layers", "heads", "width", "inner"
        )
        if self.size % self.patch:
            raise InputError(f"the model's patch of {self.patch} does not divide its size of {self.size}.")
        if self.width % self.heads:
            raise InputError(f"the model's {self.heads} heads do not divide its width of {self.width}.")
        if self.width % 4:
            raise InputError(f"the model's width is {self.width}; its positions need a multiple of 4.")
        if self.frequency_shift not in (0, 1):
            raise InputError(f"the model's frequency_shift is {self.frequency_shift}; it must be 0 or 1.")

    @property
    def shape(self) -> tuple[int, int, int]:
        """The latents' height, width and channels."""
        return self.size, self.size, self.channels

    @property
    def side(self) -> int:
        """Patches in a row, h / p."""
        return self.size // self.patch


def positions(config: Config) -> Float[np.ndarray, "T D"]:
    """Return what is added to each patch: sines and cosines of its column, then of its row, in float32."""
    quarter = config.width // 4
    frequencies = LONGEST ** -(np.arange(quarter) / quarter)
    angles = np.arange(config.side)[:, None] * frequencies[None]
    told = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    rows, columns = np.divmod(np.arange(config.side**2), config.side)
    return np.concatenate([told[columns], told[rows]], axis=1).astype(np.float32)


def waves(times: Num[Array, "B"], shift: int) -> Float[Array, "B 256"]:
    """Return cosines and sines of times, in float32; `shift` is the config's `frequency_shift`."""
    frequencies = (LONGEST ** -(np.arange(WAVES) / (WAVES - shift))).astype(np.float32)
    angles = times.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)


def glorot(in_features: int, out_features: int) -> float:
    """Return the deviation of a fresh layer, that of Glorot and Bengio's draw."""
    return (2 / (in_features + out_features)) ** 0.5


class _Part(Part):
    config: Config

    def norm(self, x: Array, epsilon: float = EPSILON) -> Array:
        """Norm the tokens, without weights, in float32."""
        # E[x^2] - E[x]^2 would lose the variance of a token whose mean is large.
        layer = nn.LayerNorm(
            epsilon=epsilon, dtype=jnp.float32, use_bias=False, use_scale=False, use_fast_variance=False
        )
        return layer(x)

    def modulation(self, name: str, c: Float[Array, "B D"], count: int) -> list[Float[Array, "B 1 D"]]:
        """Return `count` shifts, scales or gates of the tokens, in float32; a fresh layer makes zeros."""
        made = self.linear(name, count * self.config.width, deviation=0.0)(jax.nn.silu(c))
        return jnp.split(made.astype(jnp.float32)[:, None], count, axis=-1)


class Times(_Part):
    """Two linear layers with a SiLU between: times [B] -> [B, D]."""

    @nn.compact
    def __call__(self, times: Num[Array, "B"]) -> Float[Array, "B D"]:
        """Embed every time by itself."""
        told = waves(times, self.config.frequency_shift).astype(self.config.dtype)
        hidden = jax.nn.silu(self.linear("linear_1", self.config.width)(told))
        return self.linear("linear_2", self.config.width)(hidden)


class Attention(_Part):
    """Self-attention: x [B, T, D] -> [B, T, D]."""

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Attend; each patch sees all."""
        width = self.config.width
        if self.config.fused:
            q, k, v = jnp.split(self.linear("qkv", 3 * width, glorot(width, 3 * width))(x), 3, axis=-1)
        else:
            q, k, v = (self.linear(name, width, glorot(width, width))(x) for name in "qkv")
        q, k, v = (rearrange(each, "B T (H d) -> B T H d", H=self.config.heads) for each in (q, k, v))
        mixed = jax.nn.dot_product_attention(q, k, v)
        return self.linear("proj", width, glorot(width, width))(rearrange(mixed, "B T H d -> B T (H d)"))


class MLP(_Part):
    """Two linear layers with a tanh-approximated GELU between: x [B, T, D] -> [B, T, D]."""

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Map every patch by itself."""
        deviation = glorot(self.config.width, self.config.inner)
        hidden = jax.nn.gelu(self.linear("fc1", self.config.inner, deviation)(x), approximate=True)
        return self.linear("fc2", self.config.width, deviation)(hidden)


class Block(_Part):
    """One block whose norms and gates the condition c [B, D] sets: x [B, T, D] -> [B, T, D]."""

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], c: Float[Array, "B D"], kept: None, train: bool) -> Any:
        """Add attention, then the MLP, each as much as its gate says."""
        dtype = self.config.dtype
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation("adaln", c, 6)
        seen = (self.norm(x) * (1 + scale) + shift).astype(dtype)
        mixed = Attention(self.config, self.specs, name="attn")(seen)
        x = x + (gate * mixed.astype(jnp.float32)).astype(dtype)
        seen = (self.norm(x, self.config.mlp_epsilon) * (1 + mlp_scale) + mlp_shift).astype(dtype)
        mapped = MLP(self.config, self.specs, name="mlp")(seen)
        return x + (mlp_gate * mapped.astype(jnp.float32)).astype(dtype)


class Final(_Part):
    """The last norm, which the condition c [B, D] sets, and layer: x [B, T, D] -> [B, T, p p E]."""

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], c: Float[Array, "B D"]) -> Float[Array, "B T o"]:
        """Map every patch by itself; a fresh layer makes zeros."""
        config = self.config
        shift, scale = self.modulation("modulation", c, 2)
        seen = (self.norm(x) * (1 + scale) + shift).astype(config.dtype)
        return self.linear("linear", config.patch**2 * config.out_channels, deviation=0.0)(seen)


class DiT(_Part):
    """The denoiser: latents [B, h, h, C], times [B] and labels [B] -> [B, h, h, E] in float32.

    The first C channels are the noise; where E = 2 C the others tell its variance. `specs` gives the linear layers
    their formats, `{"blocks_0/attn/qkv": Spec(...)}`; all others are dense.
    """

    PREFIX = "blocks"

    @nn.compact
    def __call__(
        self, latents: Float[Array, "B h h C"], times: Num[Array, "B"], labels: Int[Array, "B"], train: bool = False
    ) -> Float[Array, "B h h E"]:
        """Tell the noise in the latents.

        Args:
          latents: channels last.
          times: steps of the noise, from 0.
          labels: of the images; `config.classes` stands for none, and dropping labels is the caller's.
          train: changes nothing, since nothing drops out.

        Raises:
          InputError: the latents are of another size than the model's.
        """
        config = self.config
        _check_latents(latents.shape, config)
        c = self._condition(times, labels)
        x = self._patches(latents) + positions(config)[None]
        x, _ = self.blocks(Block, x.astype(config.dtype), c, None, train)
        x = Final(config, self.specs, name="final")(x, c).astype(jnp.float32)
        return rearrange(
            x, "B (row column) (p q E) -> B (row p) (column q) E", row=config.side, p=config.patch, q=config.patch
        )

    def _condition(self, times: Array, labels: Array) -> Float[Array, "B D"]:
        """Add what tells the time and what tells the label, in float32."""
        drawn = nn.initializers.normal(parts.DEVIATION)
        embed = nn.Embed(self.config.classes + 1, self.config.width, embedding_init=drawn, name="labels")
        told = Times(self.config, self.specs, name="times")(times)
        return told.astype(jnp.float32) + embed(labels)

    def _patches(self, latents: Array) -> Float[Array, "B T D"]:
        """Map every patch by itself, in float32."""
        config, window = self.config, (self.config.patch, self.config.patch)
        drawn = nn.initializers.normal(glorot(config.patch**2 * config.channels, config.width))
        layer = nn.Conv(config.width, window, window, "VALID", dtype=config.dtype, kernel_init=drawn, name="patch")
        return rearrange(layer(latents), "B row column D -> B (row column) D").astype(jnp.float32)


def _check_latents(shape: tuple[int, ...], config: Config) -> None:
    """Check that latents [B, h, h, C] are of a model's size."""
    if shape[1:] != config.shape:
        found, wanted = (" x ".join(map(str, size)) for size in (shape[1:], config.shape))
        raise InputError(f"latents are {found}, but the model sees {wanted} (height, width, channels).")


def inputs(config: Config) -> tuple[Array, Array, Array]:
    """Return arguments of the model for one image, all zeros."""
    return jnp.zeros((1, *config.shape)), jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32)


def init(config: Config, key: Array, specs: Specs = ALL_DENSE) -> dict[str, Any]:
    """Draw the parameters of a model, as nested dicts."""
    return parts.init(DiT(config, specs), key, *inputs(config))


def parameter_shapes(config: Config, specs: Specs = ALL_DENSE) -> dict[str, Any]:
    """Return the shapes of the parameters without computing them."""
    return parts.shapes(DiT(config, specs), *inputs(config))
