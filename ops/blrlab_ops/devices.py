"""Peak figures of GPUs: of data sheets, and of the cards that `python -m blrlab_ops.measure` measured here.

Nothing but Python is needed. Figures of `DEVICES` are of dense (not sparse) arithmetic with float32 accumulation, as
the vendor states them: bounds, which programs stay below. Memory is as sold; CUDA reports a few percent less. The rate
of an L2 is rarely stated, so each `source` says who measured it, or from what it is derived; gpu-benches is
github.com/te42kyfo/gpu-benches at 1c36d50, with its results gpu-l2-cache/*.txt and gpu-cache/a40.txt. What CUDA reports
is the output of deviceQuery or PyTorch for that card, as found in public logs.

Measured devices live in a JSON file of the user, {"h100_sxm_measured": {field: value}}; their short names end in
`_measured`, so none can take the name of a data sheet.
"""

import dataclasses
import difflib
import json
import math
import os
import pathlib
import re
import tempfile
from typing import Any


@dataclasses.dataclass(frozen=True)
class Device:
    """One GPU. Rates a second, sizes in bytes; None where no figure is known."""

    name: str
    tensor_flops: float  # bf16 or fp16 in, float32 accumulated
    cuda_flops: float  # float32, a multiply-add counted as two
    dram_bytes_per_s: float
    l2_bytes: int
    shared_bytes_per_sm: int
    sms: int
    compute_capability: tuple[int, int] | None
    source: str
    memory_bytes: int | None = None
    l2_bytes_per_s: float | None = None
    launch_us: float | None = None  # of one more launch in a CUDA graph

    def matrix_flops(self, dtype: str = "bfloat16") -> float:
        """Return the rate of matrix products: of tensor cores, in IEEE float32 of CUDA cores."""
        return self.cuda_flops if dtype == "float32" else self.tensor_flops


_KIB, _MIB, _GIB = 2**10, 2**20, 2**30

# KiB of shared memory of a multiprocessor by compute capability: CUDA programming guide, "Technical Specifications".
_SHARED = {(8, 0): 164, (8, 6): 100, (8, 7): 164, (8, 9): 100, (9, 0): 228, (10, 0): 228}


def _sheet(
    name: str,
    capability: tuple[int, int],
    sms: int,
    *,
    tensor: float,
    cuda: float,
    dram: float,
    l2: float,
    memory: int,
    source: str,
    l2_rate: float | None = None,
    launch_us: float | None = None,
) -> Device:
    """Describe a card in the units of data sheets: TFLOP/s, GB/s, MiB of L2, GiB of memory."""
    return Device(
        name=name,
        tensor_flops=tensor * 1e12,
        cuda_flops=cuda * 1e12,
        dram_bytes_per_s=dram * 1e9,
        l2_bytes=int(l2 * _MIB),
        shared_bytes_per_sm=_SHARED[capability] * _KIB,
        sms=sms,
        compute_capability=capability,
        source=source,
        memory_bytes=memory * _GIB,
        l2_bytes_per_s=l2_rate and l2_rate * 1e9,
        launch_us=launch_us,
    )


