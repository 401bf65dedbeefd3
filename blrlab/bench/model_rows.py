"""What a benchmark of a whole model compares, and the rows that say so.

`bound_us` is a lower bound: the sum over all linear layers, the untouched ones and the output layer too, of what each
needs at least for its operations or for reading its weights (and writing the logits). There is one copy of the weights,
and the call before leaves in the L2 what fits there: the time of moving one L2 full is taken off the sum, whichever
layers it serves, as far as the time of all operations alone. Activations count no bytes, since they may stay in cache,
and everything between the linear layers counts nothing. The backward pass of an optimiser step has two products for
each of the forward one.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from blrlab_ops import cost, dispatch
from blrlab_ops.devices import Device
from blrlab_ops.testing import Case

from blrlab.bench import nets
from blrlab.bench.nets import Family
from blrlab.bench.rows import ERRORS, Row, Settings

if TYPE_CHECKING:
    from blrlab.bench.gpt2_xla import Trainer
    from blrlab.factors import Spec

OPS = ("dense", "low_rank", "monarch", "blast")
PHASES = ("forward", "prefill", "decode", "train_step")
# Of factored layers `best` is what `impl=None` takes, for each layer at its number of tokens; `joined` is the same with
# layers that share their input in the launches of one.
DENSE_IMPL, BEST, JOINED, COMPILED, XLA = "torch_eager", "best", "joined", "torch_compile", "xla"
TIMES = ("p20", "p50", "p80", "samples", "method", "launch_us")
# What rows have of models that are verified at a few layers.
OF_FEW_LAYERS = ("verified_layers", "depth_error", "depth_error_budget", "cache_bytes")
Specs = Mapping[str, "Spec"]


@dataclasses.dataclass(frozen=True, eq=False)
class Net:
    """A model in several formats.

    Attributes:
      name: for the rows.
      sizes: of the model, of a class that `blrlab.bench.nets` knows.
      plans: {format: {path of a linear layer: its spec}}; the plan of dense is empty.
      trainer: (model, parameters) -> (state, step), as of `blrlab.train`; None: no training steps.
      seed: of weights and tokens.
    """

    name: str
    sizes: Any
    plans: Mapping[str, Specs]
    trainer: "Trainer | None" = None
    seed: int = 0

    @property
    def family(self) -> Family:
        """The family of the model."""
        return nets.of(self.sizes)


@dataclasses.dataclass(frozen=True)
class Group:
    """What is compared with each other: one phase at one batch and number of tokens, in one dtype."""

    phase: str
    batch: int
    tokens: int
    dtype: str

    @property
    def length(self) -> int:
        """The tokens of a sequence that the phase sees: those of the cache and the new one, or a window's target."""
        return self.tokens + (self.phase in ("decode", "train_step"))

    @property
    def rows(self) -> int:
        """The rows n of the linear layers' input."""
        return self.batch * (1 if self.phase == "decode" else self.tokens)

    @property
    def scored(self) -> int:
        """The rows of a language model's output layer."""
        return self.batch if self.phase in ("prefill", "decode") else self.rows


def planned(net: Net, phase: str, impls: Sequence[str]) -> list[tuple[str, str]]:
    """Return the (format, implementation) of every row of a phase.

    There is no training in PyTorch, no cache in JAX, and JAX's column is GPT-2's.
    """
    if phase not in net.family.phases:
        return []
    found = []
    for op in net.plans:
        own = (DENSE_IMPL,) if op == "dense" else (BEST, *dispatch.impls(op))
        own = (*own, JOINED) if op != "dense" and net.family.running and net.family.running.sharing else own
        in_torch = () if phase == "train_step" else (*own, COMPILED)
        in_jax = () if phase in ("prefill", "decode") or net.family.running else (XLA,)
        found += [(op, impl) for impl in impls if impl in (*in_torch, *in_jax)]
    return found


