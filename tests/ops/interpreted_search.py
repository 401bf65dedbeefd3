"""Tests of tuning on an imagined GPU, run by test_ops_search.py under TRITON_INTERPRET=1.

Results come from interpreted kernels; how long these take is made up from their tiles, so that the fastest is known.
"""

import collections
import importlib
import math
import types
import zlib

import pytest
import torch
from blrlab_ops import configs, devices, dispatch, launching, testing, tuning
from blrlab_ops.testing import Case
from blrlab_ops.tuning import search, store

CARD = "Imagined GPU"
LAYERS = {
    "low_rank": Case("low_rank", 5, 264, 64, (1, 1), 64),
    "monarch": Case("monarch", 5, 80, 192, (2, 3), 24),
    "blast": Case("blast", 5, 80, 192, (2, 3), 56),
}
SOME = [("low_rank", "triton_streaming"), ("monarch", "triton_fused"), ("blast", "triton_three_stage")]
KERNELS = [(format, impl) for format in LAYERS for impl in dispatch.impls(format) if dispatch.is_portable(impl)]
TILES = ("BN", "BC", "BD", "BK", "BR", "BP", "HELD1", "HELD2", "VECTOR", "STAGES", "BB1")
LIBRARY_US = 5000.0
on_the_gpu = search.microseconds
each_kernel = pytest.mark.parametrize(("format", "impl"), KERNELS)
some_kernels = pytest.mark.parametrize(("format", "impl"), SOME)


def _made_up(launch: launching.Launch) -> float:
    """Return 1 to 1000 us, from the tiles alone."""
    tiles = [(name, launch.constants[name]) for name in TILES if name in launch.constants]
    return 1.0 + zlib.crc32(repr((launch.kernel.__name__, tiles, launch.warps, launch.stages)).encode()) % 1000


def _place(launch: launching.Launch):
    """Tell the launches of a layer from each other by what they compute."""
    name = launch.kernel.__name__
    return "mix" if name.endswith("_mix_kernel") else (name, launch.constants.get("DEPTH"))


class Clock:
    """What stands for the GPU's: takes the time of a launch from `us`, and notes what was timed."""

    def __init__(self):
        self.us, self.timed, self.running = _made_up, [], None

    def time(self, calls) -> float:
        self.running = []
        calls[0]()
        launches, self.running = self.running, None
        self.timed.append(launches)
        return sum(map(self.us, launches)) if launches else LIBRARY_US

    def alone(self) -> dict:
        """Return the launches that were timed one by one, by place."""
        found = collections.defaultdict(list)
        for launches in self.timed:
            if len(launches) == 1:
                found[_place(launches[0])] += launches
        return dict(found)


@pytest.fixture(autouse=True)
def clock(monkeypatch, tmp_path):
    clock, run = Clock(), launching.run
    sizes = {"multi_processor_count": 4, "L2_cache_size": 2**10, "shared_memory_per_multiprocessor": 100 * 2**10}
    card = types.SimpleNamespace(name=CARD, major=8, minor=6, **sizes)

    def noted(launches, device):
        """Interpret only what is judged by its result."""
        run(launches, device) if clock.running is None else clock.running.extend(launches)

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: CARD)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(launching, "warm", lambda launch: None)
    monkeypatch.setattr(launching, "run", noted)
    monkeypatch.setattr(search, "microseconds", clock.time)
    monkeypatch.setenv("BLRLAB_OPS_CACHE", str(tmp_path))
    store.refresh()
    yield clock
    store.refresh()


def _tune(layer: Case, *impls: str, measured: int = 2, **more):
    return search.tune(layer, torch.float32, "cpu", impls or None, measured, **more)


def _kept(layer: Case):
    return tuning.lookup(CARD, tuning.Key(layer.format, tuning.bucket(layer.tokens), *layer[2:], "float32"))


def _module(format: str, impl: str):
    return importlib.import_module(f"blrlab_ops.{format}.{impl}")


def _launches(layer: Case, impl: str, config) -> list[launching.Launch]:
    x, factors, _ = testing.random_operands(layer)
    module, y = _module(layer.format, impl), x.new_empty(layer.tokens, layer.out_features)
    return module.launches(x, *module.pack(*factors.values()), None, y, config=config)


