"""Training loss over steps: dense, then healing and dense trained on, both from where dense ended."""

from __future__ import annotations

from itertools import accumulate

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blrlab.report import words
from blrlab.report.groups import Run, finite, mapping
from blrlab.report.plots.style import CARD, MUTED, STAGE_COLOURS, WIDE, name_lines, new_figure, styled
from blrlab.report.summary.quality import losses, quality_rows, splits, variants

Curve = list[tuple[float, float]]

PHASES = {"dense": "dense", "dense_continued": "dense, trained on", "heal": "healing"}
STAGE_OF_PHASE = {"dense": "dense", "dense_continued": "dense_continued", "heal": "healed"}


def curves(run: Run) -> dict[str, Curve]:
    """Return (step, loss) points of every phase, phases after dense moved to begin where dense ended."""
    found: dict[str, Curve] = {}
    for phase in PHASES:
        rows = ((finite(r.get("step")), finite(r.get("loss"))) for r in run.of("train", phase=phase))
        points = {step: loss for step, loss in rows if step is not None and loss is not None}
        if points:
            found[phase] = sorted(points.items())
    end = found["dense"][-1][0] if "dense" in found else 0.0
    for phase in ("dense_continued", "heal"):
        # Steps that begin past the end of dense were counted on from it already.
        if phase in found and found[phase][0][0] <= end:
            found[phase] = [(step + end, loss) for step, loss in found[phase]]
    return found


