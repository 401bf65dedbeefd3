"""Costs against hand counts and real factors; devices; bounds."""

import doctest

import pytest
from blrlab_ops import cost, devices, testing
from hypothesis import given
from hypothesis import strategies as st

FORMATS = ("low_rank", "monarch", "blast")
sizes = st.integers(1, 6)


@given(st.sampled_from(FORMATS), sizes, sizes, sizes, sizes, sizes)
def test_params_count_the_elements_of_real_factors(format, b1, b2, p, q, rank):
    factors = testing.random_factors(format, b1 * p, b2 * q, (b1, b2), rank)
    assert cost.params(format, b1 * p, b2 * q, (b1, b2), rank) == sum(f.numel() for f in factors.values())


@given(st.sampled_from(FORMATS), sizes, sizes, sizes, sizes, sizes, sizes)
def test_flops_count_the_loops(format, tokens, b1, b2, p, q, rank):
    blocks = [(l, k) for l in range(b1) for k in range(b2)]
    products = {
        "low_rank": tokens * rank * (b1 * p + b2 * q),
        "monarch": sum(tokens * rank * (p + q) for _ in blocks),
        "blast": sum(tokens * p * rank for _ in range(b1)) + sum(tokens * rank * q for _ in range(b2)),
    }[format]
    mixing = sum(tokens * rank for _ in blocks) if format == "blast" else 0
    found = cost.flops(format, tokens, b1 * p, b2 * q, (b1, b2), rank)
    assert found == (2 * products, 2 * mixing)


@pytest.mark.parametrize("module", [cost, devices], ids=lambda module: module.__name__)
def test_examples(module):
    failed, attempted = doctest.testmod(module)
    assert not failed
    assert attempted


def test_hand_counts():
    # GPT2-S c_attn at 384 tokens, bf16.
    x, y = 384 * 768, 384 * 2304
    assert cost.cost("dense", 384, 768, 2304) == (2 * x * 2304, 0, *[2 * (x + 768 * 2304 + y)] * 2)
    monarch = cost.cost("monarch", 384, 768, 2304, (4, 4), 48)
    assert monarch.tensor_flops == 2 * 384 * 48 * 16 * (192 + 576)
    assert monarch.bytes_compulsory == 2 * (x + 16 * 48 * (192 + 576) + y)
    assert monarch.bytes_two_stage - monarch.bytes_compulsory == 2 * 2 * 384 * 16 * 48
    blast = cost.cost("blast", 384, 768, 2304, (6, 4), 192, itemsize=4)
    assert blast.cuda_flops == 2 * 384 * 192 * 24
    assert blast.bytes_two_stage - blast.bytes_compulsory == 4 * 2 * 384 * 4 * 192
    low_rank = cost.cost("low_rank", 1, 768, 2304, rank=192)
    assert low_rank.bytes_two_stage - low_rank.bytes_compulsory == 2 * 2 * 192


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("monrach", 8, 8, (2, 2), 1), "'monrach' is not one of"),
        (("monarch", 8, 8, (3, 2), 1), "blocks"),
        (("blast", 8, 8, (2, 0), 1), "blocks"),
        (("low_rank", 8, 8), "rank must be at least 1"),
    ],
)
def test_impossible_layers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        cost.params(*arguments)


def test_the_slowest_term_binds():
    a40 = devices.get("a40")
    tensor, cuda, dram = (
        cost.Cost(1497 * 10**9, 0, 1, 1),
        cost.Cost(1, 374 * 10**9, 1, 1),
        cost.Cost(1, 1, 696 * 10**6, 2 * 696 * 10**6),
    )
    assert cost.bound_us(tensor, a40) == (pytest.approx(10_000), "tensor")
    assert cost.bound_us(cuda, a40) == (pytest.approx(10_000), "cuda")
    assert cost.bound_us(dram, a40) == (pytest.approx(1000), "dram")
    assert cost.bound_us(dram, a40, two_stage=True).us == pytest.approx(2000)


def test_devices_are_complete_and_found_by_name():
    assert {name: device.compute_capability for name, device in devices.DEVICES.items()} == {
        "a40": (8, 6),
        "orin_nano_8gb": (8, 7),
        "h100_sxm": (9, 0),
        "h200": (9, 0),
    }
    for device in devices.DEVICES.values():
        assert device.source
        assert device.tensor_flops > device.cuda_flops > device.dram_bytes_per_s > device.l2_bytes
    with pytest.raises(ValueError, match=r"'h100_sxm5' is not one of .*did you mean 'h100_sxm'"):
        devices.get("h100_sxm5")
