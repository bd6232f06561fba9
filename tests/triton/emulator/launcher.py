"""Launches on CPU tensors: compiled by Triton for a GPU, and run here."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from specs.resources import compile_launch, is_record
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from emulator.execution import Schedule, execute
from emulator.machine import Result
from emulator.memory import GlobalMemory
from emulator.parsing import Kernel, parse
from emulator.probing import Probe
from moment_ops.kernels._launch import Launch

_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted")


class Allocations(TorchDispatchMode):
    """Knows which tensors were allocated in it and not written: outputs, and the workspace of launches."""

    def __init__(self) -> None:
        super().__init__()
        # Kept, so that no other storage takes their addresses.
        self._storages: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        if function.overloadpacket.__name__ in _EMPTY:
            storage = result.untyped_storage()
            self._storages[storage.data_ptr()] = storage
            # NaN, in every dtype of floats.
            torch.empty(0, dtype=torch.uint8).set_(storage).fill_(0xFF)
        elif isinstance(result, Tensor) and function._schema.is_mutable:
            self._storages.pop(result.untyped_storage().data_ptr(), None)
        return result

    @property
    def addresses(self) -> set[int]:
        """Of the storages that nobody has written."""
        return set(self._storages)


@dataclass(frozen=True)
class Compiled:
    """PTX, bytes of shared memory, types of the arguments, and what else it was specialised for."""

    ptx: str
    shared: int
    signature: tuple[Any, ...]
    constants: tuple[Any, ...]

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
    constants = (*sorted(map(str, result.src.constants.items())), *sorted(map(str, result.src.attrs.items())))
    return Compiled(result.asm["ptx"], result.metadata.shared, signature, constants)


def run(
    launches: Sequence[Launch],
    codes: Sequence[Compiled],
    fresh: Allocations | None = None,
    schedule: Schedule | None = None,
    allow_races: bool = False,
    probes: dict[int, Probe] | None = None,
) -> list[Result]:
    """Run launches one after another, as on a stream; their tensors are changed in place.

    codes: what was compiled of the launches, or was made of that. fresh: what nobody has written yet. probes: of some
    of the launches.
    """
    arguments = [list(_bound(launch, code)) for launch, code in zip(launches, codes, strict=True)]
    tensors = [(name, value) for bound in arguments for name, value in bound if isinstance(value, Tensor)]
    memory = GlobalMemory(tensors, fresh.addresses if fresh else set())
    schedule = schedule or Schedule()
    results = []
    for i, (launch, code, bound) in enumerate(zip(launches, codes, arguments, strict=True)):
        results.append(
            execute(
                code.kernel,
                [value for _, value in bound],
                memory,
                launch.programs,
                launch.warps,
                code.shared,
                schedule,
                allow_races,
                (probes or {}).get(i),
            )
        )
    memory.write_back()
    return results


def _bound(launch: Launch, code: Compiled) -> Iterator[tuple[str, Any]]:
    """(name, value) of the arguments that the compiled kernel takes: those of tuples one by one, no constants."""
    for name, type_ in zip(launch.kernel.arg_names, code.signature, strict=True):
        yield from _flat(name, launch.arguments[name], type_)


def _flat(name: str, value: Any, type_: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(type_, tuple):
        names = (
            [f"{name}.{field}" for field in value._fields]
            if is_record(value)
            else [f"{name}[{i}]" for i in range(len(value))]
        )
        for entry, part, of in zip(names, value, type_, strict=True):
            yield from _flat(entry, part, of)
    elif type_ != "constexpr":
        yield name, value
