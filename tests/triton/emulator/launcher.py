"""Launches on CPU tensors: compiled by Triton for a GPU, and run here."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from emulator.faults import Race, UndefinedRegister, UnknownInstruction
from emulator.machine import Machine, Result
from emulator.memory import GlobalMemory
from emulator.parsing import Kernel, parse
from moment_ops.kernels._plan import Launch
from moment_ops.kernels._resources import compile_launch

_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted")


class Allocations(TorchDispatchMode):
    """Knows which tensors were allocated in it and not written: outputs, and the workspace of launches."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        if function.overloadpacket.__name__ in _EMPTY:
            # Kept, so that no other storage takes its address.
            storage = result.untyped_storage()
            self.storages[storage.data_ptr()] = storage
        elif isinstance(result, Tensor):
            schema = function._schema
            if schema.is_mutable:
                self.storages.pop(result.untyped_storage().data_ptr(), None)
        return result


@dataclass(frozen=True)
class Schedule:
    """How blocks run: `together` of them in lockstep, in the order of the grid, reversed, or in a random one.

    together: as many as make some hundred lanes where it is None. warps: together, or one after another up to the next
    barrier: forward or reversed. inexact: approximate instructions err as far as they may.
    """

    order: str = "forward"
    together: int | None = None
    warps: str = "together"
    seed: int = 0
    inexact: bool = False

    def blocks(self, programs: int) -> list[int]:
        """The numbers of the blocks."""
        if self.order == "random":
            return np.random.default_rng(self.seed).permutation(programs).tolist()
        return list(range(programs))[:: -1 if self.order == "reversed" else 1]

    def turns(self, warps: int) -> list[int]:
        """The warps of a block, where they take turns."""
        turns = [] if self.warps == "together" else list(range(warps))
        return turns[:: -1 if self.warps == "reversed" else 1]


_LANES = 1024


@dataclass(frozen=True)
class Compiled:
    """PTX and what a launch of it needs to know."""

    ptx: str
    shared: int
    signature: tuple[Any, ...]

    @property
    def kernel(self) -> Kernel:
        """The parsed text."""
        return _parsed(self.ptx)


@functools.lru_cache(maxsize=64)
def _parsed(text: str) -> Kernel:
    return parse(text)


def compiled(launch: Launch, architecture: int) -> Compiled:
    """What Triton makes of a launch."""
    result = compile_launch(launch, architecture)
    signature = tuple(result.src.signature[name] for name in launch.kernel.arg_names)
    return Compiled(result.asm["ptx"], result.metadata.shared, signature)


def run(
    launches: Sequence[Launch],
    architecture: int,
    fresh: Allocations | None = None,
    schedule: Schedule | None = None,
    codes: Sequence[Compiled] | None = None,
    allow_races: bool = False,
) -> list[Result]:
    """Run launches one after another, as on a stream; their tensors are changed in place. A race is a fault.

    fresh: what nobody has written yet. codes: what was compiled of the launches, or was made of that.
    """
    schedule = schedule or Schedule()
    codes = codes or [compiled(launch, architecture) for launch in launches]
    arguments = [list(_bound(launch, code)) for launch, code in zip(launches, codes, strict=True)]
    tensors = [(name, value) for bound in arguments for name, value, _ in bound if isinstance(value, Tensor)]
    memory = GlobalMemory(tensors, set(fresh.storages) if fresh else set())
    results = []
    for launch, code, bound in zip(launches, codes, arguments, strict=True):
        result = _run(launch, code, bound, memory, schedule)
        if result.races and not allow_races:
            raise Race("\n".join(map(str, result.races)))
        results.append(result)
    memory.write_back()
    return results


def _run(launch: Launch, code: Compiled, bound: list[Any], memory: GlobalMemory, schedule: Schedule) -> Result:
    kernel, threads = code.kernel, 32 * launch.warps
    parameters = bytearray(kernel.parameter_bytes)
    # Triton's own trailing pointers, to scratch memory, are null.
    for parameter, (_, value, _) in zip(kernel.parameters, bound, strict=False):
        number = memory.address(value) if isinstance(value, Tensor) else int(value)
        if parameter.pointer != isinstance(value, Tensor):
            raise UnknownInstruction(f"argument for {parameter}")
        field = (number & (1 << 8 * parameter.size) - 1).to_bytes(parameter.size, "little")
        parameters[parameter.offset : parameter.offset + parameter.size] = field
    together = schedule.together or max(1, _LANES // threads)

    def machine(contested: dict[int, set[int]]) -> Machine:
        return Machine(
            kernel,
            memory,
            bytes(parameters),
            launch.programs,
            threads,
            code.shared,
            min(together, launch.programs),
            schedule.turns(launch.warps),
            schedule.seed,
            schedule.inexact,
            contested,
        )

    order = schedule.blocks(launch.programs)
    before = memory.saved()
    result = machine({}).run(order)
    if result.races and all(race.is_read for race in result.races):
        after = memory.saved()
        memory.restore(before)
        # Where nobody looks at what was read in a race, it is none: threads that hold copies load them, too.
        try:
            machine(result.reads).run(order)
            result.races = []
        except UndefinedRegister as fault:
            result.races = [replace(race, example=f"{race.example}; it is used: {fault}") for race in result.races]
        memory.restore(after)
    return result


def _bound(launch: Launch, code: Compiled) -> Iterator[tuple[str, Any, str]]:
    """(name, value, type) of the arguments that the compiled kernel takes: those of tuples one by one, no constants."""
    for name, type_ in zip(launch.kernel.arg_names, code.signature, strict=True):
        yield from _flat(name, launch.arguments[name], type_)


def _flat(name: str, value: Any, type_: Any) -> Iterator[tuple[str, Any, str]]:
    if isinstance(type_, tuple):
        for i, (part, of) in enumerate(zip(value, type_, strict=True)):
            yield from _flat(f"{name}[{i}]", part, of)
    elif type_ != "constexpr":
        yield name, value, type_


def without_cache(code: Compiled, ptx: str) -> Compiled:
    """The same with another text."""
    return replace(code, ptx=ptx)
