"""Compress a Hugging Face checkpoint of any size, safetensors to safetensors, one matrix at a time.

    python -m blrlab.compress --checkpoint=FOLDER --out=FOLDER --net=llama7b --format=blast
    python -m blrlab.compress --checkpoint=FOLDER --out=FOLDER --format=monarch --rank=512 --blocks=16 \\
        --layers='model.layers.*.mlp.*'
    python -m blrlab.compress --checkpoint=FOLDER --out=FOLDER --rules=rules.json
    python -m blrlab.compress --random=llama7b --format=blast --each=2

The same command goes on where it was stopped. --net names the published ranks and blocks and, unless --layers or
--rules do, the layers. rules.json: [["*.q_proj", {"format": "blast", "rank": 512, "blocks": 16}], ...]; the first
that matches decides. Tensors that no rule matches are copied as they are. --random times random weights, without a
checkpoint, and says what all matrices of a net would take.
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from blrlab_ops import shapes
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from blrlab import environment, records
from blrlab.compress import request, streaming
from blrlab.compress.deal import Device
from blrlab.compress.fit import ALGORITHMS, algorithm_of
from blrlab.compress.folder import RECORDS, Folder
from blrlab.compress.plan import Choice, Rule, load
from blrlab.compress.rows import Row
from blrlab.errors import InputError, home_expanded, one_of
from blrlab.factors import FORMATS

EXIT_INPUT, EXIT_STOPPED = 2, 130
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
GIB = 1 << 30


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        return _time(options) if options.random else _compress(options)
    except (InputError, ValueError) as error:
        print(f"blrlab.compress: {error}", file=sys.stderr)
        return EXIT_INPUT
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"blrlab.compress: {error.strerror or error}{where}", file=sys.stderr)
        return EXIT_INPUT
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(
            "blrlab.compress: out of memory: another process may hold the device's, or the layer is too large.",
            file=sys.stderr,
        )
        return EXIT_INPUT
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here.", file=sys.stderr)
        return EXIT_STOPPED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m blrlab.compress", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default="", help="a folder of safetensors and config.json, or a hub name")
    parser.add_argument("--out", type=Path, help="the folder to write; with --random: a folder for the records")
    parser.add_argument("--net", default="", help=f"whose published ranks and blocks: {', '.join(shapes.NETS)}")
    parser.add_argument("--format", default="blast", help=f"of layers whose rule names none: {', '.join(FORMATS)}")
    parser.add_argument("--rank", type=int, default=0, help="r (monarch: b r'); default: the published one")
    parser.add_argument("--blocks", default="", help="b, or b1xb2; default: the published one")
    parser.add_argument("--block-rank", type=int, default=0, help="r' of monarch, instead of --rank")
    parser.add_argument("--layers", default="", help="patterns of paths, commas between, such as model.layers.*.mlp.*")
    parser.add_argument("--rules", type=Path, help="a JSON list of [pattern, fields], instead of --layers")
    parser.add_argument("--algorithm", default="", help="default: the format's own")
    parser.add_argument("--dtype", default="", help="of the factors; default: of each weight its own")
    parser.add_argument("--seed", type=int, default=0, help="of random starts; default: 0")
    parser.add_argument("--shard-gib", type=float, default=2.0, help="the most that a file holds, GiB; default: 2")
    parser.add_argument("--fresh", action="store_true", help="compress anew what --out holds already")
    parser.add_argument("--random", default="", metavar="NET", help=f"time only: {', '.join(streaming.COUNTS)}")
    parser.add_argument("--each", type=int, default=2, help="random weights of each shape; default: 2")
    return parser


def _compress(options: argparse.Namespace) -> int:
    if not options.checkpoint or not options.out:
        raise InputError("give --checkpoint=FOLDER and --out=FOLDER, or --random=NET.")
    if not 0 <= options.seed < 2**31:
        raise InputError(f"--seed is {options.seed}: it is a whole number from 0 to {2**31 - 1}.")
    if not 0 < options.shard_gib < math.inf:
        raise InputError(f"--shard-gib is {options.shard_gib:g}: it is a positive number.")
    wanted = request.read(
        options.checkpoint,
        _rules(options),
        _defaults(options),
        one_of(options.net, shapes.NETS, "net") if options.net else "",
        options.algorithm,
        _dtype(options.dtype),
        options.seed,
        int(options.shard_gib * GIB),
    )
    folder, devices, console = Folder(home_expanded(str(options.out)), wanted), jax.local_devices(), Console()
    with folder.opened(options.fresh):
        there, whole = len(folder.rows), len(wanted.specs)
        if there:
            _say(console, f"{there} of {whole} matrices are in {folder.root} already")
        if folder.todo:
            folder.start(_env(devices))
        cost = {path: _cost(spec.in_features, spec.out_features, spec.rank) for path, spec in wanted.specs.items()}
        with _progress(console) as progress:
            task = progress.add_task("", total=sum(cost[path] for path in folder.todo), count=f"{there}/{whole}")

            def done(row: Row) -> None:
                _say(progress.console, _line(row))
                progress.update(task, advance=cost[row["path"]], count=f"{len(folder.rows)}/{whole}")

            found = streaming.compress(wanted, folder, devices, done)
    _say(console, f"factored layers {found['layer_factor']:.2f}x smaller, the model {found['model_factor']:.2f}x")
    _say(console, f"{found['seconds']:.1f} s of fits, {found['wall_seconds']:.1f} s in all; {_peaks(found)}")
    _say(console, f"wrote {folder.root}")
    return 0


def _time(options: argparse.Namespace) -> int:
    for flag in ("checkpoint", "rules", "layers", "net"):
        if getattr(options, flag):
            raise InputError(f"--random takes no --{flag}: it names the net itself, and times all of its layers.")
    if options.each < 1:
        raise InputError(f"--each is {options.each}: it is a number from 1 on.")
    specs = streaming.random_specs(options.random, Choice(**_defaults(options)))
    algorithm = algorithm_of(options.format, options.algorithm)
    devices, console = jax.local_devices()[:1], Console()
    file = None
    if options.out:
        folder = home_expanded(str(options.out))
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / RECORDS
        records.append(file, _env(devices))
    with _progress(console) as progress:
        jobs = len(specs) * options.each
        cost = {name: _cost(spec.in_features, spec.out_features, spec.rank) for name, spec in specs.items()}
        task = progress.add_task("", total=options.each * sum(cost.values()), count=f"0/{jobs}")
        rows: list[Row] = []

        def done(row: Row) -> None:
            rows.append(row)
            _say(progress.console, _line(row))
            if file:
                records.append(file, row)
            progress.update(task, advance=cost[row["layer"]], count=f"{len(rows)}/{jobs}")

        dtype = _dtype(options.dtype or "bfloat16")
        found = streaming.time_random(options.random, specs, algorithm, dtype, options.each, devices, done)
    for name, layer in found["layers"].items():
        _say(console, f"{name}: {layer['matrices']} matrices of {layer['seconds_each']:.2f} s each")
    _say(
        console,
        f"EXTRAPOLATED, not measured: all {found['matrices']} matrices of {options.random} would take "
        f"{found['seconds']:.0f} s on one {found['device']}, from {found['measured']} random weights; {_peaks(found)}",
    )
    if file:
        records.append(file, found)
        _say(console, f"wrote {file}")
    return 0


def _rules(options: argparse.Namespace) -> list[Rule] | None:
    """Read --rules or --layers; None where neither is given."""
    if options.rules and options.layers:
        raise InputError("--rules and --layers both say which layers: give one of them.")
    if options.layers:
        return [(pattern.strip(), {}) for pattern in options.layers.split(",") if pattern.strip()]
    return load(options.rules) if options.rules else None


def _defaults(options: argparse.Namespace) -> dict[str, Any]:
    one_of(options.format, FORMATS, "format")
    if options.algorithm:
        one_of(options.algorithm, [name for known in ALGORITHMS.values() for name in known], "algorithm")
    for flag in ("rank", "block_rank"):
        if getattr(options, flag) < 0:
            raise InputError(f"--{flag.replace('_', '-')} is {getattr(options, flag)}: it is a number from 0 on.")
    parts = options.blocks.lower().split("x") if options.blocks else ["0"]
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise InputError(f'--blocks is like 16 or 8x16, not "{options.blocks}".')
    sizes = tuple(map(int, parts))
    blocks = sizes[0] if len(sizes) == 1 else sizes
    return {"format": options.format, "rank": options.rank, "blocks": blocks, "block_rank": options.block_rank}


def _dtype(name: str) -> str:
    return DTYPES[one_of(name, DTYPES, "dtype")] if name else ""


def _env(devices: Sequence[Device]) -> Row:
    backend = jax.default_backend()
    name = "" if backend == "cpu" else devices[0].device_kind
    return {"kind": "env", **environment.describe(name, backend, len(devices))}


def _cost(in_features: int, out_features: int, rank: int) -> int:
    """Return what a fit's time is about proportional to."""
    return in_features * out_features * max(rank, 1)


def _line(row: Row) -> str:
    rank = f"r' {row['block_rank']}" if row["block_rank"] else f"r {row['rank']}"
    smaller = row["params_before"] / row["params_after"]
    return (
        f"{row['path']:<40} {row['format']} {rank}  error {row['relative_error']:.4f}  {smaller:.2f}x smaller  "
        f"{row['seconds']:.1f} s"
    )


def _peaks(row: Row) -> str:
    device = row["device_peak_bytes"]
    on_device = f", {device / GIB:.1f} GiB on a device" if device else ""
    return f"at most {row['host_peak_bytes'] / GIB:.1f} GiB of memory{on_device}"


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("matrices {task.fields[count]}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        speed_estimate_period=3600.0,
    )


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        os._exit(status)  # a fit that a device is at cannot be called off, nor is it waited for
    sys.exit(status)
