"""Numbers and names as a reader meets them: plain text, ASCII, the same in the terminal and on the page."""

from __future__ import annotations

from typing import Any

from blrlab.report.groups import finite, text

MISSING = "-"

FORMATS = {"dense": "dense", "low_rank": "low rank", "monarch": "Monarch", "blast": "BLAST"}
STAGES = {
    "dense": "dense",
    "dense_continued": "dense, trained on",
    "compressed": "compressed",
    "healed": "healed",
}
BACKENDS = {
    "torch_eager": "PyTorch",
    "torch": "PyTorch",
    "torch_linear": "PyTorch linear",
    "best": "best kernels",
    "joined": "best kernels, joined",
    "torch_bmm": "PyTorch bmm",
    "torch_compile": "torch.compile",
    "torch_compile_max_autotune": "torch.compile max",
    "xla": "XLA",
    "int8_weight_only": "int8 weights",
    "int8_streaming": "int8 Triton streaming",
    "triton_gemv": "Triton dense",
    "bmm_mixing": "bmm, Triton mixing",
    "triton": "Triton",
    "triton_two_stage": "Triton two-stage",
    "ref": "reference",
}
# Backends of a family read as the family and what follows.
FAMILIES = {"triton_": "Triton", "hopper_": "Hopper", "paper_": "paper", "torch_": "PyTorch"}
TERMS = {"tensor": "tensor cores", "cuda": "CUDA cores", "dram": "DRAM", "l2": "L2", "launch": "launches"}
PHASES = {"train_step": "train step"}

PROFILED = (
    "XLA's times are its kernels' on the device, without the gaps between them (about 1 us each in a graph): "
    "shown, but not counted as a win or as the fastest."
)


def name(table: dict[str, str], key: Any) -> str:
    """Return the reader's name of a format, stage or backend, or the word itself where there is none."""
    return table.get(key, text(key, MISSING)) if isinstance(key, str) else text(key, MISSING)


def backend(impl: Any) -> str:
    """Return the reader's name of a backend.

    >>> backend("xla"), backend("triton_one_launch"), backend("paper_monarch_right_left")
    ('XLA', 'Triton one launch', 'paper right left')
    """
    known = name(BACKENDS, impl)
    start = next((start for start in FAMILIES if known.startswith(start)), None)
    if start is None:
        return known
    rest = known[len(start) :]
    # The format stands beside the backend wherever one is shown.
    rest = next((rest[len(form) + 1 :] for form in FORMATS if rest.startswith(form + "_")), rest)
    return f"{FAMILIES[start]} {rest.replace('_', ' ')}"


def contender(record: dict[str, Any]) -> str:
    """Return op and backend: Monarch Triton two-stage."""
    return f"{name(FORMATS, record.get('op'))} {backend(record.get('impl'))}"


def tokens(value: Any) -> str:
    """Write a number of tokens: 1 token, 4,096 tokens."""
    number = finite(value)
    return MISSING if number is None else f"{number:,.0f} {'token' if number == 1 else 'tokens'}"


def listed(names: list[str], most: int = 12) -> str:
    """Write names with commas, and how many more there are past `most`."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def sentence(words: str) -> str:
    """Begin with a capital letter and end with one full stop."""
    return words[:1].upper() + words[1:].rstrip(".") + "." if words else ""


def loss(value: float | None) -> str:
    """Write a loss, perplexity or bits per byte with three decimals, four figures above a thousand."""
    if value is None:
        return MISSING
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.4g}"


def change(value: float | None) -> str:
    """Write a difference of losses with its sign."""
    return MISSING if value is None else f"{value:+.3f}"


def factor(value: float | None) -> str:
    """Write a ratio: 3.10x, 12.4x."""
    return MISSING if value is None else f"{figures(value)}x"


def percent(share: float) -> str:
    """Write a share as whole per cent."""
    return f"{100 * share:.0f} %"


def microseconds(value: float | None) -> str:
    """Write a time in us with about three figures."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if value >= 100 else figures(value)


def count(value: Any) -> str:
    """Write a parameter count with three figures: 512, 85.1 k, 124 M, 6.74 B."""
    number = finite(value)
    if number is None:
        return MISSING
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        # From 999.5 on, three figures round up into the next unit.
        if abs(number) >= 0.9995 * size:
            return f"{figures(number / size)} {unit}"
    return f"{number:.0f}"


def figures(value: float) -> str:
    """Write a number below a thousand with three figures, trailing zeros kept."""
    return f"{value:.2f}" if abs(value) < 9.995 else f"{value:.1f}" if abs(value) < 99.95 else f"{value:.0f}"


def rate(value: float, unit: str) -> str:
    """Write a rate with a prefix: 60 TFLOP/s, 3.35 TB/s, 41.2 GB/s."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def byte_count(value: Any) -> str:
    """Write a size in bytes, decimal prefixes."""
    number = finite(value)
    return MISSING if number is None else f"{number:.0f} B" if number < 1000 else rate(number, "B")


def shape(record: dict[str, Any]) -> str:
    """Write in x out features of a layer."""
    sizes = record.get("in_features"), record.get("out_features")
    return MISSING if None in sizes else f"{sizes[0]} x {sizes[1]}"


def blocks(value: Any) -> str:
    """Write [b1, b2] as b1 x b2."""
    return " x ".join(str(b) for b in value) if isinstance(value, list | tuple) and value else MISSING


def span(values: list[float]) -> str:
    """Write whole numbers as one value, or as the range they cover; nothing known is a dash."""
    if not values:
        return MISSING
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"


def short_hash(value: Any) -> str:
    """Write the first twelve characters of a hash."""
    return text(value)[:12]
