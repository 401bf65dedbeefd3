"""Find the fastest tile sizes of a layer on the GPU at hand, and keep them.

Every launch of an implementation is tuned by itself: its candidates are estimated, the likely ones compiled at the same
time and timed in a CUDA graph over cold weights; the best of every launch are then timed together, since launches may
overlap. A configuration is kept only if its output is within the error budget of the format's tests.
"""

import functools
import importlib
import itertools
import math
import operator
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blrlab_ops import budgets, devices, dispatch, factored, graphs, int8, int8_streaming, launching, testing
from blrlab_ops.devices import Device
from blrlab_ops.launching import Launch
from blrlab_ops.testing import Case

from . import Entry, Key, bucket, estimate, store

COLD = 4  # times the L2: the bytes of weights that calls go round through
CALLS, REPLAYS = 64, 7
MEASURED, TOGETHER = 16, 3  # candidates of a launch that are timed, and of those, that are timed with the others'
THREADS = 16
INT8_IMPLS = ("triton_streaming",)
Config = dict[str, dict[str, Any]]


class Found(NamedTuple):
    """What was measured of an implementation: its best configuration and us, or why there is none."""

    impl: str
    config: Config
    us: float
    reason: str | None = None


class Setting(NamedTuple):
    """A layer on a GPU: its input, and its weights in as many copies as make every call's cold."""

    case: Case
    dtype: str
    x: Tensor
    copies: list[list[Tensor]]
    truth: Tensor
    device: Device

    def module(self, impl: str) -> Any:
        """Return the implementation: its module, or what stands for it on int8 weights."""
        if self.dtype == "int8":
            return int8_streaming.Implementation(self.case.format)
        return importlib.import_module(f"blrlab_ops.{self.case.format}.{impl}")

    def expected(self) -> Tensor:
        """Multiply by PyTorch's batched product, which is what an error is compared with."""
        weights = self.copies[0]
        if self.dtype == "int8":
            weights = list(int8.dequantise(_named(weights), self.x.dtype).values())
        return importlib.import_module(f"blrlab_ops.{self.case.format}.torch_bmm").linear(self.x, *weights)


def tune(
    case: Case,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    impls: Sequence[str] | None = None,
    measured: int = MEASURED,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Entry]:
    """Measure implementations of a layer and keep the best configuration of each.

    Args:
      case: the layer, and the number of tokens it is measured at.
      dtype: of everything, or int8: of the weights, beside an input of bfloat16.
      device: a CUDA device that nothing else uses.
      impls: names; None: every one that can run there, and PyTorch's batched products. Int8 has the streaming one.
      measured: candidates of a launch that are timed.
      say: takes a line an implementation.

    Returns:
      {impl: entry} as kept.

    Raises:
      ValueError: an implementation is unknown.
      CannotRun: a named one cannot run there.
    """
    of_x, known = _kinds(case, dtype)
    for name in impls or ():
        dispatch.choose(case.format, name, device, of_x)
        if name not in known:
            raise ValueError(f"impl {name!r} has no kernels for {dtype} weights: {known} have")
    setting = _setting(case, dtype, torch.device(device))
    dense_us = _dense_us(setting)
    kept = {}
    for name in impls or worth_measuring(case, dtype, device):
        found = _of_triton(setting, name, measured) if dispatch.is_triton(name) else _of_library(setting, name)
        say(f"{name}: {found.us:.1f} us (dense {dense_us:.1f})" if found.reason is None else f"{name}: {found.reason}")
        if found.reason is None:
            kept[name] = _keep(setting, found, dense_us)
    return kept


