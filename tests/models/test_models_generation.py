"""Generation: the tokens of transformers, prompts of different lengths, draws, and what cannot be generated."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

from blrlab.errors import InputError
from blrlab.factors import Spec
from blrlab.models import generation, gpt2, hf, llama
from blrlab.models.generation import choose, generate

GPT2 = gpt2.GPT2(gpt2.Config(61, 32, 2, 3, 24, dropout=0.0))
LLAMA = llama.Llama(llama.Config(61, 32, 2, 4, 2, 24, 40))
FACTORED = llama.Llama(
    LLAMA.config,
    FrozenDict(
        {
            "layers_0/self_attn/k_proj": Spec("monarch", 24, 12, (2, 3), 3),
            "layers_1/mlp/down_proj": Spec("blast", 40, 24, (4, 3), 6),
        }
    ),
)
MODELS = {"gpt2": GPT2, "llama": LLAMA, "factored llama": FACTORED}
PROMPTS = np.random.default_rng(0).integers(0, 61, (3, 7))


@functools.cache
def _params(name):
    """Draw parameters large enough that the likeliest token is no matter of rounding."""
    model = MODELS[name]
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    random = np.random.default_rng(1)

    def draw(path, leaf):
        middle, scale = {"scale": (1, 0.1), "bias": (0, 0.02)}.get(path[-1].key, (0, 0.3))
        return jnp.asarray(middle + random.normal(size=leaf.shape, scale=scale), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def _likeliest(name, prompt, steps):
    """Continue one prompt greedily, computing everything anew for every token."""
    tokens = list(prompt)
    run = jax.jit(MODELS[name].apply)
    for _ in range(steps):
        padded = np.zeros((1, 32), int)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(run({"params": _params(name)}, padded)[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", list(MODELS))
def test_what_is_kept_changes_nothing(name):
    found = generate(MODELS[name], _params(name), jnp.asarray(PROMPTS), 9)
    wanted = [_likeliest(name, prompt, 9) for prompt in PROMPTS]
    assert found.tolist() == wanted
    assert len({tuple(row) for row in wanted}) == 3


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_prompts_of_different_lengths_do_not_see_the_filler(name):
    lengths = [7, 3, 5]
    found = generate(MODELS[name], _params(name), jnp.asarray(PROMPTS), 6, lengths=jnp.asarray(lengths))
    wanted = [_likeliest(name, prompt[:length], 6) for prompt, length in zip(PROMPTS, lengths, strict=True)]
    assert found.tolist() == wanted


def test_scan_generates_the_same():
    scanned = llama.Llama(dataclasses.replace(LLAMA.config, scan=True))
    found = generate(scanned, _params("llama"), jnp.asarray(PROMPTS), 6)
    assert found.tolist() == generate(LLAMA, _params("llama"), jnp.asarray(PROMPTS), 6).tolist()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_tokens_are_those_of_transformers(name, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    family = hf.FAMILIES[name]
    hf.save(tmp_path / name, family, MODELS[name].config, _params(name))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = model.generation_config.bos_token_id = None
    with torch.no_grad():
        wanted = model.generate(
            torch.from_numpy(PROMPTS), max_new_tokens=12, do_sample=False, pad_token_id=0, use_cache=True
        )
    found = generate(MODELS[name], _params(name), jnp.asarray(PROMPTS), 12)
    assert found.tolist() == wanted[:, 7:].tolist()


def test_a_row_ends_at_the_stop_token():
    free = generate(LLAMA, _params("llama"), jnp.asarray(PROMPTS), 9).tolist()
    stop = free[0][3]
    found = generate(LLAMA, _params("llama"), jnp.asarray(PROMPTS), 9, stop=stop).tolist()
    for row, wanted in zip(found, free, strict=True):
        end = wanted.index(stop) + 1 if stop in wanted else 9
        assert row == wanted[:end] + [stop] * (9 - end)


def test_draws_follow_the_seed_and_the_temperature():
    run = functools.partial(generate, LLAMA, _params("llama"), jnp.asarray(PROMPTS), 8)
    greedy = run().tolist()
    one, again, other = (run(key=jax.random.key(seed), temperature=3.0).tolist() for seed in (0, 0, 1))
    assert one == again
    assert one != other
    assert run(key=jax.random.key(0), temperature=1e-4).tolist() == greedy
    assert run(key=jax.random.key(0), temperature=3.0, top_p=1e-6).tolist() == greedy


def test_draws_come_as_often_as_their_logits_say():
    shares = np.array([0.5, 0.25, 0.15, 0.1])
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(shares))[None], (4000, 4))
    drawn = np.bincount(np.asarray(choose(logits, jax.random.key(0))), minlength=4) / 4000
    np.testing.assert_allclose(drawn, shares, atol=0.03)
    cooled = np.bincount(np.asarray(choose(logits, jax.random.key(0), temperature=0.5)), minlength=4) / 4000
    np.testing.assert_allclose(cooled, shares**2 / (shares**2).sum(), atol=0.03)
    # The two likeliest have 0.75; the third is needed to have 0.8.
    nucleus = np.bincount(np.asarray(choose(logits, jax.random.key(0), top_p=0.8)), minlength=4) / 4000
    np.testing.assert_allclose(nucleus, [*(shares[:3] / 0.9), 0], atol=0.03)


def test_room_is_made_for_the_heads_of_keys():
    cache = generation.empty_cache(LLAMA.config, 3, 10)
    assert [layer.keys.shape for layer in cache] == [(3, 10, 2, 6)] * 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": 26}, "a prompt of 7 tokens and 26 more are longer than the model's context of 32"),
        ({"steps": 0}, "0 tokens cannot be generated"),
        ({"tokens": jnp.zeros((1, 0), int)}, "there is no prompt"),
        ({"temperature": -1.0}, "a temperature of -1.0"),
        ({"top_p": 0.0}, "a top_p of 0.0"),
        ({"lengths": jnp.array([1, 0, 2])}, "lengths from 0 to 2, their rows 7"),
        ({"lengths": jnp.array([1, 8, 2])}, "lengths from 1 to 8, their rows 7"),
    ],
    ids=str,
)
def test_what_cannot_be_generated(given, said):
    arguments = {"tokens": jnp.asarray(PROMPTS), "steps": 4, **given}
    with pytest.raises(InputError, match=said):
        generate(LLAMA, _params("llama"), **arguments)
