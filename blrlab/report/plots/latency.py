"""Times of a net's layers: bars where a layer was timed at one number of tokens, lines over tokens where at several."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from blrlab.report import words
from blrlab.report.groups import Record, finite, grouped, text
from blrlab.report.plots.axes import Box, Key, Scale, around, frame, legend, panels, x_axis, y_axis
from blrlab.report.plots.canvas import Canvas, cut, text_width
from blrlab.report.plots.style import FORMAT_DASHES, FORMAT_MARKERS, WIDE, backend_colours
from blrlab.report.summary.latency import Timing, layer_title, op_names, verified_time, why_no_time

Line = tuple[str, str]

ROW = 20.0


def bars_figure(layers: list[list[Timing]], width: float = WIDE) -> Canvas | None:
    """Draw a net's times as bars, a panel per layer and number of tokens; None where nothing has a time."""
    if not any(t.p50 is not None for timings in layers for t in timings):
        return None
    lines = list(dict.fromkeys(line for timings in layers for line in _lines(timings)))
    wide = width > 600
    columns = min(len(layers), 3 if wide else 1)
    names = [f"{op} {words.backend(impl)}" for op, impl in lines]
    left = 12 + min(max(map(text_width, names)), 0.48 * width)
    places = panels(width, len(layers), columns, left, 24, 6)
    heights = _heights(lines)
    canvas, top = Canvas(width), 28.0
    colours = backend_colours(impl for _, impl in lines)
    for first in range(0, len(layers), columns):
        for (start, end), timings in zip(places, layers[first : first + columns], strict=False):
            box = Box(start, top, end, top + heights[-1] + ROW * 0.8)
            _bars(canvas, box, timings, lines, heights, colours)
            if start == places[0][0]:
                for height, name in zip(heights, names, strict=True):
                    canvas.text((start - 8, top + height + 4), cut(name, start - 10), anchor="end")
        top += heights[-1] + ROW * 0.8 + 64
    canvas.height = top - 24
    return canvas


def lines_figure(layers: list[list[Timing]], width: float = WIDE) -> Canvas | None:
    """Draw times over tokens, both logarithmic, a panel per layer timed at two numbers of tokens; else None."""
    found = {name: rows for name, rows in grouped_by_layer(layers).items() if len(_counts(rows)) > 1}
    if not found:
        return None
    columns = min(len(found), 3 if width > 700 else 1)
    places = panels(width, len(found), columns, 52, 52)
    impls = {text(r.get("impl")) for rows in found.values() for r in rows}
    colours = backend_colours(impls)
    canvas, top = Canvas(width), 28.0
    for first in range(0, len(found), columns):
        for (start, end), (name, rows) in zip(places, list(found.items())[first : first + columns], strict=False):
            _panel(canvas, Box(start, top, end, top + 250), name, rows, colours)
        top += 250 + 62
    canvas.height = top - 22 + legend(canvas, _keys([r for rows in found.values() for r in rows], colours), 8, top - 24)
    return canvas


def grouped_by_layer(layers: Iterable[list[Timing]]) -> dict[str, list[Record]]:
    """Return the records with a time of every layer, whatever their tokens."""
    rows = [t.record for timings in layers for t in timings if t.p50 is not None]
    return grouped(rows, _title)


def _title(record: Record) -> str:
    if record.get("layer") != "*":
        return f"{text(record.get('layer'))}  {words.shape(record)}"
    batch = finite(record.get("batch"))
    return " ".join(["whole model", text(record.get("phase"), ""), f"batch {batch:g}" if batch else ""]).strip()


def _counts(rows: list[Record]) -> list[float]:
    return sorted({n for n in (finite(r.get("tokens")) for r in rows) if n and n > 0})


def _panel(canvas: Canvas, box: Box, name: str, rows: list[Record], colours: dict[str, str]) -> None:
    counts = _counts(rows)
    times = [v for r in rows for v in (verified_time(r), _bound(r)) if v]
    x, y = box.across(*around(counts, log=True), log=True), box.upwards(*around(times, log=True), log=True)
    frame(canvas, box, cut(name, box.width + 40, 12, bold=True))
    x_axis(canvas, box, x, counts, lambda v: f"{v:,.0f}", "tokens", grid=False)
    y_axis(canvas, box, y, y.ticks(6), lambda v: f"{v:,g}", "us" if box.left < 60 else "")
    for members in grouped(rows, lambda r: r.get("op")).values():
        bound = sorted({(n, b) for r in members if (n := finite(r.get("tokens"))) and (b := _bound(r))})
        least = dict(sorted(bound, reverse=True))
        canvas.line([(x.at(n), y.at(b)) for n, b in sorted(least.items())], "ink", 1, _dash(members[0]) or "1 2", 0.8)
    for (op, impl, _), members in grouped(rows, _series).items():
        _series_line(canvas, x, y, sorted(members, key=lambda r: finite(r.get("tokens")) or 0), op, colours[impl])


