"""The single-peak memory model of arXiv 2512.20861 beside this project's prediction, variant by variant.

The paper's model knows one compute peak and one bandwidth: operations F = 2 n (parameters that multiply), bytes B = the
operands once and the variant's own traffic of intermediates; the time is F / min(peak, F / B bandwidth), which is
the greater of F / peak and B / bandwidth. Its code takes a gigabyte for 2^30 bytes, which overstates a data sheet's
bandwidth by 7.4 %; `single_peak_us` uses the data sheet's, `single_peak_binary_us` does as the code.

Traffic of intermediates in elements, T [n, b, r] of Monarch, Z [n, b, r] and W [n, b, r] of BLAST:

| op | variant | traffic | what it is |
|---|---|---|---|
| dense | matmul | 0 | |
| low_rank | plain | 2 n r | two products |
| | fused | 0 | one launch |
| monarch | plain | 4 n b r + 2 n o | two batched products, T and y permuted in memory |
| | right | 2 n b r + 2 n o | T written where the second product wants it, y permuted |
| | right_left | 2 n b r | y too |
| blast | plain | 4 n b r + 4 n b r | three batched products, Z and W permuted in memory |
| | three_stage | 2 n b r + 2 n b r | every permutation in the addresses |
| | partial | 2 n b r | x V with S on CUDA cores, then W U |
| | full | 0 | one launch |
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from blrlab_ops import algorithms, cost
from blrlab_ops.algorithms import Stage
from blrlab_ops.devices import Device
from blrlab_ops.shapes import Layer

from blrlab.records import Record
from blrlab.roofline.predict import ITEMSIZE, OPS, chosen, row, stages

BINARY = 2**30 / 1e9
# Run time relative to dense, least and most over the Llama-7B layers; A40, 1024 tokens, PyTorch (arXiv 2512.20861).
MEASURED = {("low_rank", "plain"): (0.53, 0.59), ("monarch", "plain"): (1.14, 1.68), ("blast", "plain"): (2.63, 4.31)}
MEASURED_AT = ("a40", "llama7b", 1024)
# (tokens, ranks) of a program that mixes blocks; (64, 32) is `algorithms.mixing_tile(16)`.
MIXING_TILES = ((32, 16), (32, 32), (64, 32), (128, 16), (128, 128))


class Variant(NamedTuple):
    """One way of computing a format.

    Attributes:
      op: dense, low_rank, monarch or blast.
      name: as in the table above.
      algorithm: of `algorithms` that it is, or that it is made from.
      traffic: elements of intermediates moved, from (n, o, b, r).
      without: launches of the algorithm that the variant does not need.
    """

    op: str
    name: str
    algorithm: str
    traffic: Callable[[int, int, int, int], int]
    without: tuple[str, ...] = ()


VARIANTS = (
    Variant("dense", "matmul", "matmul", lambda n, o, b, r: 0),
    Variant("low_rank", "plain", "two_stage", lambda n, o, b, r: 2 * n * r),
    Variant("low_rank", "fused", "fused", lambda n, o, b, r: 0),
    Variant("monarch", "plain", "plain", lambda n, o, b, r: 4 * n * b * r + 2 * n * o),
    Variant("monarch", "right", "plain", lambda n, o, b, r: 2 * n * b * r + 2 * n * o, ("permute T",)),
    Variant("monarch", "right_left", "two_stage", lambda n, o, b, r: 2 * n * b * r),
    Variant("blast", "plain", "plain", lambda n, o, b, r: 8 * n * b * r),
    Variant("blast", "three_stage", "three_stage", lambda n, o, b, r: 4 * n * b * r),
    Variant("blast", "partial", "two_stage", lambda n, o, b, r: 2 * n * b * r),
    Variant("blast", "full", "fused", lambda n, o, b, r: 0),
)


class SinglePeak(NamedTuple):
    """What the paper's model says of a variant: us and the `term` that sets it, "tensor" or "dram"."""

    us: float
    term: str
    flops: int
    bytes: int


def single_peak(
    device: Device, layer: Layer, variant: Variant, tokens: int, dtype: str, scale: float = 1
) -> SinglePeak:
    """Return the paper's time of a variant; `scale` multiplies the bandwidth."""
    factored = chosen(layer, variant.op)
    sizes = (tokens, layer.in_features, layer.out_features, factored.pair, factored.kernel_rank)
    counted = cost.cost(variant.op, *sizes, itemsize=ITEMSIZE[dtype])
    traffic = variant.traffic(tokens, layer.out_features, factored.blocks, factored.rank)
    flops, moved = counted.tensor_flops + counted.cuda_flops, counted.bytes_compulsory + ITEMSIZE[dtype] * traffic
    terms = {"tensor": flops / device.matrix_flops(dtype), "dram": moved / (device.dram_bytes_per_s * scale)}
    term = max(terms, key=lambda name: terms[name])
    return SinglePeak(1e6 * terms[term], term, flops, moved)


