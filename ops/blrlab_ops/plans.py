"""Plans: the launches of an operator, prepared once for tensors that are alike, so that a call costs little of Python.

Describing launches takes tens of views, and Triton reads every argument anew: hundreds of us, where the kernels take
ten. A plan keeps the compiled kernels with their arguments, and where in which tensor each pointer points. A call finds
it by all that it depends on: dtypes, sizes, strides, alignment and devices of the tensors, a word of the operator's,
and what tuning has kept.

A plan is made when tensors like these are met for the second time: a number of tokens that never comes again is not
worth one. None is made where describing the launches copies or computes, or where tensors overlap in memory.
"""

from collections.abc import Callable, Container, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import launching, tuning
from .launching import Launch

MOST = 1024  # kept by one operator
ALIGNMENT = 512  # bytes, as PyTorch allocates
_FRESH = ("aten::empty", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided")


class Step(NamedTuple):
    """One launch, `start(*arguments)`, once pointers are set.

    Attributes:
      start: starts the kernel.
      arguments: of it; those that `pointers` and `descriptors` name are set in every call.
      pointers: each (argument, tensor, bytes from its beginning).
      descriptors: of those, the arguments that describe memory and do not only point to it.
    """

    start: Callable[..., None]
    arguments: list[Any]
    pointers: list[tuple[int, int, int]]
    descriptors: dict[int, Any]


class Plan(NamedTuple):
    """What runs, and the bytes of memory that one launch hands on to the next: pointers name it after the tensors."""

    steps: list[Step]
    workspace_bytes: int

    def run(self, tensors: Sequence[Tensor | None]) -> None:
        """Run the launches on tensors like those that the plan was made of, on the first one's device."""
        bases = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        workspace = torch.empty(self.workspace_bytes, dtype=torch.uint8, device=_first(tensors).device)
        bases.append(workspace.data_ptr())
        for start, arguments, pointers, descriptors in self.steps:
            filled = arguments.copy()
            for argument, tensor, offset in pointers:
                filled[argument] = bases[tensor] + offset
            for argument, descriptor in descriptors.items():
                filled[argument] = launching.moved(descriptor, filled[argument])
            start(*filled)


class Plans:
    """The plans of one operator."""

    def __init__(self) -> None:
        self._met: set[Hashable] = set()
        self._plans: dict[Hashable, Plan | None] = {}  # of those met again; None where no plan can be made

    def run(self, tensors: Sequence[Tensor | None], word: Hashable, describe: Callable[[], list[Launch]]) -> None:
        """Run launches on the current stream of the first tensor's device.

        Args:
          tensors: all that the launches read and write, but for memory that `describe` allocates; None is none.
          word: what else the launches depend on.
          describe: returns the launches; called where there is no plan.
        """
        device = _first(tensors).device
        if device.type != "cuda":
            launching.run(describe(), device)
            return
        key = (word, tuning.version(), *map(signature, tensors))
        plan = self._plans.get(key)
        if plan is not None:
            with launching.on(device):
                plan.run(tensors)
        elif key in self._met and key not in self._plans:
            self._plans[key] = _made(tensors, describe)
        else:
            launching.run(describe(), device)
            if len(self._met) >= MOST:
                self._met.clear()
                self._plans.clear()
            self._met.add(key)


def _made(tensors: Sequence[Tensor | None], describe: Callable[[], list[Launch]]) -> Plan | None:
    """Run launches, and make their plan where that can be."""
    with Watch() as watch:
        launches = describe()
    kernels = launching.run(launches, _first(tensors).device)
    return None if watch.computes else prepare(launches, kernels, tensors, watch.fresh)


def prepare(
    launches: Sequence[Launch], kernels: Sequence[Any], tensors: Sequence[Tensor | None], fresh: Container[int]
) -> Plan | None:
    """Make the plan of launches that read and write tensors, or memory of their own.

    Args:
      launches: those that were run.
      kernels: each one's compiled kernel; None where there is none, as in Triton's interpreter.
      tensors: as in `Plans.run`.
      fresh: addresses of the memory that was allocated for these launches, to hand results on in.

    Returns:
      The plan; None where tensors overlap or are empty, a kernel is missing, or other memory is used.
    """
    if any(tensor is not None and tensor.numel() == 0 for tensor in tensors):
        return None
    extents = [(0, 0) if tensor is None else extent(tensor) for tensor in tensors]
    places: dict[int, int] = {}  # of memory that is no tensor's: by its address, bytes from the workspace's beginning
    steps, size = [], 0
    for launch, kernel in zip(launches, kernels, strict=True):
        if not launch.programs:
            continue
        if kernel is None:
            return None
        named = {**launch.arguments, **launch.constants}
        arguments = [named[name] for name in launch.kernel.arg_names]
        pointers = []
        for number, value in enumerate(map(launching.tensor_of, arguments)):
            if value is None:
                continue
            at = value.data_ptr()
            inside = [tensor for tensor, (begin, end) in enumerate(extents) if begin <= at < end]
            if len(inside) > 1:
                return None
            if inside:
                pointers.append((number, inside[0], at - extents[inside[0]][0]))
                continue
            storage = value.untyped_storage()
            if storage.data_ptr() not in fresh:
                return None
            if storage.data_ptr() not in places:
                places[storage.data_ptr()] = size
                size += -(-storage.nbytes() // ALIGNMENT) * ALIGNMENT
            pointers.append((number, len(tensors), places[storage.data_ptr()] + at - storage.data_ptr()))
        described = {number for number, *_ in pointers if not isinstance(arguments[number], Tensor)}
        descriptors = {number: launching.moved(arguments[number], 0) for number in described}
        for number, *_ in pointers:
            arguments[number] = 0
        steps.append(Step(kernel[(launch.programs, 1, 1)], arguments, pointers, descriptors))
    return Plan(steps, size)


def signature(tensor: Tensor | None) -> Hashable:
    """Return all that launches depend on in a tensor but its address: Triton compiles for addresses of 16 bytes."""
    if tensor is None:
        return None
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.device, tensor.data_ptr() % 16


def extent(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses that a tensor lies between."""
    begin = tensor.data_ptr()
    if tensor.numel() == 0:
        return begin, begin
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()


def _first(tensors: Sequence[Tensor | None]) -> Tensor:
    first = tensors[0]
    assert first is not None
    return first


class Watch(TorchDispatchMode):
    """Notes whether PyTorch does more than views and fresh memory meanwhile, and where that memory is."""

    def __init__(self) -> None:
        super().__init__()
        self.computes = False
        self.fresh: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name in _FRESH:
            self.fresh.add(result.untyped_storage().data_ptr())
        else:
            self.computes |= func._schema.is_mutable or not _views(result, args)
        return result


def _views(result: Any, args: Sequence[Any]) -> bool:
    """Say whether a result is a view of the first argument.

    Not by the operation: inside an operator `reshape` comes whole to a mode, and it may copy.
    """
    if not isinstance(result, Tensor) or not args or not isinstance(args[0], Tensor):
        return False
    return result.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr()
