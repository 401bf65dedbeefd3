"""The kernels of the source paper (arXiv 2512.20861), from a clone of its repository that the user points at.

The clone is read, never copied: it has no licence. Its kernels are bfloat16, take as many input as output blocks, and
pick the fastest of their own list of configurations at the first call of a shape; that counts as tuning time. There
are up to 124, so each is timed for 20 ms here, where Triton takes 100. Factors are laid out in memory as each kernel
wants them, untimed. The Monarch kernels interleave the output columns of the blocks: [n, (q, b2)] where the formats
here have [n, (b2, q)]; the gate puts them in order, untimed.

Shapes: x [n, i], V [b1, b2, p, r'] or [b1, p, r], S [b1, b2, r], U [b1, b2, r', q] or [b2, r, q].
"""

import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from blrlab.bench.problem import Kernel, Problem
from blrlab.errors import InputError

REPOSITORY = "https://github.com/pabillam/mem-efficient-blr"
MODULES = {"low_rank": "low_rank_kernels", "monarch": "monarch_kernels", "blast": "blast_kernels"}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One of the paper's ways to run a layer.

    Attributes:
      op: the format.
      function: its name in the clone.
      operands: (kernel) -> the factors in its order and layout.
    """

    op: str
    function: str
    operands: Callable[[dict[str, Tensor]], tuple[Tensor, ...]]


def _low_rank(kernel: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return V [i, r] and U [r, o]."""
    return kernel["V"].contiguous(), kernel["U"].contiguous()


def _monarch(kernel: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return V as [b1, p, (b2 r')] and U as [b2, (b1 r'), q]."""
    V, U = kernel["V"], kernel["U"]
    return V.transpose(1, 2).flatten(2).contiguous(), U.transpose(0, 1).flatten(1, 2).contiguous()


def _monarch_left_transposed(kernel: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return V as `_monarch` does and U as [b2, q, (b1 r')]."""
    V, U = _monarch(kernel)
    return V, U.transpose(1, 2).contiguous()


def _blast(kernel: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Return U [b2, r, q], V [b1, p, r], S [b1, b2, r]."""
    return tuple(kernel[name].contiguous() for name in ("U", "V", "S"))


def _blast_products(kernel: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Return U [b2, q, r], V [b1, p, r], S [r, b2, b1]."""
    U, V, S = _blast(kernel)
    return U.transpose(1, 2).contiguous(), V, S.permute(2, 1, 0).contiguous()


VARIANTS = {
    "paper_low_rank": Variant("low_rank", "triton_low_rank_fp16", _low_rank),
    "paper_monarch_right": Variant("monarch", "triton_monarch_right_fp16", _monarch_left_transposed),
    "paper_monarch_right_left": Variant("monarch", "triton_monarch_right_left_fp16", _monarch),
    "paper_blast_partial": Variant("blast", "triton_blast_partial_grouped_fp16", _blast),
    "paper_blast_partial_persistent": Variant("blast", "triton_blast_partial_grouped_persistent_fp16", _blast),
    "paper_blast_bmm": Variant("blast", "triton_blast_bmm_fp16", _blast_products),
}


def call(variant: Variant, clone: Path | None, problem: Problem, kernel: Kernel) -> Callable[[], Any]:
    """Return a call of one of the paper's kernels.

    Raises:
      InputError: there is no such clone.
    """
    assert isinstance(kernel, dict)
    if clone is None:
        raise InputError(f"the paper's kernels need a clone of {REPOSITORY}.")
    check(clone)
    run = getattr(_module(str(clone), MODULES[variant.op]), variant.function)
    operands, x = variant.operands(kernel), problem.x[None]
    return lambda: run(x, *operands)


def to_rows(problem: Problem, y: Tensor) -> Tensor:
    """Return a kernel's output [1, n, o] as y [n, o], its columns block by block."""
    rows = y.flatten(0, -2)
    if problem.op == "monarch":
        return rows.unflatten(1, (-1, problem.case.blocks[1])).transpose(1, 2).flatten(1)
    return rows


def why_not(problem: Problem) -> str | None:
    """Say in one sentence why the paper's kernels cannot run a problem; None where they can."""
    if problem.x.device.type != "cuda":
        return "the paper's kernels need a CUDA GPU"
    if problem.dtype != "bfloat16":
        return "the paper's timed kernels are bfloat16 only"
    if problem.op != "low_rank" and (len(set(problem.case.blocks)) > 1 or problem.case.blocks[0] == 1):
        return "the paper's kernels want as many input as output blocks, and more than one"
    return None


def check(clone: Path) -> None:
    """Refuse a folder that is no clone of the paper's repository.

    Raises:
      InputError: it lacks the kernels.
    """
    if not (clone / "triton_funcs" / "monarch_kernels.py").is_file():
        raise InputError(f"no triton_funcs/monarch_kernels.py in {clone}: clone {REPOSITORY} there.")


@functools.cache
def _module(clone: str, name: str) -> Any:
    """Import a module of the clone, whose own imports expect the clone's folder on the path."""
    sys.path.insert(0, clone)
    try:
        module = importlib.import_module(f"triton_funcs.{name}")
    finally:
        sys.path.remove(clone)
    for each in vars(module).values():
        if hasattr(each, "configs") and hasattr(each, "_do_bench"):  # a kernel that Triton's autotuner stands before
            each._do_bench = _time
    return module


def _time(call: Callable[[], Any], quantiles: Sequence[float]) -> Any:
    """Time a candidate of the paper's as Triton's autotuner does, for less long."""
    from triton.testing import do_bench

    return do_bench(call, warmup=5, rep=20, quantiles=quantiles)