def identity(net: Net, group: Group, op: str, impl: str) -> Row:
    """Return the fields that tell a row from others; blocks and rank where all factored layers have the same.

    Where layers differ as those of a Llama do, `plan_hash` tells two plans apart.
    """
    specs = [spec for spec in net.plans[op].values() if spec.format != "dense"]
    blocks, ranks = {spec.blocks for spec in specs}, {(spec.total_rank, spec.format, spec.rank) for spec in specs}
    total, format, rank = next(iter(ranks)) if len(ranks) == 1 else (None, None, None)
    return {
        "op": op,
        "impl": impl,
        "net": net.name,
        "layer": "*",
        "phase": group.phase,
        "in_features": None,
        "out_features": None,
        "blocks": list(next(iter(blocks))) if len(blocks) == 1 else None,
        "rank": total,
        "block_rank": rank if format == "monarch" else None,
        "batch": group.batch,
        "tokens": group.tokens,
        "dtype": group.dtype,
        **({"plan_hash": _hash(net.plans[op])} if net.family.running and specs else {}),
    }


def _hash(plan: Specs) -> str:
    told = sorted((path, dataclasses.astuple(spec)) for path, spec in plan.items())
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]


def start(net: Net, group: Group, op: str, impl: str, settings: Settings) -> Row:
    """Make a row without its results."""
    card = settings.card
    return {
        "kind": "bench",
        **identity(net, group, op, impl),
        "unit": "us",
        **dict.fromkeys(TIMES),
        "tokens_per_s": None,
        **dict.fromkeys(("images_per_s",) if net.family.shows else ()),
        **dict.fromkeys(OF_FEW_LAYERS if net.family.running else ()),
        "bound_us": bound_us(net, group, op, card.measured),
        "sheet_bound_us": bound_us(net, group, op, card.sheet) if card.sheet else None,
        **dict.fromkeys(("weight_bytes", "peak_bytes", "sm_mhz", "temperature_c", *ERRORS, "passed")),
        **settings.machine,
    }


def bound_us(net: Net, group: Group, op: str, device: Device) -> float:
    """Return the least time of all linear layers on a device, in us, as this module's text says."""
    layers = []
    for path, i, o, rows, written in net.family.products(net.family.sized(net.sizes, group.tokens), group):
        spec = net.plans[op].get(path)
        form = ("dense", (1, 1), 0) if spec is None else (spec.format, spec.blocks, spec.rank)
        layers.append(_layer_us(Case(form[0], rows, i, o, *form[1:]), written, group.dtype, device))
    operations, both = map(sum, zip(*layers, strict=True))
    total = max(operations, both - 1e6 * device.l2_bytes / device.dram_bytes_per_s)
    return 3 * total if group.phase == "train_step" else total


def _layer_us(case: Case, written: int, dtype: str, device: Device) -> tuple[float, float]:
    """Return the least time of a layer's operations, and of a layer that also moves its bytes to or from DRAM.

    The bytes are its weights and so many elements written.
    """
    format, n, i, o, blocks, rank = case
    itemsize = getattr(torch, dtype).itemsize
    found = cost.cost(format, n, i, o, blocks, rank, itemsize=itemsize)
    moved = itemsize * (cost.params(format, i, o, blocks, rank) + written)
    operations, both = (cost.bound_us(found._replace(bytes_compulsory=count), device, dtype).us for count in (0, moved))
    return operations, both


def line(row: Row) -> str:
    """Write a row for the terminal."""
    shape = f"{row['batch']} x {row['tokens']}"
    name = f"{row['net']:<10} {row['phase']:<10} {shape:<9} {row['op']:<8} {row['impl']:<17}"
    if row["p50"] is None:
        return f"{name} {row.get('reason')}"
    images = row.get("images_per_s")
    speed = f"{row['tokens_per_s']:,.0f} tokens/s" if images is None else f"{images:,.0f} images/s"
    held = f"weights {row['weight_bytes'] / 1e9:.3f} GB"
    held += f"  peak {row['peak_bytes'] / 1e6:,.1f} MB" if row["peak_bytes"] is not None else ""
    times = f"{row['p50']:11,.1f} us  (bound {row['bound_us']:,.1f})"
    return f"{name} {times}  {speed:<20} {held}  error {row['error']:.1e}"
