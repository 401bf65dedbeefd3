"""A run that never was, as one command records it: 4 blocks of 3 layers, two nets timed over 4 backends."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest

Record = dict[str, Any]

BLOCKS = 4
LAYERS = {"c_attn": ("attn", 256, 768), "c_fc": ("mlp", 256, 1024), "c_proj": ("mlp", 1024, 256)}
PAPER_LAYERS = {"c_attn": (768, 2304), "c_fc": (768, 3072), "c_proj": (3072, 768)}
INTERPRETED = "verified in Triton's interpreter, which has no speed"
DEVICE = "AMD EPYC 7B13, 2 cores"
PEAKS = {
    "name": "AMD EPYC 7B13",
    "flops_per_s": 118e9,
    "bytes_per_s": 19.5e9,
    "dtype": "float32",
    "source": "measured here",
}


def env(**changes: Any) -> Record:
    data = {
        "source": "the Python standard library",
        "files": 1612,
        "bytes": 24_300_000,
        "train_bytes": 21_900_000,
        "valid_bytes": 2_400_000,
        "hash": "9f2c51d07ab34e81",
        "unigram_entropy": 3.291,
        "tokenizer": "bytes",
        "unit": "byte",
    }
    record = {
        "kind": "env",
        "time": "2026-11-22T10:31:05Z",
        "commit": "4be1c07",
        "config": "gpt2_monarch",
        "scale": "small",
        "device": DEVICE,
        "backend": "cpu",
        "devices": 1,
        "python": "3.11.9",
        "jax": "0.9.1",
        "torch": "2.12.0",
        "triton": "3.7.0",
        "driver": None,
        "parameters": 3_421_184,
        "data": data,
        "peaks": dict(PEAKS),
    }
    return {**record, **changes}


def train(phase: str, steps: int, start: float, end: float, data_hash: str = "9f2c51d07ab34e81") -> list[Record]:
    noise = random.Random(phase)
    losses = (end + (start - end) * math.exp(-7 * (step / steps) ** 0.7) for step in range(1, steps + 1))
    return [
        {
            "kind": "train",
            "phase": phase,
            "step": step,
            "loss": loss + noise.gauss(0, 0.035),
            "lr": 1e-3,
            "tokens_per_s": 21_000.0,
            "data_hash": data_hash,
        }
        for step, loss in enumerate(losses, 1)
    ]


def evaluation(stage: str, loss: float, data_hash: str = "9f2c51d07ab34e81", **changes: Any) -> list[Record]:
    shared = {"kind": "eval", "stage": stage, "split": "valid", "examples": 512, "data_hash": data_hash}
    if stage in ("compressed", "healed"):
        shared |= {"format": "monarch", "algorithm": "plain", "layer_factor": 3.1, "model_factor": 2.7}
    shared |= changes
    values = (
        ("loss", loss, "nats/byte"),
        ("perplexity", math.exp(loss), "per byte"),
        ("bits_per_byte", loss / math.log(2), "bits/byte"),
    )
    return [{**shared, "metric": metric, "value": value, "unit": unit} for metric, value, unit in values]


def compression(form: str = "monarch") -> list[Record]:
    noise = random.Random(form)
    rows: list[Record] = []
    for block in range(BLOCKS):
        for place, (layer, (part, wide, out)) in enumerate(LAYERS.items()):
            rows.append(
                {
                    "kind": "compress",
                    "path": f"h_{block}/{part}/{layer}",
                    "layer": layer,
                    "format": form,
                    "blocks": [4, 4],
                    "rank": 64,
                    "block_rank": 16 if form == "monarch" else None,
                    "algorithm": "plain",
                    "relative_error": 0.48 + 0.06 * place + 0.025 * block + noise.gauss(0, 0.01),
                    "params_before": wide * out,
                    "params_after": 64 * (wide + out),
                    "seconds": 0.21,
                    "in_features": wide,
                    "out_features": out,
                }
            )
    total = {"kind": "compress", "path": "*", "params_before": 3_421_184, "params_after": 1_267_105}
    return [*rows, {**total, "layer_factor": 3.1, "model_factor": 2.7, "seconds": 2.6}]


def bench_row(op: str, impl: str, net: str, layer: str, p50: float | None, **changes: Any) -> Record:
    wide, out = LAYERS[layer][1:] if net == "own" else PAPER_LAYERS[layer]
    tokens, rank = (256, 64) if net == "own" else (384, 192)
    dense = op == "dense"
    parameters = wide * out if dense else rank * (wide + out)
    flops, moved = (
        2 * tokens * parameters,
        4 * (parameters + tokens * (wide + out + (0 if dense else 4 * rank))),
    )
    bound = 1e6 * max(flops / PEAKS["flops_per_s"], moved / PEAKS["bytes_per_s"])
    record = {
        "kind": "bench",
        "op": op,
        "impl": impl,
        "net": net,
        "layer": layer,
        "in_features": wide,
        "out_features": out,
        "blocks": None if dense else [4, 4],
        "rank": None if dense else rank,
        "block_rank": rank // 4 if op == "monarch" else None,
        "tokens": tokens,
        "dtype": "float32",
        "unit": "us",
        "p20": p50 and 0.96 * p50,
        "p50": p50,
        "p80": p50 and 1.08 * p50,
        "method": "median of 60",
        "bound_us": bound,
        "flops": flops,
        "bytes": moved,
        "error": 3.1e-7,
        "error_budget": 7.4e-7,
        "passed": True,
        "device": DEVICE,
        "torch": "2.12.0",
        "triton": "3.7.0",
        "jax": "0.9.1",
        "driver": None,
        "commit": "4be1c07",
        "time": "2026-11-22T11:02:44Z",
    }
    return {**record, **changes}


def bench() -> list[Record]:
    slowness = {"xla": 1.35, "torch": 1.5, "torch_compile": 1.42}
    rows: list[Record] = []
    for net in ("own", "gpt2s"):
        for layer in LAYERS:
            for impl, factor in slowness.items():
                bound = bench_row("dense", impl, net, layer, None)["bound_us"]
                rows.append(bench_row("dense", impl, net, layer, factor * bound))
            for impl, factor in slowness.items():
                bound = bench_row("monarch", impl, net, layer, None)["bound_us"]
                failed = impl == "torch_compile" and layer == "c_proj" and net == "own"
                gate = {"passed": False, "error": 2.2e-6} if failed else {}
                rows.append(bench_row("monarch", impl, net, layer, None if failed else 1.7 * factor * bound, **gate))
            rows.append(bench_row("monarch", "triton", net, layer, None, reason=INTERPRETED))
    return rows


def full_run() -> list[Record]:
    return [
        env(),
        *train("dense", 400, 5.5, 1.5),
        *evaluation("dense", 1.520),
        *compression(),
        *evaluation("compressed", 2.310),
        *train("heal", 150, 2.3, 1.54),
        *train("dense_continued", 150, 1.5, 1.46),
        *evaluation("healed", 1.550),
        *evaluation("dense_continued", 1.475),
        *bench(),
    ]


# A benchmark suite and its predictions on one GPU, with numbers a cost model and some noise make up.

GPU = "NVIDIA H100 80GB HBM3"
GPU_PEAKS = {
    "name": GPU,
    "flops_per_s": 807e12,
    "bytes_per_s": 2.91e12,
    "cuda_flops_per_s": 58e12,
    "l2_bytes_per_s": 7.2e12,
    "launch_us": 1.1,
    "dtype": "bfloat16",
    "source": "measured here",
    "sheet": {
        "name": "H100 SXM",
        "flops_per_s": 989e12,
        "bytes_per_s": 3.35e12,
        "cuda_flops_per_s": 67e12,
        "l2_bytes_per_s": None,
    },
}
NETS = {
    "gpt2s": {"c_attn": (768, 2304), "c_fc": (768, 3072), "c_proj": (3072, 768)},
    "gpt2xl": {"c_attn": (1600, 4800), "c_fc": (1600, 6400), "c_proj": (6400, 1600)},
    "llama7b": {"q_proj": (4096, 4096), "gate_proj": (4096, 11008), "down_proj": (11008, 4096)},
    "llama70b": {"q_proj": (8192, 8192), "gate_proj": (8192, 28672), "down_proj": (28672, 8192)},
    "vit_b": {"qkv": (768, 2304), "fc1": (768, 3072), "fc2": (3072, 768)},
    "vit_l": {"qkv": (1024, 3072), "fc1": (1024, 4096), "fc2": (4096, 1024)},
    "dit_xl": {"qkv": (1152, 3456), "fc1": (1152, 4608), "fc2": (4608, 1152)},
    "qwen_3b": {"q_proj": (2048, 2048), "gate_proj": (2048, 11008), "down_proj": (11008, 2048)},
    "opt_13b": {"q_proj": (5120, 5120), "fc1": (5120, 20480), "fc2": (20480, 5120)},
}
TOKENS = (1, 16, 64, 512, 4096)
SLOWNESS = {
    ("dense", "torch_eager"): (1.25, 1),
    ("dense", "torch_compile_max_autotune"): (1.22, 1),
    ("dense", "int8_weight_only"): (0.85, 1),
    ("low_rank", "torch_compile"): (1.4, 2),
    ("monarch", "torch_bmm"): (2.0, 4),
    ("monarch", "triton_two_stage"): (1.5, 2),
    ("monarch", "triton_one_launch"): (1.35, 1),
    ("monarch", "paper_monarch_right_left"): (2.4, 2),
    ("blast", "torch_bmm"): (2.2, 5),
    ("blast", "torch_compile_max_autotune"): (2.0, 4),
    ("blast", "triton_three_stage"): (1.6, 3),
}


def work(op: str, wide: int, out: int, tokens: int) -> tuple[int | None, int, int]:
    """Return rank, operations and compulsory bytes of a layer in bf16."""
    rank = None if op == "dense" else round(wide * out / (wide + out) / 2 / 16) * 16
    parameters = rank * (wide + out) if rank else wide * out
    return rank, 2 * tokens * parameters, 2 * (parameters + tokens * (wide + out))


def bound(flops: float, moved: float, peaks: Record = GPU_PEAKS) -> tuple[float, str]:
    terms = {"tensor": 1e6 * flops / peaks["flops_per_s"], "dram": 1e6 * moved / peaks["bytes_per_s"]}
    term = max(terms, key=lambda name: terms[name])
    return terms[term], term


def suite_row(op: str, impl: str, net: str, layer: str, tokens: int, **changes: Any) -> Record:
    wide, out = NETS[net][layer]
    rank, flops, moved = work(op, wide, out, tokens)
    noise = random.Random(f"{op}{impl}{net}{layer}{tokens}")
    (slow, launches), (least, term) = SLOWNESS[op, impl], bound(flops, moved)
    p50 = (slow * least + 1.6 * launches) * noise.uniform(0.9, 1.15)
    failed = net == "vit_l" and impl == "triton_three_stage" and tokens == 4096
    times = {"p20": p50 * noise.uniform(0.94, 0.99), "p50": p50, "p80": p50 * noise.uniform(1.01, 1.08)}
    times |= {"warm_us": 0.8 * p50, "launch_us": p50 + 9.0 * launches}
    record = {
        "kind": "bench",
        "op": op,
        "impl": impl,
        "net": net,
        "layer": layer,
        "in_features": wide,
        "out_features": out,
        "blocks": [16, 16] if op in ("monarch", "blast") else None,
        "rank": rank,
        "block_rank": rank // 16 if rank and op == "monarch" else None,
        "tokens": tokens,
        "dtype": "bfloat16",
        "unit": "us",
        **(dict.fromkeys(times) if failed else times),
        "samples": 200,
        "method": "CUDA graph, weights rotated",
        "copies": 64,
        "bound_us": least,
        "bound_term": term,
        "sheet_bound_us": bound(flops, moved, GPU_PEAKS["sheet"])[0],
        "flops": flops,
        "tensor_flops": flops,
        "cuda_flops": 0,
        "bytes": moved,
        "weight_bytes": 2 * (rank * (wide + out) if rank else wide * out),
        "peak_bytes": 3 * moved,
        "tuning_s": 41.5 if impl.startswith("triton") else None,
        "sm_mhz": 1755,
        "temperature_c": 47,
        "error": 0.03 if failed else 0.0023,
        "error_budget": 0.0125,
        "passed": not failed,
        "device": GPU,
        "torch": "2.12.0",
        "triton": "3.7.0",
        "driver": "580.159.04",
        "commit": "4be1c07",
    }
    return {**record, **changes}


def model_row(op: str, impl: str, net: str, phase: str, tokens: int, p50: float) -> Record:
    times = {"p20": 0.98 * p50, "p50": p50, "p80": 1.03 * p50, "warm_us": None, "launch_us": None}
    sizes = {"in_features": None, "out_features": None, "batch": 1, "phase": phase, "tokens_per_s": 1e6 * tokens / p50}
    empty = dict.fromkeys(("bound_us", "bound_term", "sheet_bound_us", "flops", "bytes", "rank", "blocks"))
    layer = next(iter(NETS[net]))
    return {**suite_row(op, impl, net, layer, tokens), "layer": "*", **times, **sizes, **empty}


def prediction(op: str, algorithm: str, net: str, layer: str, tokens: int, launches: int) -> Record:
    wide, out = NETS[net][layer]
    rank, flops, moved = work(op, wide, out, tokens)
    tensor, dram = 1e6 * flops / 807e12, 1e6 * moved / 2.91e12
    terms = {"tensor": tensor, "cuda": 0.0, "dram": dram, "l2": 0.6 * dram, "launch": 1.1 * launches}
    us = max(tensor, dram) * (1 + 0.1 * launches) + terms["launch"]
    dense = 1.1 + bound(*work("dense", wide, out, tokens)[1:])[0]
    return {
        "kind": "bound",
        "device": "h100",
        "device_name": GPU,
        "op": op,
        "algorithm": algorithm,
        "net": net,
        "layer": layer,
        "in_features": wide,
        "out_features": out,
        "blocks": [16, 16] if op in ("monarch", "blast") else [1, 1],
        "rank": rank,
        "tokens": tokens,
        "dtype": "bfloat16",
        "tensor_flops": flops,
        "dram_bytes": moved,
        "launches": launches,
        "terms": terms,
        "us": us,
        "term": max(terms, key=lambda name: terms[name]),
        "bound_us": max(tensor, dram),
        "bound_term": "tensor" if tensor > dram else "dram",
        "speedup": dense / us,
        "source": "prediction",
    }


def advice(op: str, net: str, layer: str, blocks: int) -> Record:
    wide, out = NETS[net][layer]
    ranks = [
        max(16, round(share * wide * out / (wide + out) / 16) * 16) for share in (0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1)
    ]
    tokens = [1, 8, 64, 512, 4096, 16384]
    launches = {"low_rank": 1.5, "monarch": 2, "blast": 3}[op] + 0.02 * blocks
    rows, widest = [], []
    for n in tokens:
        dense = 1.1 + bound(*work("dense", wide, out, n)[1:])[0]
        parts = (bound(2 * n * r * (wide + out), 2 * (r * (wide + out) + n * (wide + out)))[0] for r in ranks)
        rows.append([dense / (1.1 * launches + 1.15 * part) for part in parts])
        widest.append(max((r for r, v in zip(ranks, rows[-1], strict=True) if v >= 1), default=None))
    return {
        "kind": "advice",
        "device": "h100",
        "device_name": GPU,
        "net": net,
        "layer": layer,
        "in_features": wide,
        "out_features": out,
        "dtype": "bfloat16",
        "op": op,
        "blocks": [blocks, blocks],
        "tokens": tokens,
        "ranks": ranks,
        "layer_factor": [wide * out / (r * (wide + out)) for r in ranks],
        "speedup": rows,
        "bound_speedup": [[1.2 * v for v in row] for row in rows],
        "algorithm": [["two_stage"] * len(ranks) for _ in tokens],
        "widest_rank": widest,
    }


def suite(nets: int = 9) -> list[Record]:
    """Return an environment, layers and whole models of some nets, their predictions and advice."""
    some = list(NETS)[:nets]
    pairs = [(net, layer) for net in some for layer in NETS[net]]
    rows = [env(config="bench_suite", device=GPU, backend="gpu", parameters=None, data=None, peaks=GPU_PEAKS)]
    rows += [suite_row(*pair, net, layer, n) for net, layer in pairs for n in TOKENS for pair in SLOWNESS]
    for net in some[:2]:
        for phase, tokens in (("prefill", 512), ("decode", 1)):
            for (op, impl), (slow, launches) in SLOWNESS.items():
                rows.append(model_row(op, impl, net, phase, tokens, 900 * slow + 40 * launches + tokens))
    kinds = (("dense", "matmul", 1), ("monarch", "plain", 4), ("monarch", "two_stage", 2), ("blast", "three_stage", 3))
    rows += [prediction(op, name, *pair, n, k) for pair in pairs for n in TOKENS for op, name, k in kinds]
    for pair in pairs:
        rows += [advice("low_rank", *pair, 1)]
        rows += [advice(op, *pair, blocks) for op in ("monarch", "blast") for blocks in (4, 16)]
    return rows


def evaluated_suite() -> list[Record]:
    """Return the suite of one net, whose models were evaluated as well."""
    factored = {"layer_factor": 2.0, "model_factor": 1.8, "algorithm": "whitened"}
    losses = {"low_rank": (3.42, 3.21), "monarch": (3.36, 3.14), "blast": (3.28, 3.09)}
    rows = [env(config="gpt2s", device=GPU, peaks=GPU_PEAKS, parameters=124e6), *evaluation("dense", 3.02)]
    for form, (before, after) in losses.items():
        rows += evaluation("compressed", before, format=form, **factored)
        rows += evaluation("healed", after, format=form, **factored)
    return [*rows, *(r for r in suite(1) if r["kind"] == "bench")]


@pytest.fixture
def records() -> list[Record]:
    """One whole run."""
    return full_run()


@pytest.fixture(scope="session")
def build() -> SimpleNamespace:
    """What makes single records."""
    makers = (env, train, evaluation, compression, bench_row, bench, full_run, suite_row, model_row, suite)
    makers += (evaluated_suite, prediction, advice)
    return SimpleNamespace(
        **{maker.__name__: maker for maker in makers}, device=DEVICE, gpu=GPU, interpreted=INTERPRETED
    )
