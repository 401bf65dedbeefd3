"""The device at hand: its ceilings, measured beside what the data sheet states, its clock and its temperature."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from blrlab_ops import devices
from blrlab_ops.devices import Device

from blrlab import environment
from blrlab.errors import InputError


@dataclasses.dataclass(frozen=True)
class Card:
    """A device and what it can do.

    Attributes:
      device: where the tensors live.
      measured: its ceilings, measured in this process.
      sheet: its data sheet's, where the table of devices has it.
      dtype: of the matrix products measured.
    """

    device: torch.device
    measured: Device
    sheet: Device | None
    dtype: str

    @property
    def is_gpu(self) -> bool:
        """Whether it is a CUDA GPU."""
        return self.device.type == "cuda"

    def peaks(self) -> dict[str, Any]:
        """Return the ceilings as the field `peaks` of an `env` record."""
        sheet = self.sheet and {"name": self.sheet.name, **_rates(self.sheet, self.dtype)}
        return {
            "name": self.measured.name,
            **_rates(self.measured, self.dtype),
            "dtype": self.dtype,
            "launch_us": self.measured.launch_us,
            "source": self.measured.source,
            "sheet": sheet,
        }


def _rates(device: Device, dtype: str) -> dict[str, float | None]:
    return {
        "flops_per_s": device.matrix_flops(dtype),
        "cuda_flops_per_s": device.cuda_flops,
        "bytes_per_s": device.dram_bytes_per_s,
        "l2_bytes_per_s": device.l2_bytes_per_s,
    }


def here(dtype: str, device: str = "") -> Card:
    """Measure the device at hand: the named one, else the first CUDA GPU, else the processor.

    Raises:
      InputError: the GPU cannot be measured, such as for want of memory.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type != "cuda":
        return Card(where, _processor(dtype), None, dtype)
    from blrlab_ops import measuring

    in_dtype = "bfloat16" if dtype == "float32" else dtype
    try:
        measured = measuring.measure(where.index or 0, in_dtype, seconds=0.5)
    except measuring.CannotMeasure as reason:
        raise InputError(f"{reason}.") from None
    return Card(where, measured, devices.match(torch.cuda.get_device_name(where)), dtype)


def _processor(dtype: str, seconds: float = 0.3) -> Device:
    """Measure a square product and a copy on the processor; the best of the samples is a ceiling.

    A layer's weights stay in cache between calls there, so the ceiling of memory is that of a cached copy.
    """
    side, size = 1024, 2**18
    matrix = torch.randn(side, side).to(getattr(torch, dtype))
    block, target = torch.randn(size), torch.empty(size)
    rate = 2 * side**3 / _best(lambda: matrix @ matrix, seconds)
    bandwidth = 2 * 4 * size / _best(lambda: target.copy_(block), seconds)
    return Device(
        name=environment.cpu(),
        tensor_flops=rate,
        cuda_flops=rate,
        dram_bytes_per_s=bandwidth,
        l2_bytes=0,
        shared_bytes_per_sm=0,
        sms=torch.get_num_threads(),
        compute_capability=None,
        source="measured here: a square matrix product, and a copy within the cache",
    )


def _best(call: Callable[[], Any], seconds: float) -> float:
    """Return the shortest time of one call, in s."""
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best


@contextlib.contextmanager
def clocks_read_meanwhile(card: Card) -> Iterator[dict[str, float | None]]:
    """Read clock and temperature in a thread while the block keeps the card busy; the fields are there after it."""
    found: dict[str, float | None] = {}
    with ThreadPoolExecutor(1) as aside:
        read = aside.submit(clock_and_temperature, card)
        yield found
        found.update(read.result())


def clock_and_temperature(card: Card) -> dict[str, float | None]:
    """Return {"sm_mhz", "temperature_c"} of a GPU as the driver reports them now, null where it does not."""
    empty: dict[str, float | None] = {"sm_mhz": None, "temperature_c": None}
    if not card.is_gpu:
        return empty
    # the driver counts cards whatever CUDA_VISIBLE_DEVICES says: ask for this one by its identity
    identity = getattr(torch.cuda.get_device_properties(card.device), "uuid", None)
    which = f"--id=GPU-{identity}" if identity else f"--id={card.device.index or 0}"
    wanted = ("--query-gpu=clocks.sm,temperature.gpu", "--format=csv,noheader,nounits")
    said = environment.run("nvidia-smi", *wanted, which)
    try:
        mhz, celsius = (float(part) for part in (said or "").split(","))
    except ValueError:
        return empty
    return {"sm_mhz": mhz, "temperature_c": celsius}
