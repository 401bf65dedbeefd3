"""The Hopper kernels without a GPU: right in an emulator of Gluon, refused elsewhere, called by plan like others."""

import contextlib
import importlib
import itertools
import pathlib
import sys

import blrlab_ops
import pytest
import torch
from blrlab_ops import dispatch, launching, plans, testing
from blrlab_ops.epilogue import Epilogue
from blrlab_ops.testing import Case

pytest.importorskip("triton")
if dispatch.gluon_problem():
    pytest.skip("this Triton has no Gluon that the kernels are written in", allow_module_level=True)

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import emulated_gluon
from blrlab_ops import hopper_parts
from blrlab_ops.hopper_parts import async_load, barriers
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

KERNELS = [(format, impl) for format in dispatch.IMPLS for impl in filter(dispatch.is_hopper, dispatch.impls(format))]
TILES = 200  # of the emulator's own test
MULTIPROCESSORS = 3  # so that a program takes several tiles
AWKWARD = [layer for layer in testing.AWKWARD if (layer.format, "hopper_chained") in KERNELS]
SQUARE = Case("monarch", 63, 96, 96, (2, 3), 20)
each_kernel = pytest.mark.parametrize(("format", "impl"), KERNELS)


@pytest.fixture(autouse=True)
def _few_multiprocessors(monkeypatch):
    monkeypatch.setattr(hopper_parts, "SMS", MULTIPROCESSORS)


def _module(format: str, impl: str):
    return importlib.import_module(f"blrlab_ops.{format}.{impl}")


def _emulate(layer: Case, impl: str, operands, epilogue: Epilogue | None = None, config=None, **how):
    x, factors, bias = operands
    module = _module(layer.format, impl)
    y = torch.full((layer.tokens, layer.out_features), float("nan"), dtype=x.dtype)
    with testing.poisoned():
        launches = module.launches(x, *module.pack(*factors.values()), bias, y, epilogue or Epilogue(), config or {})
    for launch in launches:
        emulated_gluon.run(launch, **how)
    return y


def _judge(y, x, *rest, **more) -> None:
    """Hold an output to the budget of a kernel."""
    verdict = testing.judge(y, x, *rest, **more)
    assert y.dtype == x.dtype
    assert verdict.passed, verdict


