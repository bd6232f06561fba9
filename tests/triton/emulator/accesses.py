"""Loads, stores, atomics and asynchronous copies."""

from collections.abc import Callable

import numpy as np

from emulator.faults import MemoryFault, UnknownInstruction
from emulator.instructions import Form, Run, instruction
from emulator.memory import ACCESSIBLE, SHARED_BASE, Memory
from emulator.parsing import Address, Instruction, Operand, Register, Vector
from emulator.probing import joined
from emulator.races import ATOMIC, READ, WRITE, AccessLog
from emulator.registers import Active
from emulator.state import Copy, State
from emulator.types import PREDICATE, Type

# Where lines are kept does not change what a program may rely on.
_CACHES = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "L1::evict_first", "L1::evict_last", "L1::evict_normal",
           "L1::no_allocate", "L1::evict_unchanged")  # fmt: skip
_ALL = (1 << 64) - 1
# (offsets of the active lanes' addresses)
Locate = Callable[[Active], np.ndarray]


def _plain(form: Form) -> None:
    while form.one_of("weak", *_CACHES):
        pass


def located(state: State, operand: Operand, space: str, ins: Instruction) -> tuple[Memory, AccessLog, Locate]:
    """Memory, its log, and a function that finds the offsets of the active lanes."""
    if not isinstance(operand, Address):
        raise UnknownInstruction(f"{operand} as an address")
    bits = 64
    if isinstance(operand.base, Register):
        bits = 8 * state.registers.bits(operand.base.name).itemsize
    base = state.registers.read(operand.base, Type("u", bits))
    distance = operand.offset
    if space == "shared":
        shared, offset = state.shared_memory, np.uint64(distance & _ALL)

        def in_shared(active: Active) -> np.ndarray:
            addresses = base[active.lanes].astype(np.uint64) + offset
            return shared.offsets(addresses, active.lanes, ins)

        return shared, state.shared_log, in_shared
    if bits != 64:
        raise UnknownInstruction(f"an address of {bits} bits")
    offset = np.uint64(distance - state.global_memory.base & _ALL)
    return state.global_memory, state.global_log, lambda active: base[active.lanes] + offset


