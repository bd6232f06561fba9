"""Floating-point arithmetic, packed pairs included.

Sums, products, quotients and roots of float16 and bfloat16 are computed in float32 and rounded once more, which changes
nothing: it has more than twice their digits. Fused multiply-adds need rounding.py.
"""

from collections.abc import Callable

import numpy as np

from emulator import rounding
from emulator.faults import UnknownInstruction
from emulator.instructions import Form, Run, elementwise, instruction
from emulator.parsing import Instruction
from emulator.registers import Active
from emulator.state import State
from emulator.types import Type

_PLAIN = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
Function = Callable[..., np.ndarray]


def arithmetic(state: State, ins: Instruction, form: Form, types: list[Type]) -> Run:
    """add, sub, mul; `add.f32.bf16` widens its first operand."""
    if ins.index in state.fused:
        return _fused_sum(state, ins, types[0])
    mode = form.one_of("rn", "rz", "rm", "rp") or "rn"
    function: Function = _PLAIN[ins.opcode]
    if mode != "rn":
        function = _directed(ins.opcode, mode, types[0])
    if len(types) == 1:
        return evaluated(state, ins, form, types[0], function, plain=mode == "rn")
    result, narrow = types
    if result != Type("f", 32) or narrow.bits != 16 or narrow.count > 1:
        raise UnknownInstruction(f".{result}.{narrow}")
    x = state.registers.read(ins.operands[1], narrow)
    y = state.registers.read(ins.operands[2], result)
    out = state.registers.write(ins.operands[0], result)
    return lambda active: np.copyto(out, function(widened(x, narrow), y), where=active.where)


def _fused_sum(state: State, ins: Instruction, type_: Type) -> Run:
    """A sum with a product that is not rounded before, as an assembler may make it."""
    product, position = state.fused[ins.index]
    a, b = (state.registers.read(operand, type_) for operand in product.operands[1:])
    other = state.registers.read(ins.operands[3 - position], type_)
    out = state.registers.write(ins.operands[0], type_)
    fma = rounding.fma64 if type_.bits == 64 else rounding.fma32
    # Which of the two is subtracted.
    signs = [type_.dtype(1), type_.dtype(1)]
    if ins.opcode == "sub":
        signs[0 if position == 2 else 1] = type_.dtype(-1)

    def run(active: Active) -> None:
        np.copyto(out, fma(signs[0] * a, b, signs[1] * other), where=active.where)

    return canonical(state, ins, type_, run)


