"""Measuring a card: what can be told without one, and on a GPU the rates themselves."""

import dataclasses
import doctest
import json
import types

import pytest
import torch
from blrlab_ops import devices, measure, measuring
from torch.overrides import TorchFunctionMode

PROPERTIES = types.SimpleNamespace(
    name="NVIDIA A40",
    major=8,
    minor=6,
    L2_cache_size=6 * 2**20,
    shared_memory_per_multiprocessor=100 * 2**10,
    multi_processor_count=84,
    total_memory=45 * 2**30,
)
RATES = measuring.Rates(1e14, 3e13, 6e11, 2e12, 1.5)
CARD = measuring.as_device(PROPERTIES, RATES, "measured")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch finds a CUDA device")


@pytest.fixture(autouse=True)
def user_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return tmp_path / "blrlab" / "devices.json"


def test_examples():
    assert doctest.testmod(measuring).failed == 0


@needs_no_gpu
def test_without_a_gpu_there_is_one_sentence(capsys, user_file):
    with pytest.raises(RuntimeError, match=r"no CUDA device: PyTorch .* finds none"):
        measuring.measure()
    assert measure.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("measure: no CUDA device")
    assert printed.err.count("\n") == 1
    assert not user_file.exists()


def test_wrong_requests_are_refused_before_measuring(capsys, user_file):
    with pytest.raises(ValueError, match="'float64' is not one of"):
        measuring.measure(dtype="float64")
    for seconds in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="seconds must be positive"):
            measuring.measure(seconds=seconds)
    assert measure.main(["--name=My card"]) == 2
    assert "small letters" in capsys.readouterr().err
    assert measure.main(["--against=a41"]) == 2
    assert "did you mean 'a40'" in capsys.readouterr().err
    user_file.parent.mkdir()
    user_file.write_text("{")
    assert measure.main([]) == 2
    assert str(user_file) in capsys.readouterr().err


def test_a_device_holds_what_was_timed_and_reported():
    assert dataclasses.asdict(CARD) == RATES._asdict() | {
        "name": "NVIDIA A40",
        "compute_capability": (8, 6),
        "l2_bytes": 6 * 2**20,
        "shared_bytes_per_sm": 100 * 2**10,
        "sms": 84,
        "memory_bytes": 45 * 2**30,
        "source": "measured",
    }


