"""The device at hand: ceilings that are rates, and what the driver says of a GPU's clock and temperature."""

import dataclasses
import json
import math
import types

import pytest
import torch
from blrlab_ops import devices, measuring

from blrlab import environment
from blrlab.bench import card

PEAKS = {
    "name", "flops_per_s", "cuda_flops_per_s", "bytes_per_s", "l2_bytes_per_s", "dtype", "launch_us", "source", "sheet",
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_ceilings_of_a_processor_are_positive(dtype: str) -> None:
    found = card._processor(dtype, seconds=0.01)
    assert found.name == environment.cpu()
    for rate in (found.tensor_flops, found.cuda_flops):
        assert 1e6 < rate < 1e16
    assert 1e6 < found.dram_bytes_per_s < 1e14
    assert (found.l2_bytes, found.l2_bytes_per_s, found.compute_capability) == (0, None, None)
    assert "measured here" in found.source


def test_a_processor_has_no_data_sheet_and_its_ceilings_are_a_record() -> None:
    here = card.here("float32", "cpu")
    assert (here.device, here.is_gpu, here.sheet, here.dtype) == (torch.device("cpu"), False, None, "float32")
    peaks = json.loads(json.dumps(here.peaks(), allow_nan=False))
    assert set(peaks) == PEAKS
    assert (peaks["name"], peaks["dtype"], peaks["sheet"]) == (environment.cpu(), "float32", None)
    assert peaks["flops_per_s"] == here.measured.tensor_flops
    assert peaks["bytes_per_s"] == here.measured.dram_bytes_per_s


@pytest.mark.parametrize(
    ("dtype", "measured_in"), [("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "bfloat16")]
)
def test_a_gpu_is_measured_and_has_its_data_sheet_beside_it(dtype: str, measured_in: str, device, monkeypatch) -> None:
    asked = []
    made = device(name="NVIDIA A40", tensor_flops=1.2e14, cuda_flops=3e13, l2_bytes_per_s=2e12, launch_us=1.5)
    monkeypatch.setattr(measuring, "measure", lambda index, dtype, seconds: asked.append((index, dtype)) or made)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: "NVIDIA A40")
    here = card.here(dtype, "cuda:1")
    assert asked == [(1, measured_in)], "tensor cores have no float32: its rate is the processor's of the card"
    assert (here.is_gpu, here.measured, here.sheet) == (True, made, devices.get("a40"))
    peaks = here.peaks()
    assert set(peaks) == PEAKS
    assert peaks["flops_per_s"] == (3e13 if dtype == "float32" else 1.2e14)
    assert (peaks["cuda_flops_per_s"], peaks["l2_bytes_per_s"], peaks["launch_us"]) == (3e13, 2e12, 1.5)
    sheet = devices.get("a40")
    assert peaks["sheet"] == {
        "name": "NVIDIA A40",
        "flops_per_s": sheet.matrix_flops(dtype),
        "cuda_flops_per_s": sheet.cuda_flops,
        "bytes_per_s": sheet.dram_bytes_per_s,
        "l2_bytes_per_s": sheet.l2_bytes_per_s,
    }


def test_a_ceiling_is_the_best_of_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    now, times, calls = 0.0, [9.0, *([0.5] * 10), *([0.2] * 10), *([0.4] * 10)], 0

    def call() -> None:
        nonlocal now, calls
        now += times[calls]
        calls += 1

    monkeypatch.setattr(card.time, "perf_counter", lambda: now)
    assert math.isclose(card._best(call, 10.0), 0.2)
    assert calls == 29, "one to warm up, then ten seconds of them"


@pytest.fixture
def gpu(settings, monkeypatch: pytest.MonkeyPatch):
    """A card that is said to be a GPU; its identity can be changed."""
    properties = types.SimpleNamespace(uuid="1234-5678")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda where: properties)
    return settings(where="cuda:2").card, properties


NOTHING = {"sm_mhz": None, "temperature_c": None}


def test_clock_and_temperature_are_those_of_the_very_card(gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    here, properties = gpu
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(environment, "run", lambda *command: asked.append(command) or "1755, 61")
    assert card.clock_and_temperature(here) == {"sm_mhz": 1755.0, "temperature_c": 61.0}
    ((program, *flags),) = asked
    assert program == "nvidia-smi"
    assert "--query-gpu=clocks.sm,temperature.gpu" in flags
    assert "--id=GPU-1234-5678" in flags
    del properties.uuid  # older versions of PyTorch do not know it
    card.clock_and_temperature(here)
    assert "--id=2" in asked[-1]


@pytest.mark.parametrize("said", [None, "", "[N/A], 61", "1755", "1755, 61, 3", "No devices were found"])
def test_what_the_driver_does_not_say_is_null(gpu, said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "run", lambda *command: said)
    assert card.clock_and_temperature(gpu[0]) == NOTHING


def test_a_processor_is_not_asked(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "run", lambda *command: pytest.fail("nothing to ask"))
    assert card.clock_and_temperature(settings().card) == NOTHING


def test_a_card_is_a_value(settings) -> None:
    here = settings().card
    with pytest.raises(dataclasses.FrozenInstanceError):
        here.dtype = "bfloat16"
