"""ViT as users of PyTorch run it: `transformers.ViTForImageClassification`.

Shapes: B batch, S an image's height and width, C channels, T tokens, D width, K classes.
"""

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blrlab import compress
from blrlab.bench.nets.family import Family, Inputs, Model, Product, Running
from blrlab.models import hf, vit

if TYPE_CHECKING:
    from blrlab.bench.model_rows import Group

CHECKPOINTS = hf.FAMILIES["vit"]


@functools.cache
def linears(sizes: vit.Config) -> Mapping[str, tuple[int, int]]:
    """Return {path: (in_features, out_features)} of every linear layer; that of patches is a convolution."""
    return compress.linears(CHECKPOINTS.shapes(sizes))


def products(sizes: vit.Config, group: "Group") -> list[Product]:
    """Return the linear layers of one call; the classifier sees one token an image."""
    return [
        Product(path, *size, group.batch if path == "classifier" else group.rows)
        for path, size in linears(sizes).items()
    ]


def tokens(sizes: vit.Config) -> int:
    """Return T: the patches of an image, and one more."""
    return (sizes.image_size // sizes.patch) ** 2 + 1


def why_not(sizes: vit.Config, group: "Group") -> str | None:
    """Say in one sentence why a phase does not fit the model; None where it does."""
    own = tokens(sizes)
    return None if group.tokens == own else f"an image has {own} tokens here, not {group.tokens}: leave --tokens out"


def blank(sizes: vit.Config) -> Model:
    """Make the model of some sizes."""
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig.from_dict(CHECKPOINTS.written(sizes), attn_implementation="sdpa"))


def inputs(sizes: vit.Config, group: "Group", generator: torch.Generator) -> Inputs:
    """Draw images [B, C, S, S]."""
    shape = (group.batch, sizes.channels, sizes.image_size, sizes.image_size)
    return (torch.randn(shape, generator=generator, device=generator.device),)


def call(model: Model, phase: str, inputs: Inputs, states: bool) -> Callable[[], Tensor]:
    """Return a call on images: logits [B, 1, K], or with `states` what the last norm gives [B, T, D]."""
    (images,) = inputs

    def run() -> Tensor:
        return model.vit(images).last_hidden_state if states else model(images).logits[:, None]

    return run


FAMILY = Family(
    name="vit",
    sizes=vit.Config,
    nets={"vit_b": vit.Config()},
    phases=("forward",),
    linears=linears,
    products=products,
    tokens=tokens,
    sized=lambda sizes, tokens: sizes,
    why_not=why_not,
    running=Running("transformers", CHECKPOINTS, blank, "vit.layers", inputs, call, attention="attention", since=5),
    shows=True,
)
