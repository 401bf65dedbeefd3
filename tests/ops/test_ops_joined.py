"""Layers that share their input, multiplied as one."""

import blrlab_ops
import pytest
import torch
from blrlab_ops import joined, testing

SIZES = {"low_rank": (1, 1), "monarch": (3, 5), "blast": (3, 5)}
each_format = pytest.mark.parametrize("format", SIZES)


def layers(format, count=3, dtype=torch.float64, rank=7):
    return [testing.random_factors(format, 66, 130, SIZES[format], rank, dtype=dtype) for _ in range(count)]


def apart(x, each, bias=None, **follows):
    """Multiply by every layer alone, with its part of what is as wide as all of them."""
    parts = [[None] * len(each) if given is None else given.chunk(len(each), -1) for given in (bias, *follows.values())]
    return [
        blrlab_ops.linear(x, factors, part[0], **dict(zip(follows, part[1:], strict=True)), impl="ref")
        for factors, *part in zip(each, *parts, strict=True)
    ]


@each_format
@pytest.mark.parametrize("leading", [(), (0,), (1,), (5,), (2, 3)])
def test_joined_layers_give_what_each_gives_alone(format, leading):
    each, x, bias = layers(format), torch.randn(*leading, 66).double(), torch.randn(390).double()
    multiply, residual = torch.randn(2, *leading, 390).double()
    found = joined.linear(x, joined.join(each), bias, multiply=multiply, residual=residual)
    for y, expected in zip(found, apart(x, each, bias, multiply=multiply, residual=residual), strict=True):
        assert y.shape == (*leading, 130)
        torch.testing.assert_close(y, expected)


@each_format
def test_an_activation_follows_every_layer(format):
    each, x = layers(format, 2), torch.randn(4, 66).double()
    gate, up = joined.linear(x, joined.join(each), activation="silu")
    torch.testing.assert_close(gate, torch.nn.functional.silu(apart(x, each)[0]))
    torch.testing.assert_close(up, torch.nn.functional.silu(apart(x, each)[1]))


@each_format
def test_split_gives_back_the_layers(format):
    each = layers(format)
    for factors, found in zip(each, joined.split(joined.join(each)), strict=True):
        assert list(found) == list(factors)
        assert all(torch.equal(found[name], factor) for name, factor in factors.items())


@each_format
def test_gradients_reach_every_factor(format):
    each = layers(format, 2)
    leaves = [{name: factor.clone().requires_grad_() for name, factor in factors.items()} for factors in each]
    x = torch.randn(4, 66).double()
    weights = torch.randn(4, 260).double()
    torch.cat(joined.linear(x, joined.join(leaves)), -1).mul(weights).sum().backward()
    again = [{name: factor.clone().requires_grad_() for name, factor in factors.items()} for factors in each]
    torch.cat(apart(x, again), -1).mul(weights).sum().backward()
    for found, expected in zip(leaves, again, strict=True):
        for name in expected:
            torch.testing.assert_close(found[name].grad, expected[name].grad)


@each_format
def test_one_layer_is_as_good_as_several(format):
    each, x = layers(format, 1), torch.randn(4, 66).double()
    (y,) = joined.linear(x, joined.join(each))
    torch.testing.assert_close(y, apart(x, each)[0])


@each_format
def test_a_compiled_graph_takes_them(format):
    together, x = joined.join(layers(format, dtype=torch.float32)), torch.randn(4, 66)
    compiled = torch.compile(lambda x: joined.linear(x, together), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), joined.linear(x, together))


def test_the_order_of_the_names_does_not_matter():
    each, x = layers("blast"), torch.randn(4, 66).double()
    turned = [{name: factors[name] for name in ("U", "S", "V")} for factors in each[1:]]
    together = joined.join([each[0], *turned])
    together = together._replace(factors=dict(sorted(together.factors.items())))
    for y, expected in zip(joined.linear(x, together), apart(x, each), strict=True):
        torch.testing.assert_close(y, expected)


def test_layers_that_differ_are_refused():
    with pytest.raises(ValueError, match="no layer"):
        joined.join([])
    each = layers("monarch")
    with pytest.raises(ValueError, match=r"layer 1 has .*V \[3, 5, 22, 8\]"):
        joined.join([each[0], *layers("monarch", 1, rank=8)])
    with pytest.raises(ValueError, match=r"layer 2 has .*V .* torch\.float32"):
        joined.join([*each[:2], *layers("monarch", 1, torch.float32)])
    with pytest.raises(ValueError, match="must be alike"):
        joined.join([each[0], *layers("blast", 1)])


@each_format
def test_what_does_not_fit_is_refused(format):
    together = joined.join(layers(format))
    with pytest.raises(ValueError, match="x must be"):
        joined.linear(torch.randn(4, 65).double(), together)
    with pytest.raises(ValueError, match="bias must be"):
        joined.linear(torch.randn(4, 66).double(), together, torch.zeros(130).double())
    with pytest.raises(ValueError, match="activation 'relu'"):
        joined.linear(torch.randn(4, 66).double(), together, activation="relu")
    with pytest.raises(ValueError, match="'triton_two_stages'"):
        joined.linear(torch.randn(4, 66).double(), together, impl="triton_two_stages")
    with pytest.raises(blrlab_ops.CannotRun, match="float64"):
        joined.linear(torch.randn(4, 66).double(), together, impl="triton_streaming")
