"""The stages that take the factors to torch and to the kernels, and the report: bridge, bench, report."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from blrlab import bench, compress, factors, records, report
from blrlab.bridge import to_torch
from blrlab.errors import InputError
from blrlab.experiments import build, environment
from blrlab.experiments.model_stages import Run

BRIDGE_ROWS = 64


def latest_factored(run: Run) -> str:
    """Return the stage whose factors are newest: heal, else compress."""
    return "heal" if run.workdir.done("heal") else "compress"


def bridge(run: Run, folder: Path) -> None:
    """Hand every factored kernel to torch, and compare what torch computes with JAX.

    Raises:
      InputError: a pointer or a value differs.
    """
    if environment.version("torch") is None:
        run.say("bridge: left out, PyTorch is not installed")
        return
    import blrlab_ops
    import torch

    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        run.say("bridge: left out, JAX is on a GPU and this PyTorch finds none: install a build with CUDA")
        return

    params = run.params(latest_factored(run))
    worst, count = 0.0, 0
    for path, spec in run.made.specs.items():
        if spec.format == "dense":
            continue
        kernel = _kernel(params, path)
        bridged = to_torch(kernel)
        for name, factor in kernel.items():
            count += 1
            if bridged[name].data_ptr() != factor.unsafe_buffer_pointer():
                raise InputError(f"{path}/{name}: torch holds a copy, not the same memory.")
        x = jax.random.normal(jax.random.key(0), (BRIDGE_ROWS, spec.in_features), jnp.float32)
        with jax.default_matmul_precision("highest"):
            wanted = np.asarray(factors.apply(kernel, x))
        found = blrlab_ops.linear(to_torch(x), bridged, impl="torch_bmm").cpu().numpy()
        worst = max(worst, float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted)))
    if not worst < 1e-5:
        raise InputError(f"torch and JAX differ by {worst:.1e} on the same float32 factors; 1e-5 is rounding.")
    run.say(f"bridge: {count} factors in torch over the same memory; outputs agree to {worst:.1e}")


def _kernel(params: dict, path: str) -> dict:
    return functools.reduce(lambda node, name: node[name], [*path.split("/"), "kernel"], params)


def benchmark(run: Run, folder: Path) -> None:
    """Verify and time the model's own layers and the published ones over the backends."""
    config = run.made.config.bench
    dtype = config.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    machine = environment.describe()
    peaks = bench.measure_peaks(machine["device"], dtype)
    fields = ("device", "torch", "triton", "jax", "driver", "commit", "time")
    settings = bench.Settings(
        build.names(config.backends, build.BACKENDS, "backend"),
        config.seconds,
        peaks,
        {name: machine[name] for name in fields},
    )
    log = folder / "records.jsonl"
    records.rewrite(log, [{"kind": "env", **machine, "peaks": peaks.record()}])
    for rows in bench.bench_layers(_problems(run, dtype), settings, run.say):
        for row in rows:
            records.append(log, row)


def _problems(run: Run, dtype: str) -> list[bench.Problem]:
    made, key = run.made, jax.random.key(run.made.config.seed)
    config = made.config.bench
    problems: list[bench.Problem] = []
    for net in build.names(config.nets, (build.OWN, "gpt2s"), "net"):
        if net == build.OWN:
            params = run.params(latest_factored(run))
            problems += bench.own_problems(params, made.specs, config.tokens or made.window, dtype, key)
            continue
        for format in build.formats(made):
            problems += bench.published_problems(net, format, config.tokens, dtype, key)
    return problems


def make_report(run: Run, folder: Path) -> None:
    """Gather the records, print the closing tables and write the page."""
    found = run.workdir.gather()
    report.print_report(found, Console())
    report.write_html(found, run.workdir.root / "report.html")


def describe_specs(run: Run) -> str:
    """Return the resolved table: path, format, blocks, rank and parameters of every layer a rule matches."""
    made = run.made
    lines = [f"{'layer':<22} {'format':<9} {'blocks':>7} {'rank':>12} {'dense':>12} {'factored':>12}"]
    for path, spec in made.specs.items():
        b1, b2 = spec.blocks
        rank = str(spec.total_rank or "") if spec.format != "dense" else ""
        if spec.format == "monarch":
            rank = f"{rank} ({spec.rank}/block)".strip()
        counts = (spec.in_features * spec.out_features, factors.parameter_count(spec))
        lines.append(f"{path:<22} {spec.format:<9} {f'{b1} x {b2}':>7} {rank:>12} {counts[0]:>12,} {counts[1]:>12,}")
    layer_factor, model_factor = compress.compression_factors(made.dense_shapes, made.specs)
    lines.append(f"compression factor: layers {layer_factor:.2f}, model {model_factor:.2f}")
    return "\n".join(lines)
