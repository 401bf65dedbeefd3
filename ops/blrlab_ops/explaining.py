"""Which implementation a layer runs with on a GPU, why, and whether the dense layer would be faster."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from . import algorithms, devices, dispatch, factored
from .dispatch import Layer

_ALGORITHMS = {"low_rank": "two_stage", "monarch": "two_stage", "blast": "three_stage"}


class Explanation(NamedTuple):
    """What `impl=None` takes for a layer.

    Attributes:
      impl: the implementation.
      reason: why, in a few words.
      us: by implementation, where tuning measured it on this GPU.
      cannot: by implementation, why it cannot run here.
      dense_us: of the dense layer: measured beside the implementations, else predicted where the device is known.
      us_expected: of the layer: measured, else predicted; None where neither is known.
      measured: whether the times are measured.
    """

    impl: str
    reason: str
    us: Mapping[str, float]
    cannot: Mapping[str, str]
    dense_us: float | None
    us_expected: float | None
    measured: bool

    @property
    def dense_is_faster(self) -> bool | None:
        """Whether the dense layer would be faster; None where it is not known."""
        if self.dense_us is None or self.us_expected is None:
            return None
        return self.dense_us < self.us_expected

    def __str__(self) -> str:
        times = ", ".join(f"{impl} {us:.1f} us" for impl, us in self.us.items()) or "none measured"
        lines = [f"{self.impl}: {self.reason}", f"  measured: {times}"]
        for why in dict.fromkeys(self.cannot.values()):
            names = ", ".join(impl for impl, reason in self.cannot.items() if reason == why)
            lines.append(f"  {names} cannot run: {why}")
        if self.dense_is_faster is not None:
            how = "measured" if self.measured else "predicted by the cost model"
            verdict = "dense would be FASTER" if self.dense_is_faster else "faster than dense"
            lines.append(f"  {verdict}: {self.us_expected:.1f} us against {self.dense_us:.1f} us, {how}")
        return "\n".join(lines)


def explain(
    factors: Mapping[str, Tensor],
    tokens: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Explanation:
    """Say which implementation `impl=None` takes, why, and what the dense layer would take.

    Args:
      factors: of any format; only their shapes count where device and dtype are given.
      tokens: n, of the input.
      device: None: where the factors are.
      dtype: None: that of the factors.

    Raises:
      ValueError: factors of no known format, or a negative number of tokens.
    """
    if tokens < 0:
        raise ValueError(f"tokens {tokens} must be 0 or more")
    format, tensors = factored.recognise(factors), list(factors.values())
    where, kind = str(device or tensors[0].device), dtype or tensors[0].dtype
    sizes = dispatch.layer(format, tokens, [factors["V"], factors["U"]])
    best = dispatch.best(format, where, kind, sizes)
    reasons = {impl: dispatch.why_not(format, impl, where, kind) for impl in dispatch.impls(format)}
    us, dense_us = {entry.impl: entry.us for entry in best.measured}, None
    if best.measured:
        dense_us, expected = best.measured[0].dense_us, us[best.impl]
    else:
        dense_us, expected = _predicted(format, sizes, where, kind)
    cannot = {impl: why for impl, why in reasons.items() if why}
    return Explanation(best.impl, best.reason, us, cannot, dense_us, expected, bool(best.measured))


def _predicted(format: str, sizes: Layer, device: str, dtype: torch.dtype) -> tuple[float | None, float | None]:
    """Return the us that the cost model predicts of the dense layer and of the format's best algorithm."""
    if not device.startswith("cuda") or not torch.cuda.is_available() or sizes.tokens == 0:
        return None, None
    known = devices.match(torch.cuda.get_device_name(device))
    if known is None:
        return None, None
    name = str(dtype).removeprefix("torch.")

    def us(kind: str, algorithm: str, blocks: tuple[int, int], rank: int) -> float:
        launches = algorithms.stages(kind, algorithm, *sizes[:3], blocks, rank, itemsize=dtype.itemsize)
        return algorithms.predict(launches, known, name).us

    return us("dense", "matmul", (1, 1), 0), us(format, _ALGORITHMS[format], sizes.blocks, sizes.rank)
