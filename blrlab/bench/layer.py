"""Benchmark layers over kernel backends: every one verified against float64, then timed.

    python -m blrlab.bench.layer --net=llama7b --layer=qkvo --tokens=1,16,1024 --impl=all
    python -m blrlab.bench.layer --net=gpt2s --op=dense,monarch --impl=torch_eager,torch_bmm,triton_two_stage
    python -m blrlab.bench.layer --shape=4096x4096 --blocks=16 --rank=1024 --tokens=0,1
    python -m blrlab.bench.layer --net=all --tokens=1,16,0,16384 --out=runs/all/records.jsonl

Rows are written as they are measured; the same command goes on where it was stopped. Ranks and blocks of a named net
are the published ones. On a machine without a GPU it measures the processor, and verifies the Triton kernels in their
interpreter.
"""

import argparse
import faulthandler
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# JAX and torch share a GPU: JAX must not take most of it at its start. Read then, so set before it is imported.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from blrlab_ops.cost import FORMATS as OPS

from blrlab.bench import flags
from blrlab.errors import InputError, one_of

EXIT_INPUT, EXIT_STOPPED = 2, 130
CUSTOM = "custom"
PUBLISHED = 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except (InputError, ValueError) as error:
        print(f"blrlab.bench.layer: {error}", file=sys.stderr)
        return EXIT_INPUT
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"blrlab.bench.layer: {error.strerror or error}{where}", file=sys.stderr)
        return EXIT_INPUT
    except KeyboardInterrupt:
        print("\nstopped; the same command with its --out goes on from here.", file=sys.stderr)
        return EXIT_STOPPED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m blrlab.bench.layer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--net", default="", help="nets of the table of shapes, commas between, or all")
    parser.add_argument("--layer", default="", help="layers of those nets; default: all of them")
    parser.add_argument("--tokens", default="0", help="numbers of rows; 0: the published one of each layer")
    parser.add_argument("--op", default=",".join(OPS), help=f"formats; default: {','.join(OPS)}")
    parser.add_argument("--impl", default="all", help="backends, commas between, or all")
    parser.add_argument("--dtype", default="", help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--shape", default="", help="a layer of your own, in x out, such as 4096x11008")
    parser.add_argument("--blocks", default="", help="of --shape: b, or b1xb2; default: 16")
    parser.add_argument("--rank", type=int, default=0, help="of --shape: r (monarch: b r'); default: half the weights")
    parser.add_argument("--tune", action="store_true", help="tune own kernels first that are not, seconds for each")
    parser.add_argument("--seconds", type=float, default=0.1, help="of measuring, for each contender; default: 0.1")
    parser.add_argument("--device", default="", help="default: the first CUDA GPU, else the CPU")
    parser.add_argument("--paper", type=Path, help="a clone of the source paper's repository, for its own kernels")
    parser.add_argument("--out", type=Path, help="the file of records; default: runs/layers-<time>/records.jsonl")
    parser.add_argument("--workers", type=int, default=0, help="processes that compile ahead on a GPU; default: 0")
    parser.add_argument("--fresh", action="store_true", help="measure anew what --out holds already")
    return parser


def _run(options: argparse.Namespace) -> int:
    if importlib.util.find_spec("torch") is None:
        raise InputError("benchmarks need PyTorch: pip install torch.")
    from blrlab.bench import backends, card, paper, runner
    from blrlab.bench.results import Results

    if options.paper:
        paper.check(options.paper)
    flags.positive(options.seconds, "--seconds")
    if options.workers < 0:
        raise InputError(f"--workers is {options.workers}: it is a number from 0 on.")
    impls, where = backends.chosen(options.impl, options.paper), flags.device(options.device)
    groups = _groups(options, "float32" if where == "cpu" else "bfloat16")
    out = flags.records_file(options.out, Path("runs") / time.strftime("layers-%Y%m%d-%H%M%S") / "records.jsonl")
    how = runner.settings(impls, options.seconds, card.here(groups[0].dtype, where), options.paper, options.tune)
    return runner.run(groups, how, Results(out, options.fresh), options.workers)


def _groups(options: argparse.Namespace, default_dtype: str) -> list:
    from blrlab_ops import shapes

    from blrlab.bench.problem import DTYPES, Group, custom_case, named_groups

    tokens = flags.counts(options.tokens, "--tokens") or [PUBLISHED]
    ops = [one_of(word, OPS, "op") for word in flags.words(options.op)]
    dtypes = [one_of(word, DTYPES, "dtype") for word in flags.words(options.dtype)] or [default_dtype]
    if len(dtypes) > 1:
        raise InputError("one --dtype at a time: the ceilings beside the times are those of one.")
    if not ops:
        raise InputError(f"no op is named: give some of {', '.join(OPS)}.")
    if options.shape:
        if options.net or options.layer:
            raise InputError("--shape is a layer by itself: leave --net and --layer out.")
        features, blocks = _pair(options.shape, "--shape"), _pair(options.blocks or "16", "--blocks")
        rank = options.rank or _half(*features, max(blocks))
        counts = dict.fromkeys(count or 1024 for count in tokens)
        made = [tuple(custom_case(op, count, *features, blocks, rank) for op in ops) for count in counts]
        return [Group(CUSTOM, options.shape, dtypes[0], cases) for cases in made]
    if options.rank or options.blocks:
        raise InputError("--rank and --blocks go with --shape: a named net has its own.")
    nets = list(shapes.NETS) if options.net == "all" else flags.words(options.net)
    if not nets:
        raise InputError(f"no layer is named: give --net=all, some of {', '.join(shapes.NETS)}, or --shape=IxO.")
    return named_groups(nets, flags.words(options.layer), ops, tokens, dtypes[0])


def _half(in_features: int, out_features: int, blocks: int) -> int:
    """Return the rank, a multiple of the blocks, at which r (i + o) is about half of i o."""
    return max(1, round(in_features * out_features / 2 / (in_features + out_features) / blocks)) * blocks


def _pair(word: str, flag: str) -> tuple[int, int]:
    parts = word.lower().split("x")
    if len(parts) == 1:
        parts *= 2
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise InputError(f'{flag} is like 4096x11008, not "{word}".')
    return int(parts[0]), int(parts[1])


if __name__ == "__main__":
    faulthandler.enable()  # where a library crashes the process, say in what call
    sys.exit(main())