def _series(record: Record) -> tuple[str, str, str]:
    # Ranks follow from the layer, which is the same here; blocks and ranks tell the settings of one backend apart.
    return text(record.get("op")), text(record.get("impl")), f"{record.get('blocks')} {record.get('rank')}"


def _series_line(canvas: Canvas, x: Scale, y: Scale, rows: list[Record], op: str, colour: str) -> None:
    points = [(x.at(finite(r.get("tokens")) or 1), y.at(verified_time(r) or 1)) for r in rows]
    canvas.line(points, colour, 1.3, FORMAT_DASHES.get(op, ""), 0.85)
    for at, record in zip(points, rows, strict=True):
        with canvas.titled(_words(record)):
            canvas.mark(at, FORMAT_MARKERS.get(op, "circle"), colour, 3.2)


def _words(record: Record) -> str:
    spread = [finite(record.get(key)) for key in ("p20", "p80")]
    told = "" if None in spread else f" ({'-'.join(words.microseconds(v) for v in spread)})"
    return (
        f"{layer_title(record)}, {words.contender(record)}, {words.tokens(record.get('tokens'))}: "
        f"{words.microseconds(finite(record.get('p50')))} us{told}, bound {words.microseconds(_bound(record))} us"
    )


def _bound(record: Record) -> float | None:
    bound = finite(record.get("bound_us"))
    return bound if bound and bound > 0 else None


def _dash(record: Record) -> str:
    return FORMAT_DASHES.get(text(record.get("op")), "")


def _keys(rows: list[Record], colours: dict[str, str]) -> list[Key]:
    impls = sorted({text(r.get("impl")) for r in rows})
    ops = [op for op in FORMAT_MARKERS if any(r.get("op") == op for r in rows)]
    keys = [Key(words.backend(impl), colours[impl]) for impl in impls]
    keys += [Key(words.name(words.FORMATS, op), "ink", FORMAT_MARKERS[op], hollow=True) for op in ops]
    return [*keys, Key("bound of each format", "ink", dash="1 2")]


def _lines(timings: list[Timing]) -> list[Line]:
    return list(zip(op_names(timings), (text(t.record.get("impl"), words.MISSING) for t in timings), strict=True))


def _heights(lines: list[Line]) -> list[float]:
    # Half a bar of air where one op ends and the next begins.
    heights = [ROW * 0.6]
    for above, below in pairwise(lines):
        heights.append(heights[-1] + ROW * (1.5 if above[0] != below[0] else 1.0))
    return heights


def _bars(
    canvas: Canvas, box: Box, timings: list[Timing], lines: list[Line], heights: list[float], colours: dict[str, str]
) -> None:
    record = timings[0].record
    reach = max((v for t in timings for v in (t.p50, finite(t.record.get("p80"))) if v and t.p50), default=1.0)
    scale = box.across(0, 1.3 * reach)
    start = box.left if canvas.width > 600 else 4
    canvas.text((start, box.top - 10), cut(_title(record), box.right - start, 12, bold=True), bold=True, size=12)
    about = ["us", words.tokens(record.get("tokens")), text(record.get("dtype"), "")]
    told = ", ".join(part for part in about if part and part != words.MISSING)
    x_axis(canvas, box, scale, scale.ticks(4), lambda v: f"{v:,g}", told)
    found = dict(zip(_lines(timings), timings, strict=True))
    for height, line in zip(heights, lines, strict=True):
        timing = found.get(line)
        if timing and timing.p50 is not None:
            with canvas.titled(_words(timing.record)):
                _bar(canvas, scale, box.top + height, timing, colours[line[1]])
        else:
            reason = (why_no_time(timing.record) if timing else None) or "not measured"
            with canvas.titled(reason):
                at = (box.left + 3, box.top + height + 3)
                canvas.text(at, cut(reason, box.width - 4, 10), colour="muted", size=10)


def _bar(canvas: Canvas, scale: Scale, middle: float, timing: Timing, colour: str) -> None:
    record, p50 = timing.record, timing.p50 or 0.0
    opacity = 0.5 if record.get("op") == "dense" else 1
    canvas.rectangle((scale.start, middle - 6.5), (scale.at(p50) - scale.start, 13), colour, opacity)
    low, high = (finite(record.get(key)) for key in ("p20", "p80"))
    if low is not None and high is not None:
        canvas.line([(scale.at(low), middle), (scale.at(high), middle)], "ink", 1.3)
    bound = _bound(record)
    if bound:
        canvas.line([(scale.at(bound), middle - 7.5), (scale.at(bound), middle + 7.5)], "ink", 2)
    end = max(p50, high or 0.0)
    canvas.text((scale.at(end) + 5, middle + 3.5), words.microseconds(p50), size=10)
