"""DiT as users of PyTorch run it: `diffusers.DiTTransformer2DModel`, one step of denoising.

Every block of diffusers has embedders of times and labels; in published weights they are all the same, and here they
are one, as `blrlab_ops.nn.load_factored` makes them. Shapes: B batch, C and E channels in and out, h height and width
of the latents, p a patch's, T = (h / p)^2 tokens, D width.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import einops
import torch
from torch import Tensor

from blrlab import compress
from blrlab.bench.nets.family import Family, Inputs, Model, Product, Running
from blrlab.models import dit, hf

if TYPE_CHECKING:
    from blrlab.bench.model_rows import Group

CHECKPOINTS = hf.FAMILIES["DiTTransformer2DModel"]
TIMES = 1000  # steps of the noise
AN_IMAGE = ("adaln", "times/linear_1", "times/linear_2", "final/modulation")  # layers that see one row an image


@functools.cache
def linears(sizes: dit.Config) -> Mapping[str, tuple[int, int]]:
    """Return {path: (in_features, out_features)} of every linear layer; that of patches is a convolution."""
    return compress.linears(CHECKPOINTS.shapes(sizes))


def products(sizes: dit.Config, group: "Group") -> list[Product]:
    """Return the linear layers of one call; those that time and label go through see one row an image."""
    return [
        Product(path, *size, group.batch if path.endswith(AN_IMAGE) else group.rows)
        for path, size in linears(sizes).items()
    ]


def sized(sizes: dit.Config, tokens: int) -> dit.Config:
    """Return the sizes of a model whose latents have so many tokens, with the frequencies that diffusers has."""
    return dataclasses.replace(sizes, size=math.isqrt(tokens) * sizes.patch, frequency_shift=1)


def why_not(sizes: dit.Config, group: "Group") -> str | None:
    """Say in one sentence why a phase does not fit the model; None where it does."""
    if math.isqrt(group.tokens) ** 2 == group.tokens:
        return None
    return f"latents are square, and {group.tokens} tokens are not: give --tokens such as 256 or 16384"


def blank(sizes: dit.Config) -> Model:
    """Make the model of some sizes; its blocks share the embedders of times and labels."""
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    model: Any = DiTTransformer2DModel.from_config(CHECKPOINTS.written(sizes))
    embedder = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks:
        block.norm1.emb = embedder
    return model


def inputs(sizes: dit.Config, group: "Group", generator: torch.Generator) -> Inputs:
    """Draw latents [B, C, h, h], times [B] and labels [B]."""
    where, own = {"generator": generator, "device": generator.device}, sized(sizes, group.tokens)
    latents = torch.randn((group.batch, own.channels, own.size, own.size), **where)
    times = torch.randint(TIMES, (group.batch,), **where)
    return latents, times, torch.randint(own.classes, (group.batch,), **where)


def call(model: Model, phase: str, inputs: Inputs, states: bool) -> Callable[[], Tensor]:
    """Return a call on latents, times and labels: what it predicts of every patch of the latents, [B, T, p p E].

    A row is a patch, not one place of it: the gate holds each row's error against the row, and of the few channels of
    one place all may be near zero.
    """
    latents, times, labels = inputs
    patch = model.config["patch_size"]

    def run() -> Tensor:
        predicted = model(latents, times, labels).sample
        return einops.rearrange(predicted, "b e (h p) (w q) -> b (h w) (p q e)", p=patch, q=patch)

    return run


FAMILY = Family(
    name="dit",
    sizes=dit.Config,
    nets={"dit_xl": dit.Config()},
    phases=("forward",),
    linears=linears,
    products=products,
    tokens=lambda sizes: sizes.side**2,
    sized=sized,
    why_not=why_not,
    running=Running("diffusers", CHECKPOINTS, blank, "transformer_blocks", inputs, call, attention="attn1"),
)
