"""Opcodes that integers and floats share."""

from emulator import floats, integers
from emulator.faults import UnknownInstruction
from emulator.instructions import Form, Run, instruction
from emulator.parsing import Instruction
from emulator.state import State
from emulator.types import Type


def _one(types: list[Type]) -> Type:
    if len(types) != 1:
        raise UnknownInstruction(f"{len(types)} types")
    return types[0]


@instruction("add", "sub", "mul", "mad")
def sums_and_products(state: State, ins: Instruction, form: Form) -> Run:
    types = form.types()
    if types and types[0].is_float:
        if ins.opcode == "mad":
            raise UnknownInstruction(f".{types[0]}")
        return floats.arithmetic(state, ins, form, types)
    if ins.opcode in ("mul", "mad"):
        return integers.multiplication(state, ins, form, _one(types))
    return integers.arithmetic(state, ins, _one(types))


@instruction("min", "max")
def extrema(state: State, ins: Instruction, form: Form) -> Run:
    type_ = form.type()
    return floats.extremum(state, ins, form, type_) if type_.is_float else integers.arithmetic(state, ins, type_)


@instruction("abs", "neg")
def signs(state: State, ins: Instruction, form: Form) -> Run:
    type_ = form.type()
    return floats.sign(state, ins, form, type_) if type_.is_float else integers.sign(state, ins, type_)


@instruction("div", "rem")
def divisions(state: State, ins: Instruction, form: Form) -> Run:
    type_ = form.type()
    if type_.is_float and ins.opcode == "div":
        return floats.division(state, ins, form, type_)
    if type_.is_float:
        raise UnknownInstruction(f".{type_}")
    return integers.division(state, ins, type_)