DEVICES = {
    "a40": _sheet(
        "NVIDIA A40", (8, 6), 84, tensor=149.7, cuda=37.4, dram=696, l2=6, memory=48, l2_rate=2400,
        source="data sheet; SMs and L2 size as CUDA reports; L2 rate measured: gpu-benches, gpu-cache (every SM reads "
        "the same buffer of 0.3 to 6 MB at 1.74 GHz), 16.5 bytes a clock and SM",
    ),
    "a10": _sheet(
        "NVIDIA A10", (8, 6), 72, tensor=125, cuda=31.2, dram=600, l2=6, memory=24, l2_rate=2000,
        source="data sheet; SMs, L2 size and 1695 MHz boost as CUDA reports; L2 rate derived: the A40's 16.5 bytes a "
        "clock and SM at boost",
    ),
    "rtx_3090": _sheet(
        "NVIDIA GeForce RTX 3090", (8, 6), 82, tensor=71, cuda=35.6, dram=936, l2=6, memory=24, l2_rate=2300,
        source="GA102 white paper (tensor: half rate with float32 accumulation); SMs and L2 size as CUDA reports; L2 "
        "rate derived: the A40's 16.5 bytes a clock and SM at 1695 MHz",
    ),
    "orin_nano_8gb": _sheet(
        "NVIDIA Jetson Orin Nano 8GB", (8, 7), 8, tensor=10, cuda=1.28, dram=68, l2=2, memory=8,
        source="before its 'Super' modes (102 GB/s): tensor and DRAM as in arXiv 2512.20861 (10.24 TFLOP/s are 8 SMs x "
        "2048 a clock x 625 MHz); float32 derived: 1024 cores x 2 x 625 MHz of its data sheet; SMs, L2 size as CUDA "
        "reports",
    ),
    "orin_nx_16gb": _sheet(
        "NVIDIA Jetson Orin NX 16GB", (8, 7), 8, tensor=15, cuda=1.88, dram=102.4, l2=2, memory=16,
        source="before its 'Super' modes: DRAM as makers of boards state it; SMs, L2 size and 918 MHz as CUDA reports; "
        "tensor and float32 derived: 8 SMs x 2048 and x 256 a clock, the Orin Nano's",
    ),
    "a100_40gb": _sheet(
        "NVIDIA A100 SXM4 40GB", (8, 0), 108, tensor=312, cuda=19.5, dram=1555, l2=40, memory=40, l2_rate=5400,
        source="A100 white paper (which gives the L2 5120 bytes a clock, 7.2 TB/s at boost); L2 rate: as the 80 GB "
        "card's, the same chip and clock",
    ),
    "a100_80gb": _sheet(
        "NVIDIA A100 SXM4 80GB", (8, 0), 108, tensor=312, cuda=19.5, dram=2039, l2=40, memory=80, l2_rate=5400,
        source="data sheet and A100 white paper; L2 rate measured: gpu-benches, gpu-l2-cache (5.3 to 5.5 TB/s from 2 "
        "to 25 MB)",
    ),
    "l4": _sheet(
        "NVIDIA L4", (8, 9), 58, tensor=121, cuda=30.3, dram=300, l2=48, memory=24, l2_rate=1800,
        source="data sheet (tensor: half of 242 with sparsity); SMs, L2 size and 2040 MHz boost as CUDA reports; L2 "
        "rate derived: 15 bytes a clock and SM at boost, which its 72 W rarely allow (gpu-benches measured 14.7 on an "
        "L40)",
    ),
    "rtx_4090": _sheet(
        "NVIDIA GeForce RTX 4090", (8, 9), 128, tensor=165.2, cuda=82.6, dram=1008, l2=72, memory=24, l2_rate=4900,
        source="Ada white paper (tensor: half rate with float32 accumulation); SMs and L2 size as CUDA reports; L2 "
        "rate measured: github.com/smallscientist1/cuda_microbenchmark (cp.async, 2520 MHz)",
    ),
    "h100_pcie": _sheet(
        "NVIDIA H100 PCIe", (9, 0), 114, tensor=756, cuda=51, dram=2039, l2=50, memory=80, l2_rate=6900,
        source="data sheet (tensor: half of 1513 with sparsity); SMs, L2 size and DRAM rate as CUDA reports; L2 rate "
        "measured: gpu-benches, gpu-l2-cache (6.85 to 6.95 TB/s from 17 to 37 MB)",
    ),
    "h100_sxm": _sheet(
        "NVIDIA H100 SXM", (9, 0), 132, tensor=989, cuda=67, dram=3350, l2=50, memory=80, l2_rate=9200, launch_us=0.83,
        source="data sheet (tensor: half of 1979 with sparsity); L2 size and SMs from the white paper and as CUDA "
        "reports; L2 rate and launch measured: blrlab_ops.measure on an H100 80GB HBM3 (9.1 to 9.2 TB/s, 0.83 "
        "us); OpenXLA's cost model has 6.65 TB/s, within one L2 partition",
    ),
    "h200": _sheet(
        "NVIDIA H200 SXM", (9, 0), 132, tensor=989, cuda=67, dram=4800, l2=60, memory=141, l2_rate=9700,
        source="data sheet; L2 size and SMs as CUDA reports; L2 rate measured: gpu-benches, gpu-l2-cache (9.6 to 9.9 "
        "TB/s from 12 to 40 MB)",
    ),
    "b200": _sheet(
        "NVIDIA B200", (10, 0), 148, tensor=2250, cuda=80, dram=8000, l2=126.5, memory=180,
        source="Blackwell architecture brief for the HGX B200 at 1000 W, as glennklockwood.com quotes it; SMs, L2 size "
        "and memory as CUDA reports; shared memory unverified for this card",
    ),
}  # fmt: skip

ALIASES = {
    "a100": "a100_80gb",
    "h100": "h100_sxm",
    "orin_nano": "orin_nano_8gb",
    "orin_nx": "orin_nx_16gb",
    "3090": "rtx_3090",
    "4090": "rtx_4090",
}

# Whole names as CUDA reports them. Every Jetson Orin reports "Orin", so none is told apart.
_REPORTED = {
    "A40": "a40",
    "A10": "a10",
    "GeForce RTX 3090": "rtx_3090",
    "A100-SXM4-40GB": "a100_40gb",
    "A100-SXM4-80GB": "a100_80gb",
    "A100-SXM-80GB": "a100_80gb",
    "L4": "l4",
    "GeForce RTX 4090": "rtx_4090",
    "H100 PCIe": "h100_pcie",
    "H100 80GB HBM3": "h100_sxm",
    "H200": "h200",
    "B200": "b200",
}

MEASURED = "_measured"  # how the short name of a measured device ends


