"""Hold the cost model against the profiler: what a backend computes and moves, counted by the GPU itself.

    python -m blrlab.bench.counters --net=llama7b --layer=qkvo --tokens=1024,16384 --out=runs/counters.jsonl

Runs each backend once more under NVIDIA Nsight Compute (`ncu`, part of the CUDA toolkit), on rotating copies of the
weights as the benchmark does, and prints counted beside predicted: operations of tensor and CUDA cores, bytes at DRAM
and between L2 and the multiprocessors, each of one call. The Triton kernels are predicted with their own tiles.
"""

import argparse
import csv
import io
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blrlab_ops import algorithms, cost

from blrlab import environment, records
from blrlab.bench import flags
from blrlab.errors import InputError

EXIT_INPUT = 2
TIMEOUT = 480.0  # s, of one run of the profiler
Row = dict[str, Any]
# What each counter of the profiler is worth: operations, or bytes.
RANGE_COUNTERS = {
    "tensor_flops": {"sm__ops_path_tensor_src_bf16_dst_fp32.sum": 1},
    "dram_bytes": {"dram__bytes_read.sum": 1, "dram__bytes_write.sum": 1},
    "l2_bytes": {"lts__t_sectors_srcunit_tex.sum": 32},
}
# Counted in instructions, which works kernel by kernel only: those of the kernels that mix on CUDA cores.
KERNEL_COUNTERS = {
    "cuda_flops": {
        "smsp__sass_thread_inst_executed_op_ffma_pred_on.sum": 2,
        "smsp__sass_thread_inst_executed_op_fadd_pred_on.sum": 1,
        "smsp__sass_thread_inst_executed_op_fmul_pred_on.sum": 1,
    },
}
MIXING_KERNELS = "regex:mix_kernel"
# The algorithm of `blrlab_ops.algorithms` that a backend runs.
ALGORITHM = {
    ("dense", "torch_eager"): "matmul",
    ("low_rank", "torch_bmm"): "two_stage",
    ("low_rank", "triton_two_stage"): "two_stage",
    ("monarch", "torch_bmm"): "two_stage",
    ("monarch", "triton_two_stage"): "two_stage",
    ("blast", "torch_bmm"): "three_stage",
    ("blast", "triton_two_stage"): "two_stage",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.child:
            return _child(options)
        flags.counts(options.tokens, "--tokens")
        rows = list(count(options.net, options.layer, options.tokens))
        for row in rows:
            print(_line(row))
        if options.out:
            out = flags.records_file(options.out, options.out)
            out.parent.mkdir(parents=True, exist_ok=True)
            records.keep(out, lambda record: record.get("kind") != "counters")
            for row in rows:
                records.append(out, row)
    except (InputError, ValueError, OSError) as error:
        print(f"blrlab.bench.counters: {error}", file=sys.stderr)
        return EXIT_INPUT
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m blrlab.bench.counters",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--net", default="llama7b", help="nets of the table of shapes, commas between")
    parser.add_argument("--layer", default="", help="layers of those nets; default: all of them")
    parser.add_argument("--tokens", default="0", help="numbers of rows; 0: the published one of each layer")
    parser.add_argument("--out", type=Path, help="the file of records")
    parser.add_argument("--child", choices=("all", "mixing"), help=argparse.SUPPRESS)
    return parser


def count(net: str, layer: str, tokens: str) -> Iterator[Row]:
    """Yield what the profiler counts for every layer and backend, with what the cost model predicts.

    Raises:
      InputError: there is no `ncu`, or it fails or takes too long.
    """
    flags = (f"--net={net}", f"--tokens={tokens}", f"--layer={layer}")
    whole = ("--replay-mode", "app-range", "--cache-control", "none", "--clock-control", "none")
    mixing = ("--profile-from-start", "off", "--kernel-name", MIXING_KERNELS)
    rows = _profiled(RANGE_COUNTERS, whole, ("--child=all", *flags))
    mixed = {_name(row): row for row in _profiled(KERNEL_COUNTERS, mixing, ("--child=mixing", *flags))}
    here = environment.describe(rows[0]["device"], "gpu") if rows else {}
    for row in rows:
        machine = {name: here[name] for name in ("torch", "triton", "driver", "commit", "time")}
        yield {**row, "counted_cuda_flops": mixed.get(_name(row), {}).get("counted_cuda_flops"), **machine}


def _name(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("net", "layer", "tokens", "op", "impl"))


