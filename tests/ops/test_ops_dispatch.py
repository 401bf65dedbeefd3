"""What runs, what is refused and in which words; and what importing needs."""

import blrlab_ops
import pytest
import torch
from blrlab_ops import dispatch, testing
from blrlab_ops.testing import Case

FORMATS = ("low_rank", "monarch", "blast")


def _operands(format: str, **options):
    layer = Case(format, 4, 30, 42, (1, 1) if format == "low_rank" else (3, 2), 5)
    return testing.random_operands(layer, **options)


@pytest.mark.parametrize("format", FORMATS)
def test_impl_none_takes_torch_bmm_on_the_cpu(format):
    x, factors, bias = _operands(format)
    module = dispatch.implementation(format, None, x.device, x.dtype)
    assert module.__name__ == f"blrlab_ops.{format}.torch_bmm"
    best = blrlab_ops.linear(x, factors, bias)
    assert torch.equal(best, blrlab_ops.linear(x, factors, bias, impl="torch_bmm"))
    assert torch.equal(best, getattr(blrlab_ops, format).linear(x, *factors.values(), bias))


@pytest.mark.parametrize("format", FORMATS)
def test_impls_and_why_not(format):
    assert blrlab_ops.impls(format) == ("ref", "torch_bmm", "triton_two_stage")
    for impl in ("ref", "torch_bmm"):
        for device in ("cpu", torch.device("cpu")):
            for dtype in (torch.float64, "bfloat16"):
                assert blrlab_ops.why_not(format, impl, device, dtype) is None
    assert "int8" in blrlab_ops.why_not(format, "ref", "cpu", torch.int8)
    assert "float64" in blrlab_ops.why_not(format, "triton_two_stage", "cuda", torch.float64)


@pytest.mark.parametrize("format", FORMATS)
def test_named_triton_on_the_cpu_says_what_to_do(format, needs_triton):
    x, factors, bias = _operands(format)
    reason = blrlab_ops.why_not(format, "triton_two_stage", "cpu", torch.float32)
    assert all(part in reason for part in ("'cpu'", "CUDA", "torch_bmm", "TRITON_INTERPRET=1"))
    with pytest.raises(blrlab_ops.CannotRun) as raised:
        blrlab_ops.linear(x, factors, bias, impl="triton_two_stage")
    assert reason in str(raised.value)
    assert isinstance(raised.value, RuntimeError)


def test_unknown_names_list_the_allowed_ones():
    x, factors, bias = _operands("monarch")
    with pytest.raises(ValueError, match=r"'torch_bm'.*'torch_bmm'.*did you mean 'torch_bmm'"):
        blrlab_ops.linear(x, factors, bias, impl="torch_bm")
    with pytest.raises(ValueError, match=r"'trition'.*did you mean 'triton_two_stage'"):
        blrlab_ops.monarch.linear(x, **factors, impl="trition")
    with pytest.raises(ValueError, match=r"'monrach'.*did you mean 'monarch'"):
        blrlab_ops.impls("monrach")
    with pytest.raises(ValueError, match="no known format"):
        blrlab_ops.linear(x, {"V": factors["V"]})
    with pytest.raises(ValueError, match="no known format"):
        blrlab_ops.linear(x, {"V": factors["V"][0], "U": factors["U"][0]})


@pytest.mark.parametrize("format", FORMATS)
def test_tensors_that_do_not_fit_are_named(format):
    x, factors, bias = _operands(format)
    with pytest.raises(ValueError, match=rf"{format}: x must be \[..., 30\].*not \[4, 29\]"):
        blrlab_ops.linear(x[:, :29], factors, bias)
    with pytest.raises(ValueError, match=rf"{format}: bias must be \[42\].*not \[41\]"):
        blrlab_ops.linear(x, factors, bias[:41])
    with pytest.raises(ValueError, match=rf"{format}: .*U is torch.float64"):
        blrlab_ops.linear(x, factors | {"U": factors["U"].double()}, bias)
    with pytest.raises(ValueError, match=rf"{format}: .*bias is torch.float32 on meta"):
        blrlab_ops.linear(x, factors, bias.to("meta"))
    with pytest.raises(ValueError, match=rf"{format}: V must be"):
        blrlab_ops.linear(x, factors | {"V": factors["V"][..., :-1]}, bias)
    empty = {name: factor[..., :0] for name, factor in factors.items()} | {"U": factors["U"][..., :0, :]}
    with pytest.raises(ValueError, match="every size of V must be at least 1"):
        blrlab_ops.linear(x, empty, bias)
    integers = {name: factor.to(torch.int8) for name, factor in factors.items()}
    with pytest.raises(blrlab_ops.CannotRun, match="int8"):
        blrlab_ops.linear(x.to(torch.int8), integers)


def test_a_wrong_diagonal_is_refused():
    x, factors, bias = _operands("blast")
    with pytest.raises(ValueError, match=r"blast: .*\[2, 3, 5\]"):
        blrlab_ops.linear(x, factors | {"S": factors["S"].transpose(0, 1)}, bias)


def test_light_parts_need_nothing_but_python(run_child):
    run_child(
        "-c",
        "import sys\n"
        "for name in ('torch', 'triton', 'jax', 'numpy'): sys.modules[name] = None\n"
        "import blrlab_ops, blrlab_ops.cost, blrlab_ops.devices\n"
        "assert blrlab_ops.cost.params('dense', 3, 4) == 12\n"
        "assert blrlab_ops.devices.get('a40').sms == 84 and 'linear' in dir(blrlab_ops)\n",
    )


def test_torch_without_triton_runs_ref_and_torch_bmm(run_child):
    run_child(
        "-c",
        "import sys\n"
        "for name in ('triton', 'jax', 'flax', 'blrlab'): sys.modules[name] = None\n"
        "import torch, blrlab_ops\n"
        "x, V, U = torch.ones(2, 3), torch.ones(3, 1), torch.ones(1, 4)\n"
        "for impl in (None, 'ref', 'torch_bmm'):\n"
        "    assert blrlab_ops.low_rank.linear(x, V, U, impl=impl).sum() == 24\n"
        "for device in ('cpu', 'cuda'):\n"
        "    reason = blrlab_ops.why_not('blast', 'triton_two_stage', device, torch.float32)\n"
        "    assert 'cannot be imported' in reason and 'pip install' in reason, reason\n",
    )
