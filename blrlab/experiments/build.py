"""From a locked config to checked values: model, specs, training plans. Nothing here does the work.

A 0 or an empty string in the config stands for a value that depends on others; here it is filled in, after the
command line's overrides, and every combination is checked before a stage begins.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from blrlab_ops import devices, shapes
from blrlab_ops.devices import Device
from flax.core import FrozenDict

from blrlab import compress, environment, train
from blrlab.compress import Allowed, Target
from blrlab.errors import InputError, home_expanded, one_of
from blrlab.experiments import tasks
from blrlab.experiments.defaults import Config
from blrlab.experiments.tasks import Task
from blrlab.factors import FORMATS, Spec, parameter_count
from blrlab.models import hf
from blrlab.models.hf import Family
from blrlab.train.distil import TERMS
from blrlab.train.optimizer import DECAYS

OWN = "own"
FAMILIES = {"gpt2": hf.GPT2, "llama": hf.LLAMA, "vit": hf.VIT, "dit": hf.dit.ORIGINAL}
DTYPES = ("float32", "bfloat16", "float16")
MODES = ("plain", "whitened", "sequential")
OF_TRAINING = ("smoothing", "mixup")  # of any training, and given once
COMPUTED = ("dtype", "dropout", "fused", "remat", "scan")  # of a model: what no checkpoint decides


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config, checked.

    Attributes:
      config: as given.
      checkpoint: the folder of the pretrained model, or None.
      family: of the model.
      model: its sizes.
      specs: {path: spec} of every layer that a rule matches.
    """

    config: Config
    checkpoint: Path | None
    family: Family
    model: Any
    specs: Mapping[str, Spec]

    @functools.cached_property
    def dense_shapes(self) -> dict[str, Any]:
        """The shapes of the dense model's parameters."""
        return self.family.shapes(self.model)

    @functools.cached_property
    def factored_shapes(self) -> dict[str, Any]:
        """The shapes of the compressed model's parameters."""
        return compress.shapes_of(self.dense_shapes, self.specs)

    @property
    def task(self) -> Task:
        """What the model is trained for."""
        return tasks.of(self.family.name)

    @property
    def window(self) -> int:
        """Tokens that a model runs at once: of text, what a training or validation window predicts."""
        return self.task.window(self)

    @property
    def tokenizer_kind(self) -> str:
        """Byte or bpe as configured; a pretrained model has its own; empty where there is no text."""
        configured = self.config.data.get("tokenizer", "")
        return "checkpoint" if self.checkpoint and configured else configured


def experiment(config: Config) -> Experiment:
    """Check a config and resolve it.

    Raises:
      InputError: a value is unknown or does not fit the others.
    """
    one_of(config.factors.format, FORMATS, "format")
    one_of(config.compress.mode, MODES, "compress.mode")
    algorithms(config)
    budget(config)
    nets(config)
    token_counts(config, "bench")
    roofline_nets(config)
    token_counts(config, "roofline")
    one_of(config.roofline.dtype, DTYPES, "roofline dtype")
    checkpoint = hf.find(config.init_from) if config.init_from else None
    family, model = _model(config, checkpoint)
    layers = compress.linears(family.shapes(model))
    specs = compress.plan(layers, rules(config), config.factors.to_dict(), config.factors.net, _called(layers, config))
    made = Experiment(config, checkpoint, family, model, FrozenDict(specs))
    _check(made)
    return made


def _called(layers: Iterable[str], config: Config) -> dict[str, str]:
    """Return what the config's net calls each layer."""
    return {path: compress.called(path, config.factors.net) for path in layers}


@functools.cache
def machine() -> dict[str, Any]:
    """Return what records say of JAX's device, the versions and the commit."""
    first = jax.local_devices()[0]
    name = first.device_kind if first.platform != "cpu" else ""
    return environment.describe(name, first.platform, jax.local_device_count())


def rules(config: Config) -> Any:
    """Return the rules, those of `config.rules_file` where one is given.

    Raises:
      InputError: the file cannot be read.
    """
    return compress.load(home_expanded(config.rules_file)) if config.rules_file else config.rules


def budgeted(made: Experiment) -> tuple[str, ...]:
    """Return the paths that `config.rules` match, whatever a plan makes of them."""
    layers = compress.linears(made.dense_shapes)
    config = made.config
    return tuple(
        compress.plan(layers, config.rules, config.factors.to_dict(), config.factors.net, _called(layers, config))
    )


