"""Predictions and advice in words."""

from collections.abc import Sequence

from blrlab_ops.devices import Device
from blrlab_ops.shapes import Layer

from blrlab.roofline.advice import Advice

NAMES = {"low_rank": "low rank", "monarch": "Monarch", "blast": "BLAST"}
ESTIMATES = "Estimates: ratios of least times at nominal rates; real kernels, dense ones too, take longer."


def advice(device: Device, layer: Layer, tokens: int, found: Sequence[Advice]) -> list[str]:
    """Say which formats are predicted to beat dense, each with its best blocks, and which are not."""
    where = f"{device.name}, {_tokens(tokens)}, {layer.in_features} x {layer.out_features}"
    if not found:
        return [f"{where}: no format has a rank, a multiple of 16, that makes this layer smaller than dense."]
    best = {op: next(each for each in found if each.op == op) for op in dict.fromkeys(each.op for each in found)}
    lines = [f"{where}: {_one(each)}." for each in best.values()]
    return [*lines, ESTIMATES]


def _one(each: Advice) -> str:
    name = NAMES[each.op] + (f" with {each.blocks} blocks" if each.blocks > 1 else "")
    half = each.algorithm.at[2]
    if each.algorithm.widest is None or each.factor is None:
        allowed = "" if each.bound.widest is None else f", though by its bound it would up to rank {each.bound.widest}"
        least = "would not beat dense by any known algorithm even if both ran at their least times"
        return f"{name} {least}{allowed}"
    at_half = "" if half is None else f"; at half the size {_times(half)} dense's speed"
    limit = "" if each.bound.at[2] is None else f" ({_times(each.bound.at[2])} by its bound)"
    return (
        f"{name} is predicted to be faster than dense up to rank {each.algorithm.widest}, {each.factor:.2f}x smaller"
        f"{at_half}{limit if at_half else ''}"
    )


def notes(targets: Sequence[Device], layers: Sequence[tuple[Layer, int]], advised: bool = False) -> list[str]:
    """Say what the tables rest on."""
    lines = [
        "",
        "us: the least time of that algorithm, every unit at its nominal rate and the slowest term of each launch "
        "binding; bound: of any algorithm. A kernel takes longer; ratios over dense are estimates.",
    ]
    if advised:
        lines.append(
            "known: predicted speed over dense by the fastest known algorithm; bound: by any; at 2x: where the layer "
            "is half the size; highest: at the narrowest rank."
        )
    unknown = [device.name for device in targets if not device.l2_bytes_per_s]
    if unknown:
        lines.append(f"The rate of the L2 of {', '.join(unknown)} is not known: it binds nothing there.")
    own = list(dict.fromkeys(layer.net for layer, _ in layers if not layer.published and layer.net != "own"))
    if own:
        lines.append(f"Ranks and blocks of {', '.join(own)} are not published: they are this project's choice.")
    return lines


def _times(value: float) -> str:
    return f"{value:.2f}x"


def _tokens(tokens: int) -> str:
    return "1 token" if tokens == 1 else f"{tokens} tokens"
