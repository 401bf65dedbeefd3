"""What a layer can reach on a device, from `blrlab_ops`' cost model: a bound beside every time."""

import dataclasses
from typing import Any

from blrlab_ops import cost

from blrlab.factors import Spec


@dataclasses.dataclass(frozen=True)
class Peaks:
    """The ceilings of a machine.

    Attributes:
      name: of the device.
      flops_per_s: of matrix products in `dtype`.
      bytes_per_s: of memory traffic, read and written bytes both counted.
      dtype: of the products.
      source: measured here, or a data sheet.
    """

    name: str
    flops_per_s: float
    bytes_per_s: float
    dtype: str
    source: str

    def record(self) -> dict[str, Any]:
        """Return the fields of a record."""
        return dataclasses.asdict(self)


def work(spec: Spec, tokens: int, itemsize: int) -> tuple[int, int]:
    """Return (operations, bytes) of one call: all operations; x, the parameters and y moved once."""
    found = cost.cost(
        spec.format, tokens, spec.in_features, spec.out_features, spec.blocks, spec.rank, itemsize=itemsize
    )
    return found.tensor_flops + found.cuda_flops, found.bytes_compulsory


def bound_us(spec: Spec, tokens: int, itemsize: int, peaks: Peaks) -> float:
    """Return the time in us that no implementation can beat on a machine of these ceilings.

    >>> round(bound_us(Spec("dense", 4096, 4096), 1024, 2, Peaks("H100", 8e14, 3e12, "bfloat16", "measured")), 1)
    42.9
    """
    flops, moved = work(spec, tokens, itemsize)
    return 1e6 * max(flops / peaks.flops_per_s, moved / peaks.bytes_per_s)
