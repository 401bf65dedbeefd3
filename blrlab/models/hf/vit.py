"""ViT as Hugging Face stores it: `vit.encoder.layer.0.intermediate.dense.weight` [o, i] is `layer_0/fc1/kernel`.

Queries, keys and values are three tensors there; with `fused`, as by default, they are one layer here.
"""

import re
from typing import Any

import jax.numpy as jnp

from blrlab.errors import InputError
from blrlab.models import vit
from blrlab.models.hf.family import LINEAR, Family, Given, Source, agree, number, whole

_SETTINGS = {"model_type": "vit", "hidden_act": "gelu", "qkv_bias": True}
_CONV = (2, 3, 1, 0)  # torch.nn.Conv2d keeps [P, P, C, D] as [D, C, P, P]
_QKV = tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))
_TOKENS = {"cls": "vit.embeddings.cls_token", "positions": "vit.embeddings.position_embeddings"}
_ENDS = {"patch": "vit.embeddings.patch_embeddings.projection", "layernorm": "vit.layernorm"}
_LAYERS = {
    "attention/qkv": _QKV,
    **{f"attention/{name.rpartition('.')[2]}": (name,) for name in _QKV},
    "attention/output": ("attention.output.dense",),
    "fc1": ("intermediate.dense",),
    "fc2": ("output.dense",),
}
_LEAVES = {"scale": "weight", "kernel": "weight"}
# transformers 5 has other names in memory, which it writes only where it is asked to.
_IN_MEMORY = {
    **{f"attention.{short}_proj": name for short, name in zip("qkv", _QKV, strict=True)},
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def _read(given: Given) -> vit.Config:
    agree(given, _SETTINGS)
    config = vit.Config(
        image_size=_square(given, "image_size"),
        patch=_square(given, "patch_size"),
        channels=whole(given, "num_channels", 3),
        classes=_classes(given),
        layers=whole(given, "num_hidden_layers"),
        heads=whole(given, "num_attention_heads"),
        width=whole(given, "hidden_size"),
        inner=whole(given, "intermediate_size"),
        dropout=number(given, "hidden_dropout_prob", 0.0),
        epsilon=number(given, "layer_norm_eps", 1e-12),
    )
    agree(given, {"head_dim": config.width // config.heads})
    return config


def _square(given: Given, name: str) -> int:
    """Return a height that is the width too; both may be given."""
    value = given[name]
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        return whole({name: value[0]}, name)
    if isinstance(value, list):
        raise InputError(f"{name} is {value!r}; this model has the same height and width.")
    return whole(given, name)


def _classes(given: Given) -> int:
    """Return the number of classes, which a file may leave out where it is 2, as transformers does."""
    if given.get("architectures") == ["ViTModel"]:
        return 0
    labels = given.get("id2label")
    return whole(given, "num_labels", 2) if labels is None else len(dict(labels))


def _written(config: vit.Config) -> dict[str, Any]:
    labels = {str(index): f"LABEL_{index}" for index in range(config.classes)}
    return {
        **_SETTINGS,
        "architectures": ["ViTForImageClassification"],
        "image_size": config.image_size,
        "patch_size": config.patch,
        "num_channels": config.channels,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "hidden_size": config.width,
        "intermediate_size": config.inner,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": config.epsilon,
        "id2label": labels,
        "label2id": {label: int(index) for index, label in labels.items()},
    }


def _source(path: str, config: vit.Config) -> Source:
    if path in _TOKENS:
        return Source((_TOKENS[path],))
    layer, _, leaf = path.rpartition("/")
    block, _, place = layer.partition("/")
    names = (_ENDS.get(layer, layer),)
    if place:
        start = block.replace("layer_", "vit.encoder.layer.")
        names = tuple(f"{start}.{name}" for name in _LAYERS.get(place, (place,)))
    axes = _CONV if layer == "patch" else LINEAR
    return Source(tuple(f"{name}.{_LEAVES.get(leaf, leaf)}" for name in names), axes if leaf == "kernel" else ())


def _known(name: str, config: vit.Config) -> str | None:
    """A bare ViTModel has no `vit.` in front; a pooler is of no use to a classifier, nor a classifier to a feature."""
    if name.startswith("classifier."):
        return name if config.classes else None
    name = name if name.startswith("vit.") else f"vit.{name}"
    if name.startswith("vit.pooler."):
        return None
    layer = re.fullmatch(r"vit\.layers\.(\d+)\.(.+)\.(\w+)", name)
    if layer is None:
        return name
    index, place, leaf = layer.groups()
    return f"vit.encoder.layer.{index}.{_IN_MEMORY.get(place, place)}.{leaf}"


FAMILY = Family(
    name="vit",
    config=vit.Config,
    model=vit.ViT,
    inputs=lambda config: (jnp.zeros((1, *config.shape)),),
    read=_read,
    written=_written,
    source=_source,
    known=_known,
)
