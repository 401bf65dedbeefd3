"""The table of data sheets agrees with itself; measured devices are kept, found and never shadow it."""

import dataclasses
import json

import pytest
from blrlab_ops import devices
from blrlab_ops.devices import DEVICES, Device

CARD = Device(
    name="NVIDIA H100 80GB HBM3",
    tensor_flops=7e14,
    cuda_flops=5e13,
    dram_bytes_per_s=3e12,
    l2_bytes=50 * 2**20,
    shared_bytes_per_sm=228 * 2**10,
    sms=132,
    compute_capability=(9, 0),
    source="measured",
    memory_bytes=80 * 2**30,
    l2_bytes_per_s=6e12,
    launch_us=1.2,
)


@pytest.fixture
def user_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return tmp_path / "blrlab" / "devices.json"


def test_devices_are_complete():
    assert {name: device.compute_capability for name, device in DEVICES.items()} == {
        "a40": (8, 6),
        "a10": (8, 6),
        "rtx_3090": (8, 6),
        "orin_nano_8gb": (8, 7),
        "orin_nx_16gb": (8, 7),
        "a100_40gb": (8, 0),
        "a100_80gb": (8, 0),
        "l4": (8, 9),
        "rtx_4090": (8, 9),
        "h100_pcie": (9, 0),
        "h100_sxm": (9, 0),
        "h200": (9, 0),
        "b200": (10, 0),
    }
    for device in DEVICES.values():
        assert device.tensor_flops > device.cuda_flops > device.dram_bytes_per_s > device.l2_bytes
        assert device.memory_bytes
        assert ("launch measured" in device.source) is (device.launch_us is not None)
        assert ("L2 rate" in device.source) is (device.l2_bytes_per_s is not None)


@pytest.mark.parametrize("name", DEVICES)
def test_rates_follow_from_clocks(name):
    # Float32 gives the clock; tensor cores do a power of two a clock, which H100s and the B200 run at a lower clock.
    device = DEVICES[name]
    cores = 64 if device.compute_capability == (8, 0) else 128
    clock = device.cuda_flops / (device.sms * cores * 2)
    assert 0.6e9 < clock < 2.6e9
    a_clock = device.tensor_flops / (device.sms * clock)
    expected = {(8, 0): 2048, (8, 6): 1024, (8, 7): 2048, (8, 9): 1024, (9, 0): 4096, (10, 0): 8192}
    half = 2 if "GeForce" in device.name else 1  # float32 accumulation at half rate
    assert 0.87 < a_clock * half / expected[device.compute_capability or (0, 0)] < 1.01
    if device.l2_bytes_per_s:
        assert device.dram_bytes_per_s < device.l2_bytes_per_s < 64 * device.sms * clock


@pytest.mark.parametrize(("alias", "name"), devices.ALIASES.items())
def test_aliases(alias, name):
    assert devices.get(alias) is DEVICES[name]


def test_unknown_names_are_told_the_nearest(user_file):
    with pytest.raises(ValueError, match=r"'h100_sxm5' is not one of .*did you mean 'h100_sxm'"):
        devices.get("h100_sxm5")
    with pytest.raises(ValueError, match=r"'x1' is not one of \('a40', .*'b200'\)$"):
        devices.get("x1")
    assert devices.names() == tuple(DEVICES)


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100_sxm"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-80GB", "a100_80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100_40gb"),
        ("A100-SXM4-40GB", "a100_40gb"),
        ("NVIDIA A40", "a40"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 3090", "rtx_3090"),
        ("NVIDIA GeForce RTX 4090", "rtx_4090"),
    ],
)
def test_cards_are_matched(reported, name):
    assert devices.match(reported) is DEVICES[name]


@pytest.mark.parametrize(
    "reported",
    [
        "NVIDIA A10G",
        "NVIDIA A100 80GB PCIe",
        "NVIDIA A100-PCIE-40GB",
        "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
        "NVIDIA H100 NVL",
        "NVIDIA GH200 480GB",
        "NVIDIA L40",
        "NVIDIA L40S",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "Orin",
        "cpu",
        "",
    ],
)
def test_other_cards_are_not(reported):
    assert devices.match(reported) is None


def test_measured_devices_are_kept_and_found(user_file):
    assert devices.load() == {}
    assert devices.save(CARD) == "h100_sxm_measured"
    other = dataclasses.replace(CARD, name="Orin", compute_capability=None, l2_bytes_per_s=None)
    assert devices.save(other, name="bench_2") == "bench_2_measured"
    faster = dataclasses.replace(CARD, tensor_flops=8e14)
    assert devices.save(faster) == "h100_sxm_measured"
    assert devices.load() == {"h100_sxm_measured": faster, "bench_2_measured": other}
    assert devices.get("h100_sxm_measured") == faster
    assert devices.get("h100_sxm") is DEVICES["h100_sxm"]
    assert devices.names() == (*DEVICES, "h100_sxm_measured", "bench_2_measured")
    with pytest.raises(ValueError, match="did you mean 'bench_2_measured'"):
        devices.get("bench_2_mesured")
    assert [path.name for path in user_file.parent.iterdir()] == ["devices.json"]


def test_no_name_shadows_a_data_sheet(tmp_path):
    for name in (*DEVICES, *devices.ALIASES):
        assert devices.save(CARD, tmp_path / "cards.json", name) == f"{name}_measured"
    for name in ("", "my card", "../a40", "A40"):
        with pytest.raises(ValueError, match="small letters"):
            devices.save(CARD, tmp_path / "cards.json", name)
    assert devices.short_name("Orin") == "orin_measured"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ('{"a_measured": {', "Expecting"),
        ("[]", "one JSON object"),
        ('{"a40": {}}', "must end in _measured"),
        ('{"a_measured": 1}', "a_measured must be an object"),
        ('{"a_measured": {"name": "a", "tensor": 1}}', "a_measured lacks, or does not know, compute_capability"),
    ],
)
def test_damaged_files_are_named_with_their_fix(user_file, text, message):
    user_file.parent.mkdir()
    user_file.write_text(text)
    for call in (devices.load, devices.names, lambda: devices.get("b_measured"), lambda: devices.save(CARD)):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert str(user_file) in str(caught.value)
        assert "python -m blrlab_ops.measure" in str(caught.value)
    assert user_file.read_text() == text
    assert devices.get("a40").sms == 84


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", 1),
        ("sms", "132"),
        ("sms", None),
        ("tensor_flops", 0),
        ("cuda_flops", float("nan")),
        ("l2_bytes_per_s", -1),
        ("memory_bytes", True),
        ("compute_capability", [9]),
        ("compute_capability", "9.0"),
    ],
)
def test_damaged_values_are_named(user_file, field, value):
    devices.save(CARD)
    rows = json.loads(user_file.read_text())
    rows["h100_sxm_measured"][field] = value
    user_file.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=rf"h100_sxm_measured\.{field} cannot be"):
        devices.load()


def test_a_write_that_fails_leaves_the_old_file(user_file, monkeypatch):
    devices.save(CARD)
    before = user_file.read_bytes()

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(devices.os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        devices.save(dataclasses.replace(CARD, sms=1))
    assert user_file.read_bytes() == before
    assert [path.name for path in user_file.parent.iterdir()] == ["devices.json"]


@pytest.mark.parametrize("folder", [None, "", "relative"])
def test_without_a_data_folder_the_home_is_used(monkeypatch, tmp_path, folder):
    monkeypatch.setenv("HOME", str(tmp_path))
    if folder is None:
        monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_DATA_HOME", folder)
    assert devices.default_path() == tmp_path / ".local" / "share" / "blrlab" / "devices.json"
