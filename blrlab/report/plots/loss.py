"""Training loss over steps: dense, then healing and dense trained on, both from where dense ended."""

from __future__ import annotations

from itertools import accumulate

from blrlab.report import words
from blrlab.report.groups import Run, finite, mapping, text
from blrlab.report.plots.axes import Box, Scale, frame, name_lines, panels, x_axis, y_axis
from blrlab.report.plots.canvas import Canvas, text_width
from blrlab.report.plots.style import STAGE_COLOURS, WIDE
from blrlab.report.summary.quality import losses, quality_rows, splits, variants

Mark = tuple[float, float, str]
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


def loss_figure(run: Run, width: float = WIDE) -> Canvas | None:
    """Draw a run's loss over steps, and what follows compression once more; None without training records."""
    found = curves(run)
    if not found:
        return None
    later = {phase: curve for phase, curve in found.items() if phase != "dense"}
    pair = bool(later) and "dense" in found
    columns = 2 if pair and width > 600 else 1
    places = panels(width, 2, columns, 52, 150 if not pair else 64, 150)
    canvas = Canvas(width, 320)
    box = Box(places[0][0], 28, places[0][1] if columns == 2 or not pair else width - 10, 270)
    _whole(canvas, box, run, found, named=not pair)
    if pair:
        box = Box(places[-1][0], 28, places[-1][1], 270)
        if columns == 1:
            box, canvas.height = Box(box.left, 358, box.right, 600), 650
        _after_compression(canvas, box, run, found)
    return canvas


def marks(run: Run, found: dict[str, Curve]) -> list[Mark]:
    """Return (step, evaluation loss, stage) where the stage stands on the step axis."""
    split = (splits(run) or ["valid"])[0]
    rows = quality_rows(run, split)
    known = losses(rows, (variants(run) or [("", "")])[0])
    end = found["dense"][-1][0] if "dense" in found else 0.0
    steps = {"dense": end, "compressed": end}
    steps |= {STAGE_OF_PHASE[phase]: curve[-1][0] for phase, curve in found.items() if phase != "dense"}
    return [(steps[stage], loss, stage) for stage, loss in known.items() if loss is not None and stage in steps]


def unigram(run: Run) -> float | None:
    """Return the entropy of the text's bytes, where the losses are per byte too."""
    data = mapping(run.env.get("data"))
    return finite(data.get("unigram_entropy")) if data.get("unit") == "byte" else None


def _whole(canvas: Canvas, box: Box, run: Run, found: dict[str, Curve], named: bool) -> None:
    placed, entropy = marks(run, found), unigram(run)
    heights = [loss for curve in found.values() for _, loss in curve] + [loss for _, loss, _ in placed]
    heights += [entropy] if entropy else []
    low, high = min(heights), max(heights)
    # Room under the end of the dense curve, where its name stands.
    y = box.upwards(max(0.0, low - 0.14 * (high - low or 1)), high + 0.05 * (high - low or 1))
    x = box.across(0, 1.03 * max(curve[-1][0] for curve in found.values()))
    _axes(canvas, box, x, y, "Training loss", run)
    if entropy:
        canvas.line([(box.left, y.at(entropy)), (box.right, y.at(entropy))], "muted", 1, "4 3")
        said = f"byte frequencies alone: {entropy:.2f}"
        canvas.text((box.right - 2, y.at(entropy) - 5), said, anchor="end", colour="muted")
    _lines(canvas, x, y, found)
    _markers(canvas, x, y, placed)
    for step, loss, stage in placed:
        if stage == "dense":
            at = (x.at(step) - 6, y.at(loss) + 16)
            canvas.text(at, _said(stage, loss), anchor="end", colour=STAGE_COLOURS[stage])
    if named:
        name_lines(canvas, box, [(y.at(c[-1][1]), PHASES[phase], STAGE_COLOURS[phase]) for phase, c in found.items()])


def _after_compression(canvas: Canvas, box: Box, run: Run, found: dict[str, Curve]) -> None:
    later = {phase: curve for phase, curve in found.items() if phase != "dense"}
    end, last = found["dense"][-1][0], max(curve[-1][0] for curve in later.values())
    placed = marks(run, found)
    heights = [loss for curve in later.values() for _, loss in curve] + [loss for _, loss, _ in placed]
    margin = 0.06 * (max(heights) - min(heights) or 1.0)
    x = box.across(end - 0.04 * (last - end), last + 0.04 * (last - end))
    y = box.upwards(min(heights) - margin, max(heights) + margin)
    _axes(canvas, box, x, y, "After compression", run, outer=box.left < 70)
    _lines(canvas, x, y, later)
    _markers(canvas, x, y, placed)
    ends = []
    for phase, curve in later.items():
        value = next((loss for _, loss, stage in placed if stage == STAGE_OF_PHASE[phase]), None)
        height = smoothed(curve, _window(curve))[-1][1] if value is None else value
        told = "" if value is None else f"\n{words.loss(value)} evaluated"
        ends.append((y.at(height), PHASES[phase] + told, STAGE_COLOURS[phase]))
    name_lines(canvas, box, ends)
    for step, loss, stage in placed:
        if stage == "compressed":
            said, at = _said(stage, loss), (x.at(step) + 9, y.at(loss) + 4)
            # A curve's noise may run through the words.
            canvas.rectangle((at[0] - 2, at[1] - 11), (text_width(said) + 4, 14), "card", 0.8)
            canvas.text(at, said, colour=STAGE_COLOURS[stage])


def _said(stage: str, loss: float) -> str:
    return f"{words.STAGES[stage]} {words.loss(loss)}"


def _window(curve: Curve) -> int:
    # Enough to quiet the batches' noise, few enough to show where the loss bends.
    return 2 * (min(len(curve), 80) // 16) + 1 + len(curve) // 80


def _lines(canvas: Canvas, x: Scale, y: Scale, found: dict[str, Curve]) -> None:
    for phase, curve in found.items():
        window = _window(curve)
        if window > 1:
            canvas.line([(x.at(s), y.at(v)) for s, v in thinned(curve)], STAGE_COLOURS[phase], 0.7, opacity=0.4)
        mean = thinned(smoothed(curve, window))
        canvas.line([(x.at(s), y.at(v)) for s, v in mean], STAGE_COLOURS[phase], 1.9)


def _markers(canvas: Canvas, x: Scale, y: Scale, placed: list[Mark]) -> None:
    heights = {stage: (x.at(step), y.at(loss)) for step, loss, stage in placed}
    if "dense" in heights and "compressed" in heights:
        canvas.line([heights["dense"], heights["compressed"]], STAGE_COLOURS["compressed"], 1.3, "1.5 2.5")
    for step, loss, stage in placed:
        with canvas.titled(f"{_said(stage, loss)}, evaluated"):
            at = (x.at(step), y.at(loss))
            canvas.mark(at, "circle", STAGE_COLOURS[stage], 4.2, hollow=stage == "compressed")


def _axes(canvas: Canvas, box: Box, x: Scale, y: Scale, title: str, run: Run, outer: bool = True) -> None:
    unit = mapping(run.env.get("data")).get("unit")
    frame(canvas, box, title)
    x_axis(canvas, box, x, x.ticks(6), lambda v: f"{v:,g}", "optimizer step")
    evaluated = next((text(row.get("unit"), "") for row in run.of("eval", metric="loss")), "")
    label = f"loss (nats per {unit})" if unit else "loss (nats)"
    if evaluated and not evaluated.startswith("nats"):
        label = f"loss ({evaluated})"
    y_axis(canvas, box, y, y.ticks(6), lambda v: f"{v:g}", label if outer else "")
