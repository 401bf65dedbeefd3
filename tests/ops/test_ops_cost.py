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
    assert cost.cost("dense", 384, 768, 2304) == (2 * x * 2304, 0, 2 * (x + 768 * 2304 + y))
    monarch = cost.cost("monarch", 384, 768, 2304, (4, 4), 48)
    assert monarch.tensor_flops == 2 * 384 * 48 * 16 * (192 + 576)
    assert monarch.bytes_compulsory == 2 * (x + 16 * 48 * (192 + 576) + y)
    assert monarch.cuda_flops == 0
    blast = cost.cost("blast", 384, 768, 2304, (6, 4), 192, itemsize=4)
    assert blast.cuda_flops == 2 * 384 * 192 * 24
    assert blast.bytes_compulsory == 4 * (x + 192 * (768 + 2304 + 24) + y)
    low_rank = cost.cost("low_rank", 1, 768, 2304, rank=192)
    assert low_rank == (2 * 192 * (768 + 2304), 0, 2 * (768 + 192 * (768 + 2304) + 2304))


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
    assert cost.bound_us(cost.Cost(1497 * 10**9, 374 * 10**9, 1), a40) == (pytest.approx(10_000), "tensor")
    both = cost.Cost(1497 * 10**9, 2 * 374 * 10**9, 1)  # what CUDA cores have left at 10 ms runs on both
    assert cost.bound_us(both, a40).us == pytest.approx(10_000 * (1497 + 2 * 374) / (1497 + 374))
    assert cost.bound_us(cost.Cost(1, 1, 696 * 10**6), a40) == (pytest.approx(1000), "dram")


def test_products_in_float32_run_at_the_rate_of_cuda_cores():
    a40 = devices.get("a40")
    counted = cost.Cost(374 * 10**9, 374 * 10**9, 1)
    assert cost.bound_us(counted, a40, "float32").us == pytest.approx(20_000)
    assert cost.bound_us(counted, a40, "float16") == cost.bound_us(counted, a40)