def worth_measuring(case: Case, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> list[str]:
    """List the implementations that can run a layer on a device, but for those that are known not to be for it."""
    of_x, known = _kinds(case, dtype)
    sizes = dispatch.Layer(*case[1:])
    suited = [name for name in known if name != "ref" and dispatch.unsuited(name, sizes) is None]
    return [name for name in suited if dispatch.why_not(case.format, name, device, of_x) is None]


def _kinds(case: Case, dtype: torch.dtype) -> tuple[torch.dtype, tuple[str, ...]]:
    """Return the dtype of an input beside weights of a dtype, and the implementations that take these."""
    return (dtype, dispatch.impls(case.format)) if dtype != torch.int8 else (torch.bfloat16, INT8_IMPLS)


def _keep(setting: Setting, found: Found, dense_us: float) -> Entry:
    case, now = setting.case, time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    versions = store.triton_version(), torch.__version__
    dense = round(dense_us, 3) if math.isfinite(dense_us) else None
    entry = Entry(found.impl, found.config, round(found.us, 3), dense, *versions, now)
    key = Key(case.format, bucket(case.tokens), *case[2:4], case.blocks, case.rank, setting.dtype)
    store.record(torch.cuda.get_device_name(setting.x.device), key, entry, replace=True)
    return entry


def _setting(case: Case, dtype: torch.dtype, device: torch.device) -> Setting:
    of_x = torch.bfloat16 if dtype == torch.int8 else dtype
    x, factors, _ = testing.random_operands(case, dtype=of_x, device=device)
    wide = {name: factor.double() for name, factor in factors.items()}
    weights = list(factors.values())
    if dtype == torch.int8:
        weights = int8_streaming.in_order(int8.quantise(factors))
        wide = int8.dequantise(_named(weights), torch.float64)
    truth = factored.linear(x.double(), wide, impl="ref")
    size = sum(each.numel() * each.element_size() for each in weights)
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    count = max(2, math.ceil(COLD * l2_bytes / size))
    copies = [[each.clone() for each in weights] for _ in range(count)]
    return Setting(case, str(dtype).removeprefix("torch."), x, copies, truth, _device(device))


def _named(weights: Sequence[Tensor]) -> dict[str, Tensor]:
    """Name int8 weights as `int8.quantise` does."""
    names = ("V", "S", "U", *int8.SCALES) if len(weights) == 5 else ("V", "U", *int8.SCALES)
    return dict(zip(names, weights, strict=True))


def _device(device: torch.device) -> Device:
    """Return the data sheet of a card, or what CUDA says of it."""
    known = devices.match(torch.cuda.get_device_name(device))
    if known:
        return known
    found = torch.cuda.get_device_properties(device)
    shared = found.shared_memory_per_multiprocessor
    return Device(
        name=found.name,
        tensor_flops=found.multi_processor_count * 1e12,
        cuda_flops=found.multi_processor_count * 2e11,
        dram_bytes_per_s=5e11,
        l2_bytes=found.L2_cache_size,
        shared_bytes_per_sm=shared,
        sms=found.multi_processor_count,
        compute_capability=(found.major, found.minor),
        source="CUDA's properties, rates assumed",
    )


def _of_triton(setting: Setting, impl: str, measured: int) -> Found:
    module = setting.module(impl)
    packed = [list(module.pack(*weights)) for weights in setting.copies]
    options = _likely(setting, module, packed[0], measured)
    best = {
        name: _fastest(setting, module, packed, place, name, tiles)
        for place, (name, tiles) in enumerate(options.items())
    }
    best = {name: tiles for name, tiles in best.items() if tiles}
    together = [dict(zip(best, choice, strict=True)) for choice in itertools.product(*best.values())]
    together += [asking for each in together if (asking := _with_prefetch(each)) != each]
    timed = []
    for config in [*together, {}]:
        us = microseconds([_call(setting, module, weights, config) for weights in packed])
        timed.append((us, config))
    for us, config in sorted(timed, key=operator.itemgetter(0)):
        if math.isfinite(us) and _is_right(setting, _call(setting, module, packed[0], config)):
            return Found(impl, config, us)
    return Found(impl, {}, math.inf, "no configuration is right and runs")


def _with_prefetch(config: Config) -> Config:
    """Let the launches that can ask for their weights before they wait for what they multiply."""
    return {name: {**each, "prefetch": True} if "prefetch" in each else each for name, each in config.items()}


def _of_library(setting: Setting, impl: str) -> Found:
    module = setting.module(impl)
    packed = [module.pack(*weights) for weights in setting.copies]
    calls = [lambda weights=weights: module.linear(setting.x, *weights, None) for weights in packed]
    us = microseconds(calls)
    if not math.isfinite(us):
        return Found(impl, {}, us, "it does not run in a CUDA graph")
    return Found(impl, {}, us, None if _is_right(setting, calls[0]) else "its error is over its budget")


def _dense_us(setting: Setting) -> float:
    """Time cuBLAS's product with weights in either layout, and return the faster."""
    case, x = setting.case, setting.x
    count = max(
        2, math.ceil(COLD * setting.device.l2_bytes / (x.element_size() * case.in_features * case.out_features))
    )
    W = [torch.randn(case.in_features, case.out_features, device=x.device, dtype=x.dtype) for _ in range(count)]
    plain = microseconds([lambda each=each: x @ each for each in W])
    W = [each.T.contiguous() for each in W]
    return min(plain, microseconds([lambda each=each: torch.nn.functional.linear(x, each) for each in W]))


def _likely(setting: Setting, module: Any, weights: Sequence[Tensor], measured: int) -> dict[str, list[dict[str, Any]]]:
    """Return by launch the candidates of the least estimated time that compile."""
    options = module.candidates(setting.x, *weights)
    likely: dict[str, list[tuple[dict[str, Any], Launch]]] = {}
    for place, (name, tiles) in enumerate(options.items()):
        launches = [_launches(setting, module, weights, {name: each._asdict()})[place] for each in tiles]
        scored = sorted(zip(map(functools.partial(_estimate_us, setting), launches), range(len(tiles)), strict=True))
        likely[name] = [(tiles[at]._asdict(), launches[at]) for us, at in scored[:measured] if math.isfinite(us)]
    with ThreadPoolExecutor(THREADS) as pool:
        compiled = pool.map(_compiles, [launch for chosen in likely.values() for _, launch in chosen])
        return {name: [tiles for tiles, _ in chosen if next(compiled)] for name, chosen in likely.items()}


def _estimate_us(setting: Setting, launch: Launch) -> float:
    work = estimate.KERNELS.get(launch.kernel.__name__)
    if work is None:
        return 0.0
    weights = launch.arguments["right"] if "right" in launch.arguments else launch.arguments["V"]
    itemsize = weights.element_size()
    done = work(launch.constants, launch.programs, itemsize, launch.stages, weights.numel() * itemsize)
    return estimate.microseconds(done, launch.warps, launch.stages, setting.device)


def _launches(setting: Setting, module: Any, weights: Sequence[Tensor], config: Config) -> list[Launch]:
    y = setting.x.new_empty(setting.case.tokens, setting.case.out_features)
    return module.launches(setting.x, *weights, None, y, config=config)


def _compiles(launch: Launch) -> bool:
    try:
        launching.warm(launch)
    except Exception:  # more shared memory or registers than there are
        return False
    return True


def _fastest(
    setting: Setting,
    module: Any,
    packed: Sequence[Sequence[Tensor]],
    place: int,
    name: str,
    tiles: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Time one launch alone with each of its candidates; return the best few."""
    timed = []
    for at, each in enumerate(tiles):
        launches = [_launches(setting, module, weights, {name: each})[place] for weights in packed]
        calls = [functools.partial(launching.run, [one], setting.x.device) for one in launches]
        timed.append((microseconds(calls), at))
    return [tiles[at] for us, at in sorted(timed)[:TOGETHER] if math.isfinite(us)]


def _call(setting: Setting, module: Any, weights: Sequence[Tensor], config: Mapping[str, Any]) -> Callable[[], Tensor]:
    case, x = setting.case, setting.x

    def call() -> Tensor:
        y = x.new_empty(case.tokens, case.out_features)
        launching.run(module.launches(x, *weights, None, y, config=config), x.device)
        return y

    return call


def microseconds(calls: Sequence[Callable[[], Any]]) -> float:
    """Time calls in a CUDA graph, each on weights of its own; infinite where one cannot run."""
    try:
        calls[0]()
        torch.cuda.synchronize()
        order = list(itertools.islice(itertools.cycle(calls), max(CALLS, len(calls))))
        graph = graphs.capture(order)
        taken = [graphs.replay_us(graph) for _ in range(REPLAYS + 1)][1:]
    except Exception:  # more shared memory or registers than there are
        torch.cuda.synchronize()
        return math.inf
    return statistics.median(taken) / len(order)


def _is_right(setting: Setting, call: Callable[[], Tensor]) -> bool:
    with testing.poisoned():
        y = call()
    found = testing.errors(y, setting.truth)
    peak = testing.peak(setting.truth)
    epsilon = torch.finfo(setting.x.dtype).eps
    allowed = budgets.of_kernel(testing.errors(setting.expected(), setting.truth), epsilon, peak)
    return found[0] <= allowed.error and found[1] <= allowed.error_max
