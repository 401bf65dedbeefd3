"""Llama: the logits of transformers, dense and factored, its sizes, and what it refuses."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

from blrlab import compress
from blrlab.errors import InputError
from blrlab.factors import Spec
from blrlab.models import hf, llama
from blrlab.models.llama import Config, Llama, RopeScaling

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
KINDS = {
    "llama 2": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "llama 3": {"rope_parameters": SCALED, "tie_word_embeddings": True},
    "wide heads": {"head_dim": 10, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
}
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 40))


@functools.cache
def _torch_model(kind):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 spells rotary positions another way")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, **KINDS[kind], attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=list(KINDS))
def checkpoint(request, tmp_path):
    model = _torch_model(request.param)
    model.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama", model


def _torch_logits(model, tokens=TOKENS):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def _agree(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_logits_are_those_of_transformers(checkpoint):
    folder, model = checkpoint
    family, config = hf.describe(folder)
    params, specs = hf.load(folder, family, config)
    assert specs == {}
    wanted = _torch_logits(model)
    assert wanted.std() > 0.1
    _agree(family.model(config).apply({"params": params}, TOKENS), wanted)


def test_what_is_exported_is_read_by_transformers(checkpoint, tmp_path):
    import transformers

    folder, model = checkpoint
    family, config = hf.describe(folder)
    params, _ = hf.load(folder, family, config)
    hf.save(tmp_path / "again", family, config, params)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "again", attn_implementation="eager").eval()
    np.testing.assert_array_equal(_torch_logits(again), _torch_logits(model))


def test_llama_7b_and_1b_have_their_published_sizes():
    for config, count in ((Config(), 6_738_415_616), (llama.LLAMA_1B, 1_235_814_400)):
        assert sum(leaf.size for leaf in jax.tree.leaves(llama.parameter_shapes(config))) == count


def test_factored_layers_compute_what_their_products_do():
    config = Config(61, 64, 2, 4, 2, 24, 40)
    specs = {
        "layers_0/self_attn/q_proj": Spec("monarch", 24, 24, (2, 3), 4),
        "layers_0/self_attn/k_proj": Spec("low_rank", 24, 12, rank=5),
        "layers_1/mlp/gate_proj": Spec("blast", 24, 40, (3, 4), 6),
        "layers_1/mlp/down_proj": Spec("monarch", 40, 24, (4, 2), 3),
    }
    params = llama.init(config, jax.random.key(0), FrozenDict(specs))
    found = Llama(config, FrozenDict(specs)).apply({"params": params}, TOKENS)
    _agree(found, np.asarray(Llama(config).apply({"params": compress.expand(params)}, TOKENS)))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; this model has 'silu'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "scaled as 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "is damaged"),
        ({"num_key_value_heads": 3}, "3 heads of keys do not divide its 4 heads"),
        ({"hidden_size": "24"}, "hidden_size is '24', not a whole number"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_architecture(tmp_path, fields, said):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES, **fields}))
    with pytest.raises(InputError) as caught:
        hf.describe(tmp_path)
    assert said in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"heads": 5}, "2 heads of keys do not divide its 5 heads"),
        ({"width": 26}, "4 heads do not divide its width of 26"),
        ({"width": 12}, "rotary positions need an even one"),
        ({"inner": 0}, "inner is 0"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(changes, said):
    with pytest.raises(InputError, match=said):
        dataclasses.replace(Config(61, 64, 2, 4, 2, 24, 40), **{"head_width": 0, **changes})


def test_rotary_settings_that_cannot_be():
    with pytest.raises(InputError, match="cannot be scaled"):
        RopeScaling(factor=0.5)


def test_bfloat16_is_near_float32():
    config = Config(61, 64, 2, 4, 2, 24, 40)
    params = llama.init(config, jax.random.key(0))
    wide = np.asarray(Llama(config).apply({"params": params}, TOKENS))
    narrow = Llama(dataclasses.replace(config, dtype="bfloat16")).apply({"params": params}, TOKENS)
    assert narrow.dtype == jnp.float32
    assert 0 < np.abs(narrow - wide).max() < 0.05 * np.abs(wide).max()
