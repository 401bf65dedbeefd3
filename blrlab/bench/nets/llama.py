"""Llama as users of PyTorch run it: `transformers.LlamaForCausalLM`, its keys and values kept in place.

Shapes: B batch, T tokens, K heads of keys and values, d a head's width, D width, N vocabulary size.
"""

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from blrlab import compress
from blrlab.bench import kept
from blrlab.bench.nets import language
from blrlab.bench.nets.family import Family, Inputs, Model, Running
from blrlab.models import hf, llama

if TYPE_CHECKING:
    from blrlab.bench.model_rows import Group

CHECKPOINTS = hf.FAMILIES["llama"]


@functools.cache
def linears(sizes: llama.Config) -> Mapping[str, tuple[int, int]]:
    """Return {path: (in_features, out_features)} of every linear layer, the output layer too where it is not tied."""
    return compress.linears(CHECKPOINTS.shapes(sizes))


def blank(sizes: llama.Config) -> Model:
    """Make the model of some sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig.from_dict(CHECKPOINTS.written(sizes), attn_implementation="sdpa"))


def inputs(sizes: llama.Config, group: "Group", generator: torch.Generator) -> Inputs:
    """Draw ids [B, T]; those of a decode phase end with the new one."""
    shape = (group.batch, group.length)
    return (torch.randint(sizes.vocab_size, shape, generator=generator, device=generator.device),)


def call(model: Model, phase: str, inputs: Inputs, states: bool) -> Callable[[], Tensor]:
    """Return a call of one phase.

    Args:
      model: from `Running.skeleton`, with its weights.
      phase: prefill: all tokens, keys and values written to a cache. decode: the last token, the cache holding all
        before it; every call writes the same place again.
      inputs: ids [B, T].
      states: return what the last norm gives for the tokens of the phase, [B, T, D] or [B, 1, D], instead of the
        logits [B, 1, N] of the last token.
    """
    (ids,) = inputs
    config, length, layers = model.config, ids.shape[1], len(model.model.layers)
    shape = (ids.shape[0], config.num_key_value_heads, length, config.head_dim)
    stored = kept.storage(layers, shape, model.model.embed_tokens.weight)
    if phase == "prefill":
        return _run(model, ids, kept.cache(0, stored), states)
    _run(model, ids[:, :-1], kept.cache(0, stored), True)()
    return _run(model, ids[:, -1:].contiguous(), kept.cache(length - 1, stored), states)


def _run(model: Model, ids: Tensor, cache: Any, states: bool) -> Callable[[], Tensor]:
    def run() -> Tensor:
        if states:
            return model.model(ids, past_key_values=cache, use_cache=True).last_hidden_state
        return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    return run


def kept_elements(sizes: llama.Config, group: "Group") -> int:
    """Return the number of elements of all keys and values that a phase keeps."""
    return 2 * sizes.layers * group.batch * group.length * sizes.kv_heads * sizes.head_width


SHARING = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
FAMILY = Family(
    name="llama",
    sizes=llama.Config,
    nets={"llama7b": llama.Config(), "llama1b": llama.LLAMA_1B},
    phases=("prefill", "decode"),
    linears=linears,
    products=lambda sizes, group: language.products(linears(sizes), sizes, group),
    tokens=lambda sizes: language.tokens(sizes, "llama7b"),
    sized=lambda sizes, tokens: sizes,
    why_not=language.why_not,
    running=Running(
        "transformers",
        CHECKPOINTS,
        blank,
        "model.layers",
        inputs,
        call,
        kept=kept_elements,
        sharing=SHARING,
        aside=("lm_head",),
    ),
)
