"""Instructions become functions on arrays, once; every modifier has to be understood on the way."""

from collections.abc import Callable

import numpy as np

from emulator.faults import Fault, UnknownInstruction
from emulator.parsing import Instruction
from emulator.registers import Active
from emulator.state import State
from emulator.types import Type, type_of
from emulator.watching import observed, watched

Run = Callable[[Active], None]
Builder = Callable[[State, Instruction, "Form"], Run]

_BUILDERS: dict[str, Builder] = {}


class Form:
    """The modifiers of an instruction; what is left when it is built has no semantics here."""

    def __init__(self, ins: Instruction) -> None:
        self._left = list(ins.modifiers)
        self._ins = ins

    def flag(self, name: str) -> bool:
        """Whether the modifier is there."""
        return self.one_of(name) is not None

    def one_of(self, *names: str) -> str | None:
        """Which of them is there."""
        for name in names:
            if name in self._left:
                self._left.remove(name)
                return name
        return None

    def required(self, *names: str) -> str:
        """Likewise, where one has to be."""
        found = self.one_of(*names)
        if found is None:
            raise UnknownInstruction(f"none of {', '.join(names)}")
        return found

    def types(self) -> list[Type]:
        """All types, in order."""
        found = [(name, type_of(name)) for name in self._left]
        self._left = [name for name, type_ in found if type_ is None]
        return [type_ for _, type_ in found if type_ is not None]

    def type(self) -> Type:
        """The only type."""
        types = self.types()
        if len(types) != 1:
            raise UnknownInstruction(f"{len(types)} types")
        return types[0]

    def finish(self) -> None:
        """Nothing may be left."""
        if self._left:
            raise UnknownInstruction(f"modifier .{' .'.join(self._left)}")


def instruction(*opcodes: str) -> Callable[[Builder], Builder]:
    """Registers what builds these instructions."""

    def register(builder: Builder) -> Builder:
        _BUILDERS.update(dict.fromkeys(opcodes, builder))
        return builder

    return register


def elementwise(function: np.ufunc, inputs: list[np.ndarray], out: np.ndarray, packed: bool = False) -> Run:
    """A ufunc on registers."""
    if packed:
        return lambda active: function(*inputs, out=out, where=active.doubled)
    return lambda active: function(*inputs, out=out, where=active.where)


def build(state: State, ins: Instruction) -> Run:
    """The function that an instruction is on the arrays of a state."""
    if ins.opcode not in _BUILDERS:
        raise UnknownInstruction(f"opcode {ins.opcode} in {ins}")
    form = Form(ins)
    try:
        run = _BUILDERS[ins.opcode](state, ins, form)
        form.finish()
    except Fault as fault:
        raise type(fault)(f"{fault} in {ins}") from None
    except (IndexError, ValueError) as error:
        raise UnknownInstruction(f"operands of {ins}: {error}") from None
    run = watched(state, ins, run)
    return run if ins.guard is None else guarded(state, ins, run)


def guarded(state: State, ins: Instruction, run: Run) -> Run:
    """Run for those lanes whose predicate says so."""
    assert ins.guard is not None
    register, wanted = ins.guard
    predicate = state.registers.bits(register.name)

    def conditional(active: Active) -> None:
        observed(state, ins, [register.name], active)
        chosen = active.only(predicate if wanted else ~predicate)
        if chosen.mask.any():
            run(chosen)
        if state.probe:
            state.probe.guarded(ins, active, chosen)

    return conditional
