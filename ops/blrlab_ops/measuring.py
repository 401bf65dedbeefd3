"""What the CUDA card at hand reaches, as a `Device`: `python -m blrlab_ops.measure` prints and keeps it.

Every rate is a ceiling: what a bound is drawn from must not be slower than what a layer can reach.

- products: torch.matmul of square matrices of normal random numbers (zeros draw less power, and the clock rises), the
  fastest of short bursts: kept busy, a card lowers its clock, and layers are faster than what it sustains;
- float32: the same in IEEE float32, tf32 off, so on CUDA cores;
- DRAM: a copy within the card of at least ten times the L2, bytes read plus bytes written, or a sum that only reads,
  whichever is faster; the median of either;
- L2: every multiprocessor reads a quarter of the L2 again and again (`triton_probes`), the best of a few numbers of
  programs; not measured where Triton cannot run;
- launch: what one more kernel in sequence adds to a CUDA graph.
"""

import contextlib
import datetime
import importlib
import itertools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from . import dispatch, graphs, launching
from .devices import Device

DTYPES = ("bfloat16", "float16")
LARGEST = {"tensor": 8192, "cuda": 4096}  # sides of the products
PROGRAMS_PER_SM = (2, 4, 5)  # of the L2's readers; 5 is what the registers of a multiprocessor hold
REST = 0.05  # s, between bursts of products
GRAPHS = (200, 1200)  # launches in each of two graphs, whose difference is timed

_MIB, _GIB = 2**20, 2**30


class CannotMeasure(RuntimeError):
    """There is no card to measure, or too little of it is free."""


class Rates(NamedTuple):
    """What was timed; None where it was not."""

    tensor_flops: float
    cuda_flops: float
    dram_bytes_per_s: float
    l2_bytes_per_s: float | None
    launch_us: float


