"""Run groups of layers with a progress bar, write every row as it is measured, and leave out what is there already."""

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from blrlab import environment
from blrlab.bench import ahead, problem, suite
from blrlab.bench.card import Card
from blrlab.bench.problem import Group
from blrlab.bench.results import Results
from blrlab.bench.rows import Row, Settings, line

MACHINE = ("device", "torch", "triton", "jax", "driver", "commit", "time")


def settings(
    impls: Sequence[str], seconds: float, card: Card, clone: Path | None = None, tune: bool = False
) -> Settings:
    """Return how to benchmark on a device, with what its rows say of the machine."""
    here = environment.describe(card.measured.name, "gpu" if card.is_gpu else "cpu")
    return Settings(impls, seconds, card, {name: here[name] for name in MACHINE}, clone, tune)


def run(groups: Sequence[Group], how: Settings, results: Results, workers: int = 0) -> int:
    """Measure with a progress bar what the results lack; return the exit status, 1 where a backend failed its gate.

    Args:
      groups: layers at numbers of tokens.
      how: the settings.
      results: where rows go, and what is there already.
      workers: processes that compile ahead; 0: compile as each is measured.
    """
    console = Console()
    with _progress(console) as progress:
        task = progress.add_task("", total=len(groups))

        def say(line: str) -> None:
            progress.console.print(line, highlight=False, markup=False, soft_wrap=True)

        failed = measure(groups, how, results, say, lambda done: progress.update(task, completed=done), workers)
    where = results.path
    console.print(f"wrote {where}; python -m blrlab.report {where} --out=report.html shows it", soft_wrap=True)
    return 1 if failed else 0


def measure(
    groups: Sequence[Group],
    how: Settings,
    results: Results,
    say: Callable[[str], None],
    done: Callable[[int], None] = lambda count: None,
    workers: int = 0,
) -> int:
    """Measure what the results lack, and add every row as it is measured.

    Args:
      groups: layers at numbers of tokens.
      how: the settings.
      results: where rows go, and what is there already.
      say: takes a line a row, and what was left out.
      done: takes the number of groups that are finished.
      workers: processes that compile ahead.

    Returns:
      How many backends failed their gate.
    """
    todo = [group for group in groups if not _is_there(group, how, results)]
    if len(todo) < len(groups):
        at = ", ".join(results.commits())
        say(f"{len(groups) - len(todo)} of {len(groups)} layers are in {results.path} already, measured at commit {at}")
    if todo:
        here = environment.describe(how.card.measured.name, "gpu" if how.card.is_gpu else "cpu")
        results.start({"kind": "env", **here, "peaks": how.card.peaks()})
    done(len(groups) - len(todo))
    failed, left_out = 0, len(groups) - len(todo)
    compiled = ahead.compile_all(todo, how, workers)
    for number, rows in enumerate(suite.bench_layers(todo, how), left_out + 1):
        for row in rows:
            row["tuning_s"] = compiled.get((number - left_out - 1, row["op"], row["impl"]), row["tuning_s"])
        results.add(rows)
        failed += sum(row["passed"] is False for row in rows)
        for row in rows:
            say(line(row))
        done(number)
    return failed


def _is_there(group: Group, how: Settings, results: Results) -> bool:
    cases = {case.format: case for case in group.cases}
    rows: list[Row] = [
        {"impl": impl, **problem.fields(group.net, group.layer, cases[op], group.dtype)}
        for op, impl in suite.planned(group, how)
    ]
    return all(results.has(row, how.machine) for row in rows)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("layers"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
