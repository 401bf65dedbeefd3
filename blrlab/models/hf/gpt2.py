"""GPT-2 as Hugging Face stores it: `transformer.h.0.attn.c_attn.weight` [i, o] is `h_0/attn/c_attn/kernel`."""

from typing import Any

import jax.numpy as jnp

from blrlab.errors import InputError
from blrlab.models import gpt2
from blrlab.models.hf.family import Family, Given, Source, agree, whole

_SETTINGS = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
    "add_cross_attention": False,
}
_BUFFERS = (".attn.bias", ".attn.masked_bias")
_LEAVES = {"scale": "weight", "embedding": "weight", "kernel": "weight"}


def _read(given: Given) -> gpt2.Config:
    agree(given, _SETTINGS)
    config = gpt2.Config(
        vocab_size=whole(given, "vocab_size"),
        context=whole(given, "n_positions"),
        layers=whole(given, "n_layer"),
        heads=whole(given, "n_head"),
        width=whole(given, "n_embd"),
    )
    if given.get("n_inner") not in (None, 4 * config.width):
        raise InputError(f"n_inner is {given['n_inner']}; this model has 4 n_embd = {4 * config.width}.")
    return config


def _written(config: gpt2.Config) -> dict[str, Any]:
    return {
        **_SETTINGS,
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.context,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_embd": config.width,
    }


def _source(path: str, config: gpt2.Config) -> Source:
    *places, leaf = path.split("/")
    places = ["transformer", *places]
    if places[1].startswith("h_"):
        places[1] = places[1].replace("h_", "h.")
    return Source((".".join((*places, _LEAVES.get(leaf, leaf))),))


def _known(name: str, config: gpt2.Config) -> str | None:
    """OpenAI's files have no `transformer.` in front, and hold causal masks; the output layer is the embedding."""
    if name.endswith(_BUFFERS) or name == "lm_head.weight":
        return None
    return name if name.startswith("transformer.") else f"transformer.{name}"


FAMILY = Family(
    name="gpt2",
    config=gpt2.Config,
    model=gpt2.GPT2,
    inputs=lambda config: (jnp.zeros((1, 1), jnp.int32),),
    read=_read,
    written=_written,
    source=_source,
    known=_known,
)