def budget(config: Config) -> tuple[Target, Allowed]:
    """Read `config.budget`.

    Raises:
      InputError: a word is unknown, or a number out of range.
    """
    given = config.budget
    words = [word.strip() for word in str(given.blocks).split(",") if word.strip()]
    if not all(word.isdecimal() for word in words):
        raise InputError(f'budget.blocks is whole numbers with commas between, not "{given.blocks}".')
    formats = names(given.formats, FORMATS, "format")
    return Target(given.target, given.value), Allowed(formats, tuple(map(int, words)), given.multiple)


def algorithms(config: Config) -> dict[str, str]:
    """Read the algorithms of `config.compress`, by format.

    Raises:
      InputError: one is unknown.
    """
    return {name: compress.algorithm_of(name, config.compress.get(name, "")) for name in FORMATS}


def nets(config: Config) -> tuple[str, ...]:
    """Read `config.bench.nets`.

    Raises:
      InputError: one is unknown.
    """
    known = (OWN, *shapes.NETS)
    return known if config.bench.nets.strip() == "all" else names(config.bench.nets, known, "net")


def roofline_nets(config: Config) -> tuple[list[Device], tuple[str, ...]]:
    """Read `config.roofline.devices` and `.nets`.

    Raises:
      InputError: one is unknown.
    """
    try:
        targets = [devices.get(word.strip()) for word in config.roofline.devices.split(",") if word.strip()]
    except ValueError as unknown:
        raise InputError(str(unknown)) from None
    if not targets:
        raise InputError("roofline.devices names no device: give some such as a40,h100.")
    return targets, names(config.roofline.nets, shapes.NETS, "net")


def token_counts(config: Config, part: str) -> list[int]:
    """Read `config.bench.tokens` or `config.roofline.tokens`.

    Raises:
      InputError: it is not whole numbers with commas between.
    """
    words = [word.strip() for word in str(config[part].tokens).split(",")]
    if not all(word.isdecimal() for word in words):
        raise InputError(f'{part}.tokens is whole numbers with commas between, not "{config[part].tokens}".')
    return [int(word) for word in words]


def names(words: str, known: tuple[str, ...], what: str) -> tuple[str, ...]:
    """Read names with commas between.

    Raises:
      InputError: one is unknown, or there are none.
    """
    found = tuple(filter(None, map(str.strip, words.split(","))))
    if not found:
        raise InputError(f"no {what} is named: give some of {', '.join(known)}.")
    return tuple(one_of(word, known, what) for word in found)


def _model(config: Config, checkpoint: Path | None) -> tuple[Family, Any]:
    given = config.model
    one_of(given.dtype, DTYPES, "model dtype")
    family = FAMILIES[one_of(given.family, FAMILIES, "model family")]
    if not checkpoint:
        sizes = {field.name: given[field.name] for field in dataclasses.fields(family.config) if field.name in given}
        return family, family.config(**sizes)
    # Sizes are the checkpoint's; how it is computed is the config's.
    kept = {field: given[field] for field in COMPUTED if field in given}
    found, sizes = hf.describe(checkpoint, **kept)
    if found.model is not family.model:  # DiT's are laid out in several ways
        raise InputError(f"{checkpoint} is a {found.name} checkpoint, and this config is for {given.family}.")
    return found, sizes


def _check(made: Experiment) -> None:
    config = made.config
    made.task.check(made)
    if not made.specs:
        raise InputError("config.rules is empty: name the layers to factor, or set factors.format=dense.")
    one_of(config.bench.dtype or "float32", DTYPES, "benchmark dtype")
    mode = config.compress.mode
    if mode != "plain" and "blast" in formats(made) and algorithms(config)["blast"] == "precgd":
        raise InputError(
            f"precgd fits weights alone, and compress.mode is {mode}: set compress.mode=plain or blast=alternating."
        )
    _check_range("seed", config.seed, 0, 2**31 - 1)
    _check_range("compress.seed", config.compress.seed, 0, 2**31 - 1)
    _check_range("data.valid_fraction", config.data.valid_fraction, 1e-6, 1 - 1e-6)
    for field in ("windows", "batch"):
        _check_range(f"eval.{field}", config.eval[field], 1, 2**31 - 1)
        _check_range(f"compress.{field}", config.compress[field], 1, 2**31 - 1)
    _check_range("budget.tokens", config.budget.tokens, 1, 2**31 - 1)
    _check_range("bench.workers", config.bench.workers, 0, 1024)
    _check_range("bench.seconds", config.bench.seconds, 1e-6, 3600)
    for phase in ("train", "heal"):
        _check_training(phase, config[phase])
    if config.heal.distil:
        one_of(config.heal.distil, TERMS, "heal.distil")
    _check_range("heal.distil_weight", config.heal.distil_weight, 0, 1)
    _check_range("heal.temperature", config.heal.temperature, 1e-3, 1e3)


