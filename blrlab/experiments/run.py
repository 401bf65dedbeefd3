"""Run an experiment: `python -m blrlab.experiments.run --config=configs/gpt2_monarch.py`.

Dense model, compression, healing, evaluation, kernels and report, each a stage that starts from what the former left
in the work folder. The same command goes on after a kill, and does only what changed.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

# JAX and torch share a GPU: JAX must not take most of it at its start. Read then, so set before it is imported.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from blrlab.errors import InputError
from blrlab.experiments import command
from blrlab.experiments.workdir import Workdir, chosen
from blrlab.records import write_text

if TYPE_CHECKING:
    from blrlab.experiments import build

EXIT_INPUT, EXIT_STOPPED = 2, 130
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory")  # as JAX and PyTorch say it


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    if {"--help", "-h", "--helpfull"} & set(argv):
        print(command.USAGE, end="")
        return 0
    try:
        return _run(argv)
    except InputError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("stopped; the same command with its --workdir goes on from here.", file=sys.stderr)
        return EXIT_STOPPED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on
        return EXIT_STOPPED
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}.")
    except RuntimeError as error:
        if not any(sign in str(error) for sign in OUT_OF_MEMORY):
            raise
        parts = "config.train, config.heal, config.compress, config.eval or, where images are drawn, config.sample"
        return _fail(f"out of memory: lower the batch of {parts}.")


def _stop(*_: object) -> None:
    """Leave a terminated run as an interrupted one: what is written is whole, and the next command goes on."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _fail(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return EXIT_INPUT


def _run(argv: Sequence[str]) -> int:
    config, name, scale, folder = command.load(argv)
    stages = chosen(config.stages)
    # Imported here so that a mistake on the command line is answered before the models have loaded.
    from blrlab import environment
    from blrlab.experiments import budget_stage, build, kernel_stages, model_stages, sample_stage

    folder = folder or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    made = build.experiment(config)
    if "bench" in stages and environment.version("torch"):
        kernel_stages.check_benchmark(made)
    if "allocate" in stages:
        budget_stage.check(made)
    if "sample" in stages:
        sample_stage.check(made)
    machine = build.machine()
    flat = build.relevant(command.flatten(config))
    flat |= {f"machine.{field}": machine[field] for field in ("device", "jax", "torch", "triton")}
    workdir = Workdir(folder, flat, stages)
    run = model_stages.Run(name, scale, made, workdir, lambda line: print(line, flush=True))
    work = {
        "data": model_stages.prepare_data,
        "dense": model_stages.train_dense,
        "curves": budget_stage.curves,
        "allocate": budget_stage.allocate,
        "compress": model_stages.compress_dense,
        "heal": model_stages.heal,
        "continue": model_stages.continue_dense,
        "eval": model_stages.evaluate,
        "sample": sample_stage.sample,
        "bridge": kernel_stages.bridge,
        "roofline": kernel_stages.predict_roofline,
        "bench": kernel_stages.benchmark,
        "report": kernel_stages.make_report,
    }
    _check_disk(workdir, made, stages)
    with workdir.locked():
        said = workdir.check()
        run.say(f"{name}, scale {scale or '-'}, in {folder}; after a stop, --workdir={folder} goes on")
        for sentence in (*said, *(f"warning: {line}" for line in build.warnings(made))):
            run.say(sentence)
        run.say(kernel_stages.describe_specs(run))
        resolved = {"scale": scale, **config.to_dict(), "resolved": build.resolved(made)}
        write_text(folder / "config.json", json.dumps(resolved, indent=1))
        for stage in stages:
            workdir.run(stage, lambda path, stage=stage: work[stage](run, path), run.say)
        workdir.gather()
    run.say(f"done: {folder / ('report.html' if 'report' in stages else 'records.jsonl')}")
    return 0


def _check_disk(workdir: Workdir, made: "build.Experiment", stages: Sequence[str]) -> None:
    """Refuse to begin where two training checkpoints and the finished models would not fit."""
    from blrlab import compress

    home = next(parent for parent in (workdir.root, *workdir.root.absolute().parents) if parent.exists())
    if not os.access(home, os.W_OK):
        raise InputError(f"no permission to write in {home}.")
    ahead = [stage for stage in ("dense", "heal", "continue") if stage in stages and not workdir.done(stage)]
    if ahead:
        averages = any(made.config[phase].ema for phase in ("train", "heal"))
        # Two checkpoints of parameters, both moments and perhaps an average, and each stage's result.
        copies = 2 * (3 + averages) + len(ahead)
        needed = 4 * copies * compress.parameter_count(made.dense_shapes)
        free = shutil.disk_usage(home).free
        if free < needed:
            raise InputError(f"{home} has {free / 1e6:.0f} MB free, and this run may need {needed / 1e6:.0f} MB.")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main(sys.argv[1:]))
