"""Compile launches for each chip without a GPU and print JSON lines, for test_ops_ahead_of_time.py.

Representative launches for all chips, and every committed configuration for the chip that it was tuned on.
`tests/compile_all.py` shares the functions without an underscore.
"""

import functools
import importlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from blrlab_ops import devices, dispatch, int8, int8_streaming, launching
from blrlab_ops.blast import bmm_mixing
from blrlab_ops.launching import Launch
from blrlab_ops.testing import Case, random_factors
from blrlab_ops.tuning import from_json, search, store
from torch import Tensor

RESERVED = 1024  # bytes of a multiprocessor's shared memory that no program gets
# Largest shared memory of one program, by compute capability such as 86.
LIMITS = {
    10 * device.compute_capability[0] + device.compute_capability[1]: device.shared_bytes_per_sm - RESERVED
    for device in devices.DEVICES.values()
    if device.compute_capability
}

LARGE = (("low_rank", (1, 1), 1024), ("monarch", (16, 16), 64), ("blast", (16, 16), 1024))
ONE, FEW, MANY = (
    tuple(Case(format, n, 4096, 4096, blocks, rank) for format, blocks, rank in LARGE) for n in (1, 16, 1024)
)
SMALL = (  # c_attn of GPT2-S and fc2 of ViT-B
    Case("low_rank", 384, 768, 2304, (1, 1), 192),
    Case("monarch", 384, 768, 2304, (4, 4), 48),
    Case("blast", 384, 768, 2304, (6, 6), 192),
    Case("low_rank", 197, 3072, 768, (1, 1), 128),
    Case("monarch", 197, 3072, 768, (4, 4), 32),
    Case("blast", 197, 3072, 768, (3, 3), 128),
)
ODD = (
    Case("low_rank", 7, 33, 70, (1, 1), 5),
    Case("monarch", 7, 33, 70, (3, 2), 5),
    Case("blast", 7, 33, 70, (3, 2), 5),
)
# (layers, dtype, capabilities): everything where there is least shared memory and where launches overlap.
JOBS = (
    (ONE + FEW + MANY + SMALL, torch.bfloat16, (86,)),
    (ONE + FEW + MANY + SMALL[:3], torch.bfloat16, (90,)),
    (MANY, torch.bfloat16, (80,)),
    (SMALL[3:], torch.float32, (80,)),
    (ONE, torch.bfloat16, (87,)),
    (SMALL[:3], torch.float16, (87,)),
    (ONE, torch.float32, (86,)),
    (ODD, torch.float32, (90,)),
    (ONE + FEW, torch.int8, (86, 90)),
)
HOPPER_JOBS = (
    (MANY[1], torch.bfloat16),
    (Case("monarch", 1024, 4096, 11008, (16, 16), 96), torch.float16),
    (Case("monarch", 16384, 1152, 4608, (8, 8), 32), torch.bfloat16),
    (SMALL[1], torch.bfloat16),
    (ODD[1], torch.bfloat16),
)
# Sixteen blocks and tokens unrolled take five seconds to compile; the same tiles are compiled for six blocks.
LEFT_OUT = [(FEW[2], "triton_late_mixing"), (MANY[2], "triton_late_mixing")]


class Operands(NamedTuple):
    """A layer's operands on the "meta" device, packed for an implementation: its module, or what stands for it."""

    module: Any
    x: Tensor
    weights: tuple[Tensor, ...]
    bias: Tensor
    y: Tensor


def main() -> None:
    sizes: dict[tuple, int] = {}
    for layers, dtype, capabilities in JOBS:
        for capability in capabilities:
            for layer in layers:
                if layer.format == "blast" and dtype != torch.int8:
                    _compile_launch(_mixing(layer, dtype), layer, "bmm_mixing", dtype, capability, sizes)
                for impl in filter(dispatch.is_portable, dispatch.impls(layer.format)):
                    if (layer, impl) not in LEFT_OUT and (dtype != torch.int8 or impl in search.INT8_IMPLS):
                        _compile(layer, impl, dtype, capability, sizes)
    for layer, dtype in () if dispatch.gluon_problem() else HOPPER_JOBS:
        for impl in filter(dispatch.is_hopper, dispatch.impls(layer.format)):
            _compile(layer, impl, dtype, 90, sizes)
    for committed, layer, impl, dtype, capability, config in _committed():
        _compile(layer, impl, dtype, capability, sizes, config, committed)


