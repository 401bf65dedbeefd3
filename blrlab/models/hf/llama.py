"""Llama as Hugging Face stores it: `model.layers.0.mlp.up_proj.weight` [o, i] is `layers_0/mlp/up_proj/kernel`."""

from typing import Any

import jax.numpy as jnp

from blrlab.errors import InputError
from blrlab.models import llama
from blrlab.models.hf.family import LINEAR, Family, Given, Source, agree, number, whole

_SETTINGS = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
_HEAD = "lm_head.weight"


def _read(given: Given) -> llama.Config:
    agree(given, _SETTINGS)
    # transformers 5 keeps what is about positions in one table, 4 beside the other settings.
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    heads = whole(given, "num_attention_heads")
    return llama.Config(
        vocab_size=whole(given, "vocab_size"),
        context=whole(given, "max_position_embeddings", 2048),
        layers=whole(given, "num_hidden_layers"),
        heads=heads,
        kv_heads=whole(given, "num_key_value_heads", heads),
        width=whole(given, "hidden_size"),
        inner=whole(given, "intermediate_size"),
        head_width=whole(given, "head_dim", 0),
        rope_theta=number({**given, **rope}, "rope_theta", 1e4),
        rope_scaling=_scaling(rope),
        epsilon=number(given, "rms_norm_eps", 1e-6),
        tied=bool(given.get("tie_word_embeddings", False)),
    )


def _scaling(rope: Given) -> llama.RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise InputError(f"its rotary positions are scaled as {kind!r}; this model knows llama3.")
    return llama.RopeScaling(
        factor=number(rope, "factor"),
        low=number(rope, "low_freq_factor"),
        high=number(rope, "high_freq_factor"),
        context=whole(rope, "original_max_position_embeddings"),
    )


def _written(config: llama.Config) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.context,
        }
    return {
        **_SETTINGS,
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "hidden_size": config.width,
        "intermediate_size": config.inner,
        "head_dim": config.head_width,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling else None,  # as transformers 4 reads it
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "rms_norm_eps": config.epsilon,
        "tie_word_embeddings": config.tied,
    }


def _source(path: str, config: llama.Config) -> Source:
    if path == "lm_head/kernel":
        return Source((_HEAD,), LINEAR)
    *places, leaf = path.split("/")
    if places[0].startswith("layers_"):
        places[0] = places[0].replace("layers_", "layers.")
    return Source((".".join(("model", *places, "weight")),), LINEAR if leaf == "kernel" else ())


def _known(name: str, config: llama.Config) -> str | None:
    """A tied output layer is the embedding; older files hold rotary frequencies."""
    if name.endswith(".rotary_emb.inv_freq") or (name == _HEAD and config.tied):
        return None
    return name


FAMILY = Family(
    name="llama",
    config=llama.Config,
    model=llama.Llama,
    inputs=lambda config: (jnp.zeros((1, 1), jnp.int32),),
    read=_read,
    written=_written,
    source=_source,
    known=_known,
)
