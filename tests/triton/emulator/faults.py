"""What the emulator refuses to do, by name."""


class Fault(Exception):
    """Something that a GPU would do wrongly, or silently, or not at all."""


class UnknownInstruction(Fault):
    """An instruction, a modifier or an operand without semantics here."""


class MemoryFault(Fault):
    """An access out of bounds, misaligned, or to what nobody has written."""


class UndefinedRegister(Fault):
    """A register that is read before it was written."""


class Divergence(Fault):
    """Threads that should be together, at a barrier or in an instruction of a whole warp, are not."""


class Race(Fault):
    """Accesses to the same memory, one of them a write, that nothing orders."""
