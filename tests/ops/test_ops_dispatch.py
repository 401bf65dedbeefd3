"""What runs, what is refused and in which words; and what importing needs."""

import blrlab_ops
import pytest
import torch
from blrlab_ops import dispatch, testing, tune, tuning
from blrlab_ops.testing import Case
from blrlab_ops.tuning import search

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
    own = {
        "low_rank": ("triton_streaming", "triton_two_stage"),
        "monarch": ("hopper_chained", "triton_fused", "triton_streaming", "triton_two_stage"),
        "blast": ("bmm_mixing", "triton_two_stage", "triton_late_mixing", "triton_streaming", "triton_three_stage"),
    }
    assert blrlab_ops.impls(format) == ("ref", "torch_bmm", *own[format])
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
    with pytest.raises(ValueError, match=r"'trition_two_stage'.*did you mean 'triton_two_stage'"):
        blrlab_ops.monarch.linear(x, **factors, impl="trition_two_stage")
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


@pytest.fixture
def a_card(monkeypatch, tmp_path):
    """Let dispatch believe in an H100 on which everything runs, with an empty folder of tuned layers."""
    monkeypatch.setenv("BLRLAB_OPS_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning.store, "DEFAULTS", tmp_path / "none")
    tuning.refresh()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(dispatch, "_why_not", lambda impl, device, dtype: None)
    monkeypatch.setattr(dispatch, "_interprets", lambda: False)
    yield "NVIDIA H100 80GB HBM3"
    monkeypatch.undo()
    tuning.refresh()


def _entry(impl: str, us: float, dense_us: float) -> tuning.Entry:
    return tuning.Entry(impl, {}, us, dense_us, tuning.store.triton_version(), torch.__version__, "2026-01-01T00:00:00")


LAYER = dispatch.Layer(16, 4096, 4096, (16, 16), 64)


def test_the_measured_best_is_taken(a_card):
    key = tuning.Key("monarch", 16, 4096, 4096, (16, 16), 64, "bfloat16")
    for impl, us in (("torch_bmm", 11.2), ("triton_two_stage", 12.4), ("triton_streaming", 9.3)):
        tuning.record(a_card, key, _entry(impl, us, 15.4))
    for tokens in (2, 7, 16):  # all of one bucket
        assert (
            dispatch.best("monarch", "cuda", torch.bfloat16, LAYER._replace(tokens=tokens)).impl == "triton_streaming"
        )
    tuning.record(a_card, key, _entry("torch_bmm", 8.0, 15.4))
    assert dispatch.choose("monarch", None, "cuda", torch.bfloat16, LAYER) == "torch_bmm"
    other = dispatch.best("monarch", "cuda", torch.float16, LAYER)
    assert (other.impl, other.measured) == ("triton_streaming", ())
    assert "not measured" in other.reason


def test_a_layer_that_is_not_measured_goes_by_its_size(a_card):
    sizes = {1: "triton_streaming", 16: "triton_streaming", 17: "triton_two_stage", 1024: "torch_bmm"}
    for tokens, impl in sizes.items():
        assert dispatch.best("monarch", "cuda", torch.bfloat16, LAYER._replace(tokens=tokens)).impl == impl
    small = dispatch.Layer(384, 768, 2304, (6, 6), 192)
    assert dispatch.best("blast", "cuda", torch.bfloat16, small).impl == "triton_three_stage"


def test_explain_says_what_and_why_and_whether_dense_is_faster(a_card):
    factors = testing.random_factors("monarch", 4096, 4096, (16, 16), 64, device="meta")
    predicted = blrlab_ops.explain(factors, 1, device="cuda", dtype=torch.bfloat16)
    assert (predicted.impl, predicted.measured, predicted.dense_is_faster) == ("triton_streaming", False, False)
    assert predicted.dense_us > 10
    assert "predicted by the cost model" in str(predicted)
    key = tuning.Key("monarch", 1, 4096, 4096, (16, 16), 64, "bfloat16")
    tuning.record(a_card, key, _entry("torch_bmm", 14.4, 13.6))
    found = blrlab_ops.explain(factors, 1, device="cuda", dtype=torch.bfloat16)
    assert (found.impl, found.us, found.dense_us, found.dense_is_faster) == (
        "torch_bmm",
        {"torch_bmm": 14.4},
        13.6,
        True,
    )
    assert "dense would be FASTER: 14.4 us against 13.6 us, measured" in str(found)


def test_explain_on_a_cpu_says_what_cannot_run():
    factors = _operands("blast")[1]
    found = blrlab_ops.explain(factors, 4)
    assert (found.impl, found.us, found.dense_is_faster) == ("torch_bmm", {}, None)
    assert set(found.cannot) == {impl for impl in blrlab_ops.impls("blast") if dispatch.needs_triton(impl)}
    with pytest.raises(ValueError, match="-1 must be 0 or more"):
        blrlab_ops.explain(factors, -1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "no layer is named"),
        (["--net=llama7"], 'Did you mean "llama7b"'),
        (["--net=llama7b", "--layer=q"], "it has qkvo, gate_up, down"),
        (["--net=llama7b", "--format=monrach"], "did you mean 'monarch'"),
        (["--shape=monarch:1x2"], "is not like"),
        (["--net=llama7b"], "no CUDA device"),
    ],
)
def test_the_tuning_command_refuses_what_makes_no_sense(arguments, sentence, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(arguments) == 2
    assert sentence in capsys.readouterr().err


def test_the_tuning_command_measures_what_is_not_kept(a_card, capsys, monkeypatch):
    key, asked = tuning.Key("monarch", 1, 4096, 4096, (16, 16), 64, "bfloat16"), []
    monkeypatch.setattr(search, "tune", lambda case, dtype, impls, say: asked.append(impls))
    command = ["--net=llama7b", "--layer=qkvo", "--format=monarch", "--tokens=1"]
    tuning.record(a_card, key, _entry("torch_bmm", 14.4, 13.6))
    assert tune.main(command) == 0
    assert asked == [["triton_fused", "triton_streaming", "triton_two_stage"]]  # which are for one token
    for impl in asked.pop():
        tuning.record(a_card, key, _entry(impl, 20.0, 13.6))
    capsys.readouterr()
    assert tune.main(command) == 0
    assert "monarch:1x4096x4096:b16x16:r64: kept already, 14.4 us" in capsys.readouterr().out
    assert not asked
    assert tune.main([*command, "--again"]) == 0
    assert asked == [["torch_bmm", "triton_fused", "triton_streaming", "triton_two_stage"]]


def test_what_is_not_worth_a_measurement_says_why():
    assert dispatch.unsuited("triton_streaming", LAYER) is None
    assert "up to 64 tokens" in dispatch.unsuited("triton_streaming", LAYER._replace(tokens=65))
    assert "8 blocks" in dispatch.unsuited("triton_late_mixing", LAYER._replace(tokens=17))
    assert dispatch.unsuited("triton_late_mixing", LAYER._replace(tokens=17, blocks=(6, 6))) is None
    assert "small layers" in dispatch.unsuited("triton_fused", LAYER._replace(tokens=1024))
    assert dispatch.unsuited("torch_bmm", LAYER._replace(tokens=10**6)) is None


def test_committed_configurations_are_found(a_card, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: a_card)
    monkeypatch.setattr(tuning.store, "triton_version", lambda: "3.6.0")
    tuning.refresh()
    found = dispatch.measured("monarch", "cuda", "torch.bfloat16", LAYER._replace(tokens=1))
    assert "triton_streaming" in {entry.impl for entry in found}
