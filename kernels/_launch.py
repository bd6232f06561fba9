"""Launches, and calls of operators: what one launches is worked out once for all calls that are alike.

Calls are alike where tensors agree in shape, strides, dtype, device and address modulo 16, and all else is equal. What
is remembered of a call has neither tensors nor addresses: compiled kernels, their integers, and which of the call's
tensors each pointer belongs to.
"""

import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Calls that are remembered: a network has a few per batch size.
MOST_CALLS = 1024


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments, as it is launched."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    warps: int
    registers: int | None = None

    def options(self, hip: bool) -> dict[str, int]:
        """Compiler options."""
        # In large kernels ptxas, left to itself, spills to reach the next step of occupancy. ROCm has no such option.
        if self.registers is None or hip:
            return {"num_warps": self.warps}
        return {"num_warps": self.warps, "maxnreg": self.registers}


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def start(launches: Sequence[Launch], device: torch.device) -> list[Any]:
    """Launch on the current stream of the tensors' device; the compiled kernels, None of the interpreter's."""
    hip = torch.version.hip is not None
    with on(device):
        return [launch.kernel[(launch.programs,)](**launch.arguments, **launch.options(hip)) for launch in launches]


class Workspace(NamedTuple):
    """What a launch leaves for the next, or for its last program."""

    size: int
    dtype: torch.dtype
    device: torch.device
    zeroed: bool

    def allocate(self) -> Tensor:
        new = torch.zeros if self.zeroed else torch.empty
        return new(self.size, dtype=self.dtype, device=self.device)


class _Allocated(threading.local):
    """The workspaces of the call that is being worked out."""

    workspaces: list[tuple[Workspace, Tensor]] | None = None


_allocated = _Allocated()


def workspace(size: int, dtype: torch.dtype, device: torch.device, *, zeroed: bool = False) -> Tensor:
    """(size) new numbers for the launches of one call; every call has its own."""
    described = Workspace(size, dtype, device, zeroed)
    tensor = described.allocate()
    if _allocated.workspaces is not None:
        _allocated.workspaces.append((described, tensor))
    return tensor


class _Values(NamedTuple):
    """Arguments of a later call, or a tuple among them, without addresses."""

    values: list[Any]
    pointers: list[tuple[int, int, int]]  # positions; of the call's tensors, workspaces last, which; bytes into it
    tuples: list[tuple[int, "_Values"]]  # positions, and tuples that have pointers

    def addressed(self, addresses: Sequence[int]) -> list[Any]:
        values = self.values.copy()
        for position, tensor, offset in self.pointers:
            values[position] = addresses[tensor] + offset
        for position, inner in self.tuples:
            values[position] = tuple(inner.addressed(addresses))
        return values


class _Prepared(NamedTuple):
    """A launch of later calls."""

    launch: Callable[..., None]
    arguments: _Values

    def run(self, addresses: Sequence[int]) -> None:
        self.launch(*self.arguments.addressed(addresses))


class _Call(NamedTuple):
    workspaces: list[Workspace]
    launches: list[_Prepared]

    def run(self, tensors: Sequence[Tensor]) -> None:
        # Held until all launches have been queued.
        workspaces = [described.allocate() for described in self.workspaces]
        addresses = [tensor.data_ptr() for tensor in (*tensors, *workspaces)]
        for launch in self.launches:
            launch.run(addresses)


class _Unclear(Exception):
    """Raised if it is unclear to which tensor a pointer belongs."""


def _pointer(value: Tensor, tensors: Sequence[Tensor], workspaces: Sequence[Tensor]) -> tuple[int, int]:
    """The tensor of the call that `value` is a view of, and the offset in it."""
    storage = value.untyped_storage().data_ptr()
    for i, tensor in enumerate(workspaces):
        if tensor.untyped_storage().data_ptr() == storage:
            return len(tensors) + i, value.data_ptr() - tensor.data_ptr()
    same = [i for i, tensor in enumerate(tensors) if tensor is value]
    same = same or [i for i, tensor in enumerate(tensors) if tensor.data_ptr() == value.data_ptr()]
    if len(same) != 1:
        raise _Unclear
    return same[0], 0


def _values(arguments: Sequence[Any], tensors: Sequence[Tensor], workspaces: Sequence[Tensor]) -> _Values:
    found = _Values(list(arguments), [], [])
    for i, value in enumerate(arguments):
        if isinstance(value, Tensor):
            found.pointers.append((i, *_pointer(value, tensors, workspaces)))
            found.values[i] = None
        elif isinstance(value, tuple):
            inner = _values(value, tensors, workspaces)
            if inner.pointers or inner.tuples:
                found.tuples.append((i, inner))
                found.values[i] = None
    return found


def _prepared(launch: Launch, compiled: Any, tensors: Sequence[Tensor], workspaces: Sequence[Tensor]) -> _Prepared:
    arguments = [launch.arguments[name] for name in launch.kernel.arg_names]
    return _Prepared(compiled[(launch.programs, 1, 1)], _values(arguments, tensors, workspaces))


_calls: dict[Hashable, _Call] = {}


def _described(argument: Any, tensors: list[Tensor]) -> Hashable:
    """What calls that are alike agree on; the tensors are collected."""
    if isinstance(argument, Tensor):
        tensors.append(argument)
        return argument.shape, argument.stride(), argument.dtype, argument.device, argument.data_ptr() & 15
    if isinstance(argument, list | tuple):
        return tuple([_described(entry, tensors) for entry in argument])
    return argument


def run(make: Callable[..., list[Launch]], device: torch.device, *arguments: Any) -> None:
    """Launch `make(*arguments)` on the current stream of the device.

    Args:
        make: a function of a module, which depends on nothing but what `arguments` are described by: not on the
            values of tensors.
    """
    tensors: list[Tensor] = []
    key = make, _described(arguments, tensors)
    call = _calls.get(key)
    if call is not None:
        with on(device):
            call.run(tensors)
        return
    allocated: list[tuple[Workspace, Tensor]] = []
    _allocated.workspaces = allocated
    try:
        launches = [launch for launch in make(*arguments) if launch.programs]
    finally:
        _allocated.workspaces = None
    compiled = start(launches, device)
    # The interpreter compiles nothing.
    if None in compiled:
        return
    workspaces = [tensor for _, tensor in allocated]
    try:
        prepared = [_prepared(*each, tensors, workspaces) for each in zip(launches, compiled, strict=True)]
    except _Unclear:
        return
    if len(_calls) >= MOST_CALLS:
        _calls.pop(next(iter(_calls)), None)
    _calls[key] = _Call([described for described, _ in allocated], prepared)
