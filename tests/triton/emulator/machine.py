"""Runs blocks of a kernel, several of them in lockstep."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from emulator import accesses, arithmetic, conversions, matrices, moves, warpgroups, warps  # noqa: F401
from emulator.faults import Divergence, Fault
from emulator.flow import blocks, doubtful, fusible, packed, results, seen_as_bits, spread
from emulator.instructions import build
from emulator.memory import GlobalMemory, SharedMemory
from emulator.parsing import Instruction, Kernel
from emulator.probing import Probe
from emulator.races import AccessLog, Clocks, RaceReport
from emulator.registers import Active, Registers
from emulator.state import State
from emulator.watching import observed

_EXITED, _WAITING = 1 << 30, 1 << 29
_MOST_STEPS = 1 << 22


@dataclass
class Result:
    """What a launch has done: instructions that were executed, each for the lanes that were there, and races."""

    instructions: int = 0
    lanes: int = 0
    races: list[RaceReport] = field(default_factory=list)
    reads: dict[int, set[int]] = field(default_factory=dict)  # that race: the warps of an instruction
    unused: list[RaceReport] = field(default_factory=list)  # races whose values nobody looks at


class Machine:
    """A launch of a kernel.

    together: how many blocks run in lockstep. Of their lanes, those that are furthest behind in the text run next, so
    that threads that took different ways meet again. apart: the warps of a block do not run in lockstep, but each of
    them as far as it can before the next one begins, in this order. contested: of loads, the warps whose values nobody
    may look at.
    """

    def __init__(
        self,
        kernel: Kernel,
        memory: GlobalMemory,
        parameters: bytes,
        programs: int,
        threads: int,
        shared_bytes: int,
        together: int,
        apart: Sequence[int] = (),
        seed: int = 0,
        inexact: bool = False,
        contested: dict[int, set[int]] | None = None,
        probe: Probe | None = None,
    ) -> None:
        self.kernel = kernel
        self.programs, self.threads, self.together = programs, threads, together
        self._graph = blocks(kernel)
        lanes = threads * together
        thread = np.tile(np.arange(threads), together)
        # Warps that multiply together run together.
        unit = 128 if any(ins.opcode == "wgmma" for ins in kernel.instructions) else 32
        self._turns = [thread // unit == number for number in apart] or [np.ones(lanes, bool)]
        self._block = np.zeros(lanes, np.uint32)
        special = _special_registers(threads, together, programs, self._block)
        symbols = {p.name: p.offset for p in kernel.parameters} | accesses.shared_address(kernel.shared)
        registers = Registers(kernel, lanes, special, symbols)
        shared = SharedMemory(max(shared_bytes, kernel.shared_bytes), together, threads)
        clocks = Clocks(programs, threads // 32)
        contested = contested or {}
        unsure = {
            name
            for index in {*contested, *(probe.spoiled if probe else ())}
            for name in results(kernel.instructions[index])
        }
        watched = spread(kernel, unsure | doubtful(kernel, self._graph))
        cells = _cells(kernel)
        self.state = State(
            registers=registers,
            global_memory=memory,
            shared_memory=shared,
            parameters=np.frombuffer(parameters, np.uint8),
            clocks=clocks,
            global_log=AccessLog(memory, clocks, kernel.instructions, cells["global"], probe),
            shared_log=AccessLog(shared, clocks, kernel.instructions, cells["shared"], probe),
            threads=threads,
            seen_as_bits=seen_as_bits(kernel),
            written={name: np.zeros(lanes, bool) for name in watched},
            packed=packed(kernel),
            random=np.random.default_rng(seed),
            inexact=inexact,
            fused=fusible(self._graph) if inexact else {},
            contested=contested,
            probe=probe,
            blocks=np.full(together, -1),
        )
        self._code = [[build(self.state, ins) for ins in _body(block.instructions)] for block in self._graph]
        ends = {block.index: block.instructions[-1] for block in self._graph}
        self._barriers = {i: build(self.state, ins) for i, ins in ends.items() if _is_barrier(ins)}
        self._pc = np.zeros(lanes, np.int32)
        self._resume = np.zeros(lanes, np.int32)
        self._arrived = np.zeros(lanes, np.int32)  # at which barrier

    def run(self, order: Sequence[int]) -> Result:
        """Run the blocks in this order, `together` at a time."""
        result = Result()
        with np.errstate(all="ignore"):
            for begin in range(0, len(order), self.together):
                self._run_together(order[begin : begin + self.together], result)
                self.state.shared_log.finish()
            self.state.global_log.finish()
        for log in (self.state.shared_log, self.state.global_log):
            result.races += log.reports.values()
            for instruction, racing in log.reads.items():
                result.reads.setdefault(instruction, set()).update(racing)
        return result

    def _run_together(self, numbers: Sequence[int], result: Result) -> None:
        chosen = np.full(self.together, -1)
        chosen[: len(numbers)] = numbers
        self._block[...] = np.repeat(np.maximum(chosen, 0), self.threads)
        self.state.begin(chosen)
        self._pc[...] = np.where(np.repeat(chosen >= 0, self.threads), 0, _EXITED)
        for _ in range(_MOST_STEPS):
            here = self._next()
            if here is None:
                if (self._pc == _EXITED).all():
                    break
                self._release()
                continue
            first = int(self._pc[np.argmax(here)])
            active = Active(here, alone=bool((here | (self._pc == _EXITED)).all()))
            for run in self._code[first]:
                run(active)
            result.instructions += len(self._graph[first].instructions)
            result.lanes += len(self._graph[first].instructions) * int(here.sum())
            self._leave(first, active)
        else:
            raise Fault(f"{self.kernel.name} does not end")
        if self.state.copies:
            raise Fault(f"a copy that nobody waits for: {self.state.copies[0].instruction}")
        if self.state.products:
            raise Fault(f"a product that nobody waits for in {self.kernel.name}")

    def _next(self) -> np.ndarray | None:
        """The lanes that run next, if any can."""
        for turn in self._turns:
            first = self._pc.min(where=turn, initial=_WAITING)
            if first < _WAITING:
                return self._together(int(first), turn)
        return None

    def _together(self, first: int, turn: np.ndarray) -> np.ndarray:
        """The lanes that are furthest behind. At a barrier, a warp waits for its lanes that are yet to come."""
        here = (self._pc == first) & turn
        if first not in self._barriers:
            return here
        running = (self._pc < _WAITING) & turn
        whole = np.repeat((here == running).reshape(-1, 32).all(1), 32) & here
        if whole.any():
            return whole
        following = self._pc.min(where=running & (self._pc > first), initial=_WAITING)
        return here if following == _WAITING else self._together(int(following), turn)

    def _leave(self, index: int, active: Active) -> None:
        """Go where the block's end leads."""
        block = self._graph[index]
        ins = block.instructions[-1]
        here = active.mask
        following = _EXITED if block.following in (None, len(self._graph)) else block.following
        if _is_barrier(ins):
            self._barriers[index](active)
            self._pc[here] = _WAITING
            self._resume[here] = following
            self._arrived[here] = ins.index
            return
        if ins.opcode not in ("bra", "ret", "exit"):
            self._pc[here] = following
            return
        target = block.target if ins.opcode == "bra" else _EXITED
        if ins.guard is None:
            self._pc[here] = target
            return
        register, wanted = ins.guard
        observed(self.state, ins, [register.name], active)
        self._pc[here] = np.where(self.state.registers.bits(register.name)[here] == wanted, target, following)

    def _release(self) -> None:
        """All that still run wait at barriers."""
        waiting = self._pc == _WAITING
        complete = waiting.reshape(self.together, -1)
        partial = complete.any(1) & ~complete.all(1)
        if partial.any():
            number = self.state.blocks[np.argmax(partial)]
            raise Divergence(f"{complete[np.argmax(partial)].sum()} threads of block {number} wait for those that left")
        for slot in np.flatnonzero(complete.all(1)):
            block = int(self.state.blocks[slot])
            self.state.clocks.barrier(block)
            if self.state.probe:
                self.state.probe.barrier(block, int(self._arrived[slot * self.threads]))
        self.state.refresh()
        self._pc[waiting] = self._resume[waiting]


