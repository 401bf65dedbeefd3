"""What a factored layer is, apart from its numbers: format, sizes, blocks and rank.

Sizes: i = in_features, o = out_features; b1 input blocks, b2 output blocks; p = i / b1, q = o / b2.
"""

import dataclasses
from typing import Any

from blrlab.errors import InputError

BLOCKED = ("monarch", "blast")
FORMATS = ("dense", "low_rank", *BLOCKED)


@dataclasses.dataclass(frozen=True)
class Spec:
    """One layer's format and sizes; frozen and hashable, so a jitted function can take it as static.

    Attributes:
      format: dense, low_rank, monarch or blast.
      in_features: i.
      out_features: o.
      blocks: (b1, b2); (1, 1) for dense and low_rank.
      rank: r for low_rank and blast; r', the rank of one block, for monarch; 0 for dense.

    Raises:
      InputError: the sizes do not fit together; the sentence names the values that do.
    """

    format: str
    in_features: int
    out_features: int
    blocks: tuple[int, int] = (1, 1)
    rank: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if self.format not in FORMATS:
            raise InputError(f'unknown format "{self.format}": it is one of {", ".join(FORMATS)}.')
        if min(self.in_features, self.out_features) < 1:
            raise InputError(f"a layer of {self.in_features} x {self.out_features} has no weights.")
        _check_blocks(self)
        if self.format == "dense" and self.rank:
            raise InputError(f"a dense layer has no rank, but rank {self.rank} was asked for.")
        if self.format != "dense" and self.rank < 1:
            raise InputError(f"{self.format} needs a rank of at least 1, not {self.rank}.")

    @property
    def block_sizes(self) -> tuple[int, int]:
        """(p, q): the height and width of one block of the weight."""
        return self.in_features // self.blocks[0], self.out_features // self.blocks[1]

    @property
    def total_rank(self) -> int | None:
        """r as the papers count it: b r' for a monarch of b x b blocks; None where b1 and b2 differ."""
        if self.format != "monarch":
            return self.rank
        return self.blocks[0] * self.rank if self.blocks[0] == self.blocks[1] else None


def described(spec: Spec) -> dict[str, Any]:
    """Return a spec as the fields of a record; `rank` is the papers' r, null where b1 and b2 differ."""
    return {
        "format": spec.format,
        "in_features": spec.in_features,
        "out_features": spec.out_features,
        "blocks": list(spec.blocks),
        "rank": spec.total_rank,
        "block_rank": spec.rank if spec.format == "monarch" else None,
    }


def divisors(number: int, most: int = 64) -> tuple[int, ...]:
    """Return the divisors of a number up to `most`, in rising order."""
    return tuple(d for d in range(1, min(number, most) + 1) if number % d == 0)


def _check_blocks(spec: Spec) -> None:
    if spec.format not in BLOCKED:
        if spec.blocks != (1, 1):
            raise InputError(f"{spec.format} has no blocks, but blocks {spec.blocks} were asked for.")
        return
    sides = (("input", spec.in_features, spec.blocks[0]), ("output", spec.out_features, spec.blocks[1]))
    for side, features, blocks in sides:
        if blocks < 1 or features % blocks:
            allowed = ", ".join(map(str, divisors(features)))
            raise InputError(f"{blocks} {side} blocks do not divide {features} features; {allowed} do.")


def from_total_rank(format: str, in_features: int, out_features: int, blocks: tuple[int, int], rank: int) -> Spec:
    """Make a spec from the papers' rank r, which for monarch is b r'.

    Raises:
      InputError: the blocks do not divide the layer, or r cannot be shared out over b1 = b2 = b blocks.
    """
    if format != "monarch":
        return Spec(format, in_features, out_features, blocks, rank)
    spec = Spec(format, in_features, out_features, blocks, rank=1)
    b1, b2 = blocks
    if b1 != b2:
        raise InputError(f"a rank is shared out over b x b blocks, not {b1} x {b2}; give block_rank instead.")
    if rank < 1 or rank % b1:
        below = max(rank // b1 * b1, b1)
        raise InputError(
            f"monarch's rank {rank} is not a positive multiple of its {b1} blocks; {below} and {below + b1} are."
        )
    return dataclasses.replace(spec, rank=rank // b1)
