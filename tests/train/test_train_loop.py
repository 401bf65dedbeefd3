"""The training loop: its records and checkpoints, and what it does where it cannot go on."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blrlab import records, train
from blrlab.errors import InputError


def fit(setting, folder: Path, **changes) -> train.State:
    changes = {"say": lambda line: None} | changes
    say, step = changes.pop("say"), changes.pop("step", setting.step)
    return train.fit(setting.plan(**changes), setting.state(), step, setting.batches(), setting.schedule, folder, say)


def kept_steps(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.parametrize(
    ("steps", "log_every", "logged"),
    [(7, 3, [3, 6, 7]), (6, 3, [3, 6]), (2, 5, [2]), (3, 1, [1, 2, 3]), (0, 1, [])],
)
def test_every_nth_step_and_the_last_are_recorded(
    setting, tmp_path: Path, steps: int, log_every: int, logged: list[int]
) -> None:
    said: list[str] = []
    state = fit(setting, tmp_path, steps=steps, log_every=log_every, say=said.append)
    log = tmp_path / "records.jsonl"
    found = records.read(log) if logged else []
    assert [record["step"] for record in found] == logged
    assert log.exists() == bool(logged)
    assert int(state.step) == steps
    assert kept_steps(tmp_path)[-1] == steps
    assert [line.split("  ")[0] for line in said] == [f"dense: step {step}/{steps}" for step in logged]


def test_a_record_has_the_loss_and_the_rate_of_its_step(still, tmp_path: Path) -> None:
    fit(still, tmp_path, steps=6, log_every=2, phase="heal", data_hash="d1f")
    state, batches, losses = still.state(), still.batches(), []
    for _ in range(6):
        state, metrics = still.step(state, next(batches))
        losses.append(float(metrics["loss"]))
    found = records.read(tmp_path / "records.jsonl")
    for record, step in zip(found, (2, 4, 6), strict=True):
        assert record.pop("tokens_per_s") > 0
        assert record == {
            "kind": "train",
            "phase": "heal",
            "step": step,
            "loss": pytest.approx(losses[step - 1], rel=1e-6),
            "lr": pytest.approx(float(still.schedule(step - 1))),
            "data_hash": "d1f",
        }


def test_tokens_per_second_count_every_token_since_the_last_record(
    setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([0.0, 2.0, 2.5, 3.0])
    monkeypatch.setattr("blrlab.train.loop.time.perf_counter", lambda: next(seconds))
    said: list[str] = []
    fit(setting, tmp_path, steps=5, log_every=2, say=said.append)
    found = [record["tokens_per_s"] for record in records.read(tmp_path / "records.jsonl")]
    assert found == [4 * 6 * 2 / 2.0, 4 * 6 * 2 / 0.5, 4 * 6 * 1 / 0.5]
    assert [line.rsplit("  ", 1)[1] for line in said] == ["0:03 left", "0:00 left", "0:00 left"]


def test_checkpoints_are_written_on_time_and_the_last_two_kept(setting, tmp_path: Path) -> None:
    seen = {}

    def say(line: str) -> None:
        step = int(line.split("step ")[1].split("/")[0])
        seen[step] = kept_steps(tmp_path)

    fit(setting, tmp_path, steps=12, checkpoint_every=4, say=say)
    assert (seen[4], seen[5], seen[9], kept_steps(tmp_path)) == ([], [4], [4, 8], [8, 12])


def test_a_finished_training_is_not_done_again(setting, tmp_path: Path) -> None:
    first = jax.device_get(fit(setting, tmp_path, steps=6))
    before = (tmp_path / "records.jsonl").read_bytes()
    said: list[str] = []

    def never(*_: object) -> None:
        raise AssertionError("a step was done")

    again = fit(setting, tmp_path, steps=6, step=never, say=said.append)
    assert said == ["dense: going on from step 6"]
    assert (tmp_path / "records.jsonl").read_bytes() == before
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        assert np.array_equal(one, other)


def test_a_plan_may_be_longer_than_what_was_done(setting, tmp_path: Path) -> None:
    whole = fit(setting, tmp_path / "whole", steps=9)
    fit(setting, tmp_path / "parts", steps=4)
    parts = fit(setting, tmp_path / "parts", steps=9)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        assert np.array_equal(one, other)


def test_a_plan_shorter_than_what_was_done_is_an_error_in_words(setting, tmp_path: Path) -> None:
    fit(setting, tmp_path, steps=6)
    with pytest.raises(InputError, match=r"\b6\b.*\b4\b|\b4\b.*\b6\b"):
        fit(setting, tmp_path, steps=4)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch": 0}, "batch is 0; it must be at least 1."),
        ({"log_every": 0}, "log_every is 0; it must be at least 1."),
        ({"checkpoint_every": -1}, "checkpoint_every is -1; it must be at least 1."),
        ({"steps": -1}, "steps is -1; it must be at least 0."),
    ],
)
def test_a_plan_that_makes_no_sense_is_an_error(setting, changes: dict, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        setting.plan(**changes)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_training_with_a_sentence(setting, tmp_path: Path, value: float) -> None:
    def step(state: train.State, windows: jax.Array) -> tuple[train.State, dict]:
        loss = value if int(state.step) >= 4 else 1.0
        return state._replace(step=state.step + 1), {"loss": jnp.asarray(loss)}

    with pytest.raises(InputError, match=f"dense: the loss is {value} at step 5.*learning rate"):
        fit(setting, tmp_path, steps=9, log_every=2, step=step)
    assert [record["step"] for record in records.read(tmp_path / "records.jsonl")] == [2, 4]


def test_a_checkpoint_never_holds_a_state_whose_loss_is_not_finite(setting, tmp_path: Path) -> None:
    """Else a run that goes on from it can only fail again, whatever it is told."""

    def step(state: train.State, windows: jax.Array) -> tuple[train.State, dict]:
        loss = jnp.nan if int(state.step) >= 4 else 1.0
        return state._replace(step=state.step + 1), {"loss": jnp.asarray(loss)}

    with pytest.raises(InputError, match="the loss is nan"):
        fit(setting, tmp_path, steps=20, log_every=10, checkpoint_every=2, step=step)
    assert max(kept_steps(tmp_path)) <= 4


def test_a_damaged_record_is_named_before_any_step(setting, tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text("nonsense\n{}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"records.jsonl, line 1"):
        fit(setting, tmp_path, steps=2)