def operands(layer: Case, impl: str, dtype: torch.dtype) -> Operands:
    """Make a layer's operands, of no memory; int8 is of the weights, beside an x of bfloat16."""
    of_x = torch.bfloat16 if dtype == torch.int8 else dtype
    shapes = (layer.tokens, layer.in_features), (layer.out_features,), (layer.tokens, layer.out_features)
    x, bias, y = (torch.empty(shape, dtype=of_x, device="meta") for shape in shapes)
    factors = _factors(layer._replace(tokens=0), of_x)
    if dtype == torch.int8:
        module, weights = int8_streaming.Implementation(layer.format), int8_streaming.in_order(int8.quantise(factors))
    else:
        module, weights = importlib.import_module(f"blrlab_ops.{layer.format}.{impl}"), factors.values()
    return Operands(module, x, module.pack(*weights), bias, y)


def launches(given: Operands, capability: int, config: dict[str, Any] | None = None) -> list[Launch]:
    """Describe the launches of a layer on a chip; None: with the tiles of fixed rules."""
    launching.overlaps = lambda device: capability >= 90  # there is no device to ask
    return given.module.launches(given.x, *given.weights, given.bias, given.y, config=config or {})


def specialised(launch: Launch) -> tuple:
    """Return what a compiled kernel depends on."""
    given = tuple(map(_specialised, launch.arguments.values()))
    return launch.kernel.__name__, *launch.constants.values(), given, launch.warps, launch.stages, launch.early


def _specialised(value: Any) -> Any:
    if (described := launching.tensor_of(value)) is not None and described is not value:
        return described.dtype, *value.block_shape
    if isinstance(value, Tensor):
        return value.dtype
    return value if value in (None, 1) else (value % 16 == 0, abs(value) < 2**31)


@functools.cache
def _factors(layer: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    return random_factors(layer.format, *layer[2:], dtype=dtype, device="meta")


def _committed() -> Iterator[tuple]:
    """List the committed configurations of Triton kernels, for the chips that they were tuned on."""
    for file in sorted(store.DEFAULTS.glob("*.json")):
        name, table = from_json(file.read_text(encoding="utf-8"))
        device = devices.match(name)
        if device is None or device.compute_capability is None:
            raise ValueError(f"{file} is of {name!r}, whose compute capability `devices` does not know")
        major, minor = device.compute_capability
        for key, entries in table.items():
            layer = Case(key.format, key.tokens, key.in_features, key.out_features, key.blocks, key.rank)
            for impl, entry in entries.items():
                if dispatch.is_triton(impl):
                    committed = name, str(key)
                    yield committed, layer, impl, getattr(torch, key.dtype), 10 * major + minor, entry.config


def _compile(
    layer: Case,
    impl: str,
    dtype: torch.dtype,
    capability: int,
    sizes: dict[tuple, int],
    config: dict[str, Any] | None = None,
    committed: tuple[str, str] | None = None,
) -> None:
    """Print a line a launch; what was compiled before is looked up in `sizes`."""
    for place, launch in enumerate(launches(operands(layer, impl, dtype), capability, config)):
        _compile_launch(launch, layer, impl, dtype, capability, sizes, committed, place)


def _mixing(layer: Case, dtype: torch.dtype) -> Launch:
    """Describe the one launch of BLAST's `bmm_mixing`, between two products of PyTorch's."""
    b1, b2 = layer.blocks
    Z, W = (torch.empty(blocks, layer.rank, layer.tokens, dtype=dtype, device="meta") for blocks in layer.blocks)
    return bmm_mixing.mix(Z, torch.empty(b1, b2, layer.rank, dtype=dtype, device="meta"), W)


def _compile_launch(
    launch: Launch,
    layer: Case,
    impl: str,
    dtype: torch.dtype,
    capability: int,
    sizes: dict[tuple, int],
    committed: tuple[str, str] | None = None,
    place: int = 0,
) -> None:
    row = {"format": layer.format, "impl": impl, "kernel": launch.kernel.__name__, "dtype": str(dtype)}
    row |= {"tokens": layer.tokens, "place": place, "capability": capability, "early": launch.early}
    row |= {"signals": bool(launch.constants.get("SIGNAL")), "committed": committed, "limit": LIMITS[capability]}
    known = (capability, *specialised(launch))
    if known not in sizes:
        sizes[known] = launching.compile_for(launch, capability)
    print(json.dumps(row | {"shared": sizes[known]}))


if __name__ == "__main__":
    main()
