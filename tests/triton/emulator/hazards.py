"""Comparisons and differences in PTX that hold in exact arithmetic, or in an interpreter, and not on a GPU.

What can be decided from the text:

- A difference of two values that are the same expression, where a product is left unrounded by a fused multiply-add on
  one side, or may be: `a * b - a * b` is then the product's rounding. PTX that multiplies without `.rn` may be fused by
  the assembler even where the compiler has not done so.
- A comparison of two such values: one may be rounded where the other is not.
- A test for equality with the result of an approximate instruction (`div.full`, `sqrt.approx`, ...), which
  may be wrong in its last places, unless it is compared with zero or infinity, where it is exact; and of one that
  flushes subnormal numbers (`.ftz`), with zero as well.
- `1 - 2**x`, which cancels what `ex2.approx` has got right.

Not decided: ordered comparisons of approximate results with a threshold, which move it by their error and no more;
and values that went through memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from emulator.flow import results
from emulator.parsing import Immediate, Instruction, Kernel, Operand, Pair, Register

_FLOATS = ("f32", "f64", "f16", "bf16", "f32x2", "f16x2", "bf16x2")
_APPROXIMATE = ("full", "approx")
# They pass on a value, or its magnitude, as it is.
_EXACT = ("mov", "neg", "abs", "selp", "min", "max", "cvt")
_SPECIAL = {0, 1 << 31, 0x7F800000, 0xFF800000, 1 << 63, 0x7FF0000000000000, 0xFFF0000000000000}
_ZEROS = {0, 1 << 31, 1 << 63}
_ONES = {0x3F800000, 0x3FF0000000000000}
# (sign, number of an expression)
Value = tuple[int, int]


@dataclass(frozen=True)
class Hazard:
    """An instruction, and what is wrong with it."""

    kind: str
    instruction: Instruction

    def __str__(self) -> str:
        return f"{self.kind}: {self.instruction}"


def hazards(kernel: Kernel) -> list[Hazard]:
    """All that are found in a kernel."""
    return list(_Scan(kernel).found())


class _Scan:
    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._definitions: dict[str, list[Instruction]] = {}
        for ins in kernel.instructions:
            for name in results(ins):
                self._definitions.setdefault(name, []).append(ins)
        self._numbers: dict[tuple, int] = {}
        self._terms: dict[int, tuple] = {}
        self._values: dict[tuple[str, bool], Value] = {}

    def found(self) -> Iterator[Hazard]:
        for ins in self._kernel.instructions:
            if not any(m in _FLOATS for m in ins.modifiers):
                continue
            if ins.opcode in ("add", "sub", "fma"):
                if self._cancels(ins):
                    yield Hazard("a difference of equal values, fused", ins)
                if self._one_less_power(ins):
                    yield Hazard("1 - 2**x", ins)
            if ins.opcode == "setp":
                one, other = ins.operands[1:3]
                if self._value(one) == self._value(other) and self._value(one, True) != self._value(other, True):
                    yield Hazard("a comparison of equal values, rounded differently", ins)
                if {"eq", "ne", "equ", "neu"} & set(ins.modifiers):
                    yield from self._equality(ins, one, other)

    def _only(self, operand: Operand) -> Instruction | None:
        """The instruction that defines a register, if it is one that always does."""
        if not isinstance(operand, Register):
            return None
        definitions = self._definitions.get(operand.name, [])
        return definitions[0] if len(definitions) == 1 and definitions[0].guard is None else None

    def _number(self, term: tuple) -> int:
        number = self._numbers.setdefault(term, len(self._numbers))
        self._terms[number] = term
        return number

    def _value(self, operand: Operand, rounded: bool = False) -> Value:
        """(sign, expression) of an operand; fused and separate products are the same, unless `rounded` is asked for."""
        if not isinstance(operand, Register):
            return 1, self._number(("constant", str(operand)))
        key = (operand.name, rounded)
        if key not in self._values:
            ins = self._only(operand)
            # What is defined by itself, in a loop, is no expression.
            self._values[key] = (1, self._number(("register", operand.name)))
            if ins is not None and isinstance(ins.operands[0], Register):
                self._values[key] = self._expression(ins, rounded)
        return self._values[key]

    def _expression(self, ins: Instruction, rounded: bool) -> Value:
        opcode, operands = ins.opcode, ins.operands[1:]
        if not any(m in _FLOATS for m in ins.modifiers) and opcode != "mov":
            return 1, self._number(("register", str(ins.operands[0])))
        values = [self._value(operand, rounded) for operand in operands]
        type_ = ins.modifiers[-1]
        if opcode == "mov":
            return values[0]
        if opcode == "neg":
            return -values[0][0], values[0][1]
        if opcode == "mul":
            return self._product(values[0], values[1], type_, rounded and "rn" in ins.modifiers)
        if opcode in ("add", "sub", "fma") and not (rounded and opcode == "fma"):
            return self._sum(*self._addends(ins, rounded), type_)
        return 1, self._number((opcode, ins.modifiers, *values))

    def _product(self, x: Value, y: Value, type_: str, exactly: bool = False) -> Value:
        factors = tuple(sorted((x[1], y[1])))
        return x[0] * y[0], self._number(("mul", exactly, type_, factors))

    def _sum(self, x: Value, y: Value, type_: str) -> Value:
        sign = -1 if x[0] == y[0] == -1 else 1
        terms = tuple(sorted((sign * s, n) for s, n in (x, y)))
        return sign, self._number(("add", type_, terms))

    def _addends(self, ins: Instruction, rounded: bool = False) -> tuple[Value, Value]:
        values = [self._value(operand, rounded) for operand in ins.operands[1:]]
        if ins.opcode == "fma":
            return self._product(values[0], values[1], ins.modifiers[-1]), values[2]
        return values[0], (values[1] if ins.opcode == "add" else (-values[1][0], values[1][1]))

    def _cancels(self, ins: Instruction) -> bool:
        (sign, number), (other_sign, other) = self._addends(ins)
        if number != other or sign == other_sign:
            return False
        # A sum of the very same value is zero, if the assembler cannot take it apart.
        if ins.opcode == "fma" or self._fusible(number):
            return True
        one, another = (self._value(operand, True) for operand in ins.operands[1:3])
        return one[1] != another[1]

    def _fusible(self, number: int) -> bool:
        """Whether an expression is a product whose rounding may be left out."""
        return self._terms[number][0] == "mul"

    def _one_less_power(self, ins: Instruction) -> bool:
        operands = ins.operands[1:] if ins.opcode != "fma" else ins.operands[3:]
        constants = [o for o in operands if self._constant(o) in _ONES]
        others = [o for o in ins.operands[1:] if o not in constants]
        return bool(constants) and any("ex2" in {i.opcode for i in self._origins(o)} for o in others)

    def _constant(self, operand: Operand) -> int | None:
        if isinstance(operand, Immediate):
            return operand.value
        ins = self._only(operand)
        if ins is not None and ins.opcode == "mov" and isinstance(ins.operands[1], Immediate):
            return ins.operands[1].value
        return None

    def _origins(self, operand: Operand) -> list[Instruction]:
        """The instructions that an operand may come from, through those that pass values on."""
        found, pending, seen = [], [operand], set()
        while pending:
            register = pending.pop()
            if not isinstance(register, Register) or register.name in seen:
                continue
            seen.add(register.name)
            for ins in self._definitions.get(register.name, []):
                if ins.opcode in _EXACT and "ftz" not in ins.modifiers:
                    pending.extend(ins.operands[1:3] if ins.opcode == "selp" else ins.operands[1:])
                else:
                    found.append(ins)
        return found

    def _equality(self, ins: Instruction, one: Operand, other: Operand) -> Iterator[Hazard]:
        for operand, against in ((one, other), (other, one)):
            constant = self._constant(against)
            for origin in self._origins(operand):
                approximate = set(_APPROXIMATE) & set(origin.modifiers) and constant not in _SPECIAL
                flushed = "ftz" in origin.modifiers and (constant in _ZEROS or constant is None)
                if approximate or flushed:
                    name = ".".join((origin.opcode, *origin.modifiers))
                    yield Hazard(f"a test for equality of what {name} returns", ins)
                    return
        if isinstance(ins.operands[0], Pair):
            return
