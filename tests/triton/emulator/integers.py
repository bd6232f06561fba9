"""Integer and logical arithmetic."""

import numpy as np

from emulator.faults import UnknownInstruction
from emulator.instructions import Form, Run, elementwise, instruction
from emulator.parsing import Immediate, Instruction
from emulator.registers import Active
from emulator.state import State
from emulator.types import PREDICATE, SIGNED, UNSIGNED, Type

_PLAIN = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum}
_LOGICAL = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def arithmetic(state: State, ins: Instruction, type_: Type) -> Run:
    """add, sub, min, max of integers; of two of 16 bits, each on its own."""
    packed = type_.count > 1
    if packed and (type_.bits, type_.count) != (16, 2):
        raise UnknownInstruction(f".{type_}")
    registers = state.registers
    inputs = [registers.read(operand, type_) for operand in ins.operands[1:3]]
    return elementwise(_PLAIN[ins.opcode], inputs, registers.write(ins.operands[0], type_), packed)


def multiplication(state: State, ins: Instruction, form: Form, type_: Type) -> Run:
    """mul and mad: the low half, the high half, or all of the product."""
    registers = state.registers
    part = form.required("lo", "hi", "wide")
    x, y = (registers.read(operand, type_) for operand in ins.operands[1:3])
    wide = Type(type_.kind, 2 * type_.bits) if part == "wide" else type_
    out = registers.write(ins.operands[0], wide)
    added = registers.read(ins.operands[3], wide) if ins.opcode == "mad" else None
    if part == "hi":
        product = _high_64 if type_.bits == 64 else _high
    else:

        def product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            return np.multiply(x, y, dtype=wide.dtype)

    if added is None and part != "hi":
        return lambda active: np.multiply(x, y, out=out, dtype=wide.dtype, where=active.where)
    if added is None:
        return lambda active: np.copyto(out, product(x, y), where=active.where)
    return lambda active: np.add(product(x, y), added, out=out, where=active.where)


