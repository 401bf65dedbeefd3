"""Tests of the streaming kernels on int8 factors that test_ops_int8.py runs under TRITON_INTERPRET=1."""

import pytest
import torch
from blrlab_ops import int8, testing
from blrlab_ops.testing import Case

CASES = tuple(
    Case(format, tokens, 66, 130, blocks, rank)
    for tokens in (0, 1, 5, 17)
    for format, blocks, rank in (("low_rank", (1, 1), 24), ("monarch", (2, 5), 17), ("blast", (2, 5), 24))
)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.format}-{case.tokens}")
def test_the_kernels_compute_what_the_factors_stand_for(case, with_bias):
    x, factors, bias = testing.random_operands(case)
    small = int8.quantise(factors)
    residual = torch.randn(case.tokens, case.out_features)
    given = bias if with_bias else None
    with testing.poisoned():
        y = int8.linear(x, small, given, activation="gelu", residual=residual, impl="triton_streaming")
    wide = {name: each if each.dtype == torch.int8 else each.double() for name, each in small.items()}
    exact = int8.linear(
        x.double(),
        wide,
        None if given is None else given.double(),
        activation="gelu",
        residual=residual.double(),
        impl="torch_bmm",
    )
    assert testing.errors(y, exact)[0] < 1e-6


def test_leading_shapes():
    x, factors, bias = testing.random_operands(CASES[4])
    small = int8.quantise(factors)
    y = int8.linear(x.reshape(1, 1, -1), small, bias, impl="triton_streaming")
    torch.testing.assert_close(y[0], int8.linear(x, small, bias, impl="torch_bmm"))
