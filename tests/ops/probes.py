"""For test_ops_measuring.py: compile the kernel that reads the L2 for each chip, or interpret it; print JSON lines."""

import json
import sys

import torch
from blrlab_ops import launching, triton_probes


def main(command: str) -> None:
    if command == "compile":
        buffer = torch.empty(24 * triton_probes.ELEMENTS, device="meta")
        launch = triton_probes.read(buffer, torch.empty(168, device="meta"), passes=8)
        for capability in (80, 86, 87, 90):
            print(json.dumps({"capability": capability, "shared": launching.compile_for(launch, capability)}))
    else:
        buffer, sums = torch.rand(3 * triton_probes.ELEMENTS), torch.full((7,), float("nan"))
        launching.run([triton_probes.read(buffer, sums, passes=2)], buffer.device)
        print(json.dumps({"expected": 2 * buffer.double().sum().item(), "sums": sums.tolist()}))


if __name__ == "__main__":
    main(sys.argv[1])
