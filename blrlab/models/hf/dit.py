"""DiT as diffusers and as its authors store it: `blocks.0.mlp.fc1.weight` [o, i] is `blocks_0/mlp/fc1/kernel`.

diffusers gives every block the embedders of times and labels, which the authors and this model have once: those of
the other blocks are copies of `transformer_blocks.0.norm1.emb`.
The authors' checkpoints have no `config.json`; the one that stands for it has the names of their code's arguments.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from blrlab.errors import InputError
from blrlab.models import dit
from blrlab.models.hf.family import LINEAR, Family, Given, Source, agree, number, whole

_CONV = (2, 3, 1, 0)  # torch.nn.Conv2d keeps [p, p, C, D] as [D, C, p, p]

_CLASS = "DiTTransformer2DModel"
_SETTINGS = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "upcast_attention": False,
    "dropout": 0.0,
}
_OLDER = {  # what a config.json of the older class means where it says nothing
    "norm_type": "layer_norm",
    "activation_fn": "geglu",
    "attention_bias": False,
    "norm_elementwise_affine": True,
}
_EMBEDDER = "transformer_blocks.0.norm1.emb."
_LAYERS = {  # of a block, and of the rest
    "attn/qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn/q": ("attn1.to_q",),
    "attn/k": ("attn1.to_k",),
    "attn/v": ("attn1.to_v",),
    "attn/proj": ("attn1.to_out.0",),
    "mlp/fc1": ("ff.net.0.proj",),
    "mlp/fc2": ("ff.net.2",),
    "adaln": ("norm1.linear",),
    "patch": ("pos_embed.proj",),
    "times/linear_1": (_EMBEDDER + "timestep_embedder.linear_1",),
    "times/linear_2": (_EMBEDDER + "timestep_embedder.linear_2",),
    "labels": (_EMBEDDER + "class_embedder.embedding_table",),
    "final/modulation": ("proj_out_1",),
    "final/linear": ("proj_out_2",),
}

_ORIGINAL = "dit_original"
_ORIGINAL_LAYERS = {
    "attn/qkv": ("attn.qkv",),
    "attn/proj": ("attn.proj",),
    "mlp/fc1": ("mlp.fc1",),
    "mlp/fc2": ("mlp.fc2",),
    "adaln": ("adaLN_modulation.1",),
    "patch": ("x_embedder.proj",),
    "times/linear_1": ("t_embedder.mlp.0",),
    "times/linear_2": ("t_embedder.mlp.2",),
    "labels": ("y_embedder.embedding_table",),
    "final/modulation": ("final_layer.adaLN_modulation.1",),
    "final/linear": ("final_layer.linear",),
}


def _lies(path: str, layers: Mapping[str, tuple[str, ...]], blocks: str) -> Source:
    """Return where a parameter lies, by what a block's layers and the others are called."""
    layer, _, leaf = path.rpartition("/")
    block, _, own = layer.partition("/")
    if block.startswith("blocks_"):
        before, names = f"{blocks}.{block.removeprefix('blocks_')}.", layers[own]
    else:
        before, names = "", layers[layer]
    ending = "bias" if leaf == "bias" else "weight"
    axes = () if leaf != "kernel" else _CONV if layer == "patch" else LINEAR
    return Source(tuple(f"{before}{name}.{ending}" for name in names), axes)


def _read(given: Given) -> dit.Config:
    agree(given, _SETTINGS)
    heads = whole(given, "num_attention_heads")
    width = heads * whole(given, "attention_head_dim")
    channels = whole(given, "in_channels")
    return dit.Config(
        size=whole(given, "sample_size"),
        patch=whole(given, "patch_size"),
        channels=channels,
        out_channels=whole(given, "out_channels", channels),
        classes=whole(given, "num_embeds_ada_norm"),
        layers=whole(given, "num_layers"),
        heads=heads,
        width=width,
        inner=4 * width,
        mlp_epsilon=number(given, "norm_eps", 1e-5),
        frequency_shift=1,
    )


def _written(config: dit.Config) -> dict[str, Any]:
    """Say the sizes as diffusers does.

    Raises:
      InputError: diffusers would compute something else.
    """
    for name, wanted in (("inner", 4 * config.width), ("frequency_shift", 1)):
        if getattr(config, name) != wanted:
            raise InputError(f"the model's {name} is {getattr(config, name)}; in diffusers it is always {wanted}.")
    return {
        "_class_name": _CLASS,
        **_SETTINGS,
        "sample_size": config.size,
        "patch_size": config.patch,
        "in_channels": config.channels,
        "out_channels": config.out_channels,
        "num_embeds_ada_norm": config.classes,
        "num_layers": config.layers,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "norm_eps": config.mlp_epsilon,
    }


def _source(path: str, config: dit.Config) -> Source:
    source = _lies(path, _LAYERS, "transformer_blocks")
    name = source.names[0]
    if not name.startswith(_EMBEDDER):
        return source
    others = (_EMBEDDER.replace("0", str(index)) for index in range(1, config.layers))
    return dataclasses.replace(source, copies=tuple(name.replace(_EMBEDDER, other) for other in others))


def _read_original(given: Given) -> dit.Config:
    channels, width = whole(given, "in_channels"), whole(given, "hidden_size")
    return dit.Config(
        size=whole(given, "input_size"),
        patch=whole(given, "patch_size"),
        channels=channels,
        out_channels=whole(given, "out_channels", 2 * channels),
        classes=whole(given, "num_classes"),
        layers=whole(given, "depth"),
        heads=whole(given, "num_heads"),
        width=width,
        inner=whole(given, "intermediate_size", 4 * width),
        mlp_epsilon=number(given, "norm_eps", dit.EPSILON),
        frequency_shift=whole(given, "frequency_shift", 0),
    )


def _written_original(config: dit.Config) -> dict[str, Any]:
    """Say the sizes as the authors' code does, and beside them what it has in one way only."""
    _check_fused(config)
    return {
        "model_type": _ORIGINAL,
        "input_size": config.size,
        "patch_size": config.patch,
        "in_channels": config.channels,
        "out_channels": config.out_channels,
        "num_classes": config.classes,
        "depth": config.layers,
        "num_heads": config.heads,
        "hidden_size": config.width,
        "intermediate_size": config.inner,
        "norm_eps": config.mlp_epsilon,
        "frequency_shift": config.frequency_shift,
    }


def _source_original(path: str, config: dit.Config) -> Source:
    _check_fused(config)
    return _lies(path, _ORIGINAL_LAYERS, "blocks")


def _check_fused(config: dit.Config) -> None:
    if not config.fused:
        raise InputError(f"{_ORIGINAL} keeps q, k and v in one tensor, which is not split: take fused=True.")


FAMILY = Family(
    name=_CLASS,
    config=dit.Config,
    model=dit.DiT,
    inputs=dit.inputs,
    read=_read,
    written=_written,
    source=_source,
    known=lambda name, config: None if name == "pos_embed.pos_embed" else name,
    stem="diffusion_pytorch_model",
)
# The class that DiT has in older releases of diffusers; other models have it too.
OLDER = dataclasses.replace(FAMILY, name="Transformer2DModel", read=lambda given: _read({**_OLDER, **given}))
ORIGINAL = Family(
    name=_ORIGINAL,
    config=dit.Config,
    model=dit.DiT,
    inputs=dit.inputs,
    read=_read_original,
    written=_written_original,
    source=_source_original,
    known=lambda name, config: None if name == "pos_embed" else name,
)
