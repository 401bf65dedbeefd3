"""Measure the CUDA card at hand: `python -m blrlab_ops.measure`.

Prints what the card reaches beside its data sheet, and keeps it for `devices.get` under the short name that the last
line tells. Let nothing else run on the card meanwhile. Exits with 2 when there is no card, or the request makes no
sense.
"""

import argparse
import sys
from collections.abc import Sequence

from . import devices, measuring
from .devices import Device

_RATES = (
    ("products in {dtype}", "TFLOP/s", 1e12, "tensor_flops"),
    ("products in float32", "TFLOP/s", 1e12, "cuda_flops"),
    ("copies in DRAM", "GB/s", 1e9, "dram_bytes_per_s"),
    ("reads from L2", "GB/s", 1e9, "l2_bytes_per_s"),
)
_REST = (
    ("one more launch in a graph", "us", 1, "launch_us"),
    ("L2", "MiB", 2**20, "l2_bytes"),
    ("memory", "GiB", 2**30, "memory_bytes"),
    ("shared memory of an SM", "KiB", 2**10, "shared_bytes_per_sm"),
    ("SMs", "", 1, "sms"),
)
_COLUMNS = "{:<28} {:<8} {:>10} {:>12} {:>6}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        devices.load(options.out)  # a damaged file is told before the measuring
        if options.name is not None:
            devices.short_name(options.name, given=True)
        sheet = None if options.against is None else devices.get(options.against)
        measured = measuring.measure(options.device, options.dtype, options.seconds)
        print(table(measured, sheet or devices.match(measured.name), options.dtype), flush=True)
        short = devices.save(measured, options.out, options.name)
    except (ValueError, OSError, measuring.CannotMeasure) as error:
        print(f"measure: {error}", file=sys.stderr)
        return 2
    print(f"kept as {short!r} in {options.out or devices.default_path()}")
    return 0


def table(measured: Device, sheet: Device | None, dtype: str = "bfloat16") -> str:
    """Set what was measured beside a data sheet, with the share of it that was reached."""
    against = "no data sheet" if sheet is None else f"beside the data sheet of {sheet.name}"
    lines = [f"{measured.name}, {against}", _COLUMNS.format("", "", "measured", "data sheet", "share")]
    for label, unit, scale, field in (*_RATES, *_REST):
        found, stated = getattr(measured, field), sheet and getattr(sheet, field)
        is_rate = any(field == row[3] for row in _RATES)
        share = f"{found / stated:.0%}" if is_rate and found and stated else ""
        cells = (_number(found, scale), _number(stated, scale), share)
        lines.append(_COLUMNS.format(label.format(dtype=dtype), unit, *cells).rstrip())
    return "\n".join(lines)


def _number(value: float | None, scale: float) -> str:
    return "-" if value is None else f"{value / scale:.4g}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m blrlab_ops.measure", description=__doc__)
    parser.add_argument("--device", type=int, default=0, help="index of the CUDA device; default: %(default)s")
    parser.add_argument("--dtype", choices=measuring.DTYPES, default="bfloat16", help="of the tensor-core products")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing for each rate; default: %(default)s")
    parser.add_argument("--against", help="short name of a device to compare with, where CUDA's name does not tell")
    parser.add_argument("--name", help="short name to keep the card under; default: made from its own name")
    parser.add_argument("--out", help=f"JSON file to keep it in; default: {devices.default_path()}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