def compare(device: Device, layer: Layer, tokens: int, dtype: str, ops: Sequence[str] = OPS) -> list[Record]:
    """Return a "bound" record for every variant: this project's prediction, and the single-peak model's fields."""
    dense = single_peak(device, layer, VARIANTS[0], tokens, dtype).us
    rows = [_compared(device, layer, variant, tokens, dtype) for variant in VARIANTS if variant.op in ops]
    return [{**each, "single_peak_speedup": dense / each["single_peak_us"]} for each in rows]


def mixing(device: Device, layer: Layer, tokens: int, dtype: str) -> list[Record]:
    """Return a "bound" record of partial fusion for every tile of its mixing stage, beside three products.

    `break_even_l2_bytes_per_s` is the rate of the L2 from which on partial fusion is the faster one.
    """
    factored = chosen(layer, "blast")
    three = stages(device, layer, factored, "three_stage", tokens, dtype)
    found = []
    for tile in MIXING_TILES:
        launches = stages(device, layer, factored, "two_stage", tokens, dtype, tile)
        first = algorithms.stage_terms(launches[0], device, dtype)
        found.append(
            {
                **row(device, layer, factored, f"two_stage_{tile[0]}x{tile[1]}", launches, tokens, dtype),
                "mixing_tile": list(tile),
                "accumulator_bytes": 4 * factored.blocks * tile[0] * tile[1],
                "mixing_l2_bytes": launches[0].l2_bytes,
                "mixing_terms": first if device.l2_bytes_per_s else {**first, "l2": None},
                "three_stage_us": algorithms.predict(three, device, dtype).us,
                "break_even_l2_bytes_per_s": break_even(launches, three, device, dtype),
            }
        )
    return found


def break_even(
    launches: tuple[Stage, ...], others: tuple[Stage, ...], device: Device, dtype: str, most: float = 1e14
) -> float | None:
    """Return the L2 rate in bytes/s from which on some launches are faster than others.

    0.0 where they are at any rate from 1 GB/s, None where they are not up to `most`.
    """

    def faster(rate: float) -> bool:
        return _us(launches, device, dtype, rate) < _us(others, device, dtype, rate)

    low, high = 1e9, most
    if not faster(high):
        return None
    if faster(low):
        return 0.0
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if faster(middle) else (middle, high)
    return high


def markdown(rows: list[Record]) -> str:
    """Return the Markdown table of compared variants, a line each."""
    lines = [
        "| layer | op | variant | single peak, 2^30: us | single peak: us | binds | x dense | two peaks and L2: us "
        "| binds | x dense | run time over dense's: predicted | measured |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for each in rows:
        low_high = each["measured_relative"]
        cells = [
            *(each[key] for key in ("layer", "op", "variant")),
            *(f"{each[key]:.0f}" for key in ("single_peak_binary_us", "single_peak_us")),
            each["single_peak_term"],
            f"{each['single_peak_speedup']:.2f}",
            f"{each['us']:.0f}",
            each["term"],
            f"{each['speedup']:.2f}",
            f"{1 / each['speedup']:.2f}",
            "" if low_high is None else f"{low_high[0]:.2f} to {low_high[1]:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mixing_markdown(rows: list[Record]) -> str:
    """Return the Markdown table of partial fusion by the tile of its mixing stage, a line each."""
    lines = [
        "| layer | tile: tokens x ranks | sums, KiB | L2 of the mixing stage, MB | its us: tensor, CUDA, DRAM, L2 "
        "| partial fusion us | three products us | break-even L2, TB/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in rows:
        terms, rate = each["mixing_terms"].values(), each["break_even_l2_bytes_per_s"]
        cells = [
            each["layer"],
            " x ".join(map(str, each["mixing_tile"])),
            f"{each['accumulator_bytes'] / 1024:.0f}",
            f"{each['mixing_l2_bytes'] / 1e6:.0f}",
            ", ".join("?" if us is None else f"{us:.0f}" for us in terms),
            f"{each['us']:.0f}",
            f"{each['three_stage_us']:.0f}",
            "none" if rate is None else f"{rate / 1e12:.2f}" if rate else "any",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _compared(device: Device, layer: Layer, variant: Variant, tokens: int, dtype: str) -> Record:
    factored = chosen(layer, variant.op)
    launches = stages(device, layer, factored, variant.algorithm, tokens, dtype)
    launches = tuple(stage for stage in launches if stage.name not in variant.without)
    found = row(device, layer, factored, variant.name, launches, tokens, dtype)
    corrected = single_peak(device, layer, variant, tokens, dtype)
    known = (found["device"], layer.net, tokens) == MEASURED_AT
    measured = MEASURED.get((variant.op, variant.name)) if known else None
    return {
        **found,
        "variant": variant.name,
        "single_peak_us": corrected.us,
        "single_peak_term": corrected.term,
        "single_peak_bytes": corrected.bytes,
        "single_peak_binary_us": single_peak(device, layer, variant, tokens, dtype, BINARY).us,
        "measured_relative": None if measured is None else list(measured),
    }


def _us(launches: tuple[Stage, ...], device: Device, dtype: str, l2_rate: float) -> float:
    """Return the predicted us where the L2 has another rate."""
    return algorithms.predict(launches, dataclasses.replace(device, l2_bytes_per_s=l2_rate), dtype).us