def _directed(opcode: str, mode: str, type_: Type) -> Function:
    if type_ != Type("f", 32):
        raise UnknownInstruction(f".{mode}.{type_}")

    def function(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        if opcode == "mul":
            return rounding.narrow(np.multiply(x, y, dtype=np.float64), np.float32, mode)
        return rounding.narrow(rounding.odd_sum(x, y if opcode == "add" else -y), np.float32, mode)

    return function


def widened(x: np.ndarray, type_: Type) -> np.ndarray:
    """16-bit floats in float32; others as they are."""
    if type_.kind == "bf":
        return rounding.from_bfloat16(x)
    return x.astype(np.float32) if type_.bits == 16 else x


def narrowed(x: np.ndarray, type_: Type) -> np.ndarray:
    """Back from there, rounded to nearest."""
    return rounding.bfloat16(x) if type_.kind == "bf" else x.astype(type_.dtype, copy=False)


def evaluated(state: State, ins: Instruction, form: Form, type_: Type, function: Function, plain: bool = False) -> Run:
    """A function of all operands but the first, which is the result.

    plain: it is a ufunc, which can write the result itself.
    """
    registers = state.registers
    inputs = [registers.read(operand, type_) for operand in ins.operands[1:]]
    out = registers.write(ins.operands[0], type_)
    ftz, saturated = form.flag("ftz"), form.flag("sat")
    packed = type_.count > 1
    if plain and type_.bits >= 32 and not ftz and not saturated:
        return canonical(state, ins, type_, elementwise(function, inputs, out, packed))

    def run(active: Active) -> None:
        values = [widened(x, type_) for x in inputs]
        if ftz:
            values = [rounding.flush(x) for x in values]
        result = function(*values)
        if ftz:
            result = rounding.flush(result)
        if saturated:
            result = np.fmin(np.fmax(result, np.zeros_like(result)), np.ones_like(result))
        np.copyto(out, narrowed(result, type_), where=active.doubled if packed else active.where)

    return canonical(state, ins, type_, run)


def canonical(state: State, ins: Instruction, type_: Type, run: Run) -> Run:
    """NaNs have the bits of a GPU's where some instruction looks at them as bits."""
    name = getattr(ins.operands[0], "name", None)
    if type_ != Type("f", 32) or name not in state.seen_as_bits:
        return run
    out = state.registers.bits(name)
    values = out.view(np.float32)

    def canonicalized(active: Active) -> None:
        run(active)
        missing = np.isnan(values)
        if missing.any():
            out[missing & active.mask] = 0x7FFFFFFF

    return canonicalized


@instruction("fma")
def fused(state: State, ins: Instruction, form: Form) -> Run:
    mode, type_ = form.required("rn", "rz", "rm", "rp"), form.type()
    if mode != "rn" and type_ != Type("f", 32):
        raise UnknownInstruction(f".{mode}.{type_}")
    if type_.bits == 64:
        return evaluated(state, ins, form, type_, rounding.fma64)
    if type_.bits == 32:

        def directed(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
            return rounding.narrow(rounding.odd_fma(a, b, c), np.float32, mode)

        return evaluated(state, ins, form, type_, rounding.fma32 if mode == "rn" else directed)
    return _fused_16(state, ins, form, type_)


def _fused_16(state: State, ins: Instruction, form: Form, type_: Type) -> Run:
    registers = state.registers
    inputs = [registers.read(operand, type_) for operand in ins.operands[1:]]
    out = registers.write(ins.operands[0], type_)

    def run(active: Active) -> None:
        wide = rounding.odd_fma(*(widened(x, type_) for x in inputs))
        result = rounding.odd_bfloat16(wide) if type_.kind == "bf" else wide.astype(np.float16)
        np.copyto(out, result, where=active.doubled if type_.count > 1 else active.where)

    return run


def extremum(state: State, ins: Instruction, form: Form, type_: Type) -> Run:
    """min and max: of a NaN and a number the number, unless `.NaN`; -0 is less than 0."""
    largest = ins.opcode == "max"
    functions = (np.maximum, np.minimum) if form.flag("NaN") else (np.fmax, np.fmin)
    choose = functions[0 if largest else 1]

    def function(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        result = choose(x, y)
        zeros = (x == 0) & (y == 0)
        if zeros.any():
            negative = (np.signbit(x) & np.signbit(y)) if largest else (np.signbit(x) | np.signbit(y))
            result[zeros] = np.where(negative, -0.0, 0.0)[zeros]
        return result

    return evaluated(state, ins, form, type_, function)


def sign(state: State, ins: Instruction, form: Form, type_: Type) -> Run:
    """abs and neg."""
    return evaluated(state, ins, form, type_, np.absolute if ins.opcode == "abs" else np.negative, plain=True)


@instruction("copysign")
def copy_sign(state: State, ins: Instruction, form: Form) -> Run:
    return evaluated(state, ins, form, form.type(), lambda signs, values: np.copysign(values, signs))


def division(state: State, ins: Instruction, form: Form, type_: Type) -> Run:
    """div: rounded to nearest, or as exact as `.full` (2 units in the last place) and `.approx` are."""
    kind = form.required("rn", "full", "approx")
    if kind == "rn":
        return evaluated(state, ins, form, type_, np.divide, plain=True)
    if type_ != Type("f", 32):
        raise UnknownInstruction(f".{kind}.{type_}")

    def function(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        quotient = state.approximated(x / y, 2)
        if kind == "approx":
            quotient = np.where((np.abs(y) > 2.0**126) & np.isfinite(y) & np.isfinite(x), x * 0 * y, quotient)
        return quotient

    return evaluated(state, ins, form, type_, function)


# Functions of one operand in float64, and the units in the last place by which `.approx` may err.
_FUNCTIONS: dict[str, tuple[Function, int]] = {
    "rcp": (lambda x: 1 / x, 1),
    "sqrt": (np.sqrt, 1),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 2),
    "ex2": (np.exp2, 2),
    "lg2": (np.log2, 2),
}


@instruction(*_FUNCTIONS)
def function_of_one(state: State, ins: Instruction, form: Form) -> Run:
    exact, error = _FUNCTIONS[ins.opcode]
    kind, type_ = form.required("rn", "approx"), form.type()
    if kind == "rn" and ins.opcode in ("rcp", "sqrt") and type_.kind == "f" and type_.bits >= 32:
        return evaluated(state, ins, form, type_, exact)
    if ins.opcode == "rcp" and kind == "approx" and type_ == Type("f", 64) and form.flag("ftz"):
        return evaluated(state, ins, form, type_, lambda x: _gross_reciprocal(state, x))
    if kind == "rn" or type_ != Type("f", 32):
        raise UnknownInstruction(f".{kind}.{type_}")

    def function(x: np.ndarray) -> np.ndarray:
        return state.approximated(exact(x.astype(np.float64)).astype(np.float32), error)

    return evaluated(state, ins, form, type_, function)


_UPPER = np.uint64(0xFFFFFFFF00000000)


def _gross_reciprocal(state: State, x: np.ndarray) -> np.ndarray:
    """Of the upper half of float64, as an upper half: a start for Newton's iteration. Subnormals are zeros."""
    upper = _flushed64((x.view(np.uint64) & _UPPER).view(np.float64))
    result = _flushed64(1 / upper).view(np.uint64)
    normal = np.isfinite(upper) & (upper != 0) & (result << np.uint64(1) != 0)
    if state.inexact:
        error = (result >> np.uint64(32)) % np.uint64(3) << np.uint64(32)
        result = np.where(normal, result + error - np.uint64(1 << 32), result)
    return (result & _UPPER).view(np.float64)


def _flushed64(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.finfo(np.float64).smallest_normal, np.copysign(0.0, x), x)