def _elements(operand: Operand) -> tuple[Operand, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


def _form(ins: Instruction, form: Form, elements: int) -> Type:
    """The type, where vectors have as many elements as the modifier says."""
    count = int((form.one_of("v2", "v4", "v8") or "v1")[1:])
    if count != elements:
        raise UnknownInstruction(f"{elements} registers for a vector of {count}")
    type_ = form.type()
    if type_.count > 1 or type_ == PREDICATE or type_.bits * count > 128:
        raise UnknownInstruction(f"{count} of .{type_}")
    return type_


@instruction("ld")
def load(state: State, ins: Instruction, form: Form) -> Run:
    space = form.required("global", "shared", "param")
    _plain(form)
    destination, source = ins.operands
    results = _elements(destination)
    type_ = _form(ins, form, len(results))
    write = _writer(state, results, type_)
    if space == "param":
        return _load_parameter(state, ins, source, type_, len(results), write)
    memory, log, locate = located(state, source, space, ins)
    width = type_.bits // 8 * len(results)
    view = memory.view(width)
    if state.probe:
        names = [result.name for result in results if isinstance(result, Register)]
        state.probe.spoil[ins.index] = lambda active: state.forget(names, active)

    def run(active: Active) -> None:
        positions = memory.readable(locate(active), width, ins)
        log.add(positions, width, state.rows[active.lanes], READ, ins)
        write(view.take(positions).view(type_.dtype).reshape(len(positions), -1), active)

    return run


def _writer(state: State, results: tuple[Operand, ...], type_: Type) -> Callable[[np.ndarray, Active], None]:
    """A function that writes (active lanes, elements) into registers."""
    wide = [not isinstance(r, Register) or r.name == "_" or
            8 * state.registers.bits(r.name).itemsize != type_.bits for r in results]  # fmt: skip
    if not any(wide):
        outs = [state.registers.write(result, type_) for result in results]

        def write(values: np.ndarray, active: Active) -> None:
            for i, out in enumerate(outs):
                out[active.lanes] = values[:, i]

        return write
    puts = [state.registers.extended(result, type_) for result in results]

    def extend(values: np.ndarray, active: Active) -> None:
        for i, put in enumerate(puts):
            spread = np.zeros(state.registers.lanes, type_.dtype)
            spread[active.lanes] = values[:, i]
            put(spread, active)

    return extend


def _load_parameter(state: State, ins: Instruction, source: Operand, type_: Type, elements: int, write) -> Run:
    if not isinstance(source, Address):
        raise UnknownInstruction(f"{source} as an address")
    base = state.registers.read(source.base, Type("u", 64))
    offset = np.uint64(source.offset)
    size = type_.bits // 8 * elements

    def run(active: Active) -> None:
        starts = (base[active.lanes] + offset).astype(np.intp)
        if len(starts) and not 0 <= starts.min() <= starts.max() <= len(state.parameters) - size:
            raise MemoryFault(f"byte {starts.max()} of {len(state.parameters)} bytes of arguments: {ins}")
        taken = state.parameters[starts[:, None] + np.arange(size)]
        write(taken.view(type_.dtype), active)

    return run


@instruction("st")
def store(state: State, ins: Instruction, form: Form) -> Run:
    space = form.required("global", "shared")
    _plain(form)
    destination, source = ins.operands
    elements = _elements(source)
    type_ = _form(ins, form, len(elements))
    bits = Type("u", type_.bits)
    values = [state.registers.read(element, bits) for element in elements]
    memory, log, locate = located(state, destination, space, ins)
    width = type_.bits // 8 * len(elements)
    if state.probe:

        def stored(active: Active) -> np.ndarray:
            return joined([locate(active), *(value[active.lanes] for value in values)])

        def spoil(active: Active) -> None:
            memory.mark(memory.writable(locate(active), width, ins), width, ACCESSIBLE)

        state.probe.stored[ins.index], state.probe.spoil[ins.index] = stored, spoil

    def run(active: Active) -> None:
        stacked = np.stack([value[active.lanes] for value in values], 1)
        put(state, memory, log, locate(active), width, stacked, active, ins)

    return run


def put(
    state: State,
    memory: Memory,
    log: AccessLog,
    offsets: np.ndarray,
    width: int,
    values: np.ndarray,
    active: Active,
    ins: Instruction,
) -> None:
    """Store (active lanes, elements)."""
    positions = memory.writable(offsets, width, ins)
    units = np.ascontiguousarray(values).view(memory.view(width).dtype).ravel()
    silent, kept = memory.write(positions, width, units)
    log.add(positions, width, state.rows[active.lanes], WRITE, ins, silent)
    if not kept.all():
        _overwritten(state, positions, kept, active, ins)


def _overwritten(state: State, positions: np.ndarray, kept: np.ndarray, active: Active, ins: Instruction) -> None:
    """Lanes have written different values to one address: of one warp, a fault; others are in the log."""
    lanes = np.flatnonzero(active.mask)
    for i in np.flatnonzero(~kept):
        others = lanes[(positions == positions[i]) & kept]
        same = others[state.warps[others] == state.warps[lanes[i]]]
        if len(same):
            pair = f"{state.lane(lanes[i])} and {state.lane(same[0])}"
            raise MemoryFault(f"{pair} of one warp write different values to one address: {ins}")


def _add(old: int, operands: tuple[int, ...]) -> int:
    return old + operands[0]


_OPERATIONS: dict[str, Callable[[int, tuple[int, ...]], int]] = {
    "add": _add,
    "min": lambda old, operands: min(old, operands[0]),
    "max": lambda old, operands: max(old, operands[0]),
    "and": lambda old, operands: old & operands[0],
    "or": lambda old, operands: old | operands[0],
    "xor": lambda old, operands: old ^ operands[0],
    "exch": lambda old, operands: operands[0],
    "inc": lambda old, operands: 0 if old >= operands[0] else old + 1,
    "cas": lambda old, operands: operands[1] if old == operands[0] else old,
}


@instruction("atom", "red")
def atomic(state: State, ins: Instruction, form: Form) -> Run:
    """One lane after another, in any order: of active lanes nobody knows who comes first."""
    space = form.required("global", "shared")
    semantics = form.one_of("relaxed", "acquire", "release", "acq_rel") or "relaxed"
    scope = form.one_of("cta", "cluster", "gpu", "sys") or "gpu"
    operation = _OPERATIONS[form.required(*_OPERATIONS)]
    type_ = form.type()
    if type_.count > 1 or (type_.kind in ("f", "bf") and operation is not _add) or type_.bits < 32:
        raise UnknownInstruction(f".{type_}")
    operands = list(ins.operands)
    write = _writer(state, (operands.pop(0),), type_) if ins.opcode == "atom" else None
    memory, log, locate = located(state, operands[0], space, ins)
    values = [state.registers.read(operand, type_) for operand in operands[1:]]
    width = type_.bits // 8
    view = memory.view(width).view(type_.dtype)

    def run(active: Active) -> None:
        offsets = locate(active)
        positions = memory.readable(offsets, width, ins)
        log.add(positions, width, state.rows[active.lanes], ATOMIC, ins)
        lanes = np.flatnonzero(active.mask)
        old = np.zeros((len(lanes), 1), type_.dtype)
        for i in state.random.permutation(len(lanes)):
            lane, position = lanes[i], positions[i]
            old[i] = view[position]
            new = operation(view[position].item(), tuple(value[lane].item() for value in values))
            if type_.is_float:
                view[position] = new
            else:
                view[position : position + 1].view(np.uint8)[...] = np.frombuffer(
                    (new & (1 << type_.bits) - 1).to_bytes(width, "little"), np.uint8
                )
            block = state.blocks[lane // state.threads] if scope == "cta" or space == "shared" else None
            state.clocks.atomic(int(state.warps[lane]), (space, block, int(position) * width), semantics)
        state.refresh()
        if write:
            write(old, active)

    return run


@instruction("cp")
def copy(state: State, ins: Instruction, form: Form) -> Run:
    """cp.async: the data arrive as late as they may, when somebody waits."""
    form.required("async")
    kind = form.required("ca", "cg", "commit_group", "wait_group", "wait_all")
    if kind == "commit_group":

        def commit(active: Active) -> None:
            state.groups[active.mask] += 1

        return commit
    if kind in ("wait_group", "wait_all"):
        allowed = ins.operands[0].value if kind == "wait_group" else -1
        return lambda active: _arrive(state, active, allowed)
    form.required("shared", "shared::cta")
    form.required("global")
    form.one_of("L2::64B", "L2::128B", "L2::256B")
    size = ins.operands[2].value
    if size not in ((16,) if kind == "cg" else (4, 8, 16)) or len(ins.operands) > 4:
        raise UnknownInstruction(f"{size} bytes, {len(ins.operands)} operands")
    _, _, destination = located(state, ins.operands[0], "shared", ins)
    memory, log, source = located(state, ins.operands[1], "global", ins)
    wanted = state.registers.read(ins.operands[3], Type("u", 32)) if len(ins.operands) == 4 else None

    def run(active: Active) -> None:
        lanes = np.flatnonzero(active.mask)
        sizes = np.full(len(lanes), size, np.uint32) if wanted is None else wanted[lanes]
        sources, destinations = source(active), destination(active)
        reads = sizes > 0
        if (reads & (sizes < size)).any():
            raise UnknownInstruction(f"{sizes[reads & (sizes < size)][0]} of {size} bytes")
        # Whatever is read later has to be there now: the copy may be early, too.
        positions = memory.readable(sources[reads], size, ins)
        log.add(positions, size, state.rows[lanes[reads]], READ, ins)
        written = state.shared_memory.writable(destinations, size, ins)
        state.shared_log.add(written, size, state.rows[lanes], WRITE, ins)
        state.shared_memory.mark(written, size, ACCESSIBLE)
        state.copies.append(Copy(lanes, state.groups[lanes], sources, destinations, sizes, size, ins))

    return run


def _arrive(state: State, active: Active, allowed: int) -> None:
    """Complete what the active lanes have committed, but for the last `allowed` groups; with -1 everything."""
    remaining = []
    for copy in state.copies:
        done = active.mask[copy.lanes]
        if allowed >= 0:
            done = done & (copy.group < state.groups[copy.lanes] - allowed)
        if done.any():
            _complete(state, copy, done)
        if not done.all():
            left = ~done
            fields = (copy.lanes, copy.group, copy.source, copy.destination, copy.wanted)
            remaining.append(Copy(*(field[left] for field in fields), copy.size, copy.instruction))
    state.copies = remaining


def _complete(state: State, copy: Copy, done: np.ndarray) -> None:
    lanes, reads = copy.lanes[done], copy.wanted[done] > 0
    memory, size = state.global_memory, copy.size
    positions = memory.readable(copy.source[done][reads], size, copy.instruction)
    values = np.zeros(len(lanes), memory.view(size).dtype)
    values[reads] = memory.view(size).take(positions)
    state.global_log.add(positions, size, state.rows[lanes[reads]], READ, copy.instruction)
    mask = np.zeros(state.registers.lanes, bool)
    mask[lanes] = True
    put(state, state.shared_memory, state.shared_log, copy.destination[done], size, values[:, None], Active(mask),
        copy.instruction)  # fmt: skip


def shared_address(symbols: dict[str, int]) -> dict[str, int]:
    """The addresses of what lies in shared memory."""
    return {name: SHARED_BASE + offset for name, offset in symbols.items()}