def _high(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    bits = 8 * x.itemsize
    wide = (SIGNED if x.dtype.kind == "i" else UNSIGNED)[2 * bits]
    return (np.multiply(x, y, dtype=wide) >> bits).astype(x.dtype)


def _high_64(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    products = x.astype(object) * y.astype(object)
    mask = (1 << 64) - 1
    return np.array([(int(p) >> 64) & mask for p in products], np.uint64).view(x.dtype)


def division(state: State, ins: Instruction, type_: Type) -> Run:
    """div and rem: towards zero; all ones where a GPU divides by zero."""
    registers = state.registers
    x, y = (registers.read(operand, type_) for operand in ins.operands[1:3])
    out = registers.write(ins.operands[0], type_)
    remainder = ins.opcode == "rem"

    def run(active: Active) -> None:
        quotient = x // y
        if type_.kind == "s":
            quotient += ((x < 0) != (y < 0)) & (quotient * y != x)
        result = x - quotient * y if remainder else quotient
        np.copyto(out, np.where(y == 0, np.array(-1).astype(type_.dtype), result), where=active.where)

    return run


def sign(state: State, ins: Instruction, type_: Type) -> Run:
    """abs and neg of integers."""
    x, out = state.registers.read(ins.operands[1], type_), state.registers.write(ins.operands[0], type_)
    return elementwise(np.absolute if ins.opcode == "abs" else np.negative, [x], out)


@instruction("and", "or", "xor", "not")
def logical(state: State, ins: Instruction, form: Form) -> Run:
    registers, type_ = state.registers, form.type()
    inputs = [registers.read(operand, type_) for operand in ins.operands[1:]]
    out = registers.write(ins.operands[0], type_)
    if ins.opcode == "not":
        return elementwise(np.logical_not if type_ == PREDICATE else np.invert, inputs, out)
    return elementwise(_LOGICAL[ins.opcode], inputs, out)


@instruction("lop3")
def lookup(state: State, ins: Instruction, form: Form) -> Run:
    """Any function of three bits, by its table."""
    registers, type_ = state.registers, form.type()
    a, b, c = (registers.read(operand, type_) for operand in ins.operands[1:4])
    out = registers.write(ins.operands[0], type_)
    table = ins.operands[4].value

    def run(active: Active) -> None:
        result = np.zeros_like(a)
        for entry in range(8):
            if table >> entry & 1:
                result |= (a if entry & 4 else ~a) & (b if entry & 2 else ~b) & (c if entry & 1 else ~c)
        np.copyto(out, result, where=active.where)

    return run


@instruction("shl", "shr")
def shift(state: State, ins: Instruction, form: Form) -> Run:
    """Shifts by as many bits as there are, or more, leave zeros or signs, as NumPy's do."""
    registers, type_ = state.registers, form.type()
    kind = "s" if type_.kind == "s" and ins.opcode == "shr" else "u"
    seen = Type(kind, type_.bits)
    x, out = registers.read(ins.operands[1], seen), registers.write(ins.operands[0], seen)
    function = np.left_shift if ins.opcode == "shl" else np.right_shift
    if isinstance(ins.operands[2], Immediate):
        amount = registers.read(Immediate(min(ins.operands[2].value, 255)), seen)
        return elementwise(function, [x, amount], out)
    amount = registers.read(ins.operands[2], Type("u", 32))
    return lambda active: function(x, np.minimum(amount, 255).astype(seen.dtype), out=out, where=active.where)


@instruction("shf")
def funnel_shift(state: State, ins: Instruction, form: Form) -> Run:
    registers, direction = state.registers, form.required("l", "r")
    clamp = form.required("clamp", "wrap") == "clamp"
    type_ = form.type()
    low, high, amount = (registers.read(operand, Type("u", 32)) for operand in ins.operands[1:4])
    out = registers.write(ins.operands[0], Type(type_.kind, 32)).view(np.uint32)

    def run(active: Active) -> None:
        joined = low | high.astype(np.uint64) << np.uint64(32)
        by = (np.minimum(amount, 32) if clamp else amount & 31).astype(np.uint64)
        result = joined >> by if direction == "r" else (joined << by) >> np.uint64(32)
        np.copyto(out, result.astype(np.uint32), where=active.where)

    return run


@instruction("bfe")
def extract_bits(state: State, ins: Instruction, form: Form) -> Run:
    registers, type_ = state.registers, form.type()
    x = registers.read(ins.operands[1], type_)
    start, length = (registers.read(operand, Type("u", 32)) for operand in ins.operands[2:4])
    out = registers.write(ins.operands[0], type_)
    bits = type_.bits

    def run(active: Active) -> None:
        first = (start & 255).astype(np.int64)
        count = np.minimum(length & 255, bits).astype(np.int64)
        # What lies beyond the register has the sign of signed ones.
        top = np.minimum(first + count, bits)
        left = (bits - top).astype(type_.dtype)
        right = np.minimum(left.astype(np.int64) + first, bits).astype(type_.dtype)
        result = (x << left) >> right
        empty = np.where(x < 0, np.array(-1, np.int64), 0).astype(type_.dtype) if type_.kind == "s" else 0
        result = np.where(count == 0, 0, np.where(first >= bits, empty, result))
        np.copyto(out, result.astype(type_.dtype), where=active.where)

    return run


@instruction("bfi")
def insert_bits(state: State, ins: Instruction, form: Form) -> Run:
    registers, type_ = state.registers, form.type()
    x, y = (registers.read(operand, type_) for operand in ins.operands[1:3])
    start, length = (registers.read(operand, Type("u", 32)) for operand in ins.operands[3:5])
    out = registers.write(ins.operands[0], type_)

    def run(active: Active) -> None:
        first, count = (np.minimum(v & 255, 64).astype(type_.dtype) for v in (start, length))
        one = np.ones((), type_.dtype)
        mask = ((one << count) - one) << first
        np.copyto(out, (y & ~mask) | ((x << first) & mask), where=active.where)

    return run


@instruction("prmt")
def permute_bytes(state: State, ins: Instruction, form: Form) -> Run:
    """Four bytes of eight; bit 3 of a selector repeats the byte's sign."""
    registers, type_ = state.registers, form.type()
    low, high, selectors = (registers.read(operand, type_) for operand in ins.operands[1:4])
    out = registers.write(ins.operands[0], type_)

    def run(active: Active) -> None:
        joined = low | high.astype(np.uint64) << np.uint64(32)
        result = np.zeros_like(low)
        for i in range(4):
            selector = (selectors >> np.uint32(4 * i)) & 15
            byte = (joined >> ((selector & 7) * 8).astype(np.uint64)).astype(np.uint32) & 255
            byte = np.where(selector & 8, (byte >> 7) * 255, byte).astype(np.uint32)
            result |= byte << np.uint32(8 * i)
        np.copyto(out, result, where=active.where)

    return run


@instruction("popc", "clz", "brev")
def count_bits(state: State, ins: Instruction, form: Form) -> Run:
    registers, type_ = state.registers, form.type()
    x = registers.read(ins.operands[1], Type("u", type_.bits))
    out = registers.write(ins.operands[0], type_ if ins.opcode == "brev" else Type("u", 32))
    bits, opcode = type_.bits, ins.opcode

    def run(active: Active) -> None:
        if opcode == "popc":
            result = np.bitwise_count(x)
        else:
            planes = (x[None] >> np.arange(bits, dtype=x.dtype)[:, None]) & 1  # (bits, lanes)
            if opcode == "clz":
                result = np.where(x == 0, bits, np.argmax(planes[::-1], 0))
            else:
                result = (planes[::-1] << np.arange(bits, dtype=x.dtype)[:, None]).sum(0, dtype=x.dtype)
        np.copyto(out, result.astype(out.dtype), where=active.where)

    return run
