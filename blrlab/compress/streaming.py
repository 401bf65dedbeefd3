"""Compress a checkpoint one matrix at a time, each device at one of its own, and time what that would take.

Nothing is held but the matrices that are under way: on the host each weight and its factors as they are stored, on a
device what a fit needs.
"""

import contextlib
import functools
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from blrlab_ops import shapes
from jaxtyping import Array

from blrlab.compress.deal import Device, deal
from blrlab.compress.folder import WHOLE, Folder
from blrlab.compress.plan import Choice, resolve
from blrlab.compress.request import Request, parameter_counts
from blrlab.compress.rows import Row, row
from blrlab.compress.tree import Loss, Tree, compress_layer
from blrlab.errors import InputError
from blrlab.factors import Spec
from blrlab.models.hf import stored

# Of what a transformer has of each layer of `blrlab_ops.shapes`.
COUNTS = {
    "llama7b": {"qkvo": 4 * 32, "gate_up": 2 * 32, "down": 32},
    "llama1b": {"qo": 2 * 16, "gate": 16, "up": 16, "down": 16},
    "gpt2s": {"c_attn": 12, "c_fc": 12, "c_proj": 12},
    "vit_b": {"qkv": 12, "fc1": 12, "fc2": 12},
    "dit_xl": {"qkv": 28, "fc1": 28, "adaln": 28},
    "qwen25_7b": {"gate_up": 2 * 28, "down": 28},
    "mistral_7b": {"gate_up": 2 * 32, "down": 32},
    "llama3_8b": {"gate_up": 2 * 32, "down": 32},
    "gemma2_9b": {"gate_up": 2 * 42, "down": 42},
}
DECAY, NOISE = 0.5, 0.5  # of the spectra of random weights: place^-DECAY, and as much noise beside the first
Fitted = tuple[Row, dict[str, np.ndarray]]


def compress(
    request: Request, folder: Folder, devices: Sequence[Device], done: Callable[[Row], None] = lambda row: None
) -> Row:
    """Compress what a folder lacks; return the record of the whole, which is written last.

    Args:
      request: what is asked.
      folder: where it goes; it is open.
      devices: each works at one matrix at a time.
      done: called with the record of each layer once its factors are kept.

    Raises:
      InputError: a weight holds NaN or infinity, or its file is damaged.
    """
    if folder.whole is not None:
        return folder.whole
    began = time.perf_counter()
    numbers = {path: number for number, path in enumerate(request.specs)}

    def work(path: str, device: Device) -> Fitted:
        key = jax.random.fold_in(jax.random.key(request.seed), numbers[path])
        layer, dtype = request.layers[path], stored.DTYPES[request.dtype_of(path)]
        weight = jax.device_put(layer.stored.read(), device)
        weight = weight.T if layer.transposed else weight
        loss, kernel = _fitted(path, weight, request.specs[path], key, request.algorithms, dtype, device)
        return row(loss), {name: np.asarray(factor) for name, factor in kernel.items()}

    with contextlib.closing(deal(folder.todo, work, devices)) as results:
        for found, kernel in results:
            folder.add(found, kernel)
            done(found)
    whole = summary(request, folder.rows, time.perf_counter() - began, devices)
    folder.finish(whole)
    return whole


def _fitted(
    path: str,
    weight: Array,
    spec: Spec,
    key: Array,
    algorithms: Mapping[str, str],
    dtype: jax.typing.DTypeLike,
    device: Device,
) -> tuple[Loss, Mapping[str, Array]]:
    """Fit a weight on a device."""
    tree: Tree = {path: {"kernel": weight}}
    loss = compress_layer(tree, path, spec, jax.device_put(key, device), None, algorithms, dtype)
    return loss, tree[path]["kernel"]


def summary(request: Request, rows: Sequence[Row], seconds: float, devices: Sequence[Device]) -> Row:
    """Return the record of the whole; `wall_seconds` and the peaks are of this process alone."""
    before, after = (sum(row[name] for row in rows) for name in ("params_before", "params_after"))
    whole_before, whole_after = parameter_counts(request)
    formats = {row["format"] for row in rows}
    return {
        "kind": "compress",
        "path": WHOLE,
        "format": formats.pop() if len(formats) == 1 else "mixed",
        "params_before": whole_before,
        "params_after": whole_after,
        "layer_factor": before / after,
        "model_factor": whole_before / whole_after,
        "seconds": sum(row["seconds"] for row in rows),
        "wall_seconds": seconds,
        **peaks(devices),
    }


