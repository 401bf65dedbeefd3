"""The figures of runs: losses, errors of compression, quality against time and size."""

from __future__ import annotations

from functools import partial

from blrlab.report import words
from blrlab.report.groups import Run, labels
from blrlab.report.pictures import Picture, picture, there
from blrlab.report.plots.errors import error_figure
from blrlab.report.plots.loss import loss_figure
from blrlab.report.plots.pareto import pareto_figure
from blrlab.report.plots.sizes import sizes_figure
from blrlab.report.summary.compression import layer_records
from blrlab.report.summary.pareto import bases, metric_of
from blrlab.report.tables.data import error_data, loss_data, pareto_data, sizes_data

LOSS_CAPTION = "Thin lines are batches as logged, thick ones their running mean; dots are evaluations on held-out data."
JUMP_CAPTION = (
    " Compression lifts the loss along the dotted line, from the dense model's dot to the open one. Healing "
    "starts there; beside it the dense model is trained on."
)
ERROR_CAPTION = "Relative Frobenius error of each compressed weight, by the block of the model it lies in."
PARETO_CAPTION = (
    "A point per evaluated model, dense ones for reference; open points are compressed and not yet healed. Along the "
    "dashed line no model is beaten in both."
)

SIZES_CAPTION = (
    "A line for every way to compress, through the sizes it was tried at: fitted to the weights alone (dashes), to the "
    "layer's inputs (solid), or to what the compressed layers before it hand it (dots). Filled marks are healed."
)


def run_pictures(runs: list[Run], named: bool) -> list[Picture]:
    """Return the loss of each run, the layer errors and the trade-off of all, for runs on the same data and device.

    `named` puts the runs' names into the titles: there are other runs beside these.
    """
    found = [_loss_picture(label if named else "", run) for label, run in zip(labels(runs), runs, strict=True)]
    forms = dict.fromkeys(words.name(words.FORMATS, r.get("format")) for run in runs for r in layer_records(run))
    caption = f"{ERROR_CAPTION} Format: {', '.join(forms)}."
    about = f": {words.listed(labels(runs), 3)}" if named else ""
    title = f"Error of compression, layer by layer{about}"
    found.append(
        picture(
            title, caption, partial(error_figure, runs), "No layer was compressed.", partial(error_data, title, runs)
        )
    )
    title = f"What is lost against size{about}"
    found += there(picture(title, SIZES_CAPTION, partial(sizes_figure, runs), "", partial(sizes_data, title, runs)))
    return [*found, *_pareto_pictures(runs, about)]


def _loss_picture(label: str, run: Run) -> Picture:
    compressed = run.of("eval", stage="compressed")
    caption = LOSS_CAPTION + (JUMP_CAPTION if compressed else "")
    title = f"Loss over steps: {label}" if label else "Loss over steps"
    return picture(
        title, caption, partial(loss_figure, run), "No training was recorded.", partial(loss_data, title, run)
    )


def _pareto_pictures(runs: list[Run], about: str) -> list[Picture]:
    metric = metric_of(runs)
    if metric is None:
        return []
    title = f"{words.sentence(metric.name.replace('_', ' '))[:-1]} against time and size{about}"
    timed = bases(runs)
    caption = PARETO_CAPTION + (" Times are those of the fastest verified backend" if timed else "")
    caption += (", layer by layer, summed over the factored layers." if timed[0].counts else ".") if timed else ""
    return there(picture(title, caption, partial(pareto_figure, runs), "", partial(pareto_data, title, runs)))
