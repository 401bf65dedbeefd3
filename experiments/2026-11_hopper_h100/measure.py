"""Verify and time the Hopper kernels of this study, beside cuBLAS dense and two cuBLAS products that permute nothing.

    python experiments/2026-11_hopper_h100/measure.py --out=OUT.jsonl [--layers=qkvo,down] [--parts=stages,layers]

Each layer has a process of its own, first all beside one another for the compiler, then one after another for the
clock: a hang costs that layer. A program that is wrong by more than the rounding of its result has no time. With
`--compile` nothing runs: every variant is compiled for sm_90, without a GPU.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from chained import chained_kernel
from cuts import CHAINS, FIRST, HALF_WIDE, LAST, LAYERS, LOW, WIDE, Chain, Stage
from problems import MOST_ERROR, Launch, Problem, errors, library, start, times
from product import product_kernel
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

HERE = Path(__file__).resolve()
CHIP, SMS = 90, 132


def layout(shape: Sequence[int], ctas: int, dim: int | None) -> Any:
    """Return the shared memory's layout of a tile, a cluster's CTAs splitting one dimension or sharing all."""
    bits = range(ctas.bit_length() - 1)
    bases = [[(1 << bit) if d == dim else 0 for d in range(len(shape))] for bit in bits]
    return gl.NVMMASharedLayout.get_default_for(list(shape), gl.bfloat16, cga_layout=bases)


def describe(operand: tuple[Tensor, list[int], list[int]], tile: list[int], ctas: int, dim: int | None) -> Any:
    """Make a TMA descriptor."""
    return TensorDescriptor(*operand, tile, layout(tile, ctas, dim))


def product(stage: Stage, a: Any, b: Any, c: Any, panel: int, numbers: Any, y: Tensor, batches: int, depth: int,
            overlap: bool = True) -> tuple[Any, tuple, dict[str, Any], int]:  # fmt: skip
    """Return kernel, arguments, constants and number of CTAs' groups of one product."""
    rows = 64 * stage.ctas
    tiles = ([1, rows, stage.depth], [1, stage.blocks, stage.ranks, stage.depth], [stage.blocks, 1, rows, stage.ranks])
    made = [describe(*each, stage.ctas, dim) for *each, dim in zip((a, b, c), tiles, (1, None, 2), strict=True)]
    n1_tiles = triton.cdiv(b[1][1], stage.blocks)
    columns = n1_tiles * triton.cdiv(b[1][2], stage.ranks)
    per_unit = stage.tiles or columns
    if columns % per_unit:
        raise ValueError(f"{columns} tiles of columns are not taken {per_unit} at a time")
    row_tiles = triton.cdiv(c[1][2], 2 * rows)
    units = batches * (columns // per_unit) * row_tiles
    x_policy, weight_policy, result_policy = stage.policies
    constants = {
        **{"STEPS": triton.cdiv(depth, stage.depth), "PER_UNIT": per_unit, "RESIDENT": bool(stage.stays)},
        **{"A_SLOTS": stage.slots, "B_SLOTS": stage.weight_slots, "PANEL": panel, "PRODUCTS": stage.products},
        **{"LOADS": stage.loads, "STORES": stage.store, "A_POLICY": x_policy, "B_POLICY": weight_policy},
        **{"C_POLICY": result_policy},
    }
    options = {"num_warps": 4, "num_ctas": stage.ctas, "launch_pdl": overlap}
    arguments = (*made, y, units, row_tiles, columns // per_unit, n1_tiles, *numbers)
    return product_kernel, arguments, {**constants, **options}, min(units, SMS // stage.ctas)


def chain(problem: Problem, cut: Chain, copy: int) -> tuple[Any, tuple, dict[str, Any], int]:
    """Return kernel, arguments, constants and number of CTAs of a whole layer."""
    _, _, i, _, b, rank, n = problem.layer
    (V, U), p, q = problem.weights[copy], problem.p, problem.q
    made = (
        describe((problem.x, [n, i], [i, 1]), [64, cut.depth], 1, None),
        describe(
            (V, [b, b, rank, p], [V.stride(0), V.stride(2), V.stride(1), 1]), [1, 1, cut.ranks, cut.depth], 1, None
        ),
        describe((U, [b, q, b, rank], list(U.stride())), [1, cut.columns, 1, cut.ranks], 1, None),
    )
    row_tiles, column_tiles = triton.cdiv(n, 128), triton.cdiv(q, cut.columns)
    tiles = b * row_tiles * column_tiles
    constants = {"B1": b, "B2": b, "P": p, "Q": q, "SLOTS": cut.slots, "U_SLOTS": cut.U_slots}
    options = {"num_warps": 4, "num_ctas": 1, "launch_pdl": True}
    return (
        chained_kernel,
        (*made, problem.y, n, tiles, row_tiles, column_tiles),
        {**constants, **options},
        min(tiles, SMS),
    )


def ready(made: tuple[Any, tuple, dict[str, Any], int]) -> Launch:
    """Return the launch."""
    kernel, arguments, constants, programs = made
    return lambda: kernel[(programs,)](*arguments, **constants)


class Variant(NamedTuple):
    """What is measured: launches for a copy of the weights, the result, the truth, what is poisoned first."""

    name: str
    made: Callable[[int], list[tuple]]
    result: Callable[[], Tensor]
    truth: Callable[[], Tensor]
    prepare: Callable[[], None]
    row: dict[str, Any]


def variants(problem: Problem, parts: Sequence[str]) -> Iterator[Variant]:
    """List what there is to measure of a layer."""
    name = next(key for key, layer in LAYERS.items() if layer == problem.layer)

    def poison() -> None:
        problem.Z.fill_(float("nan"))
        problem.y.fill_(float("nan"))

    seconds = [WIDE, HALF_WIDE] if problem.q > 128 else [HALF_WIDE]
    for one in FIRST.get(name, ()):
        for panel in (problem.between, 64):
            for store, policies in ((1, (0, 0, 0)), (1, LOW), (1, LAST), (2, LOW)):
                first = one._replace(store=store, policies=policies)
                if "stages" in parts:
                    yield Variant(
                        f"first {first} panel {panel}",
                        lambda copy, first=first, panel=panel: [product(*problem.first(first, panel, copy))],
                        lambda panel=panel: problem.held(panel),
                        lambda: problem.exact_Z,
                        poison,
                        {"stage": 1, "config": {**first._asdict(), "panel": panel}},
                    )
                for two in seconds if "layers" in parts and policies != (0, 0, 0) else ():
                    second = two._replace(policies=(1, 1, 1))
                    yield Variant(
                        f"both {first} {second} panel {panel}",
                        lambda copy, first=first, second=second, panel=panel: [
                            product(*problem.first(first, panel, copy)),
                            product(*problem.second(second, panel, copy)),
                        ],
                        lambda: problem.y,
                        lambda: problem.exact,
                        poison,
                        {
                            "stage": "both",
                            "config": {"first": first._asdict(), "second": second._asdict(), "panel": panel},
                        },
                    )
    for cut in CHAINS.get(name, ()) if "chains" in parts else ():
        yield Variant(
            f"chained {cut}",
            lambda copy, cut=cut: [chain(problem, cut, copy)],
            lambda: problem.y,
            lambda: problem.exact,
            poison,
            {"impl": "hopper_chained", "stage": "both", "config": cut._asdict()},
        )


def one_layer(name: str, parts: Sequence[str], out: Path, only_compile: bool) -> None:
    """Measure one layer in this process."""
    problem = Problem(LAYERS[name], "cuda")
    common = start(problem)
    with out.open("a") as file:
        for variant in variants(problem, parts):
            row = {**common, **variant.row, "time": time.strftime("%Y-%m-%dT%H:%M:%S")}
            try:
                variant.prepare()
                for made in variant.made(0):
                    ready(made)()
                torch.cuda.synchronize()
                if only_compile:
                    continue
                error, error_max = errors(variant.result(), variant.truth())
                least, _ = errors(variant.truth().bfloat16(), variant.truth())
                finite = (value if math.isfinite(value) else None for value in (error, error_max))
                row |= dict(zip(("error", "error_max"), finite, strict=True)) | {"error_budget": MOST_ERROR * least}
                row["passed"] = error <= MOST_ERROR * least
                if row["passed"]:
                    launches = [[ready(made) for made in variant.made(copy)] for copy in range(len(problem.weights))]
                    calls = [lambda both=both: [launch() for launch in both] for both in launches]
                    row |= dict(zip(("p20", "p50", "p80"), times(calls), strict=True))
            except Exception as problem_here:
                row |= {"passed": False, "reason": str(problem_here).splitlines()[0][:200]}
            told = f"{row['p50']:.2f} us" if "p50" in row else row.get("reason", f"wrong: {row.get('error')}")
            print(f"{name} {variant.name}: {told}", flush=True)
            file.write(json.dumps(row) + "\n")
        for own, calls in library(problem) if not only_compile else ():
            row = {**common, **own, **dict(zip(("p20", "p50", "p80"), times(calls), strict=True))}
            print(f"{name} {row['impl']}: {row['p50']:.2f} us", flush=True)
            file.write(json.dumps(row) + "\n")


def compile_ahead(names: Sequence[str], parts: Sequence[str]) -> int:
    """Compile every variant for sm_90; return how many failed."""
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    failed, done = 0, set()
    for name in names:
        for variant in variants(Problem(LAYERS[name], "meta"), parts):
            for kernel, arguments, constants, _ in variant.made(0):
                options = {key: constants.pop(key) for key in ("num_warps", "num_ctas", "launch_pdl")}
                signature = {}
                for key, value in zip(kernel.arg_names, arguments, strict=False):
                    if isinstance(value, TensorDescriptor):
                        shape = ",".join(map(str, value.block_shape))
                        signature[key] = f"tensordesc<bf16[{shape}],{value.layout!r}>"
                    else:
                        signature[key] = "*bf16" if isinstance(value, Tensor) else "i32"
                key = str((signature, constants, options))
                if key in done:
                    continue
                done.add(key)
                signature |= dict.fromkeys(constants, "constexpr")
                try:
                    source = GluonASTSource(kernel, signature, constants)
                    made = triton.compile(source, target=GPUTarget("cuda", CHIP, 32), options=options)
                    fits = made.metadata.shared <= 227 * 1024
                except Exception as problem:
                    fits, made = False, problem
                failed += not fits
                if not fits:
                    print(f"{name} {variant.name}: {getattr(made, 'metadata', made)}", flush=True)
    print(f"{len(done)} programs compiled, {failed} failed")
    return failed


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("hopper.jsonl"))
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument("--parts", default="layers,chains", help="stages, layers, chains")
    parser.add_argument("--seconds", type=float, default=120, help="after which a layer is given up")
    parser.add_argument("--compile", action="store_true", help="for sm_90, without a GPU")
    parser.add_argument("--one", choices=("compile", "time"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    names, parts = asked.layers.split(","), asked.parts.split(",")
    if asked.compile:
        return min(1, compile_ahead(names, parts))
    if asked.one:
        one_layer(names[0], parts, asked.out, asked.one == "compile")
        return 0

    def command(name: str, step: str) -> list[str]:
        own = [f"--layers={name}", f"--parts={asked.parts}", f"--out={asked.out}", f"--one={step}"]
        return [sys.executable, str(HERE), *own]

    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    compiling = [subprocess.Popen(command(name, "compile"), **quiet) for name in names]
    end = time.time() + asked.seconds
    for process in compiling:
        try:
            process.wait(max(1, end - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
    for name in names:
        try:
            subprocess.run(command(name, "time"), timeout=asked.seconds, check=False, env=os.environ)
        except subprocess.TimeoutExpired:
            print(f"{name}: given up after {asked.seconds:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
