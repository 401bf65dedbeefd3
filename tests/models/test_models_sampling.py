"""Samplers: step by step those of diffusers on the same noise, whole loops, and guidance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blrlab.errors import InputError
from blrlab.models import dit, sampling
from blrlab.models import noise as noises
from blrlab.models.dit import Config, DiT
from blrlab.models.noise import Schedule

SCHEDULE = Schedule(10, 1e-3, 0.3)
SIZES = Config(4, 2, 2, 4, 3, 1, 2, 8, 16)
LABELS = jnp.array([0, 2, 3])
KEY = jax.random.key(3)


@functools.cache
def model(config=SIZES):
    """A model whose every part matters: none of its layers is zero."""
    random = np.random.default_rng(1)
    shapes = dit.parameter_shapes(config)
    return DiT(config), jax.tree.map(lambda leaf: random.normal(size=leaf.shape, scale=0.3).astype("f"), shapes)


def outputs(x, time, labels=LABELS, config=SIZES):
    made, params = model(config)
    return np.asarray(made.apply({"params": params}, jnp.asarray(x, "f"), jnp.full(len(x), time), labels))


@functools.cache
def scheduler(sampler, count, clip):
    """The scheduler of diffusers with our times, in float64."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    settings = {"num_train_timesteps": 10, "beta_start": 1e-3, "beta_end": 0.3, "clip_sample": clip}
    if sampler == "ddpm":
        made = diffusers.DDPMScheduler(variance_type="learned_range", **settings)
        made.set_timesteps(timesteps=list(noises.spread(SCHEDULE, count))[::-1])
    else:
        made = diffusers.DDIMScheduler(**settings)
        made.set_timesteps({10: 10, 4: 3}[count])  # it goes 10 // 3 = 3 times at once: 9, 6, 3, 0
        made.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    made.alphas_cumprod = torch.from_numpy(np.cumprod(1 - np.linspace(1e-3, 0.3, 10)))
    made.one = torch.tensor(1.0, dtype=torch.float64)
    return made


def theirs(monkeypatch, sampler, count, clip, time, output, x, drawn):
    import torch

    chosen = scheduler(sampler, count, clip)
    output, x, drawn = (torch.from_numpy(np.array(each, np.float64)).movedim(-1, 1) for each in (output, x, drawn))
    if sampler == "ddpm":
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: drawn)
        found = chosen.step(output, time, x).prev_sample
    else:
        found = chosen.step(output[:, :2], time, x, use_clipped_model_output=clip).prev_sample
    return found.movedim(1, -1).numpy()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("count", [10, 4])
@pytest.mark.parametrize("sampler", sampling.SAMPLERS)
def test_samples_are_those_of_diffusers(monkeypatch, sampler, count, clip):
    times = noises.spread(SCHEDULE, count)
    made, params = model()
    found = sampling.sample(made, params, LABELS, KEY, SCHEDULE, steps=count, sampler=sampler, clip=clip)
    x = np.asarray(jax.random.normal(jax.random.fold_in(KEY, count), (3, 4, 4, 2)))
    tables = noises.tables(SCHEDULE, times)
    for place in range(count - 1, -1, -1):
        output, drawn = outputs(x, times[place]), jax.random.normal(jax.random.fold_in(KEY, place), x.shape)
        wanted = theirs(monkeypatch, sampler, count, clip, times[place], output, x, drawn)
        at = jnp.asarray(place)
        if sampler == "ddpm":
            own = sampling.ddpm_step(tables, output, x, at, drawn, clip)
        else:
            own = sampling.ddim_step(tables, output, x, at, clip)
        np.testing.assert_allclose(own, wanted, atol=2e-5 * np.abs(wanted).max())
        x = wanted
    np.testing.assert_allclose(found, x, atol=1e-3 * np.abs(x).max())
    if clip:
        assert np.abs(np.asarray(found)).max() <= 1 + 1e-5, "the last step is the image as it was clipped"


def test_guidance_goes_past_the_label():
    made, params = model()
    x, times = np.random.default_rng(0).normal(size=(3, 4, 4, 2)).astype("f"), jnp.full(3, 5)
    with_label, without = outputs(x, 5), outputs(x, 5, jnp.full(3, 3))
    for scale in (0.0, 1.0, 4.0):
        found = sampling.guided(made, params, x, times, LABELS, jnp.float32(scale))
        noise = without[..., :2] + scale * (with_label[..., :2] - without[..., :2])
        np.testing.assert_allclose(found[..., :2], noise, atol=1e-4)
        np.testing.assert_allclose(found[..., 2:], with_label[..., 2:], atol=1e-5)


def test_whole_loops_are_guided():
    made, params = model()

    def run(guidance, labels=LABELS):
        return np.asarray(sampling.sample(made, params, labels, KEY, SCHEDULE, steps=4, guidance=guidance, clip=True))

    none = jnp.full(3, SIZES.classes)
    np.testing.assert_allclose(run(1.0), run(1.0 + 1e-6), atol=1e-4)
    np.testing.assert_allclose(run(3.0, none), run(1.0, none), atol=1e-3)
    assert np.abs(run(3.0) - run(1.0))[:2].max() > 1e-2


def test_samples_depend_on_the_key_and_the_label_alone():
    made, params = model()

    def run(key, labels):
        return np.asarray(sampling.sample(made, params, labels, key, SCHEDULE, steps=3, sampler="ddim", clip=True))

    np.testing.assert_array_equal(run(KEY, LABELS), run(KEY, LABELS))
    assert np.abs(run(KEY, LABELS) - run(jax.random.key(4), LABELS)).max() > 1e-2
    changed = run(KEY, jnp.array([1, 2, 3]))
    assert np.abs(run(KEY, LABELS) - changed)[0].max() > 1e-3
    np.testing.assert_allclose(run(KEY, LABELS)[1:], changed[1:], atol=1e-5)


def test_a_model_without_variance_takes_ddim():
    config = Config(4, 2, 2, 2, 3, 1, 2, 8, 16)
    made, params = model(config)
    found = sampling.sample(made, params, LABELS, KEY, SCHEDULE, steps=3, sampler="ddim")
    assert found.shape == (3, 4, 4, 2)
    with pytest.raises(InputError, match="2 channels in and 2 out does not tell: take ddim"):
        sampling.sample(made, params, LABELS, KEY, SCHEDULE, steps=3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sampler": "ddmp"}, 'Did you mean "ddpm"'),
        ({"steps": 11}, "11 steps cannot be taken from a noise of 10"),
        ({"steps": 0}, "0 steps cannot be taken"),
    ],
)
def test_sampling_that_cannot_be(given, said):
    made, params = model()
    with pytest.raises(InputError, match=said):
        sampling.sample(made, params, LABELS, KEY, SCHEDULE, **given)