def smoothed(curve: Curve, window: int) -> Curve:
    """Return the centred mean of a curve over about `window` points, fewer at its steep beginning."""
    half = window // 2
    sums = [0.0, *accumulate(loss for _, loss in curve)]
    means: Curve = []
    for i, (step, _) in enumerate(curve):
        reach = min(half, i + half // 2)
        first, last = max(0, i - reach), min(len(curve), i + reach + 1)
        means.append((step, (sums[last] - sums[first]) / (last - first)))
    return means


def thinned(curve: Curve, most: int = 800) -> Curve:
    """Keep every so-manieth point, and the last: no more than about `most`, for a page of bearable size."""
    stride = -(-len(curve) // most)
    return curve if stride == 1 else [*curve[:-1:stride], curve[-1]]


@styled
def loss_figure(run: Run, width: float = WIDE) -> Figure | None:
    """Draw a run's loss over steps, and what follows compression once more; None without training records.

    `width` in inches.
    """
    found = curves(run)
    if not found:
        return None
    later = {phase: curve for phase, curve in found.items() if phase != "dense"}
    panels = 2 if later and "dense" in found else 1
    wide = width > 6
    height = 3.7 if wide or panels == 1 else 6.4
    figure = new_figure(width, height)
    grid = figure.subplots(1, panels, squeeze=False) if wide else figure.subplots(panels, 1, squeeze=False)
    axes: list[Axes] = list(grid.flat)
    _whole(axes[0], run, found, named=panels == 1)
    if panels == 2:
        _after_compression(axes[1], run, found)
    return figure


def _whole(axes: Axes, run: Run, found: dict[str, Curve], named: bool) -> None:
    _lines(axes, found)
    marks = _evaluations(run, found)
    _markers(axes, marks)
    axes.set_title("Training loss")
    _label_axes(axes, run)
    _unigram(axes, run)
    # Room under the end of the dense curve, where its name stands.
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(0.0, bottom - 0.08 * (top - bottom)), top)
    for x, y, stage in marks:
        if stage == "dense":
            _name_mark(axes, stage, x, y, (-4, -13), "right")
    if named:
        name_lines(axes, [(curve[-1][1], PHASES[phase], _colour(phase)) for phase, curve in found.items()])


def _after_compression(axes: Axes, run: Run, found: dict[str, Curve]) -> None:
    later = {phase: curve for phase, curve in found.items() if phase != "dense"}
    end = found["dense"][-1][0]
    last = max(curve[-1][0] for curve in later.values())
    _lines(axes, later)
    marks = _evaluations(run, found)
    _markers(axes, marks)
    heights = [loss for curve in later.values() for _, loss in curve] + [mark[1] for mark in marks]
    margin = 0.06 * (max(heights) - min(heights) or 1.0)
    axes.set_xlim(end - 0.04 * (last - end), last + 0.04 * (last - end))
    axes.set_ylim(min(heights) - margin, max(heights) + margin)
    axes.set_title("After compression")
    _label_axes(axes, run)
    _name_ends(axes, later, marks)


def _name_ends(axes: Axes, later: dict[str, Curve], marks: list[tuple[float, float, str]]) -> None:
    ends = []
    for phase, curve in later.items():
        value = next((y for _, y, stage in marks if stage == STAGE_OF_PHASE[phase]), None)
        height = smoothed(curve, _window(curve))[-1][1] if value is None else value
        told = "" if value is None else f"\n{words.loss(value)} evaluated"
        ends.append((height, PHASES[phase] + told, _colour(phase)))
    name_lines(axes, ends, gap=0.15)
    for x, y, stage in marks:
        if stage == "compressed":
            _name_mark(axes, stage, x, y, (7, 0), "left")


def _name_mark(axes: Axes, stage: str, x: float, y: float, offset: tuple[int, int], align: str) -> None:
    said = f"{words.STAGES[stage]} {words.loss(y)}"
    where = {"xytext": offset, "textcoords": "offset points", "va": "center", "ha": align}
    backing = {"facecolor": CARD, "edgecolor": "none", "alpha": 0.8, "pad": 1}
    axes.annotate(said, (x, y), color=STAGE_COLOURS[stage], fontsize=8.5, bbox=backing, zorder=6, **where)


def _window(curve: Curve) -> int:
    # Enough to quiet the batches' noise, few enough to show where the loss bends.
    return 2 * (min(len(curve), 80) // 16) + 1 + len(curve) // 80


def _colour(phase: str) -> str:
    return STAGE_COLOURS[phase]


def _lines(axes: Axes, found: dict[str, Curve]) -> None:
    for phase, curve in found.items():
        window = _window(curve)
        if window > 1:
            axes.plot(*zip(*thinned(curve), strict=True), color=_colour(phase), linewidth=0.6, alpha=0.35)
        mean = thinned(smoothed(curve, window))
        axes.plot(*zip(*mean, strict=True), color=_colour(phase), solid_capstyle="round")


def _evaluations(run: Run, found: dict[str, Curve]) -> list[tuple[float, float, str]]:
    """Return (step, evaluation loss, stage) where the stage stands on the step axis."""
    split = (splits(run) or ["valid"])[0]
    rows = quality_rows(run, split)
    known = losses(rows, (variants(run) or [("", "")])[0])
    end = found["dense"][-1][0] if "dense" in found else 0.0
    steps = {"dense": end, "compressed": end}
    steps |= {STAGE_OF_PHASE[phase]: curve[-1][0] for phase, curve in found.items() if phase != "dense"}
    return [(steps[stage], loss, stage) for stage, loss in known.items() if loss is not None and stage in steps]


def _markers(axes: Axes, marks: list[tuple[float, float, str]]) -> None:
    for step, loss, stage in marks:
        colour = STAGE_COLOURS[stage]
        face = CARD if stage == "compressed" else colour
        edge = {"markeredgecolor": colour, "markeredgewidth": 1.5}
        axes.plot(step, loss, "o", color=face, markersize=6, zorder=5, **edge)
    heights = {stage: (step, loss) for step, loss, stage in marks}
    if "dense" in heights and "compressed" in heights:
        (x, low), (_, high) = heights["dense"], heights["compressed"]
        axes.plot([x, x], [low, high], color=STAGE_COLOURS["compressed"], ls=(0, (1, 1.5)), linewidth=1.2)


def _unigram(axes: Axes, run: Run) -> None:
    data = mapping(run.env.get("data"))
    entropy = finite(data.get("unigram_entropy"))
    # The entropy is per byte, and so says nothing about losses per token.
    if entropy is None or data.get("unit") != "byte":
        return
    axes.axhline(entropy, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.annotate(
        f"byte frequencies alone: {entropy:.2f}",
        (0.99, entropy),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        color=MUTED,
        fontsize=8.5,
    )


def _label_axes(axes: Axes, run: Run) -> None:
    unit = mapping(run.env.get("data")).get("unit")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"loss (nats per {unit})" if unit else "loss (nats)")
