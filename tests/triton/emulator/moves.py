"""Moves, selections, comparisons."""

import numpy as np

from emulator.faults import UnknownInstruction
from emulator.floats import widened
from emulator.instructions import Form, Run, elementwise, instruction
from emulator.parsing import Immediate, Instruction, Negated, Operand, Pair, Register, Vector
from emulator.registers import Active
from emulator.state import State
from emulator.types import PREDICATE, UNSIGNED, Type

_ORDERED = {
    "eq": np.equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
# As unordered comparisons are: the negation of what is left.
_NEGATED = {"ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


@instruction("mov")
def move(state: State, ins: Instruction, form: Form) -> Run:
    registers, type_ = state.registers, form.type()
    destination, source = ins.operands
    if isinstance(source, Vector):
        out = registers.write(destination, Type("b", type_.width))
        part = Type("b", type_.width // len(source.items))
        parts = [registers.read(item, part) for item in source.items]
        fields = [out.view(UNSIGNED[part.bits])[i :: len(parts)] for i in range(len(parts))]
        return _copies(fields, parts)
    if isinstance(destination, Vector):
        part = Type("b", type_.width // len(destination.items))
        x = registers.read(source, Type("b", type_.width)).view(UNSIGNED[part.bits])
        outs = [registers.write(item, part) for item in destination.items]
        return _copies(outs, [x[i :: len(outs)] for i in range(len(outs))])
    return _copies([registers.write(destination, type_)], [registers.read(source, type_)])


def _copies(outs: list[np.ndarray], values: list[np.ndarray]) -> Run:
    if len(outs) == 1:
        (out,), (value,) = outs, values
        return lambda active: np.copyto(out, value, where=active.where)

    def run(active: Active) -> None:
        # A register may be among the sources and among the results.
        for out, value in [(out, value.copy()) for out, value in zip(outs, values, strict=True)]:
            np.copyto(out, value, where=active.where)

    return run


@instruction("cvta")
def convert_address(state: State, ins: Instruction, form: Form) -> Run:
    """Generic addresses of global memory are its addresses."""
    form.flag("to")
    form.required("global")
    type_ = form.type()
    return _copies([state.registers.write(ins.operands[0], type_)], [state.registers.read(ins.operands[1], type_)])


@instruction("selp")
def select(state: State, ins: Instruction, form: Form) -> Run:
    registers, type_ = state.registers, form.type()
    x, y = (registers.read(operand, type_) for operand in ins.operands[1:3])
    chosen = registers.read(ins.operands[3], PREDICATE)
    out = registers.write(ins.operands[0], type_)
    return lambda active: np.copyto(out, np.where(chosen, x, y), where=active.where)


def compare(comparison: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Comparisons of a NaN are false, with `u` true."""
    if comparison in _ORDERED:
        return _ORDERED[comparison](x, y)
    if comparison in _NEGATED:
        return ~_ORDERED[_NEGATED[comparison]](x, y)
    if comparison in ("ne", "neu", "equ"):
        if x.dtype.kind != "f" or comparison == "neu":
            return np.not_equal(x, y)
        different = np.less(x, y) | np.greater(x, y)
        return different if comparison == "ne" else ~different
    numbers = (x == x) & (y == y)
    return numbers if comparison == "num" else ~numbers


@instruction("setp")
def set_predicate(state: State, ins: Instruction, form: Form) -> Run:
    """One result, or two: the second is the negation of the first, of packed types that of the second values."""
    registers = state.registers
    comparison = form.one_of(*_UNSIGNED)
    comparison = _UNSIGNED[comparison] if comparison else form.required("ne", "neu", "equ", "num", "nan", *_ORDERED,
                                                                        *_NEGATED)  # fmt: skip
    combination = form.one_of("and", "or", "xor")
    ftz = form.flag("ftz")
    type_ = form.type()
    if ftz:
        raise UnknownInstruction(".ftz")
    x, y = (registers.read(operand, type_) for operand in ins.operands[1:3])
    results = ins.operands[0]
    pair = (results.first, results.second) if isinstance(results, Pair) else (results,)
    outs = [registers.write(operand, PREDICATE) for operand in pair]
    ordered = _ORDERED.get(comparison)
    if ordered and len(outs) == 1 and not combination and type_.kind != "bf" and type_.count == 1:
        return elementwise(ordered, [x, y], outs[0])
    third, negated = _condition(state, ins.operands[3]) if combination else (None, False)

    def run(active: Active) -> None:
        met = compare(comparison, widened(x, type_), widened(y, type_)) if type_.is_float else compare(comparison, x, y)
        values = [met[0::2], met[1::2]] if type_.count == 2 else [met, ~met]
        for out, value in zip(outs, values, strict=False):
            if combination:
                other = ~third if negated else third
                value = {"and": value & other, "or": value | other, "xor": value ^ other}[combination]
            np.copyto(out, value, where=active.where)

    return run


def _condition(state: State, operand: Operand) -> tuple[np.ndarray, bool]:
    """(predicate, whether it is negated)."""
    if isinstance(operand, Negated):
        return state.registers.read(operand.register, PREDICATE), True
    if not isinstance(operand, Register | Immediate):
        raise UnknownInstruction(f"{operand} as a predicate")
    return state.registers.read(operand, PREDICATE), False
