"""Basic blocks, and which registers may be read before they are written."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from emulator.faults import UnknownInstruction
from emulator.parsing import Address, Immediate, Instruction, Kernel, Negated, Operand, Pair, Register, Symbol, Vector

# Control leaves a block behind these.
TERMINATORS = frozenset({"bra", "ret", "exit", "bar", "barrier"})
# The first operand is a result, but for these.
_NO_RESULT = frozenset({"st", "red", "bra", "ret", "exit", "bar", "barrier", "cp", "fence", "membar", "stmatrix"})


@dataclass(frozen=True)
class Block:
    """Instructions that run one after another; the last of them may be a terminator."""

    index: int
    instructions: tuple[Instruction, ...]
    target: int | None  # of a branch
    following: int | None


def blocks(kernel: Kernel) -> list[Block]:
    """The basic blocks in the order of the text."""
    instructions = kernel.instructions
    jumps = [ins.operands[0] for ins in instructions if ins.opcode == "bra"]
    starts = {0, *(kernel.labels[label.name] for label in jumps if label.name in kernel.labels)}
    starts.update(i + 1 for i, ins in enumerate(instructions) if ins.opcode in TERMINATORS)
    bounds = sorted(start for start in starts if start < len(instructions))
    number = {start: i for i, start in enumerate(bounds)}
    # A label may stand behind the last instruction.
    number[len(instructions)] = len(bounds)
    result = []
    for i, (begin, end) in enumerate(zip(bounds, [*bounds[1:], len(instructions)], strict=True)):
        last = instructions[end - 1]
        target = None
        if last.opcode == "bra":
            label = last.operands[0]
            if not isinstance(label, Symbol) or label.name not in kernel.labels:
                raise UnknownInstruction(str(last))
            target = number[kernel.labels[label.name]]
        stops = last.opcode in ("bra", "ret", "exit") and last.guard is None
        result.append(Block(i, tuple(instructions[begin:end]), target, None if stops else i + 1))
    return result


def registers_in(operand: Operand) -> Iterator[str]:
    """The names of the registers of an operand."""
    if isinstance(operand, Register):
        if operand.name != "_":
            yield operand.name
    elif isinstance(operand, Negated):
        yield operand.register.name
    elif isinstance(operand, Address):
        yield from registers_in(operand.base)
    elif isinstance(operand, Vector):
        for item in operand.items:
            yield from registers_in(item)
    elif isinstance(operand, Pair):
        yield from registers_in(operand.first)
        yield from registers_in(operand.second)


def results(ins: Instruction) -> list[str]:
    """The registers that an instruction writes."""
    if ins.opcode in _NO_RESULT or not ins.operands:
        return []
    if ins.opcode == "wgmma" and ins.modifiers[0] != "mma_async":
        return []
    return list(registers_in(ins.operands[0]))


def sources(ins: Instruction) -> list[str]:
    """The registers that an instruction reads, its guard aside."""
    whole = ins.opcode in _NO_RESULT
    if ins.opcode == "wgmma" and len(ins.operands) > 3:
        # It adds to its result, unless it is told not to.
        whole = ins.operands[3] != Immediate(0)
    operands = ins.operands if whole else ins.operands[1:]
    return [name for operand in operands for name in registers_in(operand)]


def doubtful(kernel: Kernel, graph: list[Block]) -> set[str]:
    """Registers that some path through the kernel reads before it has written them.

    A guarded instruction may not write. All other registers need no watching when the kernel runs.
    """
    bit = {name: 1 << i for i, name in enumerate(kernel.registers)}
    everything = (1 << len(bit)) - 1
    written = []
    for block in graph:
        names = [name for ins in block.instructions if ins.guard is None for name in results(ins)]
        written.append(sum({bit[name] for name in names if name in bit}))
    before = [everything] * (len(graph) + 1)
    before[0] = 0
    pending = [0]
    visited = set()
    while pending:
        i = pending.pop()
        visited.add(i)
        after = before[i] | written[i]
        for successor in (graph[i].target, graph[i].following):
            if successor is None or successor >= len(graph):
                continue
            joined = before[successor] & after
            if joined != before[successor] or successor not in visited:
                before[successor] = joined
                pending.append(successor)
    found = set()
    for i in visited:
        defined = before[i]
        for ins in graph[i].instructions:
            read = sources(ins) + ([ins.guard[0].name] if ins.guard else [])
            found.update(name for name in read if name in bit and not defined & bit[name])
            if ins.guard is None:
                for name in results(ins):
                    defined |= bit.get(name, 0)
    return found


def packed(kernel: Kernel) -> dict[str, list[str]]:
    """The registers that others are made of: of those that are written once, from such as are written once at most."""
    writes = Counter(name for ins in kernel.instructions for name in results(ins))
    return {
        results(ins)[0]: sources(ins)
        for ins in kernel.instructions
        if ins.opcode == "mov"
        and isinstance(ins.operands[1], Vector)
        and len(sources(ins)) == len(ins.operands[1].items)
        and all(writes[name] <= 1 for name in (*results(ins), *sources(ins)))
    }


def spread(kernel: Kernel, names: set[str]) -> set[str]:
    """With the registers that are computed from them."""
    edges = [(set(sources(ins)), set(results(ins))) for ins in kernel.instructions]
    while True:
        more = {name for read, written in edges if read & names for name in written} - names
        if not more:
            return names
        names = names | more


_MOVES = {"mov", "selp", "shfl"}


def seen_as_bits(kernel: Kernel) -> set[str]:
    """Registers whose bits an instruction looks at that is not one of floats: directly, or moved first.

    Through memory this is not followed.
    """
    seen: set[str] = set()
    moves: list[Instruction] = []
    for ins in kernel.instructions:
        if ins.opcode in _MOVES:
            moves.append(ins)
        elif ins.opcode != "st" and not any(m.startswith(("f16", "f32", "f64", "bf16")) for m in ins.modifiers):
            seen.update(sources(ins))
    for _ in moves:
        more = {name for ins in moves if seen & set(results(ins)) for name in sources(ins)}
        if more <= seen:
            break
        seen |= more
    return seen


def fusible(graph: list[Block]) -> dict[int, tuple[Instruction, int]]:
    """Sums that an assembler may fuse with a product: (the multiplication, which of their operands it is) by index.

    Neither says how it is rounded, they are in one block, and nothing changes the factors between.
    """
    found = {}
    for block in graph:
        products: dict[str, Instruction] = {}
        for ins in block.instructions:
            plain = ins.guard is None and ins.modifiers in (("f32",), ("f64",))
            if plain and ins.opcode in ("add", "sub"):
                for position, operand in enumerate(ins.operands[1:], 1):
                    if isinstance(operand, Register) and operand.name in products:
                        found[ins.index] = products[operand.name], position
                        break
            changed = set(results(ins))
            products = {n: p for n, p in products.items() if n not in changed and not changed & set(sources(p))}
            if plain and ins.opcode == "mul" and not changed & set(sources(ins)):
                products[ins.operands[0].name] = ins
    return found
