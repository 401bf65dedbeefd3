"""The Triton kernels on a CPU: each test is one child process under TRITON_INTERPRET=1."""

import json

import pytest
from blrlab_ops import testing

pytestmark = pytest.mark.usefixtures("needs_triton")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_awkward_layer(run_child, dtype):
    out = run_child("-m", "blrlab_ops.verify", "--impl=triton_two_stage", f"--dtype={dtype}", "--json", interpret=True)
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["op"] for row in rows] == [layer.format for layer in testing.AWKWARD]
    assert all(row["passed"] for row in rows)


def test_a_layer_of_a_model(run_child):
    shape = "--shape=monarch:384x768x2304:b4x4:r48"
    out = run_child("-m", "blrlab_ops.verify", "--impl=triton_two_stage", shape, "--json", interpret=True)
    assert json.loads(out)["passed"]


def test_operators_strides_and_tiles(run_child):
    run_child("-m", "pytest", "-q", "-p", "no:cacheprovider", "interpreted_operators.py", interpret=True)