def _profiled(counters: dict[str, dict[str, int]], how: Sequence[str], child: Sequence[str]) -> list[Row]:
    """Run a child under ncu: the rows it printed, with what was counted in the range or kernel of each."""
    ncu = shutil.which("ncu")
    if ncu is None:
        raise InputError("no ncu on the path: it comes with the CUDA toolkit (Nsight Compute).")
    metrics = ",".join(itertools.chain.from_iterable(counters.values()))
    command = [
        *(ncu, *how, "--csv", "--page", "raw", "--print-units", "base", "--metrics", metrics),
        *(sys.executable, "-m", "blrlab.bench.counters", *child),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise InputError(f"ncu took longer than {TIMEOUT:.0f} s: name fewer layers or tokens.") from None
    counted, described = parse(done.stdout, counters), _described(done.stdout)
    if done.returncode or len(counted) != len(described):
        said = [line for line in (done.stderr + done.stdout).splitlines() if "ERROR" in line]
        raise InputError(f"ncu counted {len(counted)} of {len(described)}: {' '.join(said) or 'no error was printed'}")
    return [
        row | {f"counted_{name}": value / row["calls"] for name, value in found.items()}
        for found, row in zip(counted, described, strict=True)
    ]


def parse(text: str, counters: dict[str, dict[str, int]]) -> list[dict[str, float]]:
    """Read ncu's raw CSV: for every range or kernel the sums of the counters."""
    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    table = csv.DictReader(io.StringIO("\n".join(line for line in lines[start:] if line.startswith('"'))))
    rows = [row for row in table if row["ID"].isdigit()]  # the line of units has no ID
    return [
        {
            name: sum(float(row[metric].replace(",", "")) * worth for metric, worth in parts.items())
            for name, parts in counters.items()
        }
        for row in rows
    ]


def _described(text: str) -> list[Row]:
    """Return the rows that the child printed; it runs once a pass and prints the same each time."""
    rows = [json.loads(line) for line in text.splitlines() if line.startswith('{"kind"')]
    return list({json.dumps(row, sort_keys=True): row for row in rows}.values())


def _child(options: argparse.Namespace) -> int:
    """Run every backend inside a range of the profiler."""
    import torch

    from blrlab.bench import backends, problem, timing
    from blrlab.bench.problem import named_groups

    device = torch.device("cuda")
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    layers = [word for word in options.layer.split(",") if word]
    counts = [int(word) for word in options.tokens.split(",")]
    for group in named_groups(options.net.split(","), layers, cost.FORMATS, counts, "bfloat16"):
        for each in group.problems(device):
            for (op, impl), algorithm in ALGORITHM.items():
                mixes = (op, impl) == ("blast", "triton_two_stage")
                if op != each.op or backends.why_not(impl, each) or (options.child == "mixing" and not mixes):
                    continue
                make = backends.backend(impl).make
                copies = timing.copies_to_be_cold(each.weight_bytes, l2) if options.child == "all" else 1
                calls = [make(each, problem.map_leaves(torch.clone, each.kernel)) for _ in range(copies)]
                with torch.no_grad():
                    for call in calls:
                        call()
                    torch.cuda.synchronize()
                    torch.cuda.profiler.start()
                    for call in calls:
                        call()
                    torch.cuda.synchronize()
                    torch.cuda.profiler.stop()
                print(json.dumps(_predicted(group, each, impl, algorithm, copies, l2)), flush=True)
                del calls
    return 0


def _predicted(group: Any, each: Any, impl: str, algorithm: str, calls: int, l2: int) -> Row:
    import torch

    from blrlab.bench import problem

    case = each.case
    own = {"tile": (128, 128), "order": "rows"} if impl.startswith("triton_") else {}
    sizes = (case.tokens, case.in_features, case.out_features, case.blocks, case.rank)
    stages = algorithms.stages(case.format, algorithm, *sizes, **own)
    return {
        "kind": "counters",
        "impl": impl,
        "algorithm": algorithm,
        **problem.fields(group.net, group.layer, case, group.dtype),
        "calls": calls,
        "tensor_flops": sum(stage.padded_flops for stage in stages),
        "cuda_flops": sum(stage.cuda_flops for stage in stages),
        "dram_bytes": sum(stage.dram_bytes(l2) for stage in stages),
        "l2_bytes": sum(stage.l2_bytes for stage in stages),
        "l2_size": l2,
        "device": torch.cuda.get_device_name(each.x.device),
    }


def _line(row: Row) -> str:
    name = f"{row['net']} {row['layer']} n={row['tokens']} {row['op']} {row['impl']}"
    parts = [
        f"{key} {row[f'counted_{key}']:.3e} / {row[key]:.3e} = {row[f'counted_{key}'] / row[key]:.3f}"
        for key in (*RANGE_COUNTERS, *KERNEL_COUNTERS)
        if row[key] and row[f"counted_{key}"] is not None
    ]
    return f"{name:<48} {'; '.join(parts)}"


if __name__ == "__main__":
    sys.exit(main())
