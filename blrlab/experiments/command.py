"""From a command line to a locked config, every mistake being one sentence.

Order: the config file, its scale (`file.py:scale`), then `--config.field=value` overrides (ml_collections).
"""

import difflib
import importlib.util
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from blrlab.errors import InputError
from blrlab.experiments import defaults
from blrlab.experiments.defaults import Config

USAGE = """usage: python -m blrlab.experiments.run --config=FILE[:SCALE] [--workdir=FOLDER] [--config.FIELD=VALUE ...]

  --config=configs/gpt2_monarch.py         what to do; :small or :full after it sets the scale
  --workdir=runs/mine                      where to work; an older one goes on from where it stands
  --config.factors.format=blast            any field of the config, for this run
  --config.stages=compress,bench           only these stages

Without a scale: full where JAX finds an accelerator, small where not. Exit codes: 0 done, 2 wrong input, 130 stopped.
"""


def load(argv: Sequence[str]) -> tuple[Config, str, str, Path | None]:
    """Read a command line (without the program's name).

    Returns:
      (config, its name, its scale, the work folder or None).

    Raises:
      InputError: anything about it is wrong.
    """
    values, overrides = _split(argv)
    if "config" not in values:
        raise InputError("no config: give --config=configs/gpt2_monarch.py or another config file.")
    path, _, scale = values["config"].partition(":")
    if not path:
        raise InputError("no config: --config is empty.")
    make = _get_config(Path(path))
    scaled = bool(inspect.signature(make).parameters)
    if scale and not scaled:
        raise InputError(f'{path} has no scales: its get_config takes no argument, but "{scale}" was given.')
    scale = scale or (pick_scale() if scaled else "")
    try:
        config = make(scale) if scaled else make()
    except (Exception, SystemExit) as error:  # whatever a user's function raises
        raise InputError(f"{path}: {' '.join(str(error).split()) or type(error).__name__}") from None
    if not isinstance(config, ConfigDict):
        raise InputError(f"{path}: get_config returned {type(config).__name__}, not a ConfigDict.")
    family = flatten(config).get("model.family", "gpt2")
    wanted = defaults.FAMILIES.get(family, defaults.gpt2)("small")
    missing = [field for field in flatten(wanted) if field not in flatten(config)]
    if missing:
        raise InputError(f"{path}: the config lacks {missing[0]}: start it from blrlab.experiments.defaults.")
    workdir = values.get("workdir")
    if workdir == "":
        raise InputError("--workdir is empty.")
    return override(config, overrides), Path(path).stem, scale, Path(workdir) if workdir else None


def pick_scale() -> str:
    """Return full if JAX has an accelerator, else small."""
    import jax

    return "small" if jax.default_backend() == "cpu" else "full"


def _split(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Separate the command's own flags from the overrides; both `--a=b` and `--a b` are taken."""
    values: dict[str, str] = {}
    overrides: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith("-"):
            raise InputError(f'"{word}" is not a flag; see --help.')
        name = name.lstrip("-")
        if not equals:
            if not words or words[0].startswith("--"):
                raise InputError(f"--{name} needs a value: --{name}=VALUE.")
            value = words.pop(0)
        if name in ("config", "workdir"):
            values[name] = value
        elif name.startswith("config."):
            overrides.append(f"--{name}={value}")
        else:
            hint = difflib.get_close_matches(name, ("config", "workdir"), n=1)
            raise InputError(f'unknown flag "--{name}".' + (f" Did you mean --{hint[0]}?" if hint else ""))
    return values, overrides


def _get_config(path: Path) -> Any:
    """Load the config file and return its `get_config`."""
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.glob("*.py")], n=1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise InputError(f"no config file at {path}.{hint}")
    module_spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise InputError(f"{path} is not a Python file.")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's file raises
        raise InputError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from None
    if not callable(getattr(module, "get_config", None)):
        raise InputError(f"{path} has no function get_config(scale).")
    return module.get_config


def override(config: Config, overrides: Sequence[str]) -> Config:
    """Apply `--config.field=value` flags and lock the config.

    Raises:
      InputError: a field is unknown (with the nearest known one) or a value has the wrong type.
    """
    known = flatten(config)
    for flag in overrides:
        name, value = flag.removeprefix("--config.").split("=", 1)
        if name not in known:
            if any(field.startswith(f"{name}.") for field in known):
                raise InputError(f'"{name}" is a group of fields; set one of them, such as {_first(name, known)}.')
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f' Did you mean "{near[0]}"?' if near else ""
            raise InputError(f'unknown config field "{name}".{hint}')
        _check_type(name, value, known[name])
    holder = flags.FlagValues()
    argv = ["run", *overrides]
    config_flags.DEFINE_config_dict("config", config, flag_values=holder, sys_argv=argv)
    try:
        holder(argv)
    except (flags.Error, TypeError, ValueError) as error:
        raise InputError(f"wrong value on the command line: {str(error).splitlines()[0]}") from None
    return config.lock()


def _first(name: str, known: Mapping[str, Any]) -> str:
    return next(field for field in known if field.startswith(f"{name}."))


def _check_type(name: str, value: str, default: Any) -> None:
    kinds = {bool: "true or false", int: "a whole number", float: "a number", tuple: "a tuple"}
    try:
        if type(default) in (int, float):
            type(default)(value)
        elif isinstance(default, bool) and value.lower() not in ("true", "false", "1", "0"):
            raise ValueError
    except ValueError:
        raise InputError(f'config.{name} is {kinds[type(default)]}, not "{value}".') from None


def flatten(config: Config, prefix: str = "") -> dict[str, Any]:
    """Return {dotted name: value} of every field."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        path = f"{prefix}{name}"
        flat |= flatten(value, f"{path}.") if isinstance(value, ConfigDict) else {path: value}
    return flat