def measure(device_index: int = 0, dtype: str = "bfloat16", seconds: float = 1.0) -> Device:
    """Measure a CUDA card that nothing else uses; it takes about eight times `seconds`.

    Args:
      device_index: of PyTorch's CUDA devices.
      dtype: of the tensor-core products, one of `DTYPES`.
      seconds: of timing for each rate, and half of it again to warm up.

    Raises:
      ValueError: for another dtype, or seconds that are not positive.
      CannotMeasure: a RuntimeError, when there is no such CUDA device or its memory is taken.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {DTYPES}")
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be positive, not {seconds}")
    check_card(device_index)
    properties = torch.cuda.get_device_properties(device_index)
    no_l2_rate = dispatch.why_not("low_rank", "triton_two_stage", f"cuda:{device_index}", torch.float32)
    with torch.cuda.device(device_index), torch.no_grad():
        rates = Rates(
            tensor_flops=_product_flops(getattr(torch, dtype), LARGEST["tensor"], seconds),
            cuda_flops=_float32_flops(seconds),
            dram_bytes_per_s=_copy_rate(properties.L2_cache_size, seconds),
            l2_bytes_per_s=None if no_l2_rate else _l2_rate(properties, seconds),
            launch_us=_launch_us(seconds),
        )
        torch.cuda.empty_cache()
    return as_device(properties, rates, _source(dtype, no_l2_rate))


def check_card(device_index: int) -> None:
    """Raise CannotMeasure, with the reason, where no CUDA device of that index can be measured."""
    if not torch.cuda.is_available():
        raise CannotMeasure(f"no CUDA device: PyTorch {torch.__version__} finds none, so there is nothing to measure")
    count = torch.cuda.device_count()
    if not 0 <= device_index < count:
        raise CannotMeasure(f"no CUDA device {device_index}: PyTorch finds {count}, counted from 0")
    if _interpreted():
        raise CannotMeasure("TRITON_INTERPRET is set, which runs kernels on the processor; unset it to measure")


def as_device(properties: Any, rates: Rates, source: str) -> Device:
    """Join what PyTorch reports of a card with what was timed."""
    return Device(
        name=properties.name,
        l2_bytes=properties.L2_cache_size,
        shared_bytes_per_sm=properties.shared_memory_per_multiprocessor,
        sms=properties.multi_processor_count,
        compute_capability=(properties.major, properties.minor),
        memory_bytes=properties.total_memory,
        source=source,
        **rates._asdict(),
    )


def square_side(free_bytes: int, itemsize: int, largest: int) -> int:
    """Return the side of three square matrices that take at most half of the free memory.

    >>> square_side(80 * 2**30, 2, 8192), square_side(2**29, 2, 8192)
    (8192, 4096)
    """
    side = largest
    while 3 * itemsize * side**2 > free_bytes // 2:
        side //= 2
    if side < 1024:
        raise CannotMeasure(f"only {free_bytes / _MIB:.0f} MiB of the card's memory are free, too little to measure")
    return side


def copy_bytes(free_bytes: int, l2_bytes: int) -> int:
    """Return the size of a copy that the L2 cannot serve: 1 GiB or ten times the L2, at most a quarter of what is free.

    >>> copy_bytes(80 * 2**30, 50 * 2**20) // 2**20, copy_bytes(2**30, 2 * 2**20) // 2**20
    (1024, 256)
    """
    size = min(max(_GIB, 10 * l2_bytes), free_bytes // 4) // _MIB * _MIB
    if size < max(4 * l2_bytes, _MIB):
        raise CannotMeasure(f"only {free_bytes / _MIB:.0f} MiB of the card's memory are free, too little to measure")
    return size


def calls_in(seconds: float, once: float) -> int:
    """Count the calls that fill a time, within 11 and 2000.

    >>> calls_in(1.0, 0.004), calls_in(1.0, 0.8), calls_in(1.0, 1e-6)
    (250, 11, 2000)
    """
    return min(max(math.ceil(seconds / max(once, 1e-9)), 11), 2000)


def read_passes(buffer_bytes: int, programs: int, sms: int) -> int:
    """Return how often each program reads the buffer: 128 MiB for each multiprocessor, some milliseconds in all.

    >>> read_passes(12 * 2**20, 528, 132)
    3
    """
    return max(1, math.ceil(128 * _MIB * sms / (programs * buffer_bytes)))


def _product_flops(dtype: torch.dtype, largest: int, seconds: float) -> float:
    """Return the rate of the fastest product in short bursts: kept busy, a card lowers its clock to save power."""
    side = square_side(_free_bytes(), dtype.itemsize, largest)
    rates = []
    for rows, each in ((side, side), (side // 2, side // 2), (side // 8, side)):
        left = torch.randn(rows, each, dtype=dtype, device="cuda")
        right = torch.randn(each, each, dtype=dtype, device="cuda")
        out = torch.empty_like(left)
        fastest = _seconds_in_bursts(
            lambda left=left, right=right, out=out: torch.matmul(left, right, out=out), seconds
        )
        rates.append(2 * rows * each**2 / fastest)
    return max(rates)


def _float32_flops(seconds: float) -> float:
    with _ieee_float32():
        return _product_flops(torch.float32, LARGEST["cuda"], seconds)


def _copy_rate(l2_bytes: int, seconds: float) -> float:
    source = torch.randn(copy_bytes(_free_bytes(), l2_bytes) // 4, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / _seconds_a_call(lambda: target.copy_(source), seconds / 2)
    read = source.nbytes / _seconds_a_call(lambda: torch.sum(source), seconds / 2)
    return max(copied, read)


def _l2_rate(properties: Any, seconds: float) -> float:
    from . import triton_probes

    elements = max(properties.L2_cache_size // 4 // 4 // triton_probes.ELEMENTS, 1) * triton_probes.ELEMENTS
    buffer, sms = torch.rand(elements, device="cuda"), properties.multi_processor_count
    share = seconds / len(PROGRAMS_PER_SM)
    return max(_read_rate(buffer, count * sms, sms, share) for count in PROGRAMS_PER_SM)


def _read_rate(buffer: torch.Tensor, programs: int, sms: int, seconds: float) -> float:
    from . import triton_probes

    passes = read_passes(buffer.nbytes, programs, sms)
    sums = torch.zeros(programs, device="cuda")
    launch = triton_probes.read(buffer, sums, passes)
    once = _seconds_a_call(lambda: launching.run([launch], buffer.device), seconds)
    expected = passes * buffer.double().sum()
    if not bool(((sums.double() / expected - 1).abs() < 1e-2).all()):
        raise AssertionError("the kernel that reads the L2 did not read all of its buffer")
    return programs * passes * buffer.nbytes / once


def _launch_us(seconds: float) -> float:
    target = torch.zeros(1, device="cuda")
    made = [graphs.capture([lambda: target.fill_(1.0)] * count) for count in GRAPHS]
    few, many = (_seconds_a_call(graph.replay, seconds / 2) for graph in made)
    return 1e6 * (many - few) / (GRAPHS[1] - GRAPHS[0])


def _seconds_a_call(run: Callable[[], object], seconds: float) -> float:
    """Return the median time of one of many calls back to back."""
    run()  # compiles, allocates, chooses an algorithm
    once = statistics.median(_call_times(run, 3))
    for _ in range(calls_in(seconds / 2, once)):
        run()
    return statistics.median(_call_times(run, calls_in(seconds, once)))


def _seconds_in_bursts(run: Callable[[], object], seconds: float) -> float:
    """Return the time of the fastest call in several bursts of ten, with rests between."""
    run()
    bursts = max(5, min(20, int(seconds / REST)))
    fastest = float("inf")
    for _ in range(bursts):
        time.sleep(REST)
        fastest = min(fastest, *_call_times(run, 10))
    return fastest


def _call_times(run: Callable[[], object], calls: int) -> list[float]:
    """Time calls between CUDA events, in seconds; the processor waits only after the last."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [1e-3 * start.elapsed_time(end) for start, end in itertools.pairwise(events)]


@contextlib.contextmanager
def _ieee_float32() -> Iterator[None]:
    """Multiply float32 as IEEE float32 while this lasts, whatever the process asked for.

    PyTorch has two switches for it, which some versions refuse to mix and others warn of: the older one turns both.
    """
    newer: Any = torch.backends.cuda.matmul
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        precision = getattr(newer, "fp32_precision", None)
        try:
            older = torch.get_float32_matmul_precision()
        except RuntimeError:  # the process used the newer one
            older = None
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            if older is not None:
                torch.set_float32_matmul_precision(older)
            if precision is not None:
                newer.fp32_precision = precision


def _free_bytes() -> int:
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def _interpreted() -> bool:
    try:
        return bool(importlib.import_module("triton.knobs").runtime.interpret)
    except ImportError:
        return False


def _source(dtype: str, no_l2_rate: str | None) -> str:
    """Say how, with what and when."""
    versions = [f"PyTorch {torch.__version__}", f"CUDA {torch.version.cuda}"]
    if no_l2_rate:
        l2 = f"no L2 rate ({no_l2_rate})"
    else:
        l2 = "L2 reads"
        versions.append(f"Triton {importlib.import_module('triton').__version__}")
    what = f"measured: products in {dtype} and float32, copies, launches in a CUDA graph, {l2}"
    return f"{what}; {', '.join(versions)}; {datetime.date.today().isoformat()}"
