"""The training loop: steps, records and checkpoints, and how to go on after a kill."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from blrlab import records
from blrlab.data import Stream
from blrlab.errors import InputError
from blrlab.train.checkpoint import Checkpoints
from blrlab.train.sharding import data_parallel
from blrlab.train.step import State


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long to train and what to write down.

    Attributes:
      phase: the name its records carry: dense, dense_continued or heal.
      steps: optimiser steps in all.
      batch: examples a step.
      log_every: steps between two records; the last step is always recorded.
      checkpoint_every: steps between two checkpoints; the end is always saved.
      data_hash: of the data, for the records.
    """

    phase: str
    steps: int
    batch: int
    log_every: int
    checkpoint_every: int
    data_hash: str

    def __post_init__(self) -> None:
        for name in ("batch", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.steps < 0:
            raise InputError(f"steps is {self.steps}; it must be at least 0.")


def fit(
    plan: Plan,
    state: State,
    step: Callable[[State, jax.Array], tuple[State, dict[str, jax.Array]]],
    batches: Stream,
    schedule: Callable[[int], Any],
    folder: Path,
    say: Callable[[str], None] = print,
) -> State:
    """Train from `state`, or from the newest checkpoint in `folder`, to the plan's last step.

    Records go to `folder/records.jsonl`; after a kill those past the restored step are cut off, so the file reads
    as if nothing had happened. Batches are cut between all local devices.

    Raises:
      InputError: the loss or its gradient is no longer finite, a checkpoint is damaged or past the plan's end, or
        the devices do not divide the batch.
    """
    replicate, shard = data_parallel(plan.batch)
    checkpoints = Checkpoints(folder / "checkpoints")
    state = replicate(state)
    if checkpoints.latest() is not None:
        state, batches.position = checkpoints.restore(state)
        say(f"{plan.phase}: going on from step {int(state.step)}")
    if int(state.step) > plan.steps:
        raise InputError(f"{folder} holds step {int(state.step)}, past the {plan.steps} steps asked for.")
    log = folder / "records.jsonl"
    first = int(state.step)
    records.keep(log, lambda record: record.get("step", 0) <= first)
    clock = _Clock(plan, first)
    for number in range(first + 1, plan.steps + 1):
        state, metrics = step(state, shard(next(batches)))
        logs = number % plan.log_every == 0 or number == plan.steps
        saves = number % plan.checkpoint_every == 0 or number == plan.steps
        if logs or saves:
            _check_finite(plan, number, metrics)
        if logs:
            record = _record(plan, number, metrics, float(schedule(number - 1)))
            record[f"{batches.unit}s_per_s"] = clock.per_s(number, batches.units)
            records.append(log, record)
            say(_line(record, plan, clock.seconds_left(number), batches.unit))
        if saves:
            checkpoints.save(state, batches.position)
    if checkpoints.latest() is None:  # no steps at all
        checkpoints.save(state, batches.position)
    checkpoints.close()
    return state


class _Clock:
    """Wall time between records; the first holds the compilation."""

    def __init__(self, plan: Plan, first: int):
        self._plan, self._step, self._time = plan, first, time.perf_counter()
        self._pace: float | None = None

    def per_s(self, step: int, units: int) -> float:
        now = time.perf_counter()
        self._pace = (now - self._time) / (step - self._step)
        self._step, self._time = step, now
        return self._plan.batch * units / self._pace

    def seconds_left(self, step: int) -> float:
        return (self._plan.steps - step) * (self._pace or 0.0)


def _check_finite(plan: Plan, step: int, metrics: Mapping[str, jax.Array]) -> None:
    for name, value in metrics.items():
        if not math.isfinite(float(value)):
            raise InputError(f"{plan.phase}: the {name} is {float(value)} at step {step}; lower the learning rate.")


def _record(plan: Plan, step: int, metrics: Mapping[str, jax.Array], rate: float) -> records.Record:
    return {
        "kind": "train",
        "phase": plan.phase,
        "step": step,
        **{name: float(value) for name, value in metrics.items() if name != "grad_norm"},
        "lr": rate,
        "data_hash": plan.data_hash,
    }


def _line(record: records.Record, plan: Plan, seconds: float, unit: str) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{plan.phase}: step {record['step']}/{plan.steps}  loss {record['loss']:.3f}  "
        f"{record[f'{unit}s_per_s']:,.0f} {unit}s/s  {minutes}:{rest:02d} left"
    )
