"""Predict how fast a layer can be on a GPU, without one.

    python -m blrlab.roofline --device=a40,orin_nano_8gb --net=llama7b

Times come from the cost of every algorithm and the device table of `blrlab_ops`: predictions, not measurements.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from blrlab_ops import cost, devices, shapes
from blrlab_ops.devices import Device
from blrlab_ops.shapes import Layer
from rich.console import Console

from blrlab import records
from blrlab.errors import InputError, home_expanded, one_of
from blrlab.records import Record
from blrlab.roofline import advice, predict, sentences, single_peak, tables

Layers = list[tuple[Layer, int]]  # each with a number of tokens
OWN_TOKENS = 1024  # of a layer of --shape
EXAMPLES = """examples:
  python -m blrlab.roofline --device=a40,orin_nano_8gb,h100 --net=llama7b
  python -m blrlab.roofline --device=h100 --net=llama7b --layer=qkvo,down --tokens=1,16,1024 --op=dense,monarch
  python -m blrlab.roofline --device=a40 --shape=4096x4096 --blocks=16 --rank=1024 --tokens=1,1024
  python -m blrlab.roofline --device=a40 --net=qwen25_7b --advice --out=advice.jsonl
  python -m blrlab.roofline --device=a40 --net=llama7b --compare-single-peak
  python -m blrlab.roofline --measure        what the GPU of this machine really reaches; needs PyTorch
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print predictions, write their records where asked, and return the exit status: 2 for an error."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if "--measure" in given:
            return measure([word for word in given if word != "--measure"])
        chosen = _parser().parse_args(given)
        out = _out(chosen.out) if chosen.out else None
        console = Console()
        found = _compared(chosen, console) if chosen.compare_single_peak else _predicted(chosen, console)
        if out:
            write(out, found)
            tables.say(console, f"\nwrote {len(found)} records to {out}")
    except (ValueError, OSError) as problem:
        print(f"blrlab.roofline: {problem}", file=sys.stderr)
        return 2
    return 0


def measure(arguments: list[str]) -> int:
    """Run the command that measures this machine's GPU, which needs PyTorch.

    Raises:
      InputError: PyTorch is not installed.
    """
    try:
        command = importlib.import_module("blrlab_ops.measure")
    except ImportError as missing:
        raise InputError(f"--measure needs PyTorch ({missing}): pip install 'blrlab[torch]'.") from None
    return int(command.main(arguments) or 0)


def write(path: Path, found: list[Record]) -> None:
    """Append records to a file, in the place of former ones of their kinds; other records in it stay."""
    kinds = {record["kind"] for record in found}
    records.keep(path, lambda record: record.get("kind") not in kinds)
    for record in found:
        records.append(path, record)


def _out(name: str) -> Path:
    """Return the path of --out.

    Raises:
      InputError: its folder is missing.
    """
    path = home_expanded(name)
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"--out={name} is not a file in a folder that exists.")
    return path


def _predicted(chosen: argparse.Namespace, console: Console) -> list[Record]:
    targets, layers, ops, dtype = _asked(chosen)
    found: list[Record] = []
    for device in targets:
        found += _predict(device, layers, ops, dtype, console)
    if chosen.advice:
        for device in targets:
            _advise(device, layers, ops, dtype, console)
        if chosen.out:
            each_once = dict.fromkeys(layer for layer, _ in layers)
            found += [
                row for device in targets for layer in each_once for row in advice.records(device, layer, dtype, ops)
            ]
    for line in sentences.notes(targets, layers, chosen.advice):
        tables.say(console, line)
    return found


def _predict(device: Device, layers: Layers, ops: list[str], dtype: str, console: Console) -> list[Record]:
    rows = [row for layer, tokens in layers for op in ops for row in predict.rows(device, layer, op, tokens, dtype)]
    for net in dict.fromkeys(row["net"] for row in rows):
        tables.print_rows([row for row in rows if row["net"] == net], console)
    return rows


def _advise(device: Device, layers: Layers, ops: list[str], dtype: str, console: Console) -> None:
    for layer, tokens in layers:
        found = advice.advise(device, layer, tokens, dtype, ops)
        if found:
            tables.print_advice(device.name, f"{layer.net} {layer.name}", tokens, found, console)
        for line in sentences.advice(device, layer, tokens, found):
            tables.say(console, line)


def _compared(chosen: argparse.Namespace, console: Console) -> list[Record]:
    targets, layers, ops, dtype = _asked(chosen)
    found: list[Record] = []
    for device in targets:
        variants = [row for layer, n in layers for row in single_peak.compare(device, layer, n, dtype, ops)]
        tiles = [row for layer, n in layers for row in single_peak.mixing(device, layer, n, dtype)]
        tables.plain(console, f"\n{device.name}, {dtype}: predictions\n\n{single_peak.markdown(variants)}")
        if "blast" in ops:
            told = single_peak.mixing_markdown(tiles)
            tables.plain(console, f"\nPartial fusion by the tile of its mixing stage\n\n{told}")
        found += [*variants, *(tiles if "blast" in ops else [])]
    return found


