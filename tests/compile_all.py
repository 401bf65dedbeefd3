"""Compile every candidate of the tuner for every chip, without a GPU: `make compile-all`.

The grid: what each Triton implementation lists as worth a measurement and what its fixed rules choose, for the layers
of `blrlab_ops.shapes` at 1, 16 and the published number of tokens. Equal launches are compiled once. Candidates that
need more shared memory than a chip has are counted, since the tuner leaves them out; tiles of fixed rules must fit.
Exits with 1 when those do not, or something fails to compile; with 2 when the request makes no sense. The whole grid
is hundreds of thousands of launches, a third of a second of a core each: `--net`, `--impl` and `--limit` try a part.
"""

import argparse
import collections
import itertools
import math
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import torch
from blrlab_ops import cost, dispatch, launching, shapes, tune
from blrlab_ops.testing import Case

sys.path.insert(0, str(Path(__file__).parent / "ops"))
import compiled_kernels  # pyright: ignore[reportMissingImports]

CAPABILITIES = (80, 86, 87, 90)
REPORT_S = 60  # between two lines of progress


class Job(NamedTuple):
    """One launch of an implementation on a chip; no config: with the tiles of fixed rules."""

    case: Case
    impl: str
    capability: int
    place: int
    config: dict[str, Any]


class Part(NamedTuple):
    """What one line of the report is about."""

    format: str
    impl: str
    capability: int


Grid = dict[Part, dict[tuple, Job]]  # by what a compiled kernel depends on
Outcome = int | str  # bytes of shared memory, or why a launch does not compile


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _parser().parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)  # which is asked for when a kernel's module is imported
    try:
        grid = _grid(options)
    except ValueError as error:
        print(f"compile_all: {error}", file=sys.stderr)
        return 2
    jobs = {key: job for launches in grid.values() for key, job in launches.items()}
    # Fixed rules first: they are few, and must fit.
    order = sorted(jobs, key=lambda key: bool(jobs[key].config))
    print(f"{len(jobs)} launches in {options.jobs} processes", flush=True)
    outcomes = dict(zip(order, _compile_all([jobs[key] for key in order], options.jobs), strict=True))
    failures = [_report(part, launches, outcomes) for part, launches in grid.items()]
    return 1 if any(failures) else 0


def _grid(options: argparse.Namespace) -> Grid:
    """List the launches that are asked for.

    Raises:
      ValueError: a name is unknown, or a number is none.
    """
    cases = tune.cases(options)
    formats = dict.fromkeys(case.format for case in cases)
    able = {(each, impl) for each in formats for impl in filter(dispatch.is_triton, dispatch.impls(each))}
    known = sorted({impl for _, impl in able})
    impls = _some(options.impl, known, "implementation")
    capabilities = [int(text) for text in _some(options.arch, list(map(str, CAPABILITIES)), "capability")]
    grid: Grid = {}
    for format, impl, capability in itertools.product(formats, impls, capabilities):
        hopper = capability == 90 and not dispatch.gluon_problem()
        if (format, impl) in able and (hopper or dispatch.is_portable(impl)):
            of_format = [case for case in cases if case.format == format]
            fixed = dict(_fixed(of_format, impl, capability))
            others = dict(_candidates(of_format, impl, capability, options.unsuited))
            others = {key: job for key, job in others.items() if key not in fixed}
            grid[Part(format, impl, capability)] = _spread(fixed, options.limit) | _spread(others, options.limit)
    return grid


def _some(text: str, known: list[str], what: str) -> list[str]:
    wanted = known if text == "all" else text.split(",")
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"{what} {', '.join(unknown)} is not among {', '.join(known)}")
    return wanted


def _spread(jobs: dict[tuple, Job], limit: int) -> dict[tuple, Job]:
    """Keep `limit` jobs, evenly spread; 0: all."""
    step = math.ceil(len(jobs) / limit) if limit else 1
    return dict(itertools.islice(jobs.items(), 0, None, max(step, 1)))


def _fixed(cases: Iterable[Case], impl: str, capability: int) -> Iterator[tuple[tuple, Job]]:
    for case in cases:
        given = compiled_kernels.operands(case, impl, torch.bfloat16)
        for place, launch in enumerate(compiled_kernels.launches(given, capability)):
            yield (capability, *compiled_kernels.specialised(launch)), Job(case, impl, capability, place, {})


