"""PTX text as instructions with operands: no semantics, but everything that is written there."""

import re
from dataclasses import dataclass, field

from emulator.faults import UnknownInstruction


@dataclass(frozen=True)
class Register:
    """A register, special ones included."""

    name: str


@dataclass(frozen=True)
class Negated:
    """`!%p`."""

    register: Register


@dataclass(frozen=True)
class Immediate:
    """An integer; of a float, its bits."""

    value: int


@dataclass(frozen=True)
class Symbol:
    """The name of a parameter, of shared memory, or of a label."""

    name: str


@dataclass(frozen=True)
class Address:
    """`[base + offset]`."""

    base: "Register | Symbol | Immediate"
    offset: int


@dataclass(frozen=True)
class Vector:
    """`{a, b}`."""

    items: "tuple[Operand, ...]"


@dataclass(frozen=True)
class Pair:
    """`p|q`, two results."""

    first: "Operand"
    second: "Operand"


Operand = Register | Negated | Immediate | Symbol | Address | Vector | Pair


@dataclass(frozen=True)
class Instruction:
    """`@guard opcode.modifiers operands`; a guard is (register, the value that it must have)."""

    index: int
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: tuple[Register, bool] | None
    text: str
    line: int
    source: str

    def __str__(self) -> str:
        origin = f" of {self.source}" if self.source else ""
        return f"`{self.text}` (PTX line {self.line}{origin})"


@dataclass(frozen=True)
class Parameter:
    """Where an argument lies among the bytes of all arguments."""

    name: str
    offset: int
    size: int
    pointer: bool


