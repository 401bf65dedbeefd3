"""The noise of diffusion: against closed forms in float64, and against diffusers' scheduler."""

import jax.numpy as jnp
import numpy as np
import pytest

from blrlab.errors import InputError
from blrlab.models import noise as noises
from blrlab.models.noise import Schedule

SCHEDULE = Schedule()
TABLES = noises.tables(SCHEDULE)
BETAS = np.linspace(1e-4, 0.02, 1000)


def arrays(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 4, 5, 5, 2)).astype(np.float32)


def test_the_tables_are_those_of_the_paper():
    kept = [np.prod(1 - BETAS[: t + 1]) for t in range(1000)]
    np.testing.assert_allclose(TABLES.signal, np.sqrt(kept), rtol=1e-6)
    np.testing.assert_allclose(TABLES.signal**2 + TABLES.noise**2, 1, rtol=1e-6)
    np.testing.assert_allclose(np.exp(TABLES.most), BETAS, rtol=2e-6)
    wanted = [BETAS[t] * (1 - kept[t - 1]) / (1 - kept[t]) for t in range(1, 1000)]
    np.testing.assert_allclose(np.exp(TABLES.least), [wanted[0], *wanted], rtol=2e-6)
    assert TABLES.times.tolist() == list(range(1000))


def test_noise_and_variances_are_those_of_diffusers():
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    # In float32 its betas, differences of products, would have three digits.
    scheduler.alphas_cumprod = torch.from_numpy(np.cumprod(1 - BETAS))
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    images, noise, told = arrays(3)
    places = np.array([1, 17, 500, 999])
    found = noises.noised(TABLES, images, noise, places)
    wide = (torch.from_numpy(each.astype(np.float64)) for each in (images, noise))
    np.testing.assert_allclose(found, scheduler.add_noise(*wide, torch.from_numpy(places)), atol=5e-7)
    logs = noises.log_variance(TABLES, told, places)
    for row, place in enumerate(places):
        wanted = scheduler._get_variance(int(place), predicted_variance=torch.from_numpy(told[row]))
        np.testing.assert_allclose(logs[row], wanted, atol=1e-5)


def test_the_image_is_what_remains_without_the_noise():
    images, noise = arrays(2)
    places = np.array([0, 10, 300, 700])
    x = noises.noised(TABLES, images, noise, places)
    np.testing.assert_allclose(noises.told_image(TABLES, x, noise, places), images, atol=1e-4)


def test_the_mean_before_is_that_of_two_gaussians():
    """q(x_before | x_t, x_0) is the product of two Gaussians of x_before, whose precisions add up."""
    images, x = arrays(2)
    places = np.array([1, 40, 500, 999])
    found = noises.mean_before(TABLES, images, x, places)
    for row, place in enumerate(places):
        before, beta = np.prod(1 - BETAS[:place]), BETAS[place]
        precisions = 1 / (1 - before), (1 - beta) / beta
        means = np.sqrt(before) * images[row], x[row] / np.sqrt(1 - beta)
        wanted = sum(p * mean for p, mean in zip(precisions, means, strict=True)) / sum(precisions)
        np.testing.assert_allclose(found[row], wanted, atol=1e-5)
        assert np.exp(TABLES.least[place]) == pytest.approx(1 / sum(precisions), rel=1e-5)
    np.testing.assert_allclose(noises.mean_before(TABLES, images, x, np.zeros(4, int)), images, atol=1e-6)


def test_fewer_times_are_a_schedule_of_their_own():
    short = noises.tables(SCHEDULE, (0, 333, 666, 999))
    assert short.times.tolist() == [0, 333, 666, 999]
    np.testing.assert_array_equal(short.signal, TABLES.signal[[0, 333, 666, 999]])
    np.testing.assert_array_equal(short.signal_before[1:], short.signal[:-1])
    assert (short.signal_before[0], short.noise_before[0]) == (1, 0)
    beta = 1 - np.prod(1 - BETAS[334:667])
    assert np.exp(short.most[2]) == pytest.approx(beta, rel=1e-5)
    images, noise = arrays(2)
    np.testing.assert_array_equal(
        noises.noised(short, images, noise, jnp.full(4, 2)), noises.noised(TABLES, images, noise, jnp.full(4, 666))
    )


@pytest.mark.parametrize(
    ("steps", "count", "times"),
    [(1000, 1, (999,)), (1, 1, (0,)), (1000, 2, (0, 999)), (1000, 5, (0, 250, 500, 749, 999)), (7, 7, tuple(range(7)))],
)
def test_times_are_spread_evenly(steps, count, times):
    assert noises.spread(Schedule(steps), count) == times


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Schedule(0), "the noise has 0 steps"),
        (lambda: Schedule(10, 0.0), "a beta of the noise is 0.0"),
        (lambda: Schedule(10, 1e-4, 1.0), "a beta of the noise is 1.0"),
        (lambda: noises.spread(SCHEDULE, 1001), "give 1 to 1000"),
        (lambda: noises.spread(SCHEDULE, 0), "0 steps cannot be taken"),
        (lambda: noises.tables(SCHEDULE, (3, 2)), "times must rise within 0 to 999"),
        (lambda: noises.tables(SCHEDULE, (5, 1000)), "times must rise"),
        (lambda: noises.tables(SCHEDULE, ()), "times must rise"),
    ],
)
def test_noise_that_cannot_be(make, said):
    with pytest.raises(InputError, match=said):
        make()
