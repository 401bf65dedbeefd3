"""Runs Gluon kernels without a GPU, as far as the Hopper kernels need it: Triton interprets none of them.

The partitions of a warp-specialised kernel are threads over one shared memory. What is asynchronous on the chip is late
here: TMA's copies are made out of turn by a thread of their own, and products take their operands when somebody waits
for them. So a kernel that reads a tile too early, or fills one again too early, gives wrong numbers, and one that waits
for what never comes is an error after `PATIENCE` seconds.
"""

import contextlib
import random
import threading
import time
import types
from typing import Any

import torch
from blrlab_ops import hopper_parts
from blrlab_ops.launching import Launch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import JITFunction

PATIENCE = 20.0
LINGERS = 0.05  # the share of waits for a product during which all else goes on
DTYPES = {gl.bfloat16: torch.bfloat16, gl.float16: torch.float16, gl.float32: torch.float32, gl.int64: torch.int64}
place = threading.local()  # of a partition: its program, its products under way


class Fault(Exception):
    """A kernel did what a chip would not do, or not do right."""


def require(right: Any, fault: str) -> None:
    if not right:
        raise Fault(fault)


def run(launch: Launch, seed: int = 0) -> None:
    """Run all programs of a launch at the same time."""
    kernel, given = Names().rebound(launch.kernel), {**launch.arguments, **launch.constants}
    arguments = {name: argument(given[name]) for name in launch.kernel.arg_names}
    programs = [Program(number, launch.programs, random.Random(seed + number)) for number in range(launch.programs)]

    def one(program: Program) -> None:
        with program.copies():
            place.program = program
            kernel(**arguments)

    at_once([(one, (program,)) for program in programs], programs)


def at_once(functions: list[tuple], programs: list["Program"]) -> None:
    """Call functions, each with its arguments, in threads; raise the first fault, which ends these programs."""
    problems: list[BaseException] = []

    def guarded(function, arguments) -> None:
        try:
            function(*arguments)
        except BaseException as problem:
            problems.append(problem)
            for program in programs:
                program.fail(problem)

    threads = [threading.Thread(target=guarded, args=each, daemon=True) for each in functions]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    if problems:
        raise problems[0]


def argument(value: Any) -> Any:
    """Return what a kernel sees of an argument."""
    if isinstance(value, TensorDescriptor):
        return Described(value)
    return Pointer(value.view(-1), 0) if isinstance(value, Tensor) else value


class Program:
    """One program: what is to be copied, and the partitions' first error."""

    def __init__(self, number: int, count: int, order: random.Random) -> None:
        self.number, self.count, self.order = number, count, order
        self.changed, self.pending, self.problem = threading.Condition(), [], None
        self.ended = False

    def fail(self, problem: BaseException) -> None:
        with self.changed:
            self.problem = self.problem or problem
            self.changed.notify_all()

    @contextlib.contextmanager
    def copies(self):
        """Copy meanwhile what is pending, in any order."""
        engine = threading.Thread(target=self._copy, daemon=True)
        engine.start()
        try:
            yield
        finally:
            with self.changed:
                self.ended = True
                self.changed.notify_all()
            engine.join()
        require(not self.pending, "a copy was never waited for")

    def _copy(self) -> None:
        with self.changed:
            while not self.ended:
                self.changed.wait_for(lambda: self.pending or self.ended)
                if self.pending:
                    try:
                        self.pending.pop(self.order.randrange(len(self.pending)))()
                    except Fault as problem:
                        self.fail(problem)
                    self.changed.notify_all()

    def partitions(self, functions: list[tuple]) -> None:
        """Run functions at the same time until all have ended."""

        def one(function, *arguments) -> None:
            place.program, place.products = self, []
            function(*arguments)
            require(not place.products, "a product was never waited for")

        at_once([(one, (function, *arguments)) for function, arguments in functions], [self])
        if self.problem:
            raise self.problem


class Barrier:
    """A barrier of shared memory: a phase ends when all have arrived and all bytes that it expects have come."""

    def __init__(self) -> None:
        self.count = self.missing = self.bytes = self.phase = 0

    def change(self, arrivals: int, expected: int) -> None:
        require(self.count, "the barrier is not initialised")
        self.missing -= arrivals
        self.bytes += expected
        require(self.missing >= 0, "more arrivals than the barrier counts")
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase ^ 1, self.count


class Barriers(list):
    def index(self, number: int) -> Barrier:  # type: ignore[override]  # as Gluon has it
        return self[number]


