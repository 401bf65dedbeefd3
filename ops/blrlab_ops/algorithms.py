"""How a layer is computed, launch by launch: what each runs on every unit and moves at every level of memory.

`cost` says what a format costs however it is computed; this says what one way of computing it costs. Pure functions of
plain ints; nothing but Python is needed. n tokens, W [i, o] in b1 x b2 blocks [p, q], `rank` is r, for monarch r':

| format | algorithm | launches |
|---|---|---|
| dense | matmul | x W |
| low_rank | two_stage | x V -> T [n, r]; T U |
| | fused | both, T stays in the chip |
| monarch | plain | batched x V -> T [b1, n, b2, r']; permute T; batched T U; permute y (as in PyTorch) |
| | two_stage | the two products, every permutation in the addresses of loads and stores |
| | fused | both chained for one output block at a time, no T; x is read again for every output block |
| blast | plain | x V -> Z [b1, n, r]; permute Z; S as a product batched over ranks -> W; permute W; W U; permute y |
| | three_stage | the three products, every permutation in the addresses |
| | two_stage | x V with S applied on CUDA cores, all blocks of a (token, rank) tile in one program -> W; W U |
| | fused | all of it in one launch, a program holding every block of its tokens and an output block |

Bytes at DRAM are operands once a launch, intermediates as far as the L2 does not keep them, and what a product reads
again because of the order it takes its tiles in: a library goes down strips of columns and reads the left side once a
strip; the Triton kernels of this package go along rows and read the right side again for every wave of programs. Of
`size` bytes used again, size / (0.8 L2) are no longer in the L2, at most all of them. The 0.8, the width of a strip and
the size of a wave are measured, on an H100 (`python -m blrlab.bench.counters`); a library's true order is not known,
so its layers with much more input than L2 may be off by a quarter. Operations are the useful ones, and beside them
those executed, of whole tiles.

Bytes at the L2 follow from tiles: a product [m, k] [k, n] in tiles (bm, bn) reads its left side n / bn times and its
right side m / bm times. A program's accumulators must fit registers, which bounds the tokens of a program that is fused
(it keeps T, or all of an output block) and both sides of the tile of blast's mixing stage. In thread-block clusters
(compute capability 9 and up) two programs of neighbouring tokens share what they load of the weights.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

from . import cost

if TYPE_CHECKING:
    from .devices import Device

ALGORITHMS = {
    "dense": ("matmul",),
    "low_rank": ("two_stage", "fused"),
    "monarch": ("plain", "two_stage", "fused"),
    "blast": ("plain", "three_stage", "two_stage", "fused"),
}
TERMS = ("tensor", "cuda", "dram", "l2")
TILE = (128, 256)  # of a product: rows, columns; `ACCUMULATORS` sums
ACCUMULATORS = 2**15  # float32 sums that one program keeps in registers: half of a multiprocessor's
LEAST_ROWS = 16  # of a product on tensor cores
RANKS = 128  # for which a fused program of blast keeps sums at a time
STRIP = 1024  # columns that a library's product goes down before it turns to the next
WAVE = 224  # programs that run at once: one or two on each of an H100's 132 multiprocessors
MIXING_WAVE = 132  # of blast's mixing stage: one, whose sums fill the registers
KEPT = 0.8  # share of the L2 that holds what is used again
MIXING_ROWS, MIXING_DEPTH = 64, 16  # of a library's smallest tile, to which S is padded as a product
ORDERS = {"strips": (64, 128, 64), "rows": (128, 128, 32)}  # with rows, columns and depth that tiles come in


class Stage(NamedTuple):
    """One launch.

    Attributes:
      name: of the launch.
      tensor_flops: on tensor cores; a multiply-add is two.
      cuda_flops: on CUDA cores.
      operand_bytes: of x, weights and y, each once.
      read_bytes: of intermediates, read once.
      written_bytes: of intermediates, written once.
      l2_bytes: between L2 and the multiprocessors.
      again: (bytes, times) of what is read again, after its first time.
      padded_flops: on tensor cores, of whole tiles: what is executed.
    """

    name: str
    tensor_flops: int
    cuda_flops: int
    operand_bytes: int
    read_bytes: int
    written_bytes: int
    l2_bytes: int
    again: tuple[tuple[int, int], ...] = ()
    padded_flops: int = 0

    def dram_bytes(self, l2_bytes: int) -> int:
        """Return the bytes at DRAM where the L2 has this size."""
        reused = ((self.read_bytes, 1), (self.written_bytes, 1), *self.again)
        return self.operand_bytes + round(sum(size * times * missing(size, l2_bytes) for size, times in reused))


def missing(size: int, l2_bytes: int) -> float:
    """Return the share of some bytes that the L2 no longer holds when they are used again.

    >>> [missing(size, 50) for size in (0, 20, 100)]
    [0.0, 0.5, 1.0]
    """
    return min(1.0, size / (KEPT * l2_bytes)) if l2_bytes else 1.0


class Prediction(NamedTuple):
    """The least time of an algorithm on a device.

    Attributes:
      us: the sum over launches of each one's slowest term, and the cost of the launches where it is known.
      term: what most of that time goes to: "tensor", "cuda", "dram", "l2" or "launch".
      terms: us by term, summed over launches whichever binds them.
      dram_bytes: summed over launches.
    """

    us: float
    term: str
    terms: dict[str, float]
    dram_bytes: int


def stages(
    format: str,
    algorithm: str,
    tokens: int,
    in_features: int,
    out_features: int,
    blocks: tuple[int, int] = (1, 1),
    rank: int = 0,
    *,
    itemsize: int = 2,
    tile: tuple[int, int] = TILE,
    mixing: tuple[int, int] | None = None,
    cluster: int = 1,
    order: str = "strips",
) -> tuple[Stage, ...]:
    """Return the launches of an algorithm.

    >>> [stage.name for stage in stages("monarch", "two_stage", 384, 768, 2304, (4, 4), 48)]
    ['x V', 'T U']

    Args:
      format: dense, low_rank, monarch or blast.
      algorithm: one of `ALGORITHMS[format]`.
      tokens: n.
      in_features: i.
      out_features: o.
      blocks: (b1, b2).
      rank: r, for monarch r'.
      itemsize: bytes of one element.
      tile: rows and columns that one program of a product owns.
      mixing: tokens and ranks that one program of blast's mixing stage owns; None for `mixing_tile`.
      cluster: programs of neighbouring tokens that share their loads of weights, as `cluster` says of a device.
      order: how products take their tiles: in "strips" as libraries do, or along "rows" as the Triton kernels here.

    Raises:
      ValueError: for an unknown format or algorithm, or a layer that cannot be.
    """
    cost.params(format, in_features, out_features, blocks, rank)  # refuses what cannot be
    if algorithm not in ALGORITHMS[format]:
        raise ValueError(f"algorithm {algorithm!r} of {format} is not one of {ALGORITHMS[format]}")
    if order not in ORDERS:
        raise ValueError(f"order {order!r} is not one of {tuple(ORDERS)}")
    mixing = mixing or mixing_tile(blocks[1])
    layer = _Layer(tokens, in_features, out_features, *blocks, rank, itemsize, tile, mixing, cluster, order)
    return {
        ("dense", "matmul"): _matmul,
        ("low_rank", "two_stage"): _low_rank_two_stage,
        ("low_rank", "fused"): _low_rank_fused,
        ("monarch", "plain"): _monarch_plain,
        ("monarch", "two_stage"): _monarch_two_stage,
        ("monarch", "fused"): _monarch_fused,
        ("blast", "plain"): _blast_plain,
        ("blast", "three_stage"): _blast_three_stage,
        ("blast", "two_stage"): _blast_two_stage,
        ("blast", "fused"): _blast_fused,
    }[format, algorithm](layer)


def predict(stages: tuple[Stage, ...], device: "Device", dtype: str = "bfloat16") -> Prediction:
    """Return the least time of launches in order on a device; a rate that it does not state binds nothing."""
    terms: dict[str, float] = dict.fromkeys((*TERMS, "launch"), 0.0)
    binding, moved = dict(terms), 0
    for stage in stages:
        found = stage_terms(stage, device, dtype)
        for name, us in found.items():
            terms[name] += us
        slowest = max(found, key=lambda name: found[name])
        binding[slowest] += found[slowest]
        terms["launch"] += device.launch_us or 0.0
        moved += stage.dram_bytes(device.l2_bytes)
    binding["launch"] = terms["launch"]
    return Prediction(sum(binding.values()), max(binding, key=lambda name: binding[name]), terms, moved)


def stage_terms(stage: Stage, device: "Device", dtype: str = "bfloat16") -> dict[str, float]:
    """Return the us that a launch needs at least on each unit and at each level of memory."""
    l2_rate = device.l2_bytes_per_s or math.inf
    shared = stage.cuda_flops if dtype == "float32" else 0  # whose products run on CUDA cores too
    return {
        "tensor": 1e6 * (stage.tensor_flops + shared) / device.matrix_flops(dtype),
        "cuda": 1e6 * stage.cuda_flops / device.cuda_flops,
        "dram": 1e6 * stage.dram_bytes(device.l2_bytes) / device.dram_bytes_per_s,
        "l2": 1e6 * stage.l2_bytes / l2_rate,
    }


class _Layer(NamedTuple):
    n: int
    i: int
    o: int
    b1: int
    b2: int
    r: int
    itemsize: int
    tile: tuple[int, int]
    mixing: tuple[int, int]
    cluster: int
    order: str

    def loads(self, rows: int) -> int:
        """Return how often weights are read where a program owns this many tokens."""
        return -(-self.n // (rows * self.cluster))

    def fused_loads(self, sums: int) -> int:
        """Return how often weights are read where a program keeps this many sums of each token in registers."""
        fitting = 2 ** int(math.log2(max(ACCUMULATORS // sums, LEAST_ROWS)))
        return self.loads(min(self.tile[0], fitting))

    def product(self, name: str, m: int, k: int, n: int, batch: int = 1, reads: int = 0, writes: int = 0) -> Stage:
        """Return a batched product [m, k] [k, n]; reads and writes are the elements that are intermediates."""
        elements = batch * (m * k + k * n + m * n)
        through_l2 = batch * (m * k * -(-n // self.tile[1]) + k * n * self.loads(self.tile[0]) + m * n)
        if self.order == "rows":
            again = (batch * k * n, self.waves(self.tile[0], batch * -(-n // self.tile[1])) - 1)
        else:
            again = (m * k, batch * (-(-n // STRIP) - 1))
        found = self.stage(name, 2 * batch * m * k * n, 0, elements - reads - writes, reads, writes, through_l2, again)
        return found._replace(padded_flops=2 * batch * self.whole_tiles(m, k, n))

    def whole_tiles(self, m: int, k: int, n: int, ranks: int = 0) -> int:
        """Return m k n with every side as long as its tiles; `ranks` are the columns of a tile where they are other."""
        rows, columns, depth = ORDERS[self.order]
        return math.prod(-(-side // tile) * tile for side, tile in ((m, rows), (k, depth), (n, ranks or columns)))

    def waves(self, rows: int, programs: int, at_once: int = WAVE) -> int:
        """Return the waves of programs, of which each owns this many tokens, with so many to the same tokens."""
        return -(-self.n // (rows * max(1, at_once // programs)))

    def copy(self, name: str, elements: int, to_output: bool = False) -> Stage:
        """Return the permutation of an intermediate; to_output: its result is y."""
        written = 0 if to_output else elements
        return self.stage(name, 0, 0, elements - written, elements, written, 2 * elements)

    def stage(
        self,
        name: str,
        tensor: int,
        cuda: int,
        operands: int,
        reads: int,
        writes: int,
        l2: int,
        again: tuple[int, int] = (0, 0),
    ) -> Stage:
        """Return a launch whose sizes are given in elements."""
        size, repeated = self.itemsize, ((self.itemsize * again[0], again[1]),) if all(again) else ()
        return Stage(name, tensor, cuda, size * operands, size * reads, size * writes, size * l2, repeated)

    def mixing_product(self) -> int:
        """Return the operations of S as a product batched over ranks, padded to whole tiles."""
        rows = -(-self.b2 // MIXING_ROWS) * MIXING_ROWS
        depth = -(-self.b1 // MIXING_DEPTH) * MIXING_DEPTH
        return 2 * self.n * self.r * rows * depth


def _matmul(a: _Layer) -> tuple[Stage, ...]:
    return (a.product("x W", a.n, a.i, a.o),)


def _low_rank_two_stage(a: _Layer) -> tuple[Stage, ...]:
    T = a.n * a.r
    return a.product("x V", a.n, a.i, a.r, writes=T), a.product("T U", a.n, a.r, a.o, reads=T)


def _low_rank_fused(a: _Layer) -> tuple[Stage, ...]:
    # One program owns a tile of tokens, keeps T of it and streams both factors.
    x, y, weights = a.n * a.i, a.n * a.o, a.r * (a.i + a.o)
    through_l2 = x + y + weights * a.fused_loads(a.r)
    return (a.stage("x V U", 2 * a.n * weights, 0, x + y + weights, 0, 0, through_l2),)


def _monarch_two_stage(a: _Layer) -> tuple[Stage, ...]:
    T = a.n * a.b1 * a.b2 * a.r
    return (
        a.product("x V", a.n, a.i // a.b1, a.b2 * a.r, a.b1, writes=T),
        a.product("T U", a.n, a.b1 * a.r, a.o // a.b2, a.b2, reads=T),
    )


def _monarch_plain(a: _Layer) -> tuple[Stage, ...]:
    first, _ = _monarch_two_stage(a)
    y = a.n * a.o
    to_permute = a.product("T U", a.n, a.b1 * a.r, a.o // a.b2, a.b2, reads=a.n * a.b1 * a.b2 * a.r, writes=y)
    return first, a.copy("permute T", a.n * a.b1 * a.b2 * a.r), to_permute, a.copy("permute y", y, to_output=True)


def _monarch_fused(a: _Layer) -> tuple[Stage, ...]:
    # A program owns a tile of tokens and one output block, of all q columns.
    x, y, weights = a.n * a.i, a.n * a.o, a.r * (a.b2 * a.i + a.b1 * a.o)
    through_l2 = x * a.b2 + weights * a.fused_loads(a.o // a.b2) + y
    return (a.stage("x V U", 2 * a.n * weights, 0, x + y + weights, 0, 0, through_l2),)


def _blast_three_stage(a: _Layer) -> tuple[Stage, ...]:
    Z, W, S = a.n * a.b1 * a.r, a.n * a.b2 * a.r, a.b1 * a.b2 * a.r
    mixing = a.stage("Z S", 2 * a.n * S, 0, S, Z, W, Z + W + S)._replace(padded_flops=a.mixing_product())
    return (
        a.product("x V", a.n, a.i // a.b1, a.r, a.b1, writes=Z),
        mixing,
        a.product("W U", a.n, a.r, a.o // a.b2, a.b2, reads=W),
    )


def _blast_plain(a: _Layer) -> tuple[Stage, ...]:
    first, second, _ = _blast_three_stage(a)
    Z, W, y = a.n * a.b1 * a.r, a.n * a.b2 * a.r, a.n * a.o
    last = a.product("W U", a.n, a.r, a.o // a.b2, a.b2, reads=W, writes=y)
    return first, a.copy("permute Z", Z), second, a.copy("permute W", W), last, a.copy("permute y", y, to_output=True)


def _blast_two_stage(a: _Layer) -> tuple[Stage, ...]:
    x, V, S, W = a.n * a.i, a.i * a.r, a.b1 * a.b2 * a.r, a.n * a.b2 * a.r
    rows, ranks = a.mixing
    through_l2 = x * -(-a.r // ranks) + (V + S) * a.loads(rows) + W
    again = (V, a.waves(rows, -(-a.r // ranks), MIXING_WAVE) - 1) if a.order == "rows" else (0, 0)
    mixing = 2 * a.n * a.r * a.b1 * a.b2
    first = a.stage("x V S", 2 * a.n * a.i * a.r, mixing, x + V + S, 0, W, through_l2, again)
    first = first._replace(padded_flops=2 * a.b1 * a.whole_tiles(a.n, a.i // a.b1, a.r, ranks))
    return first, a.product("W U", a.n, a.r, a.o // a.b2, a.b2, reads=W)


def _blast_fused(a: _Layer) -> tuple[Stage, ...]:
    # A program owns a tile of tokens and one output block, so x V is made anew for every output block. It keeps the
    # sums of W [rows, ranks] for some ranks at a time, and reads x again for the next.
    x, y, V, S, U = a.n * a.i, a.n * a.o, a.i * a.r, a.b1 * a.b2 * a.r, a.r * a.o
    ranks = min(a.r, RANKS)
    tensor = 2 * a.n * (a.b2 * V + U)
    through_l2 = a.b2 * x * -(-a.r // ranks) + (a.b2 * V + S + U) * a.fused_loads(a.o // a.b2 + ranks) + y
    return (a.stage("x V S U", tensor, 2 * a.n * a.r * a.b1 * a.b2, x + y + V + S + U, 0, 0, through_l2),)


def cluster(device: "Device") -> int:
    """Return how many programs share their loads of weights on a device."""
    return 2 if device.compute_capability and device.compute_capability >= (9, 0) else 1


def mixing_tile(output_blocks: int) -> tuple[int, int]:
    """Return (tokens, ranks) of a program that keeps the sums of all output blocks in registers.

    >>> mixing_tile(16)
    (64, 32)
    """
    elements = max(ACCUMULATORS // output_blocks, 256)
    ranks = 2 ** (int(math.log2(elements)) // 2)
    return min(TILE[0], elements // ranks), min(TILE[0], ranks)
