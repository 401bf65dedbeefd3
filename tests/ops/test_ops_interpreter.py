"""The Triton kernels on a CPU: each test is one child process under TRITON_INTERPRET=1."""

import json

import pytest
from blrlab_ops import dispatch, testing
from blrlab_ops.testing import Case

# 70 tokens are more than one tile of a GPU; the larger ones that are interpreted in two stages see all tokens.
SHORT = [layer._replace(tokens=min(layer.tokens, 70)) for layer in testing.AWKWARD]
FLOAT16 = [layer._replace(tokens=min(layer.tokens, 40)) for layer in testing.AWKWARD if layer.tokens in (1, 63)]

# The groups of columns of a Monarch intermediate [b2, n, b1, r'] lie b1 n r' numbers apart.
FAR_GROUPS = """
import importlib, sys, torch
from blrlab_ops import launching
left, right = torch.randn(1, 3, 16), torch.randn(1, 16, 48)
memory = torch.empty(2**31 + 2**20)  # untouched pages cost nothing
out = memory.as_strided((1, 3, 3, 16), (memory.numel(), 16, 2**30, 1)).fill_(float("nan"))
if sys.argv[1] == "product":
    launch = importlib.import_module("blrlab_ops.triton_product").product(left, right, out)
else:
    launch = importlib.import_module("blrlab_ops.triton_streaming").stream(left[None], right, out)
launching.run([launch], left.device)
torch.testing.assert_close(out.reshape(3, 48), left[0] @ right[0])
"""

pytestmark = pytest.mark.usefixtures("needs_triton")


def _shapes(layers: list[Case]) -> list[str]:
    return [
        f"--shape={layer.format}:{layer.tokens}x{layer.in_features}x{layer.out_features}"
        f":b{layer.blocks[0]}x{layer.blocks[1]}:r{layer.rank}"
        for layer in layers
    ]


def _verify(run_child, *arguments: str) -> list[dict]:
    out = run_child("-m", "blrlab_ops.verify", *arguments, "--json", interpret=True)
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_awkward_layer_in_two_stages(run_child, dtype):
    rows = _verify(run_child, "--impl=triton_two_stage", f"--dtype={dtype}")
    assert [row["op"] for row in rows] == [layer.format for layer in testing.AWKWARD]
    assert all(row["passed"] for row in rows)


@pytest.mark.parametrize(("dtype", "layers"), [("float32", SHORT), ("float16", FLOAT16)], ids=["float32", "float16"])
@pytest.mark.parametrize("format", dispatch.IMPLS)
def test_awkward_layers_of_the_other_implementations(run_child, format, dtype, layers):
    impls = [impl for impl in filter(dispatch.needs_triton, dispatch.impls(format)) if not dispatch.is_hopper(impl)]
    impls.remove("triton_two_stage")
    layers = [layer for layer in layers if layer.format == format]
    rows = _verify(run_child, *_shapes(layers), *(f"--impl={impl}" for impl in impls), f"--dtype={dtype}")
    assert [row["impl"] for row in rows] == impls * len(layers)
    assert all(row["passed"] for row in rows), [row for row in rows if not row["passed"]]


def test_a_layer_of_a_model(run_child):
    layer = Case("monarch", 384, 768, 2304, (4, 4), 48)
    (row,) = _verify(run_child, *_shapes([layer]), "--impl=triton_two_stage")
    assert row["passed"]


def test_one_token_of_larger_layers(run_child):
    ranks = {"low_rank": ((1, 1), 192), "monarch": ((4, 4), 48), "blast": ((6, 6), 192)}
    layers = [Case(format, 1, 768, 768, *choice) for format, choice in ranks.items()]
    rows = _verify(run_child, *_shapes(layers), "--impl=triton_streaming")
    assert [row["op"] for row in rows] == [*ranks]
    assert all(row["passed"] for row in rows)


@pytest.mark.parametrize("kernel", ["product", "stream"])
def test_intermediates_beyond_2_to_the_31_elements(run_child, kernel):
    """In a process of its own, which a wrong address ends."""
    run_child("-c", FAR_GROUPS, kernel, interpret=True)


@pytest.mark.parametrize("file", ["operators", "epilogues", "tiles"])
def test_inside_the_child(run_child, file):
    run_child("-m", "pytest", "-q", "-p", "no:cacheprovider", f"interpreted_{file}.py", interpret=True)