def get(name: str) -> Device:
    """Look a device up by its short name: of `DEVICES`, of `ALIASES`, or of a measured device of this user.

    >>> get("a40").sms, get("h100").name
    (84, 'NVIDIA H100 SXM')

    Raises:
      ValueError: for an unknown name, with the known ones and the nearest; for a damaged file of measured devices.
    """
    builtin = ALIASES.get(name, name)
    if builtin in DEVICES:
        return DEVICES[builtin]
    measured = load()
    if name in measured:
        return measured[name]
    known = (*DEVICES, *measured)
    close = difflib.get_close_matches(name, (*known, *ALIASES), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"device {name!r} is not one of {known}{hint}")


def names() -> tuple[str, ...]:
    """List the short names that `get` knows, measured devices last; aliases are left out."""
    return (*DEVICES, *load())


def match(reported_name: str) -> Device | None:
    """Find the data sheet of a card by its name as CUDA reports it; None unless it is certain.

    >>> match("NVIDIA H100 80GB HBM3").name, match("NVIDIA A10G")
    ('NVIDIA H100 SXM', None)
    """
    short = _short(reported_name)
    return None if short is None else DEVICES[short]


def default_path() -> pathlib.Path:
    """Return where measured devices are kept: blrlab/devices.json in the user's data folder (XDG_DATA_HOME)."""
    folder = pathlib.Path(os.environ.get("XDG_DATA_HOME", ""))
    if not folder.is_absolute():  # unset, or to be ignored by the specification
        folder = pathlib.Path.home() / ".local" / "share"
    return folder / "blrlab" / "devices.json"


def load(path: str | os.PathLike[str] | None = None) -> dict[str, Device]:
    """Read measured devices by short name; none where there is no file.

    Raises:
      ValueError: when the file is damaged, with what is wrong and what to do.
    """
    file = default_path() if path is None else pathlib.Path(path)
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(rows, dict):
            raise ValueError("it must hold one JSON object")
        return {short: _from_fields(short, fields) for short, fields in rows.items()}
    except FileNotFoundError:
        return {}
    except ValueError as error:  # also of JSON and of text that is not UTF-8
        fix = "mend it, or delete it and measure again with `python -m blrlab_ops.measure`"
        raise ValueError(f"{file} holds no measured devices: {error}; {fix}") from error


def save(device: Device, path: str | os.PathLike[str] | None = None, name: str | None = None) -> str:
    """Add a measured device to the user's file, in the place of one of the same short name.

    Args:
      device: measured; its own name is the one CUDA reports.
      path: of the file, `default_path()` by default. It is replaced as a whole, so no reader finds half of it.
      name: short name, made from the device's own by default.

    Returns:
      The short name, which ends in `_measured`.

    Raises:
      ValueError: when the name is not made of small letters, digits and _; when the file there is damaged.
    """
    short = short_name(device.name if name is None else name, given=name is not None)
    file = default_path() if path is None else pathlib.Path(path)
    rows = {key: dataclasses.asdict(known) for key, known in (load(file) | {short: device}).items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=file.name, dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(rows, indent=2) + "\n")
        os.replace(temporary, file)
    finally:
        pathlib.Path(temporary).unlink(missing_ok=True)
    return short


def short_name(name: str, given: bool = False) -> str:
    """Return the short name of a measured device: of its data sheet, else of the name that CUDA reports.

    >>> short_name("NVIDIA A40"), short_name("NVIDIA A10G"), short_name("lab_2", given=True)
    ('a40_measured', 'nvidia_a10g_measured', 'lab_2_measured')

    Args:
      name: as CUDA reports it.
      given: `name` is a short name that somebody chose.

    Raises:
      ValueError: when a chosen name is not made of small letters, digits and _.
    """
    if given and not re.fullmatch(r"[a-z0-9_]+", name):
        raise ValueError(f"name {name!r} must be made of small letters, digits and _, like lab_card")
    short = name if given else _short(name) or re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    return short.removesuffix(MEASURED) + MEASURED


def _short(reported_name: str) -> str | None:
    return _REPORTED.get(reported_name.strip().removeprefix("NVIDIA "))


def _from_fields(short: str, fields: Any) -> Device:
    """Make a device of a JSON object, refusing what is no device."""
    if not short.endswith(MEASURED):
        raise ValueError(f"the name {short!r} must end in {MEASURED}")
    if not isinstance(fields, dict):
        raise ValueError(f"{short} must be an object")
    known = {field.name: field for field in dataclasses.fields(Device)}
    required = {name for name, field in known.items() if field.default is dataclasses.MISSING}
    if wrong := (required - fields.keys()) | (fields.keys() - known.keys()):
        raise ValueError(f"{short} lacks, or does not know, {', '.join(sorted(wrong))}")
    for name, value in fields.items():
        if not _is_valid(name, value, optional=name not in required):
            raise ValueError(f"{short}.{name} cannot be {value!r}")
    values: dict[str, Any] = dict(fields)
    values["compute_capability"] = values["compute_capability"] and tuple(values["compute_capability"])
    return Device(**values)


def _is_valid(name: str, value: Any, optional: bool) -> bool:
    if name in ("name", "source"):
        return isinstance(value, str)
    if name == "compute_capability":
        return value is None or (isinstance(value, list) and [type(part) for part in value] == [int, int])
    if value is None:
        return optional
    return type(value) in (int, float) and math.isfinite(value) and value > 0
