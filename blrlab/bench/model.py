"""Benchmark a whole model, dense and with the factors that a config plans: verified against float64, then timed.

    python -m blrlab.bench.model --config=configs/gpt2_monarch.py:small
    python -m blrlab.bench.model --config=configs/gpt2_monarch.py:full --formats=dense,low_rank,monarch,blast
    python -m blrlab.bench.model --config=configs/gpt2_blast.py --config.factors.rank=96 --backends=torch
    python -m blrlab.bench.model --config=configs/llama7b_blast.py:full --phases=prefill,decode --batch=1,4,16
    python -m blrlab.bench.model --config=configs/vit_b_blast.py:full --batch=1,64 --compile

Weights are random, since times do not depend on them. Phases: forward (all logits; of images, their classes; of
latents, a step), prefill (key-value cache, last logits), decode (one token more) and train_step (one optimiser step).
PyTorch's models are those of transformers and diffusers. JAX's are those of blrlab.models, measured for GPT-2, all of
which is verified; larger ones are drawn on the device and verified at their first blocks (blrlab.bench.full_size).
Rows are written as they are measured; the same command with its --out goes on where it was stopped. The plan of a
config is made by blrlab.compress, so JAX is loaded for its shapes even where xla is not timed.
On a GPU xla is measured last, by a process of its own that is given the ceilings (blrlab.bench.beside says why).

Exit status: 0 done, 1 a program failed its gate, 2 wrong input, 130 stopped.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# JAX and torch share a GPU: JAX must not take most of it at its start. Read then, so set before it is imported.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from blrlab.bench import flags
from blrlab.errors import InputError, did_you_mean, home_expanded, one_of

EXIT_FAILED, EXIT_INPUT, EXIT_STOPPED = 1, 2, 130
BACKENDS = ("torch", "xla")
DTYPES = ("bfloat16", "float16", "float32")
NEEDS = "train_step is xla's, prefill and decode are torch's, and xla's column is GPT-2's"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options, rest = _parser().parse_known_args(given)
    try:
        return _run(options, rest, given)
    except ValueError as error:  # an InputError is one
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}")
    except KeyboardInterrupt:
        print("\nstopped; the same command with its --out goes on from here.", file=sys.stderr)
        return EXIT_STOPPED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m blrlab.bench.model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="  --config.FIELD=VALUE  any field of the config, such as --config.model.layers=2",
    )
    parser.add_argument("--config", default="", help="a config file; :small or :full after it sets the scale")
    parser.add_argument("--backends", default="torch,xla", help="default: torch,xla")
    parser.add_argument("--formats", default="", help="default: dense and the config's")
    parser.add_argument("--impl", default="", help="of factored layers in torch; default: best; of GPT-2 all but ref")
    parser.add_argument("--compile", action="store_true", help="also every model under torch.compile, in torch")
    parser.add_argument("--phases", default="all", help="forward, prefill, decode, train_step; default: all")
    parser.add_argument("--batch", default="1", help="sequences, commas between; default: 1")
    parser.add_argument("--tokens", default="", help="of a sequence, commas between; default: the published number")
    parser.add_argument("--dtype", default="", help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--seconds", type=float, default=0.5, help="of measuring, for each program; default: 0.5")
    parser.add_argument("--device", default="", help="default: the first CUDA GPU, else the CPU")
    parser.add_argument("--out", type=Path, help="the file of records; default: runs/model-<time>/records.jsonl")
    parser.add_argument("--fresh", action="store_true", help="measure anew what --out holds already")
    parser.add_argument("--ceilings", default="", help=argparse.SUPPRESS)  # for the process that runs XLA
    return parser


def _fail(sentence: str) -> int:
    print(f"blrlab.bench.model: {sentence}", file=sys.stderr)
    return EXIT_INPUT


def _run(options: argparse.Namespace, rest: Sequence[str], arguments: Sequence[str]) -> int:
    _check_flags(rest)
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"the benchmark of a model needs {package}: pip install {package}.")
    flags.positive(options.seconds, "--seconds")
    device = flags.device(options.device)
    dtype = one_of(options.dtype or ("bfloat16" if device == "cuda" else "float32"), DTYPES, "dtype")
    net = _net(options, rest)
    impls = _impls(options, net)
    groups = _groups(options, net, dtype, impls)
    from blrlab.bench import card, model_rows, runner
    from blrlab.bench.results import Results

    out = flags.records_file(options.out, Path("runs") / time.strftime("model-%Y%m%d-%H%M%S") / "records.jsonl")
    at_hand = card_from(options.ceilings, dtype, device) if options.ceilings else card.here(dtype, device)
    settings, results = runner.settings(impls, options.seconds, at_hand), Results(out, options.fresh)
    if not at_hand.is_gpu or options.ceilings:
        return measure(net, groups, settings, results)
    # measuring ceilings made CUDA graphs, which XLA's profiler does not bear
    own = tuple(impl for impl in impls if impl != model_rows.XLA)
    status = measure(net, groups, dataclasses.replace(settings, impls=own), results) if own else 0
    theirs = impls[len(own) :]  # xla, or nothing
    aside = [group.phase for group in groups if model_rows.planned(net, group.phase, theirs)]
    if not aside:
        return status
    command = _aside(arguments, aside, out, at_hand)
    return max(status, _status(subprocess.run(command, check=False).returncode))


def _aside(arguments: Sequence[str], phases: Iterable[str], out: Path, card: Any) -> list[str]:
    """Return the command that measures XLA alone, with the ceilings of a card; of repeated flags the last counts."""
    return [
        *(sys.executable, "-m", "blrlab.bench.model", *flags.without(arguments, "--fresh"), "--backends=xla"),
        *(f"--phases={','.join(dict.fromkeys(phases))}", f"--out={out}"),
        f"--ceilings={json.dumps(dataclasses.asdict(card.measured))}",
    ]


def _status(code: int) -> int:
    """Return the exit status of the process that ran XLA; one that a signal ended has a negative one."""
    if code >= 0:
        return code
    print(f"the process that ran XLA ended by signal {-code}; the same command with its --out goes on", file=sys.stderr)
    return EXIT_FAILED


def card_from(text: str, dtype: str, device: str) -> Any:
    """Make the Card of a device whose ceilings another process measured.

    Args:
      text: its `blrlab_ops.devices.Device` as a JSON object.
      dtype: of the matrix products measured.
      device: cuda or cpu.

    Raises:
      InputError: the text is no such object.
    """
    import torch
    from blrlab_ops import devices

    from blrlab.bench.card import Card

    try:
        fields = json.loads(text)
        capability = fields["compute_capability"] and tuple(fields["compute_capability"])
        measured = devices.Device(**{**fields, "compute_capability": capability})
    except (ValueError, TypeError, KeyError):
        raise InputError("--ceilings is no device's as another process of this command passes them.") from None
    where = torch.device(device)
    sheet = devices.match(torch.cuda.get_device_name(where)) if where.type == "cuda" else None
    return Card(where, measured, sheet, dtype)


def measure(net: Any, groups: Sequence[Any], settings: Any, results: Any) -> int:
    """Measure what the results lack, add and print every row; return the exit status, 1 where a gate failed."""
    from blrlab import environment
    from blrlab.bench import model_rows
    from blrlab.bench.end_to_end import bench_model
    from blrlab.bench.full_size import bench_full_size

    def is_there(group: Any, op: str, impl: str) -> bool:
        return results.has(model_rows.identity(net, group, op, impl), settings.machine)

    def is_done(group: Any) -> bool:
        return all(is_there(group, *each) for each in model_rows.planned(net, group.phase, settings.impls))

    groups = [group for group in groups if model_rows.planned(net, group.phase, settings.impls)]
    todo = [group for group in groups if not is_done(group)]
    if len(todo) < len(groups):
        at = ", ".join(results.commits())
        print(f"{len(groups) - len(todo)} of {len(groups)} phases are in {results.path} (commit {at}); --fresh: anew")
    if todo:
        here = environment.describe(settings.card.measured.name, "gpu" if settings.card.is_gpu else "cpu")
        results.start({"kind": "env", **here, "peaks": settings.card.peaks()})
    failed = 0
    in_full = net.family.running is not None
    for rows in bench_full_size(net, todo, settings, is_there) if in_full else bench_model(net, todo, settings):
        results.add(rows)
        failed += sum(row["passed"] is False for row in rows)
        for row in rows:
            print(model_rows.line(row), flush=True)
    print(f"wrote {results.path}")
    return EXIT_FAILED if failed else 0


def _check_flags(rest: Iterable[str]) -> None:
    known = [flag for action in _parser()._actions for flag in action.option_strings]
    for word in rest:
        flag = word.partition("=")[0]
        if flag.startswith("--config.") and "=" in word:
            continue
        if flag.startswith("--config."):
            raise InputError(f"{flag} needs a value: {flag}=VALUE.")
        raise InputError(f'unknown flag "{word}"; see --help.{did_you_mean(flag, known)}')


def _impls(options: argparse.Namespace, net: Any) -> tuple[str, ...]:
    """Return the implementations of `model_rows.planned`, of the backends named."""
    from blrlab_ops import dispatch

    from blrlab.bench.model_rows import BEST, COMPILED, DENSE_IMPL, JOINED, XLA

    backends = [one_of(word, BACKENDS, "backend") for word in flags.words(options.backends)]
    if not backends:
        raise InputError(f"no backend is named: give some of {', '.join(BACKENDS)}.")
    own = (BEST, JOINED, *dict.fromkeys(impl for op in dispatch.IMPLS for impl in dispatch.impls(op)))
    named = [one_of(word, own, "impl") for word in flags.words(options.impl)]
    if not named:
        named = [BEST] if net.family.running else [impl for impl in own if impl not in ("ref", JOINED)]
    in_torch = (DENSE_IMPL, *named, *((COMPILED,) if options.compile else ()))
    return (*(in_torch if "torch" in backends else ()), *((XLA,) if "xla" in backends else ()))


def _net(options: argparse.Namespace, rest: Sequence[str]) -> Any:
    """Read the config, and plan every format with its rules."""
    from blrlab import compress
    from blrlab.bench import nets
    from blrlab.bench.model_rows import OPS, Net
    from blrlab.experiments import command

    if not options.config:
        raise InputError("no config: give --config=configs/gpt2_monarch.py or another config file.")
    config, _, _, _ = command.load([f"--config={options.config}", *rest])
    family = nets.FAMILIES[one_of(config.model.family, nets.FAMILIES, "model family")]
    sizes = _sizes(config, family)
    formats = [one_of(word, OPS, "format") for word in flags.words(options.formats)] or ["dense", config.factors.format]
    layers, factors = family.linears(sizes), config.factors.to_dict()
    names = {path: compress.called(path, factors["net"]) for path in layers}
    rules = compress.load(home_expanded(config.rules_file)) if config.rules_file else config.rules
    plans: dict[str, Any] = {op: {} for op in formats}
    for op in plans.keys() - {"dense"}:
        plans[op] = compress.plan(layers, rules, {**factors, "format": op}, factors["net"], names)
    trainer = _trainer(config) if "train_step" in family.phases else None
    return Net(nets.name(sizes), sizes, plans, trainer, config.seed)


def _sizes(config: Any, family: Any) -> Any:
    """Return the sizes of a config's model, those of its checkpoint where it starts from one."""
    from blrlab.models import hf

    if config.init_from:
        found, sizes = hf.describe(hf.find(config.init_from), dtype=config.model.dtype, dropout=0.0)
        if found.config is not family.sizes:
            raise InputError(f"{config.init_from} is a {found.name} checkpoint, and this config is for {family.name}.")
        return sizes
    names = [field.name for field in dataclasses.fields(family.sizes) if field.name in config.model]
    return family.sizes(**{name: config.model[name] for name in names})


