"""Distillation: its two terms, how they are mixed with the loss of the text, and what the teacher's share does."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blrlab import train
from blrlab.errors import InputError
from blrlab.train import distil

VOCABULARY, WIDTH = 16, 8  # as the student's


class Teacher(nn.Module):
    """The student's sizes, but dense."""

    dropout: float = 0.5

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Embed(VOCABULARY, WIDTH, name="wte")(tokens)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(VOCABULARY, name="head")(x)


@pytest.fixture(scope="module")
def teacher() -> Any:
    """Its parameters, large enough for clear predictions."""
    params: Any = Teacher().init(jax.random.key(5), jnp.zeros((1, 1), jnp.int32))["params"]
    return jax.tree.map(lambda leaf: 2 * leaf, params)


def logits(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2, 3, 7)).astype(np.float32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    exact = logits.astype(np.float64)
    return exact - np.log(np.exp(exact).sum(-1, keepdims=True))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_divergence_is_that_of_softened_predictions_times_the_squared_temperature(temperature: float) -> None:
    wanted, found = log_softmax(logits(0) / temperature), log_softmax(logits(1) / temperature)
    by_hand = temperature**2 * (np.exp(wanted) * (wanted - found)).sum(-1)
    result = distil.divergence(logits(0), logits(1), temperature)
    assert np.all(by_hand > 0)
    np.testing.assert_allclose(result, by_hand, rtol=1e-5)
    np.testing.assert_allclose(distil.divergence(logits(0), logits(0) + 3, temperature), 0, atol=1e-5)


def test_at_a_high_temperature_the_divergence_is_half_the_variance_of_what_the_logits_differ_by() -> None:
    """Hinton et al., section 2.1."""
    with jax.enable_x64(True):
        result = distil.divergence(logits(0).astype(np.float64), logits(1).astype(np.float64), 50.0)
    np.testing.assert_allclose(result, (logits(0) - logits(1)).var(-1) / 2, rtol=0.1)


def test_the_error_of_outputs_is_relative_to_every_position_and_the_mean_over_blocks() -> None:
    one, other = logits(0), logits(1)
    large = one * np.float32([1, 1e4, 1e-4])[None, :, None]
    np.testing.assert_allclose(distil.output_error({"h_0": large}, {"h_0": 1.25 * large}), 0.25**2, rtol=1e-5)
    parts = ((one - other) ** 2).sum(-1) / (one**2).sum(-1)
    both = distil.output_error({"h_0": one, "h_1": one}, {"h_0": other, "h_1": one})
    np.testing.assert_allclose(both, parts.mean() / 2, rtol=1e-5)


def mixed(still: Any, term: str, weight: float, **options: Any) -> Any:
    loss = train.distil_loss(still.model, Teacher(), term, weight, **options)
    return train.make_step(still.model, still.optimizer, loss)


def test_without_a_share_the_step_is_that_of_the_text_alone(still, teacher) -> None:
    windows = still.windows(4)
    found, metrics = mixed(still, "logits", 0.0)(still.state(), windows, teacher)
    wanted, usual = still.step(still.state(), windows)
    assert float(metrics["loss"]) == pytest.approx(float(usual["loss"]), rel=1e-6)
    assert float(metrics["grad_norm"]) == pytest.approx(float(usual["grad_norm"]), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found.params, wanted.params)


@pytest.mark.parametrize("term", distil.TERMS)
def test_the_gradient_is_of_the_mixture_and_the_metrics_of_its_parts(still, teacher, term) -> None:
    windows, blocks = still.windows(4), ("wte", "head")

    def outputs(params: Any, model: nn.Module) -> tuple[jax.Array, dict[str, jax.Array]]:
        x = params["wte"]["embedding"][windows[:, :-1]]
        y: Any = model.apply({"params": params}, windows[:, :-1])
        return y, {"wte": x, "head": y}

    def parts(params: Any) -> tuple[jax.Array, jax.Array]:
        (y, found), (wanted_y, wanted) = outputs(params, still.model), outputs(teacher, Teacher())
        text = train.next_token_loss(y, windows[:, 1:]).mean()
        return text, distil.divergence(wanted_y, y, 2.0).mean() if term == "logits" else distil.output_error(
            wanted, found
        )

    text, of_teacher = jax.jit(parts)(still.params())
    gradient = jax.jit(jax.grad(lambda params: 0.25 * parts(params)[0] + 0.75 * parts(params)[1]))(still.params())
    norm = np.sqrt(sum(float(np.square(leaf).sum()) for leaf in jax.tree.leaves(gradient)))
    step = mixed(still, term, 0.75, temperature=2.0, blocks=blocks)
    _, metrics = step(still.state(), windows, teacher)
    assert set(metrics) == {"loss", "distil_loss", "grad_norm"}
    found = [float(metrics[name]) for name in ("loss", "distil_loss", "grad_norm")]
    assert found == pytest.approx([float(text), float(of_teacher), norm], rel=1e-4)


def test_the_student_drops_out_and_the_teacher_does_not(setting, teacher) -> None:
    def terms(teacher_s: float) -> list[float]:
        loss = train.distil_loss(setting.model, Teacher(teacher_s), "logits", 0.5)
        run = jax.jit(lambda key: loss(setting.params(), setting.windows(4), key, teacher)[1]["distil_loss"])
        return [float(run(jax.random.key(seed))) for seed in (0, 1)]

    assert terms(0.5) == pytest.approx(terms(0.0))
    assert terms(0.5)[0] != pytest.approx(terms(0.5)[1]), "the student's depends on the key"


@pytest.mark.parametrize("term", distil.TERMS)
def test_steps_draw_the_student_to_its_teacher(still, teacher, term) -> None:
    step, state, windows, found = mixed(still, term, 1.0, blocks=("head",)), still.state(), still.windows(4), []
    for _ in range(20):
        state, metrics = step(state, windows, teacher)
        found.append(float(metrics["distil_loss"]))
    assert found[-1] < 0.6 * found[0]
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(teacher))


def test_wrong_terms_and_blocks_are_named(still, teacher) -> None:
    with pytest.raises(InputError, match=r'unknown distillation "logit".* Did you mean "logits"'):
        mixed(still, "logit", 0.5)
    with pytest.raises(InputError, match="no blocks are named"):
        mixed(still, "outputs", 0.5)
    with pytest.raises(InputError, match="the model has no block h_7"):
        mixed(still, "outputs", 0.5, blocks=("head", "h_7"))(still.state(), still.windows(4), teacher)
