"""The stages that make and measure models: data, dense, compress, heal, continue, eval.

Each is a function (run, folder) that starts from what earlier stages left in their folders and writes its own.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from blrlab import compress, records, train
from blrlab.compress.rows import row
from blrlab.errors import InputError
from blrlab.experiments import build
from blrlab.experiments.build import Experiment
from blrlab.experiments.tasks import Dataset, Metric
from blrlab.experiments.workdir import Workdir
from blrlab.models import hf
from blrlab.models.parts import ALL_DENSE, Part

# Each phase of randomness draws from the config's seed and its own number, compression from compress.seed, too.
INIT, TRAIN, COMPRESS, HEAL = range(4)


@dataclasses.dataclass(frozen=True)
class Run:
    """What a stage is given: the checked config, the work folder and where to print."""

    name: str
    scale: str
    made: Experiment
    workdir: Workdir
    say: Callable[[str], None]

    def key(self, phase: int) -> jax.Array:
        """Return the random key of a phase."""
        key = jax.random.fold_in(jax.random.key(self.made.config.seed), phase)
        return jax.random.fold_in(key, self.made.config.compress.seed) if phase == COMPRESS else key

    @functools.cached_property
    def dataset(self) -> Any:
        """The prepared data."""
        return self.made.task.load(self.workdir.path("data"))

    def params(self, stage: str) -> dict[str, Any]:
        """Load the parameters that dense, continue, compress or heal left."""
        dense = stage in ("dense", "continue")
        shapes = self.made.dense_shapes if dense else self.made.factored_shapes
        return train.load_params(self.workdir.path(stage) / "params", shapes)

    def model(self, dense: bool, watched: bool = False) -> Part:
        """Make the dense or the factored model; one whose layers are watched runs them one by one, and once."""
        sizes = self.made.model
        sizes = dataclasses.replace(sizes, scan=False, remat=False) if watched else sizes
        return self.made.family.model(sizes, ALL_DENSE if dense else self.made.specs)


def prepare_data(run: Run, folder: Path) -> None:
    """Prepare the data of the task, and record it with the machine."""
    made = run.made
    said = made.task.prepare(made, folder)
    dataset = made.task.load(folder)
    made.task.held_out(made, dataset, 1)
    made.task.batches(made, dataset, max(made.config.train.batch, made.config.heal.batch), 0)
    records.rewrite(folder / "records.jsonl", [environment_record(run, dataset)])
    run.say(f"data: {said}")


def environment_record(run: Run, dataset: Dataset) -> records.Record:
    """Return the record of machine, config and data."""
    return {
        "kind": "env",
        **build.machine(),
        "config": run.name,
        "scale": run.scale,
        "parameters": compress.parameter_count(run.made.dense_shapes),
        "data": dataset.summary,
    }


def train_dense(run: Run, folder: Path) -> None:
    """Train the dense model from scratch, or take the pretrained one as it is."""
    made = run.made
    if made.checkpoint:
        params = _loaded(made)
        run.say(f"dense: {compress.parameter_count(params):,} parameters from {made.config.init_from}")
        train.save_params(folder / "params", params)
        return
    params = made.family.init(made.model, run.key(INIT))
    run.say(f"dense: {compress.parameter_count(params):,} parameters, from scratch")
    _fit(run, folder, "dense", made.config.train, run.model(dense=True), params, TRAIN)


def _loaded(made: Experiment) -> dict[str, Any]:
    """Read the pretrained model."""
    assert made.checkpoint is not None
    params, specs = hf.load(made.checkpoint, made.family, made.model)
    if specs:
        raise InputError(f"{made.checkpoint} holds factors already: start from the dense checkpoint.")
    return params


def compress_dense(run: Run, folder: Path) -> None:
    """Replace the layers that the rules match by factors, and record the error of each."""
    made, params = run.made, run.params("dense")

    def line(loss: compress.Loss) -> None:
        of_output = "" if loss.output_error is None else f", of the output {loss.output_error:.4f}"
        run.say(
            f"compress: {loss.path:<20} {loss.spec.format}  error {loss.relative_error:.4f}{of_output}  "
            f"{loss.params_before:,} -> {loss.params_after:,} parameters  {loss.seconds:.1f} s"
        )

    small, losses = _compressed(run, params, line)
    layer_factor, model_factor = compress.compression_factors(made.dense_shapes, made.specs)
    mode = made.config.compress.mode
    rows = [{**row(loss), "algorithm": _algorithm(loss.algorithm, mode)} for loss in losses]
    rows.append(
        {
            "kind": "compress",
            "path": "*",
            "format": _format(made),
            "params_before": compress.parameter_count(params),
            "params_after": compress.parameter_count(small),
            "layer_factor": layer_factor,
            "model_factor": model_factor,
            "seconds": sum(loss.seconds for loss in losses),
        }
    )
    records.rewrite(folder / "records.jsonl", rows)
    train.save_params(folder / "params", small)
    run.say(f"compress: factored layers {layer_factor:.2f}x smaller, the model {model_factor:.2f}x")


def _compressed(
    run: Run, params: dict[str, Any], line: Callable[[compress.Loss], None]
) -> tuple[dict[str, Any], list[compress.Loss]]:
    """Compress as `config.compress` says."""
    made, config = run.made, run.made.config.compress
    key, algorithms = run.key(COMPRESS), build.algorithms(made.config)
    if config.mode == "plain":
        return compress.compress(params, made.specs, key, line, algorithms)
    model, batches = run.model(dense=True, watched=True), calibration_batches(run)
    if config.mode == "sequential":
        return compress.compress_in_sequence(model, params, made.specs, batches, key, line, algorithms)
    inputs = compress.collect(model, params, batches, tuple(made.specs))
    return compress.compress(params, made.specs, key, line, algorithms, inputs)


def calibration_batches(run: Run) -> list[Any]:
    """Return what the model is given on training examples, from which layers' inputs are taken."""
    made, config = run.made, run.made.config.compress
    examples, objective = made.task.calibration(made, run.dataset, config.windows), made.task.objective(made, False)
    count = len(jax.tree.leaves(examples)[0])
    parts = [
        jax.tree.map(lambda rows, at=start: rows[at : at + config.batch], examples)
        for start in range(0, count, config.batch)
    ]
    key = run.key(COMPRESS)
    return [objective.inputs(part, jax.random.fold_in(key, number)) for number, part in enumerate(parts)]


