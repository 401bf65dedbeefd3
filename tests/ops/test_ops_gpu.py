"""The same contract on a real GPU, bfloat16 included: `pytest -m gpu tests/ops`."""

import importlib

import blrlab_ops
import pytest
import torch
from blrlab_ops import dispatch, testing, verify
from blrlab_ops.testing import Case

IMPLS = ("ref", "torch_bmm", "triton_two_stage")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MODEL_LAYERS = (
    Case("low_rank", 1024, 4096, 4096, (1, 1), 1024),
    Case("monarch", 1024, 4096, 4096, (16, 16), 64),
    Case("monarch", 384, 768, 2304, (4, 4), 48),
    Case("monarch", 16384, 1152, 3456, (8, 8), 48),
    Case("monarch", 1, 4096, 11008, (16, 16), 96),
    Case("blast", 1024, 4096, 4096, (16, 16), 1024),
    Case("blast", 197, 768, 2304, (3, 3), 128),
    Case("blast", 16384, 1152, 3456, (9, 9), 384),
    Case("blast", 1, 4096, 11008, (16, 16), 1488),
)
SMALL = tuple(layer for layer in testing.AWKWARD if layer.tokens in (0, 63))

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device"),
]
each_small_layer = pytest.mark.parametrize("layer", SMALL, ids=lambda layer: f"{layer.format}-{layer.tokens}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layer", testing.AWKWARD, ids=lambda layer: "-".join(map(str, layer)))
def test_awkward_layers_are_within_their_budgets(layer, impl, dtype):
    verdict = testing.check(impl, *testing.random_operands(layer, dtype=dtype, device="cuda"))
    assert verdict.passed, verdict


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", ["torch_bmm", "triton_two_stage"])
@pytest.mark.parametrize("layer", MODEL_LAYERS, ids=lambda layer: "-".join(map(str, layer)))
def test_layers_of_models_are_within_their_budgets(layer, impl, dtype):
    verdict = testing.check(impl, *testing.random_operands(layer, dtype=dtype, device="cuda"))
    assert verdict.passed, verdict


@each_small_layer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["torch_bmm", "triton_two_stage"])
def test_gradients_are_within_their_budgets(layer, impl, dtype):
    verdicts = testing.check_gradients(impl, *testing.random_operands(layer, dtype=dtype, device="cuda"))
    assert all(verdict.passed for verdict in verdicts.values()), verdicts


@each_small_layer
def test_opcheck(layer):
    operator = importlib.import_module(f"blrlab_ops.{layer.format}.triton_two_stage")._two_stage
    x, factors, bias = testing.random_operands(layer, dtype=torch.bfloat16, device="cuda")
    torch.library.opcheck(operator, tuple(tensor.requires_grad_() for tensor in (x, *factors.values(), bias)))


@each_small_layer
def test_compiles_as_one_graph(layer):
    x, factors, bias = testing.random_operands(layer, dtype=torch.bfloat16, device="cuda")
    torch.compiler.reset()
    compiled = torch.compile(blrlab_ops.linear, fullgraph=True, backend="aot_eager")
    expected = blrlab_ops.linear(x, factors, bias, impl="triton_two_stage")
    assert torch.equal(compiled(x, factors, bias), expected)


@each_small_layer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_impl_none_takes_triton(layer, dtype):
    x, factors, bias = testing.random_operands(layer, dtype=dtype, device="cuda")
    assert blrlab_ops.why_not(layer.format, "triton_two_stage", x.device, dtype) is None
    module = dispatch.implementation(layer.format, None, x.device, dtype)
    assert module.__name__.endswith("triton_two_stage")
    best = blrlab_ops.linear(x, factors, bias)
    assert torch.equal(best, blrlab_ops.linear(x, factors, bias, impl="triton_two_stage"))


def test_float64_goes_to_torch_bmm():
    assert dispatch.choose("monarch", None, "cuda", torch.float64) == "torch_bmm"


@each_small_layer
def test_any_strides_on_another_stream(layer):
    x, factors, bias = testing.random_operands(layer, device="cuda")
    turned = {name: factor.mT.contiguous().mT for name, factor in factors.items()}
    expected = blrlab_ops.linear(x, factors, bias, impl="torch_bmm")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = blrlab_ops.linear(x.mT.contiguous().mT, turned, bias, impl="triton_two_stage")
    stream.synchronize()
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("layer", [layer for layer in SMALL if layer.tokens], ids=lambda layer: layer.format)
def test_can_be_captured_in_a_cuda_graph(layer):
    x, factors, bias = testing.random_operands(layer, dtype=torch.bfloat16, device="cuda")
    expected = blrlab_ops.linear(x, factors, bias, impl="triton_two_stage")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = blrlab_ops.linear(x, factors, bias, impl="triton_two_stage")
    y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("format", ["low_rank", "monarch", "blast"])
def test_outputs_beyond_2_to_the_31_elements(format):
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    layer = Case(format, 66_000, 64, 32_768, (1, 1) if format == "low_rank" else (2, 2), 16)
    x, factors, bias = testing.random_operands(layer, dtype=torch.bfloat16, device="cuda")
    y = blrlab_ops.linear(x, factors, bias, impl="triton_two_stage")
    tail = blrlab_ops.linear(x[-200:], factors, bias, impl="triton_two_stage")
    assert testing.errors(y[-200:], tail)[0] < 1e-2


def test_the_command_verifies_on_the_gpu(capsys):
    assert verify.main(["--device=cuda", "--dtype=bfloat16", "--impl=triton_two_stage", "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(testing.AWKWARD)
