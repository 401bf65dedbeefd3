"""The figures of a device: speeds over dense, times, roofline, predictions and advice."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from blrlab.report import words
from blrlab.report.groups import Record, finite, grouped, mapping, text
from blrlab.report.pictures import Picture, picture, there
from blrlab.report.plots.advice import MOST as MOST_ADVICE
from blrlab.report.plots.advice import advice_figure, left_out
from blrlab.report.plots.bounds import MOST as MOST_BOUNDS
from blrlab.report.plots.bounds import bounds_figure
from blrlab.report.plots.latency import bars_figure, lines_figure
from blrlab.report.plots.overview import overview_figure
from blrlab.report.plots.roofline import roofline_figure, roofline_points
from blrlab.report.plots.speedup import MOST_PANELS, bar_names, panel_names, speedup_figure
from blrlab.report.summary.advice import Advice, choose
from blrlab.report.summary.bounds import by_shape
from blrlab.report.summary.latency import LayerKey, Timing, by_layer, profiled, verified_time
from blrlab.report.summary.speed import Speed, by_net, some_tokens, speeds
from blrlab.report.tables.data import overview_data, roofline_data
from blrlab.report.tables.predictions import advice_data, prediction_table
from blrlab.report.tables.provenance import peaks_in_words
from blrlab.report.tables.speed import speed_table, times_table

BARS_CAPTION = (
    "Bars are medians and their thin lines span p20 to p80; upright marks are the roofline's bound. Dense is "
    "pale, factored is full. A backend without a verified time says why."
)
LINES_CAPTION = (
    "Medians over the number of tokens, both axes logarithmic; dotted and dashed black lines are the bound of each "
    "format. What has no verified time has no point."
)
ROOFLINE_CAPTION = "Points are measured layers; the nearer a point to the roof, the less is left to gain."
PALE_CAPTION = (
    " Where points are many, the fastest of each layer, format and number of tokens is full and the others pale."
)
SPEEDUP_CAPTION = (
    "A bar per layer, from 1 outwards: right is faster than the fastest dense backend, left is slower; thin lines are "
    "the ratio's spread (p20 to p80 of both). Diamonds and numbers are geometric means."
)
OVERVIEW_CAPTION = (
    "Geometric mean of the speed over the fastest dense backend: blue is faster, orange slower, the line runs where it "
    "is 1."
)
ADVICE_CAPTION = (
    "Predicted speed over dense, the best algorithm for each cell: blue is faster, orange slower, and the black line "
    "runs where it is 1. Both times are least times: the ratio is an estimate, not a limit."
)
BOUNDS_CAPTION = (
    "Bars are predicted times in the colour of what takes most of it; the thin lines beneath are each term's time "
    "on its own, which overlap. Upright marks are the least time of any algorithm. All are "
    "least times: a kernel takes longer."
)


def device_pictures(device: str, records: list[Record], peaks: Record) -> list[Picture]:
    """Return speeds over dense, times and the roofline of one device."""
    layers = by_layer(records)
    found = _overview_picture(device, speeds(layers), any(map(profiled, records)))
    for net, members in by_net(layers).items():
        found += [*_speed_pictures(device, net, members), *_time_pictures(device, net, list(members.values()))]
    if not any(verified_time(r) for r in records):
        found.append(Picture(f"Latency on {device}", "", None, "No layer has a verified time."))
    return [*_said_once(found), _roofline_picture(device, records, peaks)]


def prediction_pictures(device: str, records: list[Record]) -> list[Picture]:
    """Return the predicted times on one device, for some of its layers and numbers of tokens."""
    shapes = by_shape(records)
    chosen = _some_shapes(list(shapes.values()))
    title = f"Predicted times on {device}"
    more = len(shapes) - len(chosen)
    caption = BOUNDS_CAPTION + (f" {more} more layers and numbers of tokens are in the tables." if more else "")
    rows = [r for found in chosen for r in found]
    return there(
        picture(
            title, caption, partial(bounds_figure, chosen), "", lambda: prediction_table(device, rows, most=len(rows))
        )
    )


def advice_pictures(device: str, found: list[Advice]) -> list[Picture]:
    """Return the heat maps of one device, for the layers where most is to be gained."""
    shown, others = choose(found, MOST_ADVICE)
    title = f"Which ranks beat dense on {device}, predicted"
    caption = ADVICE_CAPTION + (f" Left out here, and in the tables: {left_out(others)}." if others else "")
    return there(picture(title, caption, partial(advice_figure, shown), "", partial(advice_data, shown)))


def _overview_picture(device: str, found: list[Speed], profiled: bool) -> list[Picture]:
    title = f"Speed over dense on {device}, all layers"
    caption = f"{OVERVIEW_CAPTION} {words.PROFILED}" if profiled else OVERVIEW_CAPTION
    data = partial(overview_data, title, found)
    return there(picture(title, caption, partial(overview_figure, found), "", data))


def _speed_pictures(device: str, net: str, layers: dict[LayerKey, list[Timing]]) -> list[Picture]:
    found: list[Picture] = []
    for whole, name in ((False, f"{net} layers"), (True, f"{net} as a whole")):
        compared = speeds(layers, whole)
        title = f"Speed of {name} over dense on {device}"
        caption = f"{SPEEDUP_CAPTION} Bars of a row, downwards: {words.listed(bar_names(compared))}."
        more = len(panel_names(compared)) - MOST_PANELS
        caption += f" {more} more panels are in the data." if more > 0 else ""
        data = partial(speed_table, title, compared)
        found += there(picture(title, caption, partial(speedup_figure, compared), "", data))
    return found


def _time_pictures(device: str, net: str, layers: list[list[Timing]]) -> list[Picture]:
    title = f"Latency of {net} on {device}"
    over, once = _several(layers), _once(layers)
    data = partial(times_table, f"{title} over tokens", over)
    found = there(picture(f"{title} over tokens", LINES_CAPTION, partial(lines_figure, over), "", data))
    data = partial(times_table, title, once)
    return [*found, *there(picture(title, BARS_CAPTION, partial(bars_figure, once), "", data))]


def _said_once(pictures: list[Picture]) -> list[Picture]:
    """Leave out of later captions how to read a kind of figure: it is said above the first."""
    said: set[str] = set()
    shown: list[Picture] = []
    for one in pictures:
        caption = one.caption
        for how in (SPEEDUP_CAPTION, LINES_CAPTION, BARS_CAPTION):
            if how in caption:
                caption = caption.replace(how, "").strip() if how in said else caption
                said.add(how)
        shown.append(replace(one, caption=caption))
    return shown


def _several(layers: list[list[Timing]]) -> list[list[Timing]]:
    """Return the layers timed at two numbers of tokens or more."""
    groups = grouped(layers, _without_tokens)
    return [timings for found in groups.values() if len(found) > 1 for timings in found]


def _once(layers: list[list[Timing]]) -> list[list[Timing]]:
    several = {id(timings) for timings in _several(layers)}
    return [timings for timings in layers if id(timings) not in several]


def _without_tokens(timings: list[Timing]) -> tuple[object, ...]:
    record = timings[0].record
    return tuple(str(record.get(k)) for k in ("net", "layer", "phase", "in_features", "out_features", "batch", "dtype"))


def _some_shapes(shapes: list[list[Record]]) -> list[list[Record]]:
    """Choose the largest layer of the first nets, at the least, a middle and the most tokens."""
    chosen: list[list[Record]] = []
    for found in grouped(shapes, lambda rows: rows[0].get("net")).values():
        sizes = grouped(
            found, lambda rows: (rows[0].get("layer"), rows[0].get("in_features"), rows[0].get("out_features"))
        )
        largest = max(sizes, key=lambda s: (finite(s[1]) or 0) * (finite(s[2]) or 0))
        counts = some_tokens((finite(rows[0].get("tokens")) for rows in sizes[largest]), 3)
        chosen += [rows for rows in sizes[largest] if finite(rows[0].get("tokens")) in counts][:3]
    return chosen[:MOST_BOUNDS]


def _roofline_picture(device: str, records: list[Record], peaks: Record) -> Picture:
    told = ", ".join(part for part in (peaks_in_words(peaks), str(peaks.get("source") or "")) if part)
    nets = roofline_points(records, peaks)
    many = any(len(points) > 30 for points in nets.values())
    caption = f"{ROOFLINE_CAPTION}{PALE_CAPTION if many else ''} Peaks: {told}."
    sheet = mapping(peaks.get("sheet"))
    caption += f" Dashed: the data sheet of {text(sheet.get('name'), 'the device')}." if sheet else ""
    missing = "A roofline takes the machine's peaks and a verified time; these records lack one of them."
    title = f"Roofline of {device}"
    return picture(
        title, caption, partial(roofline_figure, records, peaks), missing, partial(roofline_data, title, nets)
    )