def _asked(chosen: argparse.Namespace) -> tuple[list[Device], Layers, list[str], str]:
    targets = list(dict.fromkeys(devices.get(name) for name in _words(chosen.device, "--device")))
    ops = [one_of(op, predict.OPS, "op") for op in _words(chosen.op, "--op")]
    dtype = one_of(chosen.dtype, predict.ITEMSIZE, "dtype")
    if chosen.advice and ops == ["dense"]:
        raise InputError("--advice is about what may beat dense: --op needs another format.")
    return targets, _layers(chosen), ops, dtype


def _layers(chosen: argparse.Namespace) -> Layers:
    """Return the layers asked for, each with a number of tokens."""
    if chosen.shape:
        layers = [_custom(chosen)]
    elif chosen.blocks or chosen.rank:
        raise InputError("--blocks and --rank are of a layer given by --shape, such as --shape=4096x4096.")
    else:
        layers = [layer for net in _words(chosen.net, "--net") for layer in _of_net(net, chosen.layer)]
    tokens = [_whole(word, "--tokens", 0) for word in _words(chosen.tokens or "0", "--tokens")]
    return [(layer, n or layer.tokens) for layer in layers for n in tokens]


def _of_net(net: str, names: str | None) -> list[Layer]:
    known = {layer.name: layer for layer in shapes.layers(net)}
    wanted = _words(names, "--layer") if names else list(known)
    return [known[one_of(name, known, f"layer of {net}")] for name in wanted]


def _custom(chosen: argparse.Namespace) -> Layer:
    sides = chosen.shape.lower().split("x")
    if len(sides) != 2:
        raise InputError(f'--shape is in x out features, such as 4096x11008, not "{chosen.shape}".')
    i, o = (_whole(side, "--shape", 1) for side in sides)
    if not chosen.rank or not chosen.blocks:
        raise InputError("a layer given by --shape needs --rank and --blocks, such as --rank=1024 --blocks=16.")
    rank, blocks = _whole(chosen.rank, "--rank", 1), _whole(chosen.blocks, "--blocks", 1)
    if i % blocks or o % blocks:
        allowed = ", ".join(str(b) for b in (1, *advice.BLOCKS) if i % b == 0 and o % b == 0)
        raise InputError(f"{blocks} blocks do not divide a layer of {i} x {o}: {allowed} do, for example.")
    return Layer("own", f"{i}x{o}", i, o, OWN_TOKENS, rank, blocks, rank, blocks, published=False)


def _words(text: str, flag: str) -> list[str]:
    found = [word.strip() for word in text.split(",") if word.strip()]
    if not found:
        raise InputError(f"{flag} names nothing.")
    return list(dict.fromkeys(found))


def _whole(word: str, flag: str, least: int) -> int:
    if not word.isdecimal() or int(word) < least:
        raise InputError(f'{flag} takes whole numbers from {least}, not "{word}".')
    return int(word)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m blrlab.roofline",
        description="How fast dense and factored layers can be on a GPU, predicted from its data sheet without one.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--device",
        default="a40,orin_nano_8gb",
        metavar="NAME,...",
        help=f"of {', '.join(devices.DEVICES)} (default %(default)s)",
    )
    add("--net", default="llama7b", metavar="NAME,...", help=f"of {', '.join(shapes.NETS)} (default %(default)s)")
    add("--layer", metavar="NAME,...", help="of the net (default all)")
    add("--shape", metavar="INxOUT", help="a layer of your own instead of a net's, with --blocks and --rank")
    add("--blocks", metavar="B", help="blocks on both sides of the layer of --shape")
    add("--rank", metavar="R", help="rank r of the layer of --shape; a Monarch block has R / B")
    add(
        "--tokens",
        metavar="N,...",
        help=f"rows of x; 0 is the number the layer is published at (default), or {OWN_TOKENS}",
    )
    add("--op", default=",".join(cost.FORMATS), metavar="NAME,...", help="formats (default %(default)s)")
    add("--dtype", default="bfloat16", metavar="NAME", help=f"of {', '.join(predict.ITEMSIZE)} (default %(default)s)")
    other = parser.add_mutually_exclusive_group().add_argument
    other("--advice", action="store_true", help="also: which formats, blocks and ranks are predicted to beat dense")
    other("--compare-single-peak", action="store_true", help="instead: beside the model of arXiv 2512.20861, Markdown")
    add("--out", metavar="FILE", help="write the records here, as JSON lines")
    other(
        "--measure",
        action="store_true",
        help="instead: measure this machine's GPU; further flags go to blrlab_ops.measure",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
