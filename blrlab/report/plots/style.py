"""How figures look: one palette for the whole report, the colour of each backend, the mark of each format.

The hues are those of Okabe and Ito and a few between, told apart by readers who see few colours; marks, dashes and
words carry the same meaning a second time. A figure names its colours by these words, and the page says what they
are in light, in dark and on paper.
"""

from __future__ import annotations

from collections.abc import Iterable

WIDE = 924.0
NARROW = 332.0

COLOURS = {
    "ink": "#1b2430",
    "muted": "#5b6675",
    "rule": "#d5dae1",
    "card": "#fefefe",
    "slate": "#6b7684",
    "blue": "#0072b2",
    "sky": "#4aa8dc",
    "orange": "#e69f01",
    "vermilion": "#d55e00",
    "green": "#019e73",
    "purple": "#a4509a",
    "navy": "#2a3f9d",
    "teal": "#00808a",
    "brown": "#8a5a2b",
    "pink": "#d4679f",
    "olive": "#7d8a0b",
}

STAGE_COLOURS = {
    "dense": "slate",
    "dense_continued": "blue",
    "compressed": "vermilion",
    "healed": "vermilion",
    "heal": "vermilion",
}
FORMAT_COLOURS = {"dense": "slate", "low_rank": "orange", "monarch": "green", "blast": "purple"}
BACKEND_COLOURS = {
    "torch_eager": "orange",
    "torch": "orange",
    "torch_linear": "slate",
    "torch_bmm": "vermilion",
    "torch_compile": "brown",
    "torch_compile_max_autotune": "olive",
    "xla": "sky",
    "int8_weight_only": "pink",
    "int8_streaming": "pink",
    "bmm_mixing": "teal",
    "triton": "blue",
    "triton_two_stage": "blue",
    "ref": "muted",
}
# A backend without a colour of its own takes the next of its family, by the beginning of its name.
FAMILIES = {
    "triton_": ("navy", "teal", "blue", "sky"),
    "hopper_": ("green", "olive", "teal"),
    "paper_": ("purple", "pink", "slate"),
    "torch_": ("brown", "olive", "vermilion"),
    "": ("slate", "olive", "pink", "teal", "brown"),
}
FORMAT_MARKERS = {"dense": "square", "low_rank": "triangle", "monarch": "circle", "blast": "diamond"}
FORMAT_DASHES = {"dense": "", "low_rank": "6 3", "monarch": "", "blast": "2 3"}
TERM_COLOURS = {"tensor": "blue", "cuda": "green", "dram": "vermilion", "l2": "purple", "launch": "slate"}


def backend_colours(impls: Iterable[str]) -> dict[str, str]:
    """Give every backend a colour, the same whatever the order in which they come.

    >>> backend_colours(["triton_fused", "xla"])
    {'triton_fused': 'navy', 'xla': 'sky'}
    """
    chosen: dict[str, str] = {}
    places: dict[str, int] = {}
    for impl in sorted(set(impls)):
        if impl in BACKEND_COLOURS:
            chosen[impl] = BACKEND_COLOURS[impl]
            continue
        family = next(start for start in FAMILIES if impl.startswith(start))
        place = places.get(family, 0)
        chosen[impl] = FAMILIES[family][place % len(FAMILIES[family])]
        places[family] = place + 1
    return chosen