def _break(monkeypatch, format: str, impl: str, change) -> None:
    """Let `change(launches, config)` have the last word on what an implementation launches."""
    module = _module(format, impl)
    launches = module.launches
    monkeypatch.setattr(module, "launches", lambda *given, config: change(launches(*given, config=config), config))


def _unwritten(launches: list[launching.Launch]) -> list[launching.Launch]:
    """Let the last launch write elsewhere."""
    last = launches[-1]
    out = "out" if "out" in last.arguments else "y"
    return [*launches[:-1], last._replace(arguments={**last.arguments, out: last.arguments[out].clone()})]


@each_kernel
@pytest.mark.parametrize("tokens", [1, 5])
def test_the_fastest_is_kept(clock, format, impl, tokens):
    layer = LAYERS[format]._replace(tokens=tokens)
    entry = _tune(layer, impl, measured=3)[impl]
    assert _kept(layer) == {impl: entry}
    assert entry.dense_us == LIBRARY_US
    assert entry.us == sum(map(_made_up, _launches(layer, impl, entry.config)))
    usual, alone = _launches(layer, impl, {}), clock.alone()
    never_alone = [_made_up(launch) for launch in usual if _place(launch) not in alone]
    best = sum(min(map(_made_up, launches)) for launches in alone.values()) + sum(never_alone)
    assert entry.us == min(best, sum(map(_made_up, usual)))


@some_kernels
def test_the_rules_are_kept_where_nothing_is_faster(clock, format, impl):
    usual = _launches(LAYERS[format], impl, {})
    least = {_made_up(launch) for launch in usual}
    clock.us = lambda launch: 1.0 if _made_up(launch) in least else 1000.0
    assert _tune(LAYERS[format], impl)[impl].us == len(usual)


@some_kernels
@pytest.mark.parametrize("measured", [1, 3])
def test_no_more_are_timed_than_asked_for(clock, format, impl, measured):
    _tune(LAYERS[format], impl, measured=measured)
    usual = _launches(LAYERS[format], impl, {})
    # the best few, and that of the rules, are timed as a whole layer
    again = search.TOGETHER + 1 if len(usual) == 1 else 0
    assert all(1 <= len(launches) <= measured + again for launches in clock.alone().values())
    assert len(clock.alone()) == len([launch for launch in usual if launch.kernel.__name__ != "sum_kernel"])


@each_kernel
def test_a_wrong_configuration_is_never_kept(clock, format, impl, monkeypatch):
    """However fast: here all but those of the rules leave the result as it was in memory."""
    clock.us = lambda launch: 0.5
    _break(monkeypatch, format, impl, lambda launches, config: _unwritten(launches) if config else launches)
    assert _tune(LAYERS[format], impl, measured=1)[impl].config == {}


@each_kernel
def test_a_slightly_wrong_kernel_is_never_kept(format, impl, monkeypatch):
    """Here the result, and so every error of it, is a hundredth too large."""
    layer, lines, module = LAYERS[format], [], _module(format, impl)
    launches = module.launches

    def scaled(x, *given, config):
        return launches(1.01 * x, *given, config=config)

    monkeypatch.setattr(module, "launches", scaled)
    assert _tune(layer, impl, measured=1, say=lines.append) == {}
    assert _kept(layer) == {}
    assert lines == [f"{impl}: no configuration is right and runs"]


def test_other_implementations_are_kept_beside_a_wrong_one(monkeypatch):
    _break(monkeypatch, "monarch", "triton_two_stage", lambda launches, config: _unwritten(launches))
    kept = _tune(LAYERS["monarch"])
    assert set(kept) == {"torch_bmm", "triton_fused", "triton_streaming"}


@some_kernels
def test_what_cannot_run_is_left_out(clock, format, impl):
    """Here whatever has four warps, as the rules ask for everywhere or nearly."""
    clock.us = lambda launch: math.inf if launch.warps == 4 else 1.0
    for entry in _tune(LAYERS[format], impl).values():
        assert all(tiles["warps"] != 4 for tiles in entry.config.values())
    clock.us = lambda launch: math.inf
    assert _tune(LAYERS[format], impl) == {}