def _check_training(phase: str, training: Config) -> None:
    ranges = {
        "learning_rate": (0.0, 1e3),
        "final_fraction": (0.0, 1.0),
        "weight_decay": (0.0, 1e3),
        "clip_norm": (1e-12, 1e12),
        "ema": (0.0, 1 - 1e-9),
    }
    for field, (least, most) in ranges.items():
        _check_range(f"{phase}.{field}", training[field], least, most)
    one_of(training.decay, DECAYS, f"{phase}.decay")
    try:
        plan(phase, training, "")
        schedule(training)
        train.data_parallel(training.batch)
    except InputError as error:
        raise InputError(f"config.{phase}: {error}") from None


def _check_range(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:  # nor is NaN
        raise InputError(f"config.{name} is {value}; it must lie between {least:g} and {most:g}.")


def relevant(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a flat config that can change a result: not those that another one switches off."""
    unused = {"stages", "model.remat", "model.scan"}
    unused |= {f"{phase}.ema" for phase in ("train", "heal") if not flat[f"{phase}.ema"]}
    # Healing is trained so, too.
    flat = {**flat, **{f"heal.{name}": flat[f"train.{name}"] for name in OF_TRAINING if f"train.{name}" in flat}}
    if flat["rules_file"]:  # what is in a file counts, not where it is
        flat = {**flat, "rules_file": compress.load(home_expanded(flat["rules_file"]))}
    if flat["budget.target"] != "microseconds":
        unused |= {"budget.records", "budget.tokens"}
    elif (file := home_expanded(flat["budget.records"])).is_file():
        flat = {**flat, "budget.records": hashlib.sha256(file.read_bytes()).hexdigest()}
    if flat["compress.mode"] == "plain":
        unused |= {"compress.windows", "compress.batch"}
    if not flat["heal.distil"]:
        unused |= {"heal.distil_weight"}
    if flat["heal.distil"] != "logits":
        unused |= {"heal.temperature"}
    if flat["data.source"] not in ("folder", "latents"):
        unused |= {"data.path"}
    if flat["data.source"] != "latents":
        unused |= {"data.scale"}
    if flat["data.source"] != "huggingface":
        unused |= {"data.name", "data.subset"}
    if flat["init_from"]:
        kept = {f"model.{field}" for field in ("family", "context", *COMPUTED)}
        unused |= {"data.tokenizer", "data.vocab_size", *(name for name in flat if name.startswith("model."))} - kept
        unused |= {name for name in flat if name.startswith("train.")}
    elif flat.get("data.tokenizer", "bpe") != "bpe":
        unused |= {"data.vocab_size"}
    return {name: value for name, value in flat.items() if name not in unused}


def resolved(made: Experiment) -> dict[str, Any]:
    """Return what the config came to: the model's sizes, the tokenizer and the spec of every layer."""
    return {
        "model": dataclasses.asdict(made.model),
        "window": made.window,
        "tokenizer": made.tokenizer_kind,
        "specs": {path: dataclasses.asdict(spec) for path, spec in made.specs.items()},
    }


def formats(made: Experiment) -> tuple[str, ...]:
    """Return the formats that the model's layers are factored into, without dense."""
    return tuple(dict.fromkeys(spec.format for spec in made.specs.values() if spec.format != "dense"))


def warnings(made: Experiment) -> list[str]:
    """Say which layers do not get smaller, with both counts."""
    said = []
    for path, spec in made.specs.items():
        before, after = spec.in_features * spec.out_features, parameter_count(spec)
        if spec.format != "dense" and after >= before:
            said.append(f"{path}: {spec.format} has {after:,} parameters, dense {before:,}: it does not compress.")
    return said


def plan(phase: str, training: Mapping[str, Any], data_hash: str) -> train.Plan:
    """Make the plan of one training phase."""
    return train.Plan(
        phase,
        training["steps"],
        training["batch"],
        training["log_every"],
        training["checkpoint_every"],
        data_hash,
    )


def schedule(training: Mapping[str, Any]) -> Any:
    """Make the learning rate's schedule."""
    return train.make_schedule(
        training["learning_rate"], training["steps"], training["warmup"], training["final_fraction"]
    )


def optimizer(training: Mapping[str, Any], dense: bool = False) -> optax.GradientTransformation:
    """Make the optimiser of one training phase; a dense model has no factors to treat otherwise."""
    return train.make_optimizer(
        schedule(training),
        training["weight_decay"],
        training["clip_norm"],
        factor_rates=training["factor_rates"] and not dense,
        decay="factors" if dense else training["decay"],
        ema=training["ema"],
    )