def _trainer(config: Any) -> Any:
    """Return what starts training a model with the config's optimiser."""
    import jax

    from blrlab import train

    given = config.train
    schedule = train.make_schedule(given.learning_rate, given.steps, given.warmup, given.final_fraction)
    optimizer = train.make_optimizer(
        schedule, given.weight_decay, given.clip_norm, factor_rates=given.factor_rates, decay=given.decay
    )

    def start(model: Any, params: Any) -> tuple[Any, Any]:
        # a key of its own: the step donates the state that holds it
        state = train.init_state(params, optimizer, jax.random.key(config.seed))
        return state, train.make_step(model, optimizer)

    return start


def _groups(options: argparse.Namespace, net: Any, dtype: str, impls: Sequence[str]) -> list[Any]:
    from blrlab.bench.model_rows import PHASES, Group, planned

    able = [phase for phase in PHASES if planned(net, phase, impls)]
    words = flags.words(options.phases)
    phases = able if words == ["all"] else [one_of(word, PHASES, "phase") for word in words]
    for phase in phases:
        if phase not in net.family.phases:
            raise InputError(f"{net.name} has no {phase}: its phases are {', '.join(net.family.phases)}.")
        if phase not in able:
            raise InputError(f"nothing named runs {phase}: {NEEDS}.")
    tokens = flags.counts(options.tokens or str(net.family.tokens(net.sizes)), "--tokens", 1)
    batches = flags.counts(options.batch, "--batch", 1)
    found = [Group(phase, batch, count, dtype) for batch in batches for count in tokens for phase in phases]
    if not found:
        raise InputError("nothing to measure: name at least one of --phases, --tokens and --batch.")
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    sys.exit(main())
