"""Verify implementations against float64: `python -m blrlab_ops.verify --dtype=float32 --format=all`.

Runs the implementations named by --impl (default: all that can run here) on awkward layers, or on those named
by --shape, and prints a table, or with --json one object a line. Exits with 1 when one fails its error
budget, and with 2 when the request makes no sense or a named implementation cannot run. TRITON_INTERPRET=1 in
the environment verifies the Triton implementations without a GPU.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence

import torch

from . import dispatch, testing
from .testing import Case

_SHAPE = re.compile(r"(\w+):(\d+)x(\d+)x(\d+)(?::b(\d+)x(\d+))?:r(\d+)")
_COLUMNS = "{:<9} {:<17} {:>6} {:>6} {:>6} {:>7} {:>5} {:<9} {:>9} {:>9} {:>9} {}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _parser().parse_args(arguments)
    dtype, device = getattr(torch, options.dtype), torch.device(options.device)
    try:
        layers = _layers(options)
        _check_named(options.impl, layers, device, dtype)
    except (ValueError, dispatch.CannotRun) as error:
        print(f"verify: {error}", file=sys.stderr)
        return 2
    if not options.json:
        print(
            _COLUMNS.format(*["op", "impl", "in", "out", "blocks", "rank", "n", "dtype", "error", "max", "budget"], "")
        )
    failures = 0
    for row in _rows(layers, options.impl, device, dtype, options.seed):
        print(json.dumps(row) if options.json else _line(row), flush=True)
        failures += not row["passed"]
    return 1 if failures else 0


def parse_shape(text: str) -> Case:
    """Read `format:TOKENSxINxOUT[:bB1xB2]:rRANK`.

    >>> parse_shape("monarch:384x768x2304:b4x4:r48").blocks
    (4, 4)

    Raises:
      ValueError: when the text is not of that form or the blocks do not divide the features.
    """
    match = _SHAPE.fullmatch(text)
    if match is None:
        raise ValueError(f"shape {text!r} is not like monarch:384x768x2304:b4x4:r48 (tokens x in x out)")
    dispatch.impls(match[1])
    tokens, in_features, out_features, b1, b2, rank = (int(group or 1) for group in match.groups()[1:])
    if min(b1, b2, rank, in_features, out_features) < 1 or in_features % b1 or out_features % b2:
        raise ValueError(f"shape {text!r}: blocks must divide the features, and only tokens may be 0")
    return Case(match[1], tokens, in_features, out_features, (b1, b2), rank)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m blrlab_ops.verify", description=__doc__)
    parser.add_argument("--dtype", default="float32", choices=dispatch.TRITON_DTYPES)
    parser.add_argument("--format", default="all", help=f"all, or one of {', '.join(dispatch.IMPLS)}")
    parser.add_argument("--impl", action="append", help="repeatable; default: all that can run")
    parser.add_argument("--shape", action="append", help="format:TOKENSxINxOUT:bB1xB2:rRANK, repeatable")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    return parser


def _layers(options: argparse.Namespace) -> list[Case]:
    layers = [parse_shape(text) for text in options.shape or ()] or testing.AWKWARD
    if options.format != "all":
        dispatch.impls(options.format)
        layers = [layer for layer in layers if layer.format == options.format]
    if not layers:
        raise ValueError(f"no shape given is of format {options.format!r}")
    return list(layers)


def _check_named(named: list[str] | None, layers: list[Case], device: torch.device, dtype: torch.dtype) -> None:
    for format in dict.fromkeys(layer.format for layer in layers):
        for impl in named or ():
            dispatch.choose(format, impl, device, dtype)


def _rows(
    layers: list[Case], named: list[str] | None, device: torch.device, dtype: torch.dtype, seed: int
) -> Iterator[dict]:
    for layer in layers:
        x, factors, bias = testing.random_operands(layer, seed=seed, dtype=dtype, device=device)
        for impl in named or dispatch.impls(layer.format):
            if dispatch.why_not(layer.format, impl, device, dtype) is None:
                yield _row(layer, impl, dtype, testing.check(impl, x, factors, bias))


def _row(layer: Case, impl: str, dtype: torch.dtype, verdict: testing.Verdict) -> dict:
    sizes = {name: value for name, value in layer._asdict().items() if name != "format"}
    row = {"op": layer.format, "impl": impl, **sizes, "dtype": str(dtype).removeprefix("torch.")}
    return row | verdict._asdict() | {"passed": verdict.passed}


def _line(row: dict) -> str:
    blocks = "x".join(map(str, row["blocks"]))
    sizes = row["in_features"], row["out_features"], blocks, row["rank"], row["tokens"], row["dtype"]
    found = (f"{row[name]:.2e}" for name in ("error", "error_max", "error_budget"))
    return _COLUMNS.format(row["op"], row["impl"], *sizes, *found, "ok" if row["passed"] else "FAILED")


if __name__ == "__main__":
    sys.exit(main())
