"""The data behind pictures that no other table holds, for who cannot see them."""

from __future__ import annotations

from collections.abc import Sequence

from blrlab.report import words
from blrlab.report.groups import Run, finite, text
from blrlab.report.plots.errors import error_points
from blrlab.report.plots.loss import PHASES, curves, marks, smoothed
from blrlab.report.plots.overview import overview_rows
from blrlab.report.plots.pareto import pareto_panels
from blrlab.report.summary.latency import layer_title
from blrlab.report.summary.pareto import metric_of
from blrlab.report.summary.roofline import Point
from blrlab.report.summary.sizes import sizes
from blrlab.report.summary.speed import Speed, mean_words
from blrlab.report.tables.table import Column, Table


def loss_data(title: str, run: Run) -> Table:
    """Return the evaluations of a run, and the running mean of its losses at ten steps of every phase."""
    found = curves(run)
    rows = [
        (words.STAGES[stage], "evaluated", f"{step:g}", words.loss(loss)) for step, loss, stage in marks(run, found)
    ]
    for phase, curve in found.items():
        mean = smoothed(curve, 1 + len(curve) // 20)
        chosen = mean[:: max(1, len(mean) // 9)]
        chosen += [] if chosen[-1] == mean[-1] else [mean[-1]]
        rows += [(PHASES[phase], "training", f"{step:g}", words.loss(loss)) for step, loss in chosen]
    columns = (Column("phase", 0, False), Column("loss of", 0, False), Column("step"), Column("loss"))
    return Table(title, columns, tuple(rows))


def error_data(title: str, runs: list[Run]) -> Table:
    """Return the error of every compressed layer."""
    names = ("run", "layer", "format", "algorithm", "block", "error")
    columns = tuple(Column(name, 0, name in ("block", "error")) for name in names)
    rows = [
        (
            point.series.run,
            point.layer,
            words.name(words.FORMATS, point.series.format),
            point.series.algorithm or words.MISSING,
            str(point.depth),
            f"{point.error:.3f}",
        )
        for point in error_points(runs)
    ]
    return Table(title, columns, tuple(rows)).without_empty(["layer"])


def roofline_data(title: str, nets: dict[str, list[Point]]) -> Table:
    """Return every point drawn under a roof."""
    names = ("layer", "op", "backend", "tokens", "p50 us", "FLOP/byte", "speed", "of the roof")
    columns = tuple(Column(name, 0, name not in ("layer", "op", "backend")) for name in names)
    rows = [
        (
            layer_title(p.record),
            words.name(words.FORMATS, p.record.get("op")),
            words.backend(p.record.get("impl")),
            words.span([v for v in [finite(p.record.get("tokens"))] if v is not None]),
            words.microseconds(finite(p.record.get("p50"))),
            f"{p.intensity:.3g}",
            words.rate(p.speed, "FLOP/s"),
            words.percent(p.share),
        )
        for points in nets.values()
        for p in points
    ]
    return Table(title, columns, tuple(rows))


def overview_data(title: str, found: Sequence[Speed]) -> Table:
    """Return geometric means, a column per number of tokens; layers are counted where contenders have not the same."""
    counts = sorted({s.tokens for s in found if s.tokens is not None})
    by_place = {(s.op, s.impl, s.dtype, s.tokens): told for s, told in mean_words(found).items()}
    rows = [
        (name, *(by_place.get((*row, n), words.MISSING) for n in counts)) for row, name in overview_rows(found).items()
    ]
    notes = ("In brackets: the layers behind a mean.",) if any("(" in told for told in by_place.values()) else ()
    columns = (Column("x dense", 0, False), *(Column(f"{n:,.0f}\n{'token' if n == 1 else 'tokens'}") for n in counts))
    return Table(title, columns, tuple(rows), notes=notes)


def pareto_data(title: str, runs: Sequence[Run]) -> Table:
    """Return every model's quality and what it takes."""
    metric = metric_of(runs)
    rows = [
        (
            model.name,
            words.loss(model.quality),
            panel,
            words.count(cost) if unit == "parameters" else f"{words.microseconds(cost)} us",
        )
        for panel, unit, placed in pareto_panels(runs)
        for cost, model in placed
    ]
    name = text(metric.label if metric else None, "quality")
    return Table(title, (Column("model", 0, False), Column(name), Column("", 0, False), Column("cost")), tuple(rows))


def sizes_data(title: str, runs: Sequence[Run]) -> Table:
    """Return what every compressed model lost, by the way it was compressed."""
    rows = [
        (way, words.count(size.parameters), words.change(size.lost), words.change(size.healed))
        for way, line in sizes(runs).items()
        for size in line
    ]
    columns = (
        Column("compressed", 0, False),
        Column("parameters"),
        Column("loss\nvs dense"),
        Column("healed\nvs dense"),
    )
    return Table(title, columns, tuple(rows))