def _algorithm(name: str, mode: str) -> str:
    """Name how a layer was compressed: block_svd, or block_svd whitened."""
    return name if mode == "plain" or name in ("none", "mixed") else f"{name} {mode}"


def _format(made: Experiment) -> str:
    """Return the one format of the factored layers; mixed where they differ, dense where there are none."""
    found = build.formats(made)
    return found[0] if len(found) == 1 else "mixed" if found else "dense"


def heal(run: Run, folder: Path) -> None:
    """Train the compressed model on, on the text and on what the dense model makes of it."""
    training = run.made.config.heal
    step = _distilling(run) if training.distil else None
    _fit(run, folder, "heal", training, run.model(dense=False), run.params("compress"), HEAL, step)


def _distilling(run: Run) -> Callable:
    """Return the step that distils the dense model into the compressed one."""
    made, training = run.made, run.made.config.heal
    watched = training.distil == "outputs"
    model = run.model(dense=False, watched=watched)
    blocks = [f"{made.family.model.PREFIX}_{index}" for index in range(made.model.layers)] if watched else []
    loss = train.distil_loss(
        model,
        run.model(dense=True, watched=watched),
        training.distil,
        training.distil_weight,
        training.temperature,
        blocks,
        made.task.objective(made, True),
    )
    step, (replicate, _) = train.make_step(model, build.optimizer(training), loss), train.data_parallel(training.batch)
    teacher = replicate(run.params("dense"))
    return lambda state, windows: step(state, windows, teacher)


def continue_dense(run: Run, folder: Path) -> None:
    """Train the dense model on for the same steps on the same batches: the rival of healing."""
    _fit(run, folder, "dense_continued", run.made.config.heal, run.model(dense=True), run.params("dense"), HEAL)


def _fit(
    run: Run,
    folder: Path,
    phase: str,
    training: Any,
    model: Part,
    params: dict[str, Any],
    number: int,
    step: Callable | None = None,
) -> None:
    optimizer = build.optimizer(training, dense=phase.startswith("dense"))
    loss = train.data_loss(model, run.made.task.objective(run.made, True))
    # The order of the batches is drawn from the seed and the phase, as all other randomness is.
    seed = int(jax.random.randint(run.key(number), (), 0, 2**31 - 1))
    state = train.fit(
        build.plan(phase, training, run.dataset.summary["hash"]),
        train.init_state(params, optimizer, run.key(number)),
        step or train.make_step(model, optimizer, loss),
        run.made.task.batches(run.made, run.dataset, training.batch, seed),
        build.schedule(training),
        folder,
        run.say,
    )
    train.save_params(folder / "params", jax.device_get(train.averaged(state.params, state.opt_state)))


EVALUATED = {"dense": "dense", "continue": "dense_continued", "compress": "compressed", "heal": "healed"}


def evaluate(run: Run, folder: Path) -> None:
    """Evaluate every model there is on the same held-out examples."""
    made, config = run.made, run.made.config.eval
    examples, objective = made.task.held_out(made, run.dataset, config.windows), made.task.objective(made, False)
    rows: list[records.Record] = []
    for stage, name in EVALUATED.items():
        if run.workdir.done(stage):
            dense = stage in ("dense", "continue")
            measured = train.evaluate(run.model(dense), run.params(stage), examples, config.batch, objective)
            metrics = made.task.metrics(made, run.dataset, measured, examples)
            rows += eval_records(run, name, metrics, len(jax.tree.leaves(examples)[0]), factored=not dense)
            (_, loss, unit), (second, value, _) = metrics[:2]
            run.say(f"eval: {name:<16} {loss:.4f} {unit}, {second} {value:.3f}")
    records.rewrite(folder / "records.jsonl", rows)


def eval_records(
    run: Run, stage: str, metrics: Sequence[Metric], examples: int, factored: bool
) -> list[records.Record]:
    """Return the records of what was measured of one model."""
    made = run.made
    shared: records.Record = {
        "kind": "eval",
        "stage": stage,
        "split": "validation",
        "examples": examples,
        "data_hash": run.dataset.summary["hash"],
    }
    if factored:
        layer_factor, model_factor = compress.compression_factors(made.dense_shapes, made.specs)
        shared |= {
            "format": _format(made),
            "algorithm": _algorithm(
                build.algorithms(made.config).get(_format(made), "mixed"), made.config.compress.mode
            ),
            "layer_factor": layer_factor,
            "model_factor": model_factor,
        }
    return [shared | {"metric": metric, "value": value, "unit": unit} for metric, value, unit in metrics]
