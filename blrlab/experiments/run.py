"""Run an experiment: `python -m blrlab.experiments.run --config=configs/gpt2_monarch.py`.

Dense model, compression, healing, evaluation, kernels and report, each a stage that starts from what the former left
in the work folder. The same command goes on after a kill, and does only what changed.
"""

import errno
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# JAX and torch share a GPU: neither may take all of its memory. Read when JAX starts, so set before it is imported.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from blrlab.errors import InputError
from blrlab.experiments import command

EXIT_INPUT, EXIT_STOPPED = 2, 130


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
        print("stopped; the same command with this --workdir goes on from here.", file=sys.stderr)
        return EXIT_STOPPED
    except OSError as error:
        if error.errno not in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENOTDIR,
        ):
            raise
        where = f" ({error.filename})" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}.")


def _stop(*_: object) -> None:
    """Leave a terminated run as an interrupted one: what is written is whole, and the next command goes on."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _fail(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return EXIT_INPUT


def _run(argv: Sequence[str]) -> int:
    config, name, scale, folder = command.load(argv)
    # Imported here so that a mistake on the command line is answered before JAX has loaded.
    from blrlab.experiments import build, kernel_stages, model_stages
    from blrlab.experiments.workdir import Workdir, chosen

    stages = chosen(config.stages)
    folder = folder or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    flat = {field: value for field, value in command.flatten(config).items() if field != "stages"}
    workdir = Workdir(folder, flat, stages)
    made = build.experiment(config)
    said = workdir.check()
    _check_disk(folder, made)
    run = model_stages.Run(name, scale, made, workdir, lambda line: print(line, flush=True))
    work = {
        "data": model_stages.prepare_data,
        "dense": model_stages.train_dense,
        "compress": model_stages.compress_dense,
        "heal": model_stages.heal,
        "continue": model_stages.continue_dense,
        "eval": model_stages.evaluate,
        "bridge": kernel_stages.bridge,
        "bench": kernel_stages.benchmark,
        "report": kernel_stages.make_report,
    }
    fresh = not folder.exists()
    with workdir.locked():
        run.say(f"{name}, scale {scale or '-'}, in {folder}")
        for sentence in (*said, *(f"warning: {line}" for line in build.warnings(made))):
            run.say(sentence)
        run.say(kernel_stages.describe_specs(run))
        (folder / "config.json").write_text(json.dumps({"scale": scale, **config.to_dict()}, indent=1), "utf-8")
        try:
            for stage in stages:
                workdir.run(stage, lambda path, stage=stage: work[stage](run, path), run.say)
        except InputError:
            if fresh:
                workdir.forget()
            raise
        workdir.gather()
    if "report" in stages:
        run.say(f"done: {folder / 'report.html'}")
    else:
        run.say(f"done: {folder / 'records.jsonl'}")
    return 0


def _check_disk(folder: Path, made) -> None:
    """Refuse to begin where two training checkpoints and the finished models would not fit."""
    from blrlab import compress

    needed = 4 * compress.parameter_count(made.dense_shapes) * (2 * 3 + 4)
    home = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not os.access(home, os.W_OK):
        raise InputError(f"no permission to write in {home}.")
    free = shutil.disk_usage(home).free
    if free < needed:
        raise InputError(f"{home} has {free / 1e6:.0f} MB free, and this run may need {needed / 1e6:.0f} MB.")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main(sys.argv[1:]))
