"""Tune layers on the CUDA card at hand: `python -m blrlab_ops.tune --net=llama7b --tokens=1,16`.

Measures every implementation that can run, each with the tile sizes that are likely to be fast, and keeps the best of
each for this device and Triton release; `impl=None` takes the fastest from then on. Let nothing else run on the card
meanwhile. What is kept already is left out. Exits with 2 when there is no card, or the request makes no sense.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from . import cost, dispatch, shapes, tuning, verify
from .testing import Case


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        layers = cases(options)
        if not torch.cuda.is_available():
            raise ValueError("no CUDA device is found: there is nothing to tune on")
    except ValueError as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name(0)
    for number, case in enumerate(layers, 1):
        from .tuning import search

        dtype, known = getattr(torch, options.dtype), tuning.lookup(device, key(case, options.dtype))
        asked = [name for name in search.worth_measuring(case, dtype) if options.again or name not in known]
        if not asked:
            print(f"[{number}/{len(layers)}] {title(case)}: kept already, {next(iter(known.values())).us:.1f} us")
            continue
        started = time.perf_counter()
        print(f"[{number}/{len(layers)}] {title(case)}", flush=True)
        search.tune(case, dtype, impls=asked, say=lambda line: print(f"    {line}", flush=True))
        print(f"    in {time.perf_counter() - started:.1f} s", flush=True)
    print(f"kept in {tuning.path(device)}")
    return 0


def cases(options: argparse.Namespace) -> list[Case]:
    """Return the layers that are asked for.

    Raises:
      ValueError: a net, layer, format or shape is unknown, or none is named.
    """
    found = [verify.parse_shape(text) for text in options.shape or ()]
    formats = options.format.split(",") if options.format != "all" else cost.FORMATS[1:]
    for format in formats:
        dispatch.impls(format)
    for net in filter(None, options.net.split(",")):
        rows = shapes.layers(net)
        names = [row.name for row in rows]
        wanted = options.layer.split(",") if options.layer else names
        unknown = set(wanted) - set(names)
        if unknown:
            raise ValueError(f"{net} has no layer {', '.join(sorted(unknown))}: it has {', '.join(names)}")
        tokens = [int(count) for count in options.tokens.split(",")]
        chosen = [row for row in rows if row.name in wanted]
        found += [_case(row, format, count) for row in chosen for format in formats for count in tokens]
    if not found:
        raise ValueError("no layer is named: give --net or --shape")
    return list(dict.fromkeys(found))


def key(case: Case, dtype: str) -> tuning.Key:
    """Return the key that a layer is kept under."""
    return tuning.Key(case.format, tuning.bucket(case.tokens), *case[2:], dtype)


def title(case: Case) -> str:
    """Name a layer as `--shape` does."""
    sizes = f"{case.tokens}x{case.in_features}x{case.out_features}"
    return f"{case.format}:{sizes}:b{case.blocks[0]}x{case.blocks[1]}:r{case.rank}"


def _case(row: shapes.Layer, format: str, tokens: int) -> Case:
    rank, blocks = row.choice(format)
    rank = rank // blocks if format == "monarch" else rank
    return Case(format, tokens or row.tokens, row.in_features, row.out_features, (blocks, blocks), rank)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m blrlab_ops.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--net", default="", help=f"some of {', '.join(shapes.NETS)}, with commas between")
    parser.add_argument("--layer", default="", help="layers of the nets; default: all")
    parser.add_argument(
        "--tokens", default="1,16", help="numbers of tokens; 0: the published one; default: %(default)s"
    )
    parser.add_argument("--format", default="all", help=f"all, or some of {', '.join(cost.FORMATS[1:])}")
    parser.add_argument("--shape", action="append", help="format:TOKENSxINxOUT:bB1xB2:rRANK, repeatable")
    parser.add_argument("--dtype", default="bfloat16", choices=(*dispatch.TRITON_DTYPES, "int8"))
    parser.add_argument("--again", action="store_true", help="measure also what is kept already")
    return parser


if __name__ == "__main__":
    sys.exit(main())
