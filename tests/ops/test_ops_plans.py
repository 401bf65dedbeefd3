"""Plans of launches: they point where the launches point, and are made of what can be run again and of nothing else."""

import importlib

import pytest
import torch
from blrlab_ops import dispatch, launching, plans, testing
from blrlab_ops.epilogue import Epilogue
from blrlab_ops.testing import Case

LAYERS = {
    "low_rank": Case("low_rank", 3, 64, 96, (1, 1), 24),
    "monarch": Case("monarch", 3, 64, 96, (4, 2), 12),
    "blast": Case("blast", 3, 64, 96, (4, 2), 24),
}
KERNELS = [(format, impl) for format in dispatch.IMPLS for impl in dispatch.impls(format) if dispatch.is_portable(impl)]
OPERATORS: list = []  # of these tests, kept: a name can be registered once
pytest.importorskip("triton")


class Kernel:
    """Stands for a compiled kernel: notes what it is launched with."""

    def __init__(self, seen: list) -> None:
        self.seen = seen

    def __getitem__(self, grid: tuple[int, int, int]):
        return lambda *arguments: self.seen.append((grid, arguments))


def _operands(format: str, seed: int, fused: bool = True):
    """Draw (x, *weights, bias, multiply, residual, y) as an implementation's kernels take them."""
    layer = LAYERS[format]
    x, factors, bias = testing.random_operands(layer, seed=seed)
    follows = list(torch.randn(2, layer.tokens, layer.out_features)) if fused else [None, None]
    follows = [None if each is None else each.clone() for each in follows]
    return x, *factors.values(), bias, *follows, x.new_empty(layer.tokens, layer.out_features)


def _launches(format: str, impl: str, operands):
    x, *weights, bias, multiply, residual, y = operands
    module = importlib.import_module(f"blrlab_ops.{format}.{impl}")
    return module.launches(x, *weights, bias, y, Epilogue("silu", multiply, residual))


def _packed(format: str, impl: str, operands):
    module = importlib.import_module(f"blrlab_ops.{format}.{impl}")
    count = len(testing.random_factors(format, *LAYERS[format][2:]))
    return operands[0], *module.pack(*operands[1 : 1 + count]), *operands[1 + count :]


@pytest.mark.parametrize(("format", "impl"), KERNELS)
def test_a_plan_points_into_other_tensors_as_their_launches_do(format, impl):
    first, second = (_packed(format, impl, _operands(format, seed)) for seed in (1, 2))
    seen: list = []
    with plans.Watch() as watch:
        launches = _launches(format, impl, first)
    plan = plans.prepare(launches, [Kernel(seen)] * len(launches), first, watch.fresh)
    assert plan is not None
    plan.run(second)
    expected = _launches(format, impl, second)
    assert len(seen) == len(expected)
    owned = [plans.extent(each) for each in second if each is not None]
    moved = set()
    for (grid, arguments), launch in zip(seen, expected, strict=True):
        assert grid == (launch.programs, 1, 1)
        named = {**launch.arguments, **launch.constants}
        for argument, name in zip(arguments, launch.kernel.arg_names, strict=True):
            wanted = named[name]
            if not isinstance(wanted, torch.Tensor):
                assert argument == wanted, name
            elif any(begin <= wanted.data_ptr() < end for begin, end in owned):
                assert argument == wanted.data_ptr(), name
            else:  # memory of the launches' own, which lies elsewhere, but all of it moved alike
                moved.add((wanted.untyped_storage().data_ptr(), argument - wanted.data_ptr()))
    assert len(moved) == len({storage for storage, _ in moved})


def test_memory_between_launches_does_not_overlap():
    x = torch.zeros(8)
    first, second = torch.empty(100), torch.empty(300)
    launch = launching.Launch(_named("a", "b", "c"), 1, {"a": x, "b": first, "c": second[10:]}, {}, 4, 1)
    seen: list = []
    fresh = {first.data_ptr(), second.data_ptr()}
    plan = plans.prepare([launch], [Kernel(seen)], (x,), fresh)
    assert plan is not None
    plan.run((x,))
    (_, (a, b, c)), *_ = seen
    assert (a, c - 40 - b) == (x.data_ptr(), 512)
    assert plan.workspace_bytes == 512 + 1536
    assert plans.prepare([launch], [Kernel(seen)], (x,), {first.data_ptr()}) is None  # the second lives on elsewhere
    assert plans.prepare([launch], [None], (x,), fresh) is None  # as the interpreter's kernels
    assert plans.prepare([launch], [Kernel(seen)], (x, torch.empty(0)), fresh) is None


def test_overlapping_tensors_have_no_plan():
    """A residual that is the input may be another tensor in the next call."""
    operands = _operands("monarch", 1)
    operands = (*operands[:4], operands[5], operands[5], operands[6])
    with plans.Watch() as watch:
        launches = _launches("monarch", "triton_streaming", operands)
    assert plans.prepare(launches, [Kernel([])] * len(launches), operands, watch.fresh) is None


def test_a_launch_of_no_programs_is_left_out():
    launch = launching.Launch(_named("a"), 0, {"a": torch.zeros(3)}, {}, 4, 1)
    assert plans.prepare([launch], [None], (torch.zeros(3),), ()) == plans.Plan([], 0)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda x: x.clone(), True),
        (lambda x: x[:, :8], False),
        (lambda x: x.t().contiguous().t(), False),
        (lambda x: x.half(), False),
        (lambda x: x.to("meta"), False),
        (lambda x: torch.cat([x.flatten(), x.flatten()])[1:65].view(4, 16), False),
    ],
    ids=["copy", "narrower", "strides", "dtype", "device", "alignment"],
)
def test_a_signature_tells_what_a_kernel_is_compiled_for(change, same):
    x = torch.randn(4, 16)
    assert (plans.signature(x) == plans.signature(change(x))) is same
    assert plans.signature(None) is None


@pytest.mark.parametrize(
    ("work", "computes"),
    [
        (lambda x: x.view(2, 32).unflatten(1, (4, 8)).transpose(0, 1)[None], False),
        (lambda x: x.t().flatten(0), True),
        (lambda x: x.reshape(-1), False),
        (lambda x: x.t().reshape(-1), True),
        (lambda x: x.contiguous(), False),
        (lambda x: x.t().contiguous(), True),
        (lambda x: x.new_empty(3, 4), False),
        (lambda x: x.new_zeros(3), True),
        (lambda x: x.zero_(), True),
        (lambda x: torch.empty(3), False),
        (lambda x: torch.arange(3), True),
        (lambda x: torch.cat([x, x]), True),
    ],
    ids=[
        "views",
        "flatten",
        "reshape",
        "copy",
        "contiguous",
        "packing",
        "memory",
        "zeros",
        "writing",
        "empty",
        "arange",
        "cat",
    ],
)
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside an operator"])
def test_what_computes_is_noticed(work, computes, inside):
    """Inside an operator, where plans are made, PyTorch does not take operations apart."""
    found = []

    def watched(x: torch.Tensor) -> torch.Tensor:
        with plans.Watch() as watch:
            work(x)
        found.append(watch.computes)
        return torch.empty(1)

    if inside:
        name = f"blrlab_tests::watched_{len(OPERATORS)}"
        OPERATORS.append(torch.library.custom_op(name, watched, mutates_args=("x",)))
        watched = OPERATORS[-1]
    watched(torch.randn(4, 16))
    assert found == [computes]


def _named(*names: str):
    """Return what a launch knows of a kernel: the names of its arguments."""
    return type("Named", (), {"arg_names": names})
