"""How a kernel is run: on which arguments, in which order of blocks and warps."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from emulator.faults import Race, UndefinedRegister, UnknownInstruction
from emulator.machine import Machine, Result
from emulator.memory import GlobalMemory
from emulator.parsing import Kernel
from emulator.probing import Probe

# Lanes that run in lockstep.
_LANES = 1024


@dataclass(frozen=True)
class Schedule:
    """How blocks run: `together` of them in lockstep, in the order of the grid, reversed, or in a random one.

    together: as many as make some hundred lanes where it is None. warps: together, or one after another up to the next
    barrier: forward or reversed. inexact: approximate instructions err as far as they may, and products are fused with
    sums where PTX leaves that to the assembler.
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


def execute(
    kernel: Kernel,
    arguments: Sequence[Tensor | int],
    memory: GlobalMemory,
    programs: int,
    warps: int,
    shared_bytes: int,
    schedule: Schedule,
    allow_races: bool = False,
    probe: Probe | None = None,
) -> Result:
    """Run a kernel on the tensors in memory. A race is a fault, unless nobody looks at what was read in it."""
    parameters = _packed(kernel, arguments, memory)
    threads = 32 * warps
    together = min(programs, schedule.together or max(1, _LANES // threads))

    def run(contested: dict[int, set[int]], probe: Probe | None = None) -> Result:
        machine = Machine(
            kernel,
            memory,
            parameters,
            programs,
            threads,
            shared_bytes,
            together,
            schedule.turns(warps),
            schedule.seed,
            schedule.inexact,
            contested,
            probe,
        )
        return machine.run(schedule.blocks(programs))

    before = memory.saved()
    result = run({}, probe)
    if result.races and all(race.is_read for race in result.races):
        # Threads that hold a copy of a value load it, too, and may see it before or after its owner has changed it.
        after = memory.saved()
        memory.restore(before)
        try:
            run(result.reads)
            result.unused, result.races = result.races, []
        except UndefinedRegister as fault:
            result.races = [replace(race, example=f"{race.example}; it is used: {fault}") for race in result.races]
        memory.restore(after)
    if result.races and not allow_races:
        raise Race("\n".join(map(str, result.races)))
    return result


def _packed(kernel: Kernel, arguments: Sequence[Tensor | int], memory: GlobalMemory) -> bytes:
    """The bytes of all arguments. Those that are missing are null: pointers of Triton's own, to scratch memory."""
    parameters = bytearray(kernel.parameter_bytes)
    for parameter, value in zip(kernel.parameters, arguments, strict=False):
        if parameter.pointer != isinstance(value, Tensor):
            raise UnknownInstruction(f"{type(value).__name__} for parameter {parameter.name}")
        number = memory.address(value) if isinstance(value, Tensor) else int(value)
        field = (number & (1 << 8 * parameter.size) - 1).to_bytes(parameter.size, "little")
        parameters[parameter.offset : parameter.offset + parameter.size] = field
    missing = kernel.parameters[len(arguments) :]
    if len(arguments) > len(kernel.parameters) or not all(parameter.pointer for parameter in missing):
        raise UnknownInstruction(f"{len(arguments)} arguments for {len(kernel.parameters)} parameters")
    return bytes(parameters)
