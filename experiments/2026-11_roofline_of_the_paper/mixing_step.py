"""What a program that mixes all blocks of BLAST becomes on sm_86: registers, spills, instructions a multiply-add.

    python experiments/2026-11_roofline_of_the_paper/mixing_step.py

Compiles ahead of time with the Triton that is installed, no GPU needed; prints a Markdown table and writes
records/mixing_step.jsonl beside itself. The program keeps W [b2, tokens, ranks] in float32 and adds S[l, k] Z[l] for
one input block after the other, S Z either rounded to bf16 before it is added, or kept in float32.

Instructions a multiply-add: those of the loop over input blocks outside the loop over p, in bf16 less in float32, over
the sums of a thread, plus the one fused multiply-add of float32. Time to issue: one instruction takes as long as a
fused multiply-add at the A40's float32 rate.
"""

import pathlib
import re
import subprocess
import tempfile

import triton
import triton.language as tl
from blrlab_ops import devices, shapes
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from blrlab import records

CAPABILITY = 86  # of an A40
BLOCKS, TOKENS = 16, 1024
# tokens, ranks, p at a time, warps, stages of loads
CONFIGS = ((32, 16, 32, 4, 5), (32, 32, 32, 4, 5), (128, 16, 64, 8, 3), (64, 32, 32, 4, 4), (64, 32, 32, 8, 3))
OUT = pathlib.Path(__file__).parent / "records/mixing_step.jsonl"


@triton.jit
def mix(
    x, V, S, W, n, p, r, b1, b2: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr, ROUND: tl.constexpr
):
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)
    inner, out = tl.arange(0, BP), tl.arange(0, b2)
    sums = tl.zeros((b2, BN, BR), tl.float32)
    for l in range(b1):
        z = tl.zeros((BN, BR), tl.float32)
        for start in range(0, p, BP):
            column = l * p + start + inner
            left = tl.load(x + rows[:, None] * (b1 * p) + column[None, :])
            right = tl.load(V + column[:, None] * r + ranks[None, :])
            z = tl.dot(left, right, z)
        s = tl.load(S + (l * b2 + out[:, None]) * r + ranks[None, :])[:, None, :]
        if ROUND:
            sums += s * z.to(tl.bfloat16)[None, :, :]
        else:
            sums += s.to(tl.float32) * z[None, :, :]
    to = out[:, None, None] * (n * r) + rows[None, :, None] * r + ranks[None, None, :]
    tl.store(W + to, sums.to(tl.bfloat16))


def compiled(config: tuple[int, int, int, int, int], rounded: bool) -> tuple[int, int, int]:
    """Return (registers a thread, bytes spilled a thread, instructions an input block outside the loop over p)."""
    tokens, ranks, depth, warps, stages = config
    constants = {"b2": BLOCKS, "BN": tokens, "BR": ranks, "BP": depth, "ROUND": rounded}
    pointers, sizes = ("x", "V", "S", "W"), ("n", "p", "r", "b1")
    signature = dict.fromkeys(pointers, "*bf16") | dict.fromkeys(sizes, "i32")
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {(mix.arg_names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *sizes[:3])}
    source = ASTSource(mix, signature, constants, aligned)
    options = {"num_warps": warps, "num_stages": stages}
    built = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options)
    usage, code = (_dump(built.asm["cubin"], flag) for flag in ("--dump-resource-usage", "-sass"))
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return registers, stack, _outside(code)


def _dump(cubin: bytes, flag: str) -> str:
    tool = pathlib.Path(nvidia.__file__).parent / "bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout


def _outside(code: str) -> int:
    """Return the instructions of the longest loop less those of the loops inside it."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]*);", code)]
    jumps = [(int(found[1], 16), at) for at, text in lines if (found := re.search(r"BRA 0x([0-9a-f]+)", text))]
    loops = sorted(((start, end) for start, end in jumps if start < end), key=lambda loop: loop[0] - loop[1])
    (start, end), inside = loops[0], loops[1:]
    return sum(
        start <= at <= end and not any(first <= at <= last for first, last in inside if start <= first and last < end)
        for at, _ in lines
    )


def main() -> None:
    a40, layer = devices.get("a40"), shapes.layers("llama7b")[0]
    multiply_adds = TOKENS * layer.rank * BLOCKS * BLOCKS
    print("| tokens x ranks, warps | registers | spilled bytes | instructions a multiply-add | us of issue, qkvo |")
    print("|---|---|---|---|---|")
    OUT.unlink(missing_ok=True)
    for config in CONFIGS:
        tokens, ranks, _, warps, _ = config
        sums = BLOCKS * tokens * ranks // (32 * warps)
        (registers, spilled, bf16), (_, _, float32) = (compiled(config, rounded) for rounded in (True, False))
        each = 1 + (bf16 - float32) / sums
        us = 1e6 * each * multiply_adds / (a40.cuda_flops / 2)
        print(f"| {tokens} x {ranks}, {warps} | {registers} | {spilled} | {each:.1f} | {us:.0f} |")
        found = {"mixing_tile": [tokens, ranks], "warps": warps, "registers": registers, "spilled_bytes": spilled}
        about = {"kind": "bound", "device": "a40", "device_name": a40.name, "op": "blast", "algorithm": "mixing_step"}
        where = {
            "net": layer.net,
            "layer": layer.name,
            "tokens": TOKENS,
            "dtype": "bfloat16",
            "triton": triton.__version__,
        }
        told = {"us": us, "term": "cuda", "instructions": each, "source": "compiled for sm_86"}
        records.append(OUT, about | where | found | told)


if __name__ == "__main__":
    main()