def test_sizes_follow_the_free_memory():
    assert [measuring.square_side(gib * 2**30, 2, 8192) for gib in (80, 1)] == [8192, 8192]
    assert measuring.square_side(100 * 2**20, 2, 8192) == 2048
    assert measuring.copy_bytes(80 * 2**30, 126 * 2**20) == 1260 * 2**20
    for too_little in (lambda: measuring.square_side(2**20, 2, 8192), lambda: measuring.copy_bytes(2**28, 50 * 2**20)):
        with pytest.raises(measuring.CannotMeasure, match="MiB of the card's memory are free"):
            too_little()
    for sms, l2 in ((132, 50), (84, 6), (8, 2)):
        passes = measuring.read_passes(l2 * 2**20 // 4, 4 * sms, sms)
        assert 128 * 2**20 <= passes * l2 * 2**20 <= 192 * 2**20  # each SM's four programs together


def test_float32_stays_float32():
    before = torch.get_float32_matmul_precision()
    for chosen in ("high", "highest"):
        torch.set_float32_matmul_precision(chosen)
        with measuring._ieee_float32():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == chosen
    torch.set_float32_matmul_precision(before)


def test_float32_stays_float32_by_the_newer_switch():
    switch = torch.backends.cuda.matmul
    if not hasattr(switch, "fp32_precision"):
        pytest.skip("this PyTorch has the older switch alone")
    before = switch.fp32_precision
    switch.fp32_precision = "tf32"
    try:
        with measuring._ieee_float32():
            assert switch.fp32_precision == "ieee"
        assert switch.fp32_precision == "tf32"
    finally:
        switch.fp32_precision = before


def test_the_table_sets_the_card_beside_its_data_sheet():
    lines = measure.table(CARD, devices.match(CARD.name)).splitlines()
    assert lines[0] == "NVIDIA A40, beside the data sheet of NVIDIA A40"
    rows = {line[:28].strip(): line[28:].split() for line in lines[2:]}
    assert rows["products in bfloat16"] == ["TFLOP/s", "100", "149.7", "67%"]
    assert rows["copies in DRAM"] == ["GB/s", "600", "696", "86%"]
    assert rows["one more launch in a graph"] == ["us", "1.5", "-"]
    assert rows["SMs"] == ["84", "84"]
    unknown = dataclasses.replace(CARD, name="Orin", l2_bytes_per_s=None)
    lines = measure.table(unknown, None, "float16").splitlines()
    assert lines[0] == "Orin, no data sheet"
    assert lines[2].split() == ["products", "in", "float16", "TFLOP/s", "100", "-"]
    assert lines[5].split() == ["reads", "from", "L2", "GB/s", "-", "-"]


def test_the_command_keeps_the_card(capsys, user_file, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "measure", lambda *_: CARD)
    assert measure.main([]) == 0
    assert capsys.readouterr().out.endswith(f"kept as 'a40_measured' in {user_file}\n")
    assert devices.get("a40_measured") == CARD
    other = tmp_path / "cards.json"
    assert measure.main([f"--out={other}", "--name=lab", "--against=orin_nano"]) == 0
    assert "beside the data sheet of NVIDIA Jetson Orin Nano 8GB" in capsys.readouterr().out
    assert devices.load(other) == {"lab_measured": CARD}
    assert measure.main([f"--out={other / 'below'}"]) == 2
    assert capsys.readouterr().err.startswith("measure: ")


class OnTheProcessor(TorchFunctionMode):
    """Make tensors asked for on a GPU on the processor."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return func(*args, **kwargs | ({"device": "cpu"} if kwargs.get("device") == "cuda" else {}))


class Pretended:
    """A pretended CUDA event: every one comes a millisecond after the one before."""

    clock = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Pretended.clock += 1
        self.at = Pretended.clock

    def elapsed_time(self, later):
        return float(later.at - self.at)


@needs_no_gpu
def test_the_whole_course_on_a_pretended_card(monkeypatch):
    graph = types.SimpleNamespace(replay=lambda: None)
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "device": lambda _: torch.no_grad(),
        "get_device_properties": lambda _: PROPERTIES,
        "empty_cache": lambda: None,
        "mem_get_info": lambda: (2**27, 2**27),
        "synchronize": lambda: None,
        "Event": Pretended,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(measuring.dispatch, "why_not", lambda *_: "Triton is not installed")
    monkeypatch.setattr(measuring.graphs, "capture", lambda calls: calls[0]() is None or graph)
    monkeypatch.setattr(measuring, "LARGEST", {"tensor": 1024, "cuda": 1024})
    with OnTheProcessor():
        card = measuring.measure(seconds=0.002)
    assert card.tensor_flops == card.cuda_flops == pytest.approx(2 * 1024**3 / 1e-3)
    assert card.dram_bytes_per_s == pytest.approx(2 * 2**25 / 1e-3)
    assert card.l2_bytes_per_s is None
    assert card.launch_us == 0  # both graphs take one tick
    assert "no L2 rate (Triton is not installed)" in card.source
    assert (card.name, card.sms) == ("NVIDIA A40", 84)


def test_the_probe_compiles_and_fits(run_child, needs_triton):
    rows = [json.loads(line) for line in run_child("probes.py", "compile").splitlines()]
    assert [row["capability"] for row in rows] == [80, 86, 87, 90]
    assert all(row["shared"] < 2**10 for row in rows)


def test_the_probe_reads_all_of_its_buffer(run_child, needs_triton):
    row = json.loads(run_child("probes.py", "interpret", interpret=True))
    assert row["sums"] == pytest.approx([row["expected"]] * 7, rel=1e-4)


def test_the_probe_refuses_a_part_of_a_round(needs_triton):
    from blrlab_ops import triton_probes

    for size in (0, triton_probes.BLOCK, triton_probes.ELEMENTS + 1):
        with pytest.raises(ValueError, match="is no multiple of 16384"):
            triton_probes.read(torch.empty(size), torch.empty(1), 1)


@pytest.mark.gpu
@needs_gpu
def test_a_card_reaches_what_it_can():
    card = measuring.measure(seconds=0.3)
    properties = torch.cuda.get_device_properties(0)
    assert (card.name, card.sms) == (properties.name, properties.multi_processor_count)
    assert card.tensor_flops > card.cuda_flops > card.dram_bytes_per_s
    assert card.launch_us is not None
    assert 0.2 < card.launch_us < 20
    assert card.l2_bytes_per_s is None or card.l2_bytes_per_s > 1.1 * card.dram_bytes_per_s
    sheet = devices.match(card.name)
    if sheet is not None:
        assert (card.sms, card.compute_capability) == (sheet.sms, sheet.compute_capability)
        assert card.l2_bytes == sheet.l2_bytes
        assert card.shared_bytes_per_sm == sheet.shared_bytes_per_sm
        assert 0.4 < card.tensor_flops / sheet.tensor_flops < 1.1
        assert 0.4 < card.cuda_flops / sheet.cuda_flops < 1.1
        assert 0.6 < card.dram_bytes_per_s / sheet.dram_bytes_per_s < 1.02


@pytest.mark.gpu
@needs_gpu
def test_the_command_measures_and_keeps(capsys):
    assert measure.main(["--seconds=0.05"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert devices.get(last.split("'")[1]).name == torch.cuda.get_device_name(0)


@pytest.mark.gpu
@needs_gpu
def test_a_device_that_is_not_there_is_named(capsys):
    assert measure.main(["--device=99"]) == 2
    assert "no CUDA device 99" in capsys.readouterr().err
