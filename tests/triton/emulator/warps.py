"""What the threads of a warp do together, and how threads wait for one another and publish what they wrote."""

import numpy as np

from emulator.faults import Divergence, UnknownInstruction
from emulator.instructions import Form, Run, instruction
from emulator.parsing import Immediate, Instruction, Pair
from emulator.registers import Active
from emulator.state import State
from emulator.types import PREDICATE, Type

_REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
               "xor": np.bitwise_xor}  # fmt: skip


def together(state: State, ins: Instruction, active: Active, members: int = 0xFFFFFFFF) -> None:
    """The members of every warp that is here must all be here, and nobody else."""
    warps = active.mask.reshape(-1, 32)
    wanted = (members >> np.arange(32) & 1).astype(bool)
    split = warps.any(1) & (warps != wanted).any(1)
    if split.any():
        raise Divergence(f"only some threads of the warp of {state.lane(32 * np.argmax(split))} at {ins}")


def _members(ins: Instruction, operand: object) -> int:
    if not isinstance(operand, Immediate):
        raise UnknownInstruction(f"members {operand}")
    return operand.value & 0xFFFFFFFF


@instruction("shfl")
def shuffle(state: State, ins: Instruction, form: Form) -> Run:
    form.required("sync")
    mode = form.required("up", "down", "bfly", "idx")
    if form.type().bits != 32:
        raise UnknownInstruction("type")
    registers, word = state.registers, Type("u", 32)
    result = ins.operands[0]
    met = registers.write(result.second, PREDICATE) if isinstance(result, Pair) else None
    out = registers.write(result.first if isinstance(result, Pair) else result, word)
    x, by, bounds = (registers.read(operand, word) for operand in ins.operands[1:4])
    members = None if _all_ones(ins) else _register_members(state, ins)
    constant = all(isinstance(operand, Immediate) for operand in ins.operands[2:4])
    lanes = np.arange(registers.lanes)
    lane = lanes % 32

    def sources() -> tuple[np.ndarray, np.ndarray]:
        segment, clamp = (bounds >> np.uint32(8)).astype(np.int64) & 31, bounds.astype(np.int64) & 31
        last = (lane & segment) | (clamp & ~segment)
        first = lane & segment
        distance = by.astype(np.int64) & 31
        if mode == "up":
            source = lane - distance
            inside = source >= last
        else:
            source = {"down": lane + distance, "bfly": lane ^ distance, "idx": first | (distance & ~segment)}[mode]
            inside = source <= last
        return lanes - lane + np.where(inside, source, lane), inside

    fixed = sources() if constant else None

    def run(active: Active) -> None:
        if members is None:
            together(state, ins, active)
        else:
            members(active)
        source, inside = fixed or sources()
        state.shuffles[ins.index] = source
        if not active.mask[source[active.mask]].all():
            raise Divergence(f"a value of a thread that is not there: {ins}")
        np.copyto(out, x[source], where=active.where)
        if met is not None:
            np.copyto(met, inside, where=active.where)

    return run


def _all_ones(ins: Instruction) -> bool:
    return ins.operands[-1] == Immediate(-1) or ins.operands[-1] == Immediate(0xFFFFFFFF)


def _register_members(state: State, ins: Instruction):
    """A check that whoever is here is as the mask of members says."""
    mask = state.registers.read(ins.operands[-1], Type("u", 32))

    def check(active: Active) -> None:
        together_masks = np.unique(mask[active.mask])
        if len(together_masks) != 1:
            raise Divergence(f"masks that differ: {ins}")
        together(state, ins, active, int(together_masks[0]))

    return check


@instruction("redux")
def reduction(state: State, ins: Instruction, form: Form) -> Run:
    form.required("sync")
    function = _REDUCTIONS[form.required(*_REDUCTIONS)]
    type_ = form.type()
    if type_.bits != 32 or type_.is_float:
        raise UnknownInstruction(f".{type_}")
    out = state.registers.write(ins.operands[0], type_)
    x = state.registers.read(ins.operands[1], type_)
    check = None if _all_ones(ins) else _register_members(state, ins)

    def run(active: Active) -> None:
        if check:
            check(active)
        else:
            together(state, ins, active)
        for warp in np.flatnonzero(active.mask.reshape(-1, 32).any(1)):
            lanes = 32 * warp + np.flatnonzero(active.mask[32 * warp : 32 * warp + 32])
            out[lanes] = function.reduce(x[lanes])

    return run


@instruction("vote")
def vote(state: State, ins: Instruction, form: Form) -> Run:
    form.required("sync")
    mode = form.required("all", "any", "uni", "ballot")
    form.type()
    if ins.guard or not _all_ones(ins):
        raise UnknownInstruction("members")
    x = state.registers.read(ins.operands[1], PREDICATE)
    out = state.registers.write(ins.operands[0], Type("u", 32) if mode == "ballot" else PREDICATE)

    def run(active: Active) -> None:
        together(state, ins, active)
        votes = x.reshape(-1, 32)
        if mode == "ballot":
            result = (votes.astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(1, dtype=np.uint32)
        else:
            every, some = votes.all(1), votes.any(1)
            result = {"all": every, "any": some, "uni": every | ~some}[mode]
        np.copyto(out, np.repeat(result, 32), where=active.where)

    return run


@instruction("bar")
def barrier(state: State, ins: Instruction, form: Form) -> Run:
    """bar.warp.sync; bar.sync is the machine's, which is told here that it may be."""
    if form.flag("warp"):
        form.required("sync")
        members = _members(ins, ins.operands[0])
        return lambda active: together(state, ins, active, members)
    form.required("sync")
    if ins.operands != (Immediate(0),) or ins.guard:
        raise UnknownInstruction("a barrier of some threads")
    return lambda active: together(state, ins, active)


@instruction("fence", "membar")
def fence(state: State, ins: Instruction, form: Form) -> Run:
    """Of programs that run on one GPU, all scopes but that of a block order the same."""
    if form.flag("proxy"):
        form.required("async")
        form.one_of("shared::cta", "global")

        def proxy_fence(active: Active) -> None:
            for warp in state.warps_of(active):
                state.clocks.proxy_fence(int(warp))
            state.refresh()

        return proxy_fence
    if ins.opcode == "membar":
        form.required("gl", "sys")
    else:
        form.one_of("sc", "acq_rel")
        form.required("gpu", "sys")

    def run(active: Active) -> None:
        for warp in state.warps_of(active):
            state.clocks.fence(int(warp))
        state.refresh()

    return run
