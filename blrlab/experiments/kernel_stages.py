"""The stages that take the factors to torch and to the kernels, and the report: bridge, bench, report."""

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from blrlab_ops import shapes
from rich.console import Console

from blrlab import compress, environment, factors, records, report
from blrlab.bridge import to_torch
from blrlab.errors import InputError, home_expanded
from blrlab.experiments import build
from blrlab.experiments.model_stages import Run
from blrlab.roofline import advice, predict

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


def check_benchmark(made: build.Experiment) -> tuple[tuple[str, ...], Path | None]:
    """Return the backends to measure, and the clone of the source paper's repository.

    Raises:
      InputError: a backend is unknown, or the clone is none.
    """
    from blrlab.bench import backends, paper

    config = made.config.bench
    clone = home_expanded(config.paper) if config.paper else None
    if clone:
        paper.check(clone)
    return backends.chosen(config.impls, clone), clone


def benchmark(run: Run, folder: Path) -> None:
    """Verify and time the model's own layers and the published ones over the backends.

    Raises:
      InputError: a backend or layer is unknown, or the model's own layers are asked for before it is compressed.
    """
    if environment.version("torch") is None:
        run.say("bench: left out, PyTorch is not installed")
        return
    from blrlab.bench import card, runner
    from blrlab.bench.results import Results

    config = run.made.config.bench
    impls, clone = check_benchmark(run.made)
    on_cpu = jax.default_backend() == "cpu"
    dtype = config.dtype or ("float32" if on_cpu else "bfloat16")
    here = card.here(dtype, "cpu" if on_cpu else "")
    how = runner.settings(impls, config.seconds, here, clone)
    results = Results(folder / "records.jsonl")
    groups = _groups(run, dtype)
    runner.measure(groups, how, results, lambda line: run.say(f"bench: {line}"), workers=config.workers)


def _groups(run: Run, dtype: str) -> list:
    """Return the layers to measure: the model's own, and those of named nets."""
    from blrlab.bench.problem import named_groups

    config, tokens = run.made.config.bench, build.token_counts(run.made.config, "bench")
    nets = build.nets(run.made.config)
    asked = tuple(filter(None, map(str.strip, config.ops.split(","))))
    ops = asked or ("dense", *(format for format in build.formats(run.made) if format != "dense"))
    groups = _own_groups(run, tokens, dtype) if build.OWN in nets else []
    named = [net for net in nets if net != build.OWN]
    layers = tuple(filter(None, map(str.strip, config.layers.split(","))))
    return groups + (named_groups(named, layers, ops, tokens, dtype) if named else [])


def _own_groups(run: Run, tokens: Sequence[int], dtype: str) -> list:
    """Return the model's own factored layers with its own factors: the first layer of every name and spec."""
    from blrlab.bench.problem import given_group

    if not run.workdir.done("compress"):
        raise InputError("bench.nets names the model's own layers: run the stage compress first, or name other nets.")
    params, net = run.params(latest_factored(run)), run.made.config.factors.net
    # What is published for one token, such as a condition of an image, has one here, too.
    single = {layer.name for layer in shapes.LAYERS if layer.net == net and layer.tokens == 1}
    first: dict[tuple[str, factors.Spec], str] = {}
    for path, spec in run.made.specs.items():
        if spec.format != "dense":
            first.setdefault((path.rsplit("/", 1)[-1], spec), path)
    groups = []
    for seed, ((name, _), path) in enumerate(first.items()):
        kernel = jax.tree.map(lambda leaf: leaf.astype(dtype), _kernel(params, path))
        own = 1 if compress.called(path, net) in single else run.made.window
        groups += [given_group(build.OWN, name, to_torch(kernel), n or own, seed) for n in tokens]
    return groups


def predict_roofline(run: Run, folder: Path) -> None:
    """Predict the layers of named nets on devices that are not here, and what could beat dense there."""
    config = run.made.config.roofline
    targets, nets = build.roofline_nets(run.made.config)
    counts = build.token_counts(run.made.config, "roofline")
    found: list[records.Record] = []
    for device, net in itertools.product(targets, nets):
        for layer in shapes.layers(net):
            for tokens in sorted({count or layer.tokens for count in counts}):
                found += [row for op in predict.OPS for row in predict.rows(device, layer, op, tokens, config.dtype)]
            if config.advice:
                found += advice.records(device, layer, config.dtype, predict.OPS)
    records.rewrite(folder / "records.jsonl", found)
    run.say(f"roofline: {len(found)} predictions for {', '.join(device.name for device in targets)}")


def make_report(run: Run, folder: Path) -> None:
    """Gather the records, print the closing tables and write the page.

    Raises:
      InputError: no stage has left a record.
    """
    found = run.workdir.gather()
    if not found:
        raise InputError(f"nothing to report: {run.workdir.root} holds no records, run other stages before.")
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