def peaks(devices: Sequence[Device]) -> Row:
    """Return the most bytes that this process has held on the host and on a device; null where JAX does not tell."""
    told = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "device_peak_bytes": max((peak for peak in told if peak is not None), default=None),
    }


def random_specs(net: str, choice: Choice) -> dict[str, Spec]:
    """Return {layer: spec} of a net of `COUNTS`; a rank or blocks of 0 are the published ones.

    Raises:
      InputError: the net is unknown, or a layer cannot have what is asked.
    """
    if net not in COUNTS:
        raise InputError(f'--random="{net}" is no net that can be counted: it is one of {", ".join(COUNTS)}.')
    sizes = {layer.name: (layer.in_features, layer.out_features) for layer in shapes.layers(net)}
    return {name: resolve(name, *size, choice, net) for name, size in sizes.items()}


def time_random(
    net: str,
    specs: Mapping[str, Spec],
    algorithm: str,
    dtype: str,
    each: int,
    devices: Sequence[Device],
    done: Callable[[Row], None] = lambda row: None,
) -> Row:
    """Time fits of random weights, and return the record of what all matrices of a net would take by that.

    Args:
      net: of `COUNTS`.
      specs: {layer: spec}.
      algorithm: a name; empty: the format's default.
      dtype: of weights and factors, such as BF16.
      each: how many weights of each shape and device; a first one that is followed by others counts for compilation.
      devices: as for `compress`.
      done: called with the record of each fit.
    """
    jobs = [(layer, number) for layer in specs for number in range(each)]
    rows: list[Row] = []

    def work(job: tuple[str, int], device: Device) -> Row:
        (layer, number), spec = job, specs[job[0]]
        key = jax.random.fold_in(jax.random.key(0), jobs.index(job))
        size = spec.in_features, spec.out_features
        weight = random_weight(jax.device_put(key, device), *size, jnp.dtype(stored.DTYPES[dtype]))
        algorithms = {spec.format: algorithm} if algorithm else {}
        loss, _ = _fitted(f"{layer}.{number}", weight, spec, key, algorithms, weight.dtype, device)
        return row(loss) | {"net": net, "layer": layer, "weights": "random"}

    # All weights of a run go to one device, so that its first of a shape alone is compiled for.
    with contextlib.closing(deal(jobs, work, devices[:1])) as results:
        for found in results:
            rows.append(found)
            done(found)
    return extrapolated(net, rows, devices)


def extrapolated(net: str, rows: Sequence[Row], devices: Sequence[Device]) -> Row:
    """Return what all matrices of a net would take on one device: the median of each shape, as often as the net has it.

    Where a shape was met more than once, the first is left out of the median, and what it took longer is added once.
    """
    layers, total, compiling = {}, 0.0, 0.0
    for name, count in COUNTS[net].items():
        times = [row["seconds"] for row in rows if row["layer"] == name]
        warm = statistics.median(times[1:] or times)
        layers[name] = {"matrices": count, "measured": len(times), "seconds_each": warm}
        total += count * warm
        compiling += max(times[0] - warm, 0.0)
    return {
        "kind": "extrapolation",
        "net": net,
        "format": rows[0]["format"],
        "algorithm": rows[0]["algorithm"],
        "weights": "random",
        "device": devices[0].device_kind,
        "layers": layers,
        "matrices": sum(COUNTS[net].values()),
        "measured": len(rows),
        "compile_seconds": compiling,
        "seconds": total + compiling,
        **peaks(devices),
    }


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def random_weight(key: Array, in_features: int, out_features: int, dtype: jnp.dtype) -> Array:
    """Draw a weight [i, o] whose singular values decay about as those of a trained one, with noise below them."""
    one, other, noise = jax.random.split(key, 3)
    inner = min(in_features, out_features)
    scales = jnp.arange(1, inner + 1, dtype=jnp.float32) ** -DECAY
    left = jax.random.normal(one, (in_features, inner)) * scales[None]
    weight = left @ jax.random.normal(other, (inner, out_features))
    weight = weight + NOISE * jax.random.normal(noise, (in_features, out_features))
    return (weight * in_features**-0.5).astype(dtype)
