"""Bounds against counts by hand."""

import json

import pytest

from blrlab import factors, roofline
from blrlab.factors import Spec
from blrlab.roofline import Peaks

# Operations and elements of 3 tokens through a layer of 4 x 6: x has 12 elements, y 18.
COUNTED = [
    (Spec("dense", 4, 6), 2 * 3 * 24, 24),
    (Spec("low_rank", 4, 6, rank=2), 2 * 3 * (4 * 2 + 2 * 6), 20),
    # 2 x 3 blocks of 2 x 2 and rank 1: each token meets 2 numbers of V and 2 of U in each of 6 blocks.
    (Spec("monarch", 4, 6, (2, 3), 1), 2 * 3 * 6 * (2 + 2), 6 * (2 + 2)),
    # V 2 x [2, 2], U 3 x [2, 2]; and each token and rank has 2 x 3 numbers of S.
    (Spec("blast", 4, 6, (2, 3), 2), 2 * 3 * (8 + 12 + 12), 8 + 12 + 12),
]


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(("spec", "flops", "elements"), COUNTED, ids=lambda value: getattr(value, "format", ""))
def test_work_is_what_a_count_by_hand_gives(spec: Spec, flops: int, elements: int, itemsize: int) -> None:
    assert roofline.work(spec, 3, itemsize) == (flops, itemsize * (12 + elements + 18))
    assert factors.parameter_count(spec) == elements


@pytest.mark.parametrize(
    ("rate", "bandwidth", "bound"),
    [(1e6, 1e12, 144.0), (1e12, 1e6, 108.0), (1e6, 108e6 / 144, 144.0), (144e3, 54e3, 2000.0)],
    ids=["products", "traffic", "both alike", "traffic again"],
)
def test_the_slower_of_products_and_traffic_is_the_bound(rate: float, bandwidth: float, bound: float) -> None:
    # 144 operations, 2 x (12 + 24 + 18) = 108 bytes
    found = roofline.bound_us(Spec("dense", 4, 6), 3, 2, Peaks("a test", rate, bandwidth, "bfloat16", "made up"))
    assert found == pytest.approx(bound)


def test_peaks_are_a_record() -> None:
    peaks = Peaks("a test", 8e14, 3e12, "bfloat16", "measured here")
    assert json.loads(json.dumps(peaks.record(), allow_nan=False)) == {
        "name": "a test",
        "flops_per_s": 8e14,
        "bytes_per_s": 3e12,
        "dtype": "bfloat16",
        "source": "measured here",
    }
