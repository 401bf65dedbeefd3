"""The machine's ceilings, and where every measured layer stands under them.

Intensity is FLOP per byte moved, speed is FLOP per second. The roof is min(peak FLOP/s, intensity x peak bytes/s)
with the peaks of the `env` record, measured on the machine, or those of its data sheet. A layer's share of the roof
is its recorded bound over its time; where no bound is recorded, its speed over the roof's height.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blrlab.report import words
from blrlab.report.groups import Record, finite, mapping, text
from blrlab.report.summary.latency import layer_title, profiled, verified_time


@dataclass(frozen=True)
class Roof:
    """Peaks in FLOP/s and bytes/s: `flops` of matrix products, `cuda` of CUDA cores, `dram` and `l2` of memory."""

    flops: float
    dram: float
    cuda: float | None = None
    l2: float | None = None

    @property
    def ridge(self) -> float:
        """Return the intensity from which on the arithmetic limits, in FLOP per byte."""
        return self.flops / self.dram

    def at(self, intensity: float) -> float:
        """Return the roof's height in FLOP/s."""
        return min(self.flops, intensity * self.dram)


@dataclass(frozen=True)
class Point:
    """One measured layer: FLOP per byte, FLOP per second, and its share of the roof."""

    intensity: float
    speed: float
    share: float
    record: Record

    @property
    def words(self) -> str:
        """Say what the point is: layer, op, backend, tokens, time and share."""
        r = self.record
        spread = [finite(r.get(key)) for key in ("p20", "p80")]
        told = "" if None in spread else f" (p20-p80 {'-'.join(words.microseconds(v) for v in spread)})"
        return (
            f"{layer_title(r)} {words.shape(r)}, {words.contender(r)}, {words.tokens(r.get('tokens'))}: "
            f"p50 {words.microseconds(finite(r.get('p50')))} us{told}, {words.percent(self.share)} of the roof"
        )


def roof(peaks: Record) -> Roof | None:
    """Return the ceilings that `peaks` states, None without both a peak of arithmetic and one of memory."""
    flops, dram, cuda, l2 = (
        finite(peaks.get(key)) for key in ("flops_per_s", "bytes_per_s", "cuda_flops_per_s", "l2_bytes_per_s")
    )
    if not flops or not dram or flops < 0 or dram < 0:
        return None
    return Roof(flops, dram, cuda if cuda and cuda > 0 else None, l2 if l2 and l2 > 0 else None)


def sheet_roof(peaks: Record) -> Roof | None:
    """Return the ceilings of the machine's data sheet, where `peaks` names it."""
    return roof(mapping(peaks.get("sheet")))


def units(peaks: Record) -> str:
    """Name what reaches the peak of arithmetic: the tensor cores, or plainly matrix products."""
    halves = text(peaks.get("dtype"), "") in ("bfloat16", "float16", "float8_e4m3fn", "int8")
    return "tensor cores" if halves or peaks.get("cuda_flops_per_s") else "matrix products"


def point(record: Record, under: Roof) -> Point | None:
    """Return where a record stands, None where it has no verified time or no count of its work."""
    time, flops, moved = verified_time(record), finite(record.get("flops")), finite(record.get("bytes"))
    if not time or not flops or not moved or flops < 0 or moved < 0:
        return None
    intensity, speed = flops / moved, flops / (time * 1e-6)
    bound = finite(record.get("bound_us"))
    return Point(intensity, speed, bound / time if bound else speed / under.at(intensity), record)


def foremost(points: Sequence[Point]) -> set[int]:
    """Return the places of the fastest point of every layer, op and number of tokens, a profiler's left aside."""
    best: dict[tuple[str, ...], int] = {}
    for place, found in enumerate(points):
        if profiled(found.record):
            continue
        key = tuple(text(found.record.get(k), "") for k in ("net", "layer", "phase", "op", "tokens"))
        if key not in best or found.speed > points[best[key]].speed:
            best[key] = place
    return set(best.values())
