"""The objective of a denoiser, held against closed forms in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from blrlab import train
from blrlab.models import dit
from blrlab.models import noise as noises
from blrlab.models.dit import Config, DiT
from blrlab.models.noise import Schedule
from blrlab.train import diffusion

SCHEDULE = Schedule(200, 5e-4, 0.1)
TABLES = noises.tables(SCHEDULE)
SIZES = Config(4, 2, 2, 4, 3, 1, 2, 8, 16)
BETAS = np.linspace(5e-4, 0.1, 200)
KEPT = np.cumprod(1 - BETAS)
normal_cdf = np.vectorize(lambda x: 0.5 * math.erfc(-x / math.sqrt(2)))


def batch(times=(0, 0, 1, 60, 199)):
    random = np.random.default_rng(0)
    count = len(times)
    images = np.round(random.uniform(0, 255, (count, 4, 4, 2))) / 127.5 - 1
    images[0, 0, 0, 0], images[0, 0, 0, 1] = -1, 1
    noise = random.normal(size=images.shape)
    found = {"image": images, "noise": noise, "time": np.array(times), "label": np.arange(count) % 3}
    return {name: each.astype("f") if each.dtype == float else each for name, each in found.items()}


def output_of(given, off=0.3):
    """What a model might say: the noise, somewhat off, and variances all over."""
    random = np.random.default_rng(1)
    noise = given["noise"] + off * random.normal(size=given["noise"].shape)
    return np.concatenate([noise, random.uniform(-1.2, 1.2, given["noise"].shape)], -1).astype("f")


def term(row, given, output):
    """The bound of one example in bits a value, from the definitions, in float64."""
    time, image = int(given["time"][row]), given["image"][row].astype(np.float64)
    noise, told = np.split(output[row].astype(np.float64), 2, axis=-1)
    kept, beta = KEPT[time], BETAS[time]
    x = np.sqrt(kept) * image + np.sqrt(1 - kept) * given["noise"][row]

    def posterior(start):
        before = KEPT[time - 1] if time else 1.0
        mean = np.sqrt(before) * beta * start + np.sqrt(1 - beta) * (1 - before) * x
        return mean / (1 - kept), beta * (1 - before) / (1 - kept)

    share = (told + 1) / 2
    mean, least = posterior((x - np.sqrt(1 - kept) * noise) / np.sqrt(kept))
    least = least if time else BETAS[1] * (1 - KEPT[0]) / (1 - KEPT[1])
    variance = np.exp(share * np.log(beta) + (1 - share) * np.log(least))
    if time:
        wanted, own = posterior(image)
        nats = 0.5 * (np.log(variance / own) + (own + (wanted - mean) ** 2) / variance - 1)
    else:
        upper = np.where(image > 0.999, np.inf, image + 1 / 255)
        lower = np.where(image < -0.999, -np.inf, image - 1 / 255)
        deviation = np.sqrt(variance)
        nats = -np.log(normal_cdf((upper - mean) / deviation) - normal_cdf((lower - mean) / deviation))
    return nats.mean() / np.log(2)


def test_the_bound_is_that_of_its_definition():
    given = batch()
    output = output_of(given, off=0.05)
    x = noises.noised(TABLES, given["image"], given["noise"], given["time"])
    found = diffusion.bound(TABLES, output, given["image"], x, given["time"])
    np.testing.assert_allclose(found, [term(row, given, output) for row in range(5)], rtol=2e-3)


def test_the_loss_is_the_error_and_a_share_of_the_bound():
    given, objective = batch(), train.denoising(SCHEDULE, 3)
    output = output_of(given)
    error = ((output[..., :2] - given["noise"]) ** 2).mean(axis=(1, 2, 3))
    found = {name: measure(output, given) for name, measure in objective.measures.items()}
    np.testing.assert_allclose(found["mse"], error, rtol=1e-5)
    key = jax.random.key(0)
    np.testing.assert_allclose(objective.losses(output, given, key), error + 0.2 * found["vb"], rtol=1e-5)
    half = train.denoising(Schedule(100, 5e-4, 0.1), 3)  # T / 1000 of another T
    given["time"] = given["time"] // 2
    assert float((half.losses(output, given, key) - error)[3]) == pytest.approx(
        0.1 * float(half.measures["vb"](output, given)[3]), rel=1e-3
    )


def test_the_divergence_is_that_of_many_draws():
    random = np.random.default_rng(0)
    x = 0.3 + np.exp(0.5 * -1.2) * random.normal(size=400_000)

    def log_density(mean, log_variance):
        return -0.5 * (log_variance + (x - mean) ** 2 / np.exp(log_variance))

    wanted = (log_density(0.3, -1.2) - log_density(-0.2, -0.4)).mean()
    found = diffusion.divergence(*map(jnp.float32, (0.3, -1.2, -0.2, -0.4)))
    assert float(found) == pytest.approx(wanted, rel=0.01)
    assert float(diffusion.divergence(*map(jnp.float32, (0.3, -1.2, 0.3, -1.2)))) == 0


def test_the_likelihoods_of_all_pixels_add_up_to_one():
    pixels = jnp.arange(256) / 127.5 - 1
    for mean, log_variance in ((0.0, -4.0), (-0.97, -9.0), (0.999, -11.0), (1.3, -2.0)):
        logs = diffusion.log_likelihood(pixels, jnp.float32(mean), jnp.float32(log_variance))
        assert float(jnp.exp(logs).sum()) == pytest.approx(1, abs=1e-4)
    gradient = jax.grad(lambda mean: diffusion.log_likelihood(pixels, mean, jnp.float32(-9.0)).sum())(jnp.float32(0.9))
    assert math.isfinite(float(gradient))


def test_only_the_variance_learns_from_the_bound():
    given = batch()
    x = noises.noised(TABLES, given["image"], given["noise"], given["time"])
    slope = jax.grad(lambda output: diffusion.bound(TABLES, output, given["image"], x, given["time"]).sum())
    found = np.asarray(slope(jnp.asarray(output_of(given, off=0.05))))
    assert not found[..., :2].any()
    assert np.abs(found[..., 2:]).min(axis=(1, 2, 3)).max() > 0
    assert np.isfinite(found).all()


def test_what_is_drawn_comes_from_the_key():
    objective = train.denoising(SCHEDULE, 3, dropped=0.25)
    count = 4000
    given = {"image": jnp.zeros((count, 2, 2, 1)), "label": jnp.arange(count) % 3}
    x, times, labels = objective.inputs(given, jax.random.key(1))
    assert np.array_equal(times, objective.inputs(given, jax.random.key(1))[1])
    assert not np.array_equal(times, objective.inputs(given, jax.random.key(2))[1])
    assert (int(times.min()), int(times.max())) == (0, 199)
    assert float(times.mean()) == pytest.approx(99.5, abs=4)
    # The image is zero, so x is the noise times its share; the loss draws the same noise again.
    noise = np.asarray(x) / np.asarray(noises.at(TABLES.noise, times))
    assert noise.std() == pytest.approx(1, abs=0.03)
    output = np.concatenate([noise, np.zeros_like(noise)], -1)
    exact = {**given, "time": times, "noise": jnp.asarray(noise)}
    assert float(objective.measures["mse"](output, exact).max()) < 1e-9
    np.testing.assert_allclose(
        objective.losses(output, given, jax.random.key(1)),
        objective.losses(output, exact, jax.random.key(9)),
        atol=1e-5,
    )
    gone = np.asarray(labels) == 3
    assert gone.mean() == pytest.approx(0.25, abs=0.03)
    assert np.array_equal(np.asarray(labels)[~gone], np.asarray(given["label"])[~gone])
    assert np.array_equal(train.denoising(SCHEDULE, 3).inputs(given, jax.random.key(1))[2], given["label"])


def test_a_denoiser_learns_and_its_measures_add_up():
    """Images of one colour a label: after some steps their noise is told better than by saying nothing."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 64)
    images = np.broadcast_to((labels - 1.0)[:, None, None, None], (64, 4, 4, 2)).astype("f")
    given = {"image": images, "label": labels}
    objective, model = train.denoising(SCHEDULE, 3, dropped=0.1), DiT(SIZES)
    optimizer = train.make_optimizer(train.make_schedule(1e-2, 300, 0, 0.1), 0.0, 1.0, ema=0.9)
    state = train.init_state(dit.init(SIZES, jax.random.key(0)), optimizer, jax.random.key(1))
    step = train.make_step(model, optimizer, train.data_loss(model, objective))
    for _ in range(300):
        state, _ = step(state, given)
    fixed = {**given, "time": random.integers(0, 200, 64), "noise": random.normal(size=images.shape).astype("f")}
    measured = train.evaluate(
        model, train.averaged(state.params, state.opt_state), fixed, 24, train.denoising(SCHEDULE, 3)
    )
    assert measured["mse"] < 0.3
    assert measured["loss"] == pytest.approx(measured["mse"] + 0.2 * measured["vb"], rel=1e-5)
    assert set(flatten_dict(state.params)) == set(flatten_dict(train.averaged(state.params, state.opt_state)))