class Shared:
    """A piece of shared memory."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers, self.shape, self.dtype = numbers, list(numbers.shape), numbers.dtype

    def index(self, number: int) -> "Shared":
        return Shared(self.numbers[number])

    def reshape(self, shape: list[int]) -> "Shared":
        return Shared(self.numbers.view(shape))

    def permute(self, order: list[int]) -> "Shared":
        return Shared(self.numbers.permute(order))


class Described:
    """A tensor as TMA sees it."""

    def __init__(self, descriptor: TensorDescriptor) -> None:
        base, self.block_shape, self.layout = descriptor.base, list(descriptor.block_shape), None
        self.tensor = base.as_strided(descriptor.shape, descriptor.strides)
        self.dtype = base.dtype
        size = base.element_size()
        for each in self.block_shape:
            size *= each
        self.block_type = types.SimpleNamespace(nbytes=size)

    def box(self, corner: list[int]) -> tuple[Tensor, tuple[slice, ...]]:
        """Return what of a tile lies inside the tensor, and where in the tile."""
        sizes = self.tensor.shape
        ends = [min(size, at + side) for size, at, side in zip(sizes, corner, self.block_shape, strict=True)]
        inside = tuple(slice(0, max(0, end - at)) for at, end in zip(corner, ends, strict=True))
        return self.tensor[tuple(slice(at, max(at, end)) for at, end in zip(corner, ends, strict=True))], inside


class Pointer:
    """An address, or a tile of addresses, in the numbers of a tensor."""

    def __init__(self, numbers: Tensor, at: Any) -> None:
        self.numbers, self.at = numbers, at
        self.dtype = types.SimpleNamespace(element_ty=numbers.dtype)

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.numbers, self.at + offset)


class Sums:
    """What a product under way will add up to."""

    def __init__(self) -> None:
        self.value: Tensor | None = None


def _value(given: Any) -> Tensor:
    return given.value if isinstance(given, Sums) else given


def _operand(given: Any) -> Tensor:
    return (given.numbers if isinstance(given, Shared) else given).float()


def product(left, right, total, *, is_async=False, use_acc=True):
    """Put a product on its way."""
    found = Sums()
    place.products.append((left, right, total, use_acc, found))
    return found if is_async else finished(0, (found,))


def finished(pending=0, deps=()):
    """Wait until so many products are under way at most; results of those may only be added to."""
    if place.program.order.random() < LINGERS:
        time.sleep(0.002)
    while len(place.products) > pending:
        left, right, total, use_acc, found = place.products.pop(0)
        require(_operand(left).shape[0] == 64, "a warpgroup multiplies 64 rows")
        found.value = _operand(left) @ _operand(right)
        if use_acc:
            found.value += _value(total)
    values = tuple(each.value if isinstance(each, Sums) and each.value is not None else each for each in deps)
    return values[0] if len(values) == 1 else values


def wait(barrier: Barrier, phase: int) -> None:
    """Wait for the end of a phase."""
    program = place.program
    with program.changed:
        came = program.changed.wait_for(lambda: barrier.phase != phase or program.problem, PATIENCE)
        require(came, "waited in vain")
        require(not program.problem, "something else failed")


def signal(barrier: Barrier, arrivals: int, expected: int) -> None:
    with place.program.changed:
        barrier.change(arrivals, expected)
        place.program.changed.notify_all()


def init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.missing = count


def load_box(described: Described, corner: list[int], barrier: Barrier, into: Shared) -> None:
    """Have a tile copied into shared memory."""
    require(into.shape == described.block_shape, "a tile is copied to one of another shape")

    def do() -> None:
        values, inside = described.box([int(at) for at in corner])
        into.numbers.zero_()
        into.numbers[inside] = values
        barrier.change(0, -described.block_type.nbytes)

    with place.program.changed:
        place.program.pending.append(do)
        place.program.changed.notify_all()


def load(pointer: Pointer, mask: Tensor, other: float) -> Tensor:
    at = torch.where(mask, pointer.at, 0)
    return torch.where(mask, pointer.numbers[at], other)


def store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    pointer.numbers[pointer.at[mask]] = value[mask]


def allocate(dtype: Any, shape: list[int], layout: Any) -> Any:
    if isinstance(layout, hopper.mbarrier.MBarrierLayout):
        return Barriers(Barrier() for _ in range(shape[0]))
    return Shared(torch.full(shape, float("nan"), dtype=dtype))


LANGUAGE = types.SimpleNamespace(
    **{name: dtype for dtype in DTYPES.values() for name in [str(dtype).removeprefix("torch.")]},
    constexpr=gl.constexpr,
    NVMMADistributedLayout=lambda **_: None,
    SliceLayout=lambda *_: None,
    DotOperandLayout=lambda *_: None,
    allocate_shared_memory=allocate,
    arange=lambda start, end, layout=None: torch.arange(start, end, dtype=torch.int32),
    convert_layout=lambda value, layout: value,
    erf=torch.erf,
    exp=torch.exp,
    load=load,
    minimum=min,
    num_programs=lambda axis: place.program.count,
    program_id=lambda axis: place.program.number,
    static_range=range,
    store=store,
    warp_specialize=lambda functions, warps, registers: place.program.partitions(functions),
    zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
)
BARRIER = types.SimpleNamespace(
    MBarrierLayout=hopper.mbarrier.MBarrierLayout,
    arrive=lambda barrier: signal(barrier, 1, 0),
    expect=lambda barrier, size: signal(barrier, 1, size),
    init=init,
    wait=wait,
)
FAKES = {
    id(gl): LANGUAGE,
    id(hopper.mbarrier): BARRIER,
    id(hopper.warpgroup_mma): product,
    id(hopper.warpgroup_mma_wait): finished,
    id(hopper_parts.async_load): load_box,
}


class Names:
    """Kernels' functions, in modules where Gluon's names mean what they mean here."""

    def __init__(self) -> None:
        self.spaces: dict[int, dict[str, Any]] = {}

    def rebound(self, kernel: Any) -> Any:
        function = kernel.fn
        known = function.__globals__
        if id(known) not in self.spaces:
            space = self.spaces[id(known)] = dict(known)
            space.update({name: self._seen(value) for name, value in known.items()})
        return types.FunctionType(function.__code__, self.spaces[id(known)], function.__name__, function.__defaults__)

    def _seen(self, value: Any) -> Any:
        fake = FAKES.get(id(value))
        if fake is None and isinstance(value, JITFunction):
            return self.rebound(value)
        if isinstance(value, gl.constexpr):
            return value.value
        return value if fake is None else fake