@pytest.mark.parametrize("layer", AWKWARD, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_awkward_layers_are_within_their_budgets(layer, dtype):
    operands = testing.random_operands(layer, dtype=dtype)
    for impl in (impl for format, impl in KERNELS if format == layer.format):
        _judge(_emulate(layer, impl, operands), *operands)


@each_kernel
def test_every_candidate_is_right(format, impl):
    layer = Case(format, 150, 288, 264, (2, 3), 40)
    x, factors, bias = operands = testing.random_operands(layer, dtype=torch.bfloat16)
    module = _module(format, impl)
    options = module.candidates(x, *module.pack(*factors.values()))
    configs = [{name: tiles._asdict()} for name, each in options.items() for tiles in each]
    assert len(configs) > 3
    for config in configs[:: max(1, len(configs) // 12)]:
        _judge(_emulate(layer, impl, operands, config=config), x, factors, bias)


@each_kernel
@pytest.mark.parametrize("tokens", [1024, 1025, 2300])
def test_many_tiles_of_tokens(format, impl, tokens):
    """More than share what they read: the last of them are fewer."""
    layer = Case(format, tokens, 64, 96, (2, 3), 24)
    operands = testing.random_operands(layer, dtype=torch.bfloat16)
    _judge(_emulate(layer, impl, operands), *operands)


@each_kernel
def test_tiles_that_would_never_come_to_an_end_are_left_out(format, impl):
    """Those of a file; rules take their place."""
    x, factors, bias = operands = testing.random_operands(SQUARE, dtype=torch.bfloat16)
    module = _module(format, impl)
    for tiles in module.candidates(x, *factors.values())["only"][:2]:
        assert tiles.runs()
        assert not tiles._replace(slots=1).runs()
        assert not tiles._replace(slots=99).runs()
        _judge(_emulate(SQUARE, impl, operands, config={"only": tiles._replace(slots=1)._asdict()}), x, factors, bias)


@each_kernel
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "silu"])
def test_epilogues(format, impl, activation):
    x, factors, bias = testing.random_operands(SQUARE, dtype=torch.bfloat16)
    drawn = torch.randn(2, SQUARE.tokens, SQUARE.out_features, generator=torch.Generator().manual_seed(5)).bfloat16()
    for multiply, residual in itertools.product((None, drawn[0]), (None, drawn[1])):
        given = bias if multiply is None or residual is None else None
        y = _emulate(SQUARE, impl, (x, factors, given), Epilogue(activation, multiply, residual))
        follows = {"activation": activation, "multiply": multiply, "residual": residual}
        _judge(y, x, factors, given, follows, times=4 if activation else 2)


@each_kernel
def test_any_strides_and_addresses(format, impl):
    """What TMA cannot address is copied."""
    x, factors, bias = testing.random_operands(SQUARE, dtype=torch.bfloat16)
    turned = x.mT.contiguous().mT
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    apart = torch.stack([x] * 2, dim=-1)[..., 0]
    expected = _emulate(SQUARE, impl, (x, factors, bias))
    for each in (turned, shifted, apart):
        assert torch.equal(_emulate(SQUARE, impl, (each, factors, bias)), expected)
    same = x[:1].expand_as(x)  # rows 0 apart
    assert torch.equal(
        _emulate(SQUARE, impl, (same, factors, bias)), _emulate(SQUARE, impl, (same.clone(), factors, bias))
    )
    assert hopper_parts.is_aligned(x)
    assert not any(map(hopper_parts.is_aligned, (turned, shifted, apart, same)))
    assert torch.equal(_emulate(SQUARE, impl, (x, factors, bias), seed=7), expected)


@each_kernel
def test_infinite_inputs_stay_in_their_rows(format, impl):
    layer = Case(format, 70, 40, 40, (2, 2), 12)  # tiles reach beyond a block's 20 numbers
    x, factors, bias = testing.random_operands(layer, dtype=torch.bfloat16)
    expected = _emulate(layer, impl, (x, factors, bias))
    x[3] = float("inf")
    y = _emulate(layer, impl, (x, factors, bias))
    assert not torch.isfinite(y[3]).any()
    assert torch.equal(y[torch.arange(70) != 3], expected[torch.arange(70) != 3])


@each_kernel
def test_a_plan_describes_other_tensors_as_their_launches_do(format, impl):
    layer, seen = Case(format, 3, 64, 96, (4, 2), 8), []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments: seen.append(arguments)

    def operands(seed: int):
        x, factors, bias = testing.random_operands(layer, seed=seed, dtype=torch.bfloat16)
        return x, *_module(format, impl).pack(*factors.values()), bias, x.new_empty(3, 96)

    first, second = operands(1), operands(2)
    with plans.Watch() as watch:
        launches = _module(format, impl).launches(*first)
    assert not watch.computes
    plan = plans.prepare(launches, [Kernel()] * len(launches), first, watch.fresh)
    assert plan is not None
    plan.run(second)
    for launch, arguments in zip(_module(format, impl).launches(*second), seen, strict=True):
        wanted = {**launch.arguments, **launch.constants}
        for name, found in zip(launch.kernel.arg_names, arguments, strict=True):
            given, tensor = wanted[name], launching.tensor_of(wanted[name])
            if tensor is None:
                assert found == given
                continue
            address = found if tensor is given else found.base.data_ptr()
            assert address == tensor.data_ptr()
            if tensor is not given:
                assert (found.shape, found.strides) == (given.shape, given.strides)
                assert (found.block_shape, found.layout) == (given.block_shape, given.layout)


@each_kernel
def test_other_chips_and_dtypes_are_refused(format, impl, monkeypatch):
    x, factors, bias = testing.random_operands(SQUARE, dtype=torch.bfloat16)
    with pytest.raises(blrlab_ops.CannotRun, match=r"device 'cpu' is not a CUDA device: .*impl='torch_bmm'$"):
        blrlab_ops.linear(x, factors, bias, impl=impl)
    assert "dtype float32 is not one of ('float16', 'bfloat16')" in dispatch.why_not(format, impl, "cuda", "float32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    why_not = dispatch._why_not.__wrapped__
    for capability in ((8, 6), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        said = "needs compute capability 9.0 (H100, H200) and this device has {}.{}".format(*capability)
        assert said in why_not(impl, "cuda:1", "bfloat16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch.shutil, "which", lambda name: "/usr/bin/gcc")
    assert why_not(impl, "cuda:1", "bfloat16") is None
    monkeypatch.setattr(dispatch, "gluon_problem", lambda: "it needs Triton 3.6 or newer, and this is 3.5.1")
    assert "this is 3.5.1" in why_not(impl, "cuda:1", "bfloat16")


def test_an_older_triton_is_named(monkeypatch):
    triton = importlib.import_module("triton")
    for version, ends in (("3.5.1", "and this is 3.5.1"), ("3.10.0", None), ("3.6.0", None)):
        monkeypatch.setattr(triton, "__version__", version)
        found = dispatch.gluon_problem.__wrapped__()
        assert found is None if ends is None else found.endswith(ends)
    monkeypatch.setitem(sys.modules, "blrlab_ops.hopper_parts", None)
    assert "it is written for Triton 3.6 to 3.9, and this is 3.6.0" in dispatch.gluon_problem.__wrapped__()


@gluon.jit
def _sum_kernel(x, y, TILES: gl.constexpr, WAITS: gl.constexpr, ARRIVES: gl.constexpr):
    ring = gl.allocate_shared_memory(x.dtype, [1] + x.block_shape, x.layout)  # noqa: RUF005
    full = barriers(1, 1)
    empty = barriers(1, 1)
    gl.warp_specialize(
        [(_add, (y, ring, full, empty, TILES, WAITS, ARRIVES)), (_load, (x, ring, full, empty, TILES))], [1], [24]
    )


@gluon.jit
def _load(x, ring, full, empty, TILES: gl.constexpr):
    for tile in range(TILES):
        mbarrier.wait(empty.index(0), (tile & 1) ^ 1)
        mbarrier.expect(full.index(0), x.block_type.nbytes)
        async_load(x, [tile * 64, 0], full.index(0), ring.index(0))


@gluon.jit
def _add(y, ring, full, empty, TILES: gl.constexpr, WAITS: gl.constexpr, ARRIVES: gl.constexpr):
    total = gl.zeros([64, 64], gl.float32, None)
    for tile in range(TILES):
        if WAITS:
            mbarrier.wait(full.index(0), tile & 1)
        flying = warpgroup_mma(ring.index(0), ring.index(0), total, is_async=True)
        if ARRIVES == "early":
            mbarrier.arrive(empty.index(0))
        total = warpgroup_mma_wait(0, deps=(flying,))
        if ARRIVES == "late":
            mbarrier.arrive(empty.index(0))
    row = gl.arange(0, 64, None)
    gl.store(y + (row[:, None] * 64 + row[None, :]), total, mask=(row < 64)[:, None] & (row < 64)[None, :])


def _summed(**constants) -> bool:
    """Say whether the kernel is right with these constants."""
    tiles, y = torch.randn(TILES, 64, 64).bfloat16(), torch.zeros(64, 64)
    x = hopper_parts.descriptor(tiles.view(-1, 64), [64, 64])
    constants = {"TILES": TILES, "WAITS": True, "ARRIVES": "late"} | constants
    launch = launching.Launch(_sum_kernel, 1, {"x": x, "y": y}, constants, 4, 1)
    emulated_gluon.run(launch)
    return torch.allclose(y, (tiles.float() @ tiles.float()).sum(0), atol=1e-3)


def test_the_emulator_runs_what_is_right():
    assert _summed()


@pytest.mark.parametrize("fault", [{"WAITS": False}, {"ARRIVES": "early"}, {"ARRIVES": "never"}], ids=str)
def test_the_emulator_sees_what_a_chip_would_do_wrong(fault, monkeypatch):
    """Wrong numbers, or an error where a phase that somebody waits for was missed."""
    monkeypatch.setattr(emulated_gluon, "PATIENCE", 0.5)
    with contextlib.suppress(emulated_gluon.Fault):
        assert not _summed(**fault)
