"""Compile representative launches for each chip and print JSON lines, for test_ops_ahead_of_time.py."""

import importlib
import json

import torch
from blrlab_ops import launching
from blrlab_ops.testing import Case, random_factors

EVERY_DTYPE = (torch.bfloat16, torch.float16, torch.float32)
CASES = (
    (Case("monarch", 1024, 4096, 4096, (16, 16), 64), EVERY_DTYPE),
    (Case("monarch", 1, 768, 2304, (4, 4), 48), (torch.bfloat16,)),
    (Case("blast", 1024, 4096, 4096, (16, 16), 1024), EVERY_DTYPE),
    (Case("blast", 197, 768, 2304, (3, 3), 128), (torch.bfloat16,)),
    (Case("low_rank", 7, 33, 70, (1, 1), 5), (torch.bfloat16, torch.float32)),
)


def main() -> None:
    for layer, dtypes in CASES:
        for dtype in dtypes:
            for launch in _launches(layer, dtype):
                for capability in (80, 86, 87, 90):
                    row = {"format": layer.format, "kernel": launch.kernel.__name__, "dtype": str(dtype)}
                    shared = launching.compile_for(launch, capability)
                    print(json.dumps(row | {"capability": capability, "shared": shared}))


def _launches(layer: Case, dtype: torch.dtype) -> list[launching.Launch]:
    module = importlib.import_module(f"blrlab_ops.{layer.format}.triton_two_stage")
    factors = random_factors(layer.format, *layer[2:], dtype=dtype, device="meta")
    x, y, bias = (
        torch.empty(shape, dtype=dtype, device="meta")
        for shape in (
            (layer.tokens, layer.in_features),
            (layer.tokens, layer.out_features),
            (layer.out_features,),
        )
    )
    return module.launches(x, *factors.values(), bias, y)


if __name__ == "__main__":
    main()
