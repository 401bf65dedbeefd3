"""How long a launch is likely to take, from its tiles alone: good enough to leave most candidates unmeasured.

A launch runs in waves of as many programs as fit the multiprocessors at once. A program starts, goes through the steps
of its loop, each as long as its slowest part (bytes through the L2, operations on tensor or CUDA cores), and ends;
loads are hidden behind each other as far as they are in flight. Bytes of weights come from DRAM once. Plain numbers:
torch and Triton are not needed.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from blrlab_ops.devices import Device

START_US, LATENCY_US = 1.0, 0.8  # of a program, and of a load that is not in cache
RATE = 0.7  # of the peaks, that small tiles reach
SM_BYTES_PER_S = 80e9  # that one multiprocessor takes from the L2
L2_BYTES_PER_S = 5e12  # where a device's is not known
RESIDENT_THREADS = 2048


class Work(NamedTuple):
    """What one program of a launch does.

    Attributes:
      programs: of the launch.
      steps: of its loop.
      step_bytes: read in a step.
      step_flops: of a step.
      cold_bytes: that the launch reads from DRAM.
      shared_bytes: of a program.
    """

    programs: int
    steps: int
    step_bytes: int
    step_flops: int
    cold_bytes: int
    shared_bytes: int


def microseconds(work: Work, warps: int, stages: int, device: Device) -> float:
    """Estimate the time of a launch in us; infinite where a program does not fit the device."""
    if work.shared_bytes > device.shared_bytes_per_sm:
        return math.inf
    fitting = min(device.shared_bytes_per_sm // max(work.shared_bytes, 1), RESIDENT_THREADS // (32 * warps), 8)
    at_once = max(1, min(fitting, math.ceil(work.programs / device.sms)))
    waves = math.ceil(work.programs / (device.sms * at_once))
    active = min(work.programs, device.sms)
    l2_rate = min((device.l2_bytes_per_s or L2_BYTES_PER_S) * RATE / active, SM_BYTES_PER_S)
    step = max(
        work.step_bytes * at_once / l2_rate, work.step_flops * at_once / (device.tensor_flops * RATE / device.sms)
    )
    step_us = max(1e6 * step, LATENCY_US / max(stages, 1))
    cold_us = 1e6 * work.cold_bytes / device.dram_bytes_per_s
    return START_US + max(waves * (LATENCY_US + work.steps * step_us), cold_us)


def product(constants: Mapping[str, Any], programs: int, itemsize: int, stages: int, cold_bytes: int) -> Work:
    """Return the work of `triton_product` and `triton_streaming`, from their constants."""
    held = constants.get("HELD1", 0) + constants.get("HELD2", 0)
    rows, columns, depth = constants["BN"], constants["BC"], held or constants["BD"]
    parts = constants.get("PARTS", 1)
    step_bytes = depth * (rows * parts + columns) * itemsize
    steps = math.ceil(constants["DEPTH"] / depth)
    flops = 2 * max(rows, 16) * columns * depth
    if constants.get("VECTOR"):  # no product of tensor cores: only what is on its way waits in shared memory
        parts_columns = 2 * parts if parts > 1 else 1  # of x, and of what scales it
        shared = (min(stages, steps) - 1) * depth * (columns + parts_columns) * itemsize
    else:
        shared = max(1, min(stages, steps)) * depth * (rows + columns) * itemsize
    return Work(programs, steps, step_bytes, flops, cold_bytes, shared)


def chain(constants: Mapping[str, Any], programs: int, itemsize: int, stages: int, cold_bytes: int) -> Work:
    """Return the work of `monarch.triton_fused`, from its constants."""
    rows, columns, depth = (constants[name] for name in ("BN", "BC", "BD"))
    rank = constants["R1"] + constants["R2"]
    step_bytes = (depth * (rows + rank) + rank * columns) * itemsize
    steps = constants["RANK_CHUNKS"] * constants["B1"] * math.ceil(constants["P"] / depth)
    flops = 2 * rows * rank * (depth + columns)
    return Work(programs, steps, step_bytes, flops, cold_bytes, stages * step_bytes)


KERNELS = {"product_kernel": product, "stream_kernel": product, "chain_kernel": chain}
