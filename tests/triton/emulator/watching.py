"""Registers that may hold what nobody has written, or what was read in a race.

Compilers leave such values in threads whose results nobody uses: they may be moved and computed with. It is a fault to
look at them, where they would become an address, a condition, or something in memory.
"""

from collections.abc import Callable, Sequence

import numpy as np

from emulator.faults import UndefinedRegister
from emulator.flow import results, sources
from emulator.parsing import Instruction, Vector
from emulator.registers import Active
from emulator.state import State

_OBSERVERS = frozenset({"st", "ld", "red", "atom", "cp", "ldmatrix", "stmatrix", "mma", "wgmma"})


def observed(state: State, ins: Instruction, names: Sequence[str], active: Active) -> None:
    """Fault where an active lane has not written one of these registers."""
    for name in names:
        if name in state.written:
            missing = active.mask & ~state.written[name]
            if missing.any():
                raise UndefinedRegister(f"{name} of {state.lane(int(np.argmax(missing)))} in {ins}")


def watched(state: State, ins: Instruction, run: Callable[[Active], None]) -> Callable[[Active], None]:
    """An instruction with its effect on what is written; itself where it has none."""
    reads = [name for name in sources(ins) if name in state.written]
    writes = [name for name in results(ins) if name in state.written]
    if not reads and not writes:
        return run

    parts = _parts(state, ins)

    def tracked(active: Active) -> None:
        if ins.opcode in _OBSERVERS:
            observed(state, ins, reads, active)
        run(active)
        known = _known(state, ins, reads)
        for name in writes:
            of_name = state.written.get(parts[name], True) if name in parts else known
            np.copyto(state.written[name], of_name, where=active.mask)

    return tracked


def _parts(state: State, ins: Instruction) -> dict[str, str]:
    """What is unpacked, and what it was packed from: compilers leave halves that nobody uses unwritten."""
    if ins.opcode != "mov" or not isinstance(ins.operands[0], Vector):
        return {}
    names = [getattr(item, "name", "_") for item in ins.operands[0].items]
    return dict(zip(names, state.packed.get(getattr(ins.operands[1], "name", ""), ()), strict=False))


def _known(state: State, ins: Instruction, reads: Sequence[str]) -> np.ndarray:
    """Lanes whose result depends on nothing that was not written."""
    every = np.ones(state.registers.lanes, bool)
    if ins.opcode == "selp":
        names = [getattr(operand, "name", "") for operand in ins.operands]
        one, other, condition = (state.written.get(name, every) for name in names[1:])
        return np.where(state.registers.bits(names[3]), one, other) & condition
    for name in reads:
        every = every & state.written[name]
    if ins.opcode == "shfl":
        return every[state.shuffles[ins.index]]
    if ins.index in state.contested:
        return every & ~np.isin(state.warps, list(state.contested[ins.index]))
    return every