@dataclass
class Kernel:
    """An entry function."""

    name: str
    parameters: list[Parameter]
    registers: dict[str, int] = field(default_factory=dict)  # bits; predicates have 1
    shared: dict[str, int] = field(default_factory=dict)  # offsets
    shared_bytes: int = 0  # of what is declared with its size
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all arguments."""
        return max((p.offset + p.size for p in self.parameters), default=0)


_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)[^{;]*\{", re.S)
_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b(\d+)\s+([\w$]+)\s*(?:\[(\d*)\])?\s*$")


def parse(text: str) -> Kernel:
    """The only entry function of a module."""
    text = re.sub(r"//[^\n]*", "", text)
    entries = list(_ENTRY.finditer(text))
    if len(entries) != 1:
        raise UnknownInstruction(f"a module with {len(entries)} entry functions")
    (entry,) = entries
    kernel = Kernel(entry[1], _parameters(entry[2]))
    for declaration in re.findall(r"^\s*\.(?:extern|visible)?\s*(\.shared[^;]*);", text[: entry.start()], re.M):
        _declare_shared(kernel, declaration)
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]*)"', text, re.M))
    _body(kernel, text, entry.end(), files)
    return kernel


def _parameters(text: str) -> list[Parameter]:
    parameters, offset = [], 0
    for declaration in filter(None, map(str.strip, text.split(","))):
        match = re.fullmatch(
            r"\.param\s+(?:\.align\s+(\d+)\s+)?\.([bsuf])(\d+)\s*(.*?)([\w$]+)(?:\[(\d+)\])?", declaration
        )
        if match is None:
            raise UnknownInstruction(f"parameter `{declaration}`")
        size = int(match[3]) // 8
        align = int(match[1] or size)
        offset = -(-offset // align) * align
        parameters.append(Parameter(match[5], offset, size * int(match[6] or 1), ".ptr" in match[4]))
        offset += size * int(match[6] or 1)
    return parameters


def _declare_shared(kernel: Kernel, declaration: str) -> None:
    match = _SHARED.match(declaration.strip())
    if match is None:
        raise UnknownInstruction(f"declaration `{declaration}`")
    align, bits, name, count = match.groups()
    start = -(-kernel.shared_bytes // int(align)) * int(align)
    kernel.shared[name] = start
    # An extern array has all of the dynamic shared memory.
    kernel.shared_bytes = start + int(bits) // 8 * int(count or ("1" if count is None else "0"))


def _body(kernel: Kernel, text: str, begin: int, files: dict[str, str]) -> None:
    """Statements up to the brace that closes the function."""
    number = text.count("\n", 0, begin) + 1
    statement, start, depth, source = "", number, 1, ""
    for line in text[begin:].split("\n"):
        location = re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line)
        if location:
            source = f"{files.get(location[1], '?')}:{location[2]}"
            line = ""
        for part in re.split(r"(;)", line):
            if part == ";":
                _statement(kernel, statement.strip(), start, source)
                statement = ""
                continue
            while True:
                # Braces that begin or end a scope stand where a statement would begin; others are vectors.
                scope = re.match(r"\s*([{}])", part) if not statement.strip() else None
                if scope is None:
                    break
                depth += 1 if scope[1] == "{" else -1
                part = part[scope.end() :]
                if depth == 0:
                    return
            while not statement.strip() and (label := re.match(r"\s*([\w$]+):(?!:)", part)):
                kernel.labels[label[1]] = len(kernel.instructions)
                part = part[label.end() :]
            if not statement.strip():
                start = number
            statement += part + " "
        number += 1
    raise UnknownInstruction(f"{kernel.name} does not end")


def _statement(kernel: Kernel, text: str, line: int, source: str) -> None:
    text = re.sub(r"\s+", " ", text)
    if not text or text.startswith(".pragma"):
        return
    if text.startswith(".reg"):
        return _declare_registers(kernel, text)
    if text.startswith(".shared"):
        return _declare_shared(kernel, text)
    match = re.fullmatch(r"(?:@(!?)(%?[\w$]+) )?([a-z]\w*)((?:(?:\.|::)\w+)*)(?: (.*))?", text)
    if match is None:
        raise UnknownInstruction(f"`{text}` (PTX line {line})")
    negated, guard, opcode, modifiers, operands = match.groups()
    kernel.instructions.append(
        Instruction(
            len(kernel.instructions),
            opcode,
            tuple(filter(None, modifiers.split("."))),
            tuple(_operand(kernel, part, text) for part in _split(operands or "", ",")),
            (Register(guard), not negated) if guard else None,
            text,
            line,
            source,
        )
    )


def _declare_registers(kernel: Kernel, text: str) -> None:
    match = re.fullmatch(r"\.reg \.(pred|[bsuf]\d+) (.*)", text)
    if match is None:
        raise UnknownInstruction(f"declaration `{text}`")
    bits = 1 if match[1] == "pred" else int(match[1][1:])
    for name in match[2].split(","):
        many = re.fullmatch(r"\s*(%?[\w$]+)<(\d+)>\s*", name)
        names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]
        kernel.registers.update(dict.fromkeys(names, bits))


def _split(text: str, separator: str) -> list[str]:
    """Parts of a list, those in brackets whole."""
    parts, depth, part = [], 0, ""
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == separator and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += character
    return [*parts, part.strip()] if part.strip() else parts


def _operand(kernel: Kernel, text: str, statement: str) -> Operand:
    if text.startswith("{"):
        return Vector(tuple(_operand(kernel, part, statement) for part in _split(text[1:-1], ",")))
    if text.startswith("["):
        match = re.fullmatch(r"\[\s*(%?[\w$.]+)\s*(?:\+\s*(-?\w+)\s*)?\]", text)
        if match is None:
            raise UnknownInstruction(f"address {text} in `{statement}`")
        return Address(_operand(kernel, match[1], statement), int(match[2] or "0", 0))
    if "|" in text:
        first, second = text.split("|")
        return Pair(_operand(kernel, first.strip(), statement), _operand(kernel, second.strip(), statement))
    if text.startswith("!"):
        return Negated(Register(text[1:].strip()))
    if text.startswith("%") or text in kernel.registers or text == "_":
        return Register(text)
    if match := re.fullmatch(r"0[fFdD]([0-9A-Fa-f]+)", text):
        return Immediate(int(match[1], 16))
    if match := re.fullmatch(r"(-?(?:0[xX][0-9A-Fa-f]+|\d+))U?", text):
        return Immediate(int(match[1], 0))
    if re.fullmatch(r"[\w$]+", text):
        return Symbol(text)
    raise UnknownInstruction(f"operand {text} in `{statement}`")
