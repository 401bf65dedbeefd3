"""The page's figures with titles and captions, or the sentence that stands where a figure has no data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from matplotlib.figure import Figure

from blrlab.report import words
from blrlab.report.groups import Record, Run, labels
from blrlab.report.plots.errors import error_figure
from blrlab.report.plots.latency import latency_figures
from blrlab.report.plots.loss import loss_figure
from blrlab.report.plots.roofline import roofline_figure
from blrlab.report.plots.style import NARROW, WIDE
from blrlab.report.summary.compression import layer_records
from blrlab.report.tables.provenance import peaks_in_words

LOSS_CAPTION = "Thin lines are batches as logged, thick ones their running mean; dots are evaluations on held-out data."
JUMP_CAPTION = (
    " Compression lifts the loss along the dotted line, from the dense model's dot to the open one. Healing "
    "starts there; beside it the dense model is trained on."
)
ERROR_CAPTION = "Relative Frobenius error of each compressed weight, by the block of the model it lies in."
LATENCY_CAPTION = (
    "Bars are medians and their thin lines span p20 to p80; upright marks are the roofline's bound. Dense is "
    "pale, factored is full. A backend without a verified time says why."
)
ROOFLINE_CAPTION = (
    "Points are measured layers, dashes their bounds; the nearer a point to its dash, the less is left to gain."
)


@dataclass(frozen=True)
class Picture:
    """A figure for wide and one for narrow screens, or `absent`: why there is none."""

    title: str
    caption: str
    figures: tuple[Figure, Figure] | None
    absent: str = ""


def run_pictures(runs: list[Run], named: bool) -> list[Picture]:
    """Return the loss of each run and the layer errors of all, for runs on the same data and device.

    `named` puts the runs' names into the titles: there are other runs beside these.
    """
    found = [_loss_picture(label if named else "", run) for label, run in zip(labels(runs), runs, strict=True)]
    forms = dict.fromkeys(words.name(words.FORMATS, r.get("format")) for run in runs for r in layer_records(run))
    caption = f"{ERROR_CAPTION} Format: {', '.join(forms)}."
    title = "Error of compression, layer by layer" + (f": {', '.join(labels(runs))}" if named else "")
    return [*found, _picture(title, caption, partial(error_figure, runs), "No layer was compressed.")]


def device_pictures(device: str, records: list[Record], peaks: Record) -> list[Picture]:
    """Return the latency of each net's layers and the roofline of one device."""
    wide, narrow = latency_figures(records, WIDE), latency_figures(records, NARROW)
    found = [
        # How to read the bars is said once, above the first.
        Picture(
            f"Latency of {net} layers on {device}",
            "" if number else LATENCY_CAPTION,
            (wide[net], narrow[net]),
        )
        for number, net in enumerate(wide)
    ]
    if not found:
        found.append(Picture(f"Latency on {device}", "", None, "No layer has a verified time."))
    told = ", ".join(part for part in (peaks_in_words(peaks), str(peaks.get("source") or "")) if part)
    caption = f"{ROOFLINE_CAPTION} Peaks: {told}."
    missing = "A roofline takes the machine's peaks and a verified time; these records lack one of them."
    return [
        *found,
        _picture(f"Roofline of {device}", caption, partial(roofline_figure, records, peaks), missing),
    ]


def _loss_picture(label: str, run: Run) -> Picture:
    compressed = run.of("eval", stage="compressed")
    caption = LOSS_CAPTION + (JUMP_CAPTION if compressed else "")
    title = f"Loss over steps: {label}" if label else "Loss over steps"
    return _picture(title, caption, partial(loss_figure, run), "No training was recorded.")


def _picture(title: str, caption: str, draw: Callable[[float], Figure | None], absent: str) -> Picture:
    wide, narrow = draw(WIDE), draw(NARROW)
    return Picture(title, caption, (wide, narrow) if wide and narrow else None, absent)