def _is_barrier(ins: Instruction) -> bool:
    return ins.opcode == "bar" and "warp" not in ins.modifiers


def _body(instructions: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
    last = instructions[-1]
    return instructions[:-1] if last.opcode in ("bra", "ret", "exit") or _is_barrier(last) else instructions


def _special_registers(threads: int, together: int, programs: int, block: np.ndarray) -> dict[str, np.ndarray]:
    lanes = threads * together
    thread = np.tile(np.arange(threads, dtype=np.uint32), together)

    def constant(value: int) -> np.ndarray:
        return np.full(lanes, value, np.uint32)

    special = {"%tid.x": thread, "%ctaid.x": block, "%ntid.x": constant(threads), "%nctaid.x": constant(programs),
               "%laneid": thread % 32}  # fmt: skip
    for axis in "yz":
        special |= {f"%tid.{axis}": constant(0), f"%ctaid.{axis}": constant(0), f"%ntid.{axis}": constant(1),
                    f"%nctaid.{axis}": constant(1)}  # fmt: skip
    return special


def _cells(kernel: Kernel) -> dict[str, int]:
    """Bytes that every access to a space covers wholly or not at all."""
    cells = {"global": 16, "shared": 16}
    for ins in kernel.instructions:
        for space in cells:
            if space in ins.modifiers or f"{space}::cta" in ins.modifiers:
                cells[space] = min(cells[space], _access_bytes(ins))
    return cells


def _access_bytes(ins: Instruction) -> int:
    if ins.opcode == "cp":
        return ins.operands[2].value if len(ins.operands) > 2 else 16
    if ins.opcode in ("ldmatrix", "stmatrix", "fence"):
        return 16
    count = next((int(m[1:]) for m in ins.modifiers if m in ("v2", "v4", "v8")), 1)
    bits = [int(m.lstrip("bsuf")) for m in ins.modifiers if m.lstrip("bsuf").isdigit()]
    return count * bits[-1] // 8 if bits else 16
