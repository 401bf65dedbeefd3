"""A kernel that only reads, to measure the rate of the L2 with.

The buffer is [blocks, BLOCK] in float32. Every program reads all of it `passes` times, starting at a block of its own
and going round, past the L1 (`.cg`), and stores its sum: passes x the buffer's sum, which says that it did read.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from .launching import Launch

BLOCK = 4096  # elements: four loads of 16 bytes for each of 256 threads
UNROLL = 4  # blocks that a program has in flight
ELEMENTS = BLOCK * UNROLL  # a buffer is a multiple of this

INTERPRETED: bool = knobs.runtime.interpret  # read when @triton.jit reads it


@triton.jit
def read_kernel(buffer, sums, blocks, ROUNDS: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    """Add up ROUNDS x UNROLL blocks, from the program's share of the way through the buffer."""
    program = tl.program_id(0)
    block = program * blocks // tl.num_programs(0)
    elements = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(0, ROUNDS):
        for _ in tl.static_range(UNROLL):  # pyright: ignore[reportGeneralTypeIssues]
            total += tl.load(buffer + block * BLOCK + elements, cache_modifier=".cg")  # [BLOCK]
            block += 1
            block = tl.where(block == blocks, 0, block)
    tl.store(sums + program, tl.sum(total, axis=0))


def read(buffer: Tensor, sums: Tensor, passes: int) -> Launch:
    """Describe the launch in which each of len(sums) programs reads `buffer` `passes` times.

    Args:
      buffer: [a multiple of ELEMENTS] in float32, contiguous.
      sums: [programs] in float32, written.
      passes: over the whole buffer.
    """
    blocks, rest = divmod(buffer.numel(), BLOCK)
    if rest or not blocks or blocks % UNROLL:
        raise ValueError(f"a buffer of {buffer.numel()} elements is no multiple of {ELEMENTS}")
    arguments = {"buffer": buffer, "sums": sums, "blocks": blocks}
    constants = {"ROUNDS": passes * blocks // UNROLL, "BLOCK": BLOCK, "UNROLL": UNROLL}
    return Launch(read_kernel, sums.numel(), arguments, constants, warps=8, stages=1)
