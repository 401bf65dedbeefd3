"""Compile representative launches for each chip and print JSON lines, for test_ops_ahead_of_time.py."""

import importlib
import json

import torch
from blrlab_ops import dispatch, launching
from blrlab_ops.testing import Case, random_factors

LARGE = (("low_rank", (1, 1), 1024), ("monarch", (16, 16), 64), ("blast", (16, 16), 1024))
ONE, FEW, MANY = (tuple(Case(format, n, 4096, 4096, *cut) for format, *cut in LARGE) for n in (1, 16, 1024))
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
)
# Sixteen blocks and tokens unrolled take five seconds to compile; the same tiles are compiled for six blocks.
LEFT_OUT = [(FEW[2], "triton_late_mixing"), (MANY[2], "triton_late_mixing")]


def main() -> None:
    compiled = set()
    for layers, dtype, capabilities in JOBS:
        for capability in capabilities:
            launching.overlaps = lambda device, at=capability: at >= 90  # there is no device to ask
            for layer in layers:
                for impl in filter(dispatch.is_triton, dispatch.impls(layer.format)):
                    if (layer, impl) not in LEFT_OUT:
                        _compile(layer, impl, dtype, capability, compiled)


def _compile(layer: Case, impl: str, dtype: torch.dtype, capability: int, compiled: set) -> None:
    for place, launch in enumerate(_launches(layer, impl, dtype)):
        row = {"format": layer.format, "impl": impl, "kernel": launch.kernel.__name__, "dtype": str(dtype)}
        row |= {"tokens": layer.tokens, "place": place, "capability": capability, "early": launch.early}
        row["signals"] = bool(launch.constants.get("SIGNAL"))
        known = (capability, *_specialised(launch))
        row["again"] = known in compiled
        if known not in compiled:
            compiled.add(known)
            row["shared"] = launching.compile_for(launch, capability)
        print(json.dumps(row))


def _specialised(launch: launching.Launch) -> tuple:
    """Return what a compiled kernel depends on."""
    given = tuple(
        value.dtype if isinstance(value, torch.Tensor) else value if value in (None, 1) else value % 16 == 0
        for value in launch.arguments.values()
    )
    return launch.kernel.__name__, *launch.constants.values(), given, launch.warps, launch.stages, launch.early


def _launches(layer: Case, impl: str, dtype: torch.dtype) -> list[launching.Launch]:
    module = importlib.import_module(f"blrlab_ops.{layer.format}.{impl}")
    weights = module.pack(*random_factors(layer.format, *layer[2:], dtype=dtype, device="meta").values())
    x, y, bias = (
        torch.empty(shape, dtype=dtype, device="meta")
        for shape in (
            (layer.tokens, layer.in_features),
            (layer.tokens, layer.out_features),
            (layer.out_features,),
        )
    )
    return module.launches(x, *weights, bias, y)


if __name__ == "__main__":
    main()
