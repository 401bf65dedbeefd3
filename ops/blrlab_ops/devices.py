"""Peak figures of the GPUs that bounds are drawn for; nothing but Python is needed.

Figures are of dense (not sparse) arithmetic, as the vendor states them; what a program reaches lies below.
"""

import dataclasses
import difflib


@dataclasses.dataclass(frozen=True)
class Device:
    """One GPU. Rates a second, sizes in bytes."""

    name: str
    tensor_flops: float  # bf16 in, float32 accumulated
    cuda_flops: float  # float32
    dram_bytes_per_s: float
    l2_bytes: int
    shared_bytes_per_sm: int
    sms: int
    compute_capability: tuple[int, int]
    source: str


_KIB, _MIB = 2**10, 2**20

DEVICES = {
    "a40": Device(
        name="NVIDIA A40",
        tensor_flops=149.7e12,
        cuda_flops=37.4e12,
        dram_bytes_per_s=696e9,
        l2_bytes=6 * _MIB,
        shared_bytes_per_sm=100 * _KIB,
        sms=84,
        compute_capability=(8, 6),
        source="NVIDIA A40 data sheet; tensor, DRAM and L2 figures as in arXiv 2512.20861",
    ),
    "orin_nano_8gb": Device(
        name="NVIDIA Jetson Orin Nano 8GB",
        tensor_flops=10e12,
        cuda_flops=1.28e12,
        dram_bytes_per_s=68e9,
        l2_bytes=2 * _MIB,
        shared_bytes_per_sm=164 * _KIB,
        sms=8,
        compute_capability=(8, 7),
        source="tensor and DRAM figures as in arXiv 2512.20861; float32: 1024 cores x 2 x 625 MHz of the "
        "Jetson Orin Nano data sheet; L2: as CUDA reports it",
    ),
    "h100_sxm": Device(
        name="NVIDIA H100 SXM",
        tensor_flops=989e12,
        cuda_flops=67e12,
        dram_bytes_per_s=3.35e12,
        l2_bytes=50 * _MIB,
        shared_bytes_per_sm=228 * _KIB,
        sms=132,
        compute_capability=(9, 0),
        source="NVIDIA H100 data sheet; L2, shared memory and SMs from its architecture white paper",
    ),
    "h200": Device(
        name="NVIDIA H200 SXM",
        tensor_flops=989e12,
        cuda_flops=67e12,
        dram_bytes_per_s=4.8e12,
        l2_bytes=50 * _MIB,
        shared_bytes_per_sm=228 * _KIB,
        sms=132,
        compute_capability=(9, 0),
        source="NVIDIA H200 data sheet; L2, shared memory and SMs as of the H100, whose chip it shares",
    ),
}


def get(name: str) -> Device:
    """Look a device up by its short name, one of `DEVICES`.

    >>> get("a40").sms
    84

    Raises:
      ValueError: for an unknown name, with the known ones and the nearest.
    """
    if name not in DEVICES:
        close = difflib.get_close_matches(name, DEVICES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"device {name!r} is not one of {tuple(DEVICES)}{hint}")
    return DEVICES[name]