def _candidates(cases: Iterable[Case], impl: str, capability: int, unsuited: bool) -> Iterator[tuple[tuple, Job]]:
    for case in cases:
        if not unsuited and dispatch.unsuited(impl, dispatch.Layer(*case[1:])):
            continue
        given = compiled_kernels.operands(case, impl, torch.bfloat16)
        for place, (name, tiles) in enumerate(given.module.candidates(given.x, *given.weights).items()):
            for each in tiles:
                config = {name: each._asdict()}
                launch = compiled_kernels.launches(given, capability, config)[place]
                key = capability, *compiled_kernels.specialised(launch)
                yield key, Job(case, impl, capability, place, config)


def _compile_all(jobs: list[Job], processes: int) -> list[Outcome]:
    """Compile in processes of their own, so that a compiler that dies takes one launch with it."""
    own, started, told = threading.local(), time.perf_counter(), time.perf_counter()
    pools: list[ProcessPoolExecutor] = []

    def compile_apart(job: Job) -> Outcome:
        if not hasattr(own, "pool"):
            own.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            pools.append(own.pool)
        try:
            return own.pool.submit(_compile, job).result()
        except BrokenProcessPool:
            del own.pool
            return "the compiler's process died"

    threads = ThreadPoolExecutor(processes)
    try:
        waiting = [threads.submit(compile_apart, job) for job in jobs]
        for done, _ in enumerate(as_completed(waiting), 1):
            if time.perf_counter() - told > REPORT_S:
                told = time.perf_counter()
                left = (told - started) * (len(jobs) - done) / done
                print(f"{done} of {len(jobs)}, about {left / 60:.0f} min left", flush=True)
        return [each.result() for each in waiting]
    finally:
        threads.shutdown(cancel_futures=True)
        for pool in pools:
            pool.shutdown()


def _compile(job: Job) -> Outcome:
    """Compile a launch; its files are not kept, of which a whole grid's would fill a disk."""
    given = compiled_kernels.operands(job.case, job.impl, torch.bfloat16)
    launch = compiled_kernels.launches(given, job.capability, job.config)[job.place]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            return launching.compile_for(launch, job.capability)
        except Exception as error:
            return f"{type(error).__name__}: {error}"


def _report(part: Part, launches: dict[tuple, Job], outcomes: dict[tuple, Outcome]) -> int:
    """Print what became of the launches of an implementation on a chip; return how many failed."""
    limit = compiled_kernels.LIMITS[part.capability]
    verdicts = {key: _verdict(job, outcomes[key], limit) for key, job in launches.items()}
    counts = collections.Counter(verdict for verdict, _ in verdicts.values())
    print(
        f"{part.format:8} {part.impl:18} sm_{part.capability}: {counts['fits']:6} compile, "
        f"{counts['too large']:5} need more than {limit // 1024} KiB, {counts['fails']:4} fail"
    )
    for key in [key for key, (verdict, _) in verdicts.items() if verdict == "fails"][:1]:
        job, why = launches[key], verdicts[key][1]
        print(f"    {tune.title(job.case)}, launch {job.place}, {job.config or 'fixed rules'}: {why}")
    return counts["fails"]


def _verdict(job: Job, outcome: Outcome, limit: int) -> tuple[str, str]:
    if isinstance(outcome, str):
        return "fails", outcome
    if outcome <= limit:
        return "fits", ""
    return "too large" if job.config else "fails", f"{outcome} bytes of shared memory, of {limit}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tests/compile_all.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    nets = ",".join(shapes.NETS)
    parser.add_argument("--arch", default="all", help=f"some of {CAPABILITIES}, with commas between; default: all")
    parser.add_argument("--format", default="all", help=f"all, or some of {', '.join(cost.FORMATS[1:])}")
    parser.add_argument("--impl", default="all", help="names, such as triton_streaming; default: all of Triton")
    parser.add_argument("--net", default=nets, help=f"some of {nets}; default: all")
    parser.add_argument("--layer", default="", help="layers of the nets; default: all")
    parser.add_argument("--tokens", default="1,16,0", help="0: the published number; default: %(default)s")
    parser.add_argument("--limit", type=int, default=0, help="at most so many candidates, and of fixed rules, a line")
    parser.add_argument("--unsuited", action="store_true", help="also candidates that the tuner would not measure")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; default: one a core")
    parser.set_defaults(shape=None)
    return parser


if __name__ == "__main__":
    sys.exit(main())