@some_kernels
def test_what_does_not_compile_is_not_timed(clock, format, impl, monkeypatch):
    def refuse(launch):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(launching, "warm", refuse)
    assert _tune(LAYERS[format], impl)[impl].config == {}
    assert len(_launches(LAYERS[format], impl, {})) == 1 or not clock.alone()


def test_a_call_that_fails_takes_forever():
    def fail():
        raise RuntimeError("out of resource: registers")

    assert on_the_gpu([fail]) == math.inf


@pytest.mark.parametrize("format", LAYERS)
def test_every_implementation_is_measured_and_told(format):
    lines = []
    kept = _tune(LAYERS[format], say=lines.append)
    sizes = dispatch.Layer(*LAYERS[format][1:])
    suited = tuple(impl for impl in dispatch.impls(format) if dispatch.unsuited(impl, sizes) is None)
    suited = tuple(impl for impl in suited if not dispatch.is_hopper(impl))  # which is not interpreted
    assert tuple(kept) == suited[1:]
    assert suited[0] == "ref"
    assert [line.partition(":")[0] for line in lines] == list(kept)
    assert kept["torch_bmm"].config == {}
    assert kept["torch_bmm"].us == LIBRARY_US
    found = _kept(LAYERS[format])
    assert found == kept
    assert [entry.us for entry in found.values()] == sorted(entry.us for entry in kept.values())


def test_a_kernel_between_products_is_timed_as_it_is():
    entry = _tune(LAYERS["blast"], "bmm_mixing")["bmm_mixing"]
    assert entry.config == {}
    assert entry.us < LIBRARY_US  # of its own launch, which the clock sees


def test_unsuited_implementations_are_measured_only_by_name():
    layer = LAYERS["monarch"]._replace(tokens=65)
    assert "triton_streaming" not in _tune(layer, measured=1)
    assert list(_tune(layer, "triton_streaming", measured=1)) == ["triton_streaming"]


def test_a_name_that_is_none_is_an_error_before_anything_is_timed(clock):
    with pytest.raises(ValueError, match=r"'triton_tow_stage' of blast .* did you mean 'triton_two_stage'"):
        _tune(LAYERS["blast"], "triton_two_stage", "triton_tow_stage")
    with pytest.raises(ValueError, match="'triton_fused' of blast"):
        _tune(LAYERS["blast"], "triton_fused")
    with pytest.raises(dispatch.CannotRun, match="bfloat16"):
        search.tune(LAYERS["blast"], torch.bfloat16, "cpu", ["triton_two_stage"])
    assert clock.timed == []


def test_tuning_again_replaces_what_was_faster(clock):
    layer = LAYERS["low_rank"]
    _tune(layer, "triton_two_stage")
    clock.us = lambda launch: 7e5
    again = _tune(layer, "triton_two_stage")["triton_two_stage"]
    assert again.us == 1.4e6
    assert _kept(layer) == {"triton_two_stage": again}


@some_kernels
def test_a_layer_finds_what_was_kept_for_its_bucket(format, impl):
    layer = LAYERS[format]
    config = _tune(layer, impl)[impl].config

    def found(tokens: int, kind: str = "cuda", dtype: torch.dtype = torch.float32):
        return configs.tuned(format, impl, tokens, layer[2:4], *layer[4:], dtype, torch.device(kind))

    assert found(2) == found(16) == config
    assert found(1) == found(17) == found(2, "cpu") == found(2, dtype=torch.float16) == configs.NO_CONFIG


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("in_features", [37, 30])
def test_a_low_rank_input_that_cannot_be_cut_is_tuned_too(tokens, in_features):
    layer = LAYERS["low_rank"]._replace(tokens=tokens, in_features=in_features)
    assert "triton_streaming" in _tune(layer, "triton_streaming")


def test_a_known_card_is_judged_by_its_data_sheet(monkeypatch):
    assert search._device(torch.device("cpu")).sms == 4
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A40")
    assert search._device(torch.device("cpu")) == devices.DEVICES["a40"]


def test_launches_that_can_ask_early_are_told_to():
    asking = search._with_prefetch({"first": {"rows": 16, "prefetch": False}, "middle": {"rows": 4}})
    assert asking == {"first": {"rows": 16, "prefetch": True}, "middle": {"rows": 4}}
