"""Kernels without one of their barriers, orders or guards; and why some of those can be spared.

A mutation is noticed where a run faults, or its numbers are wrong. What is not noticed has to be explained, by what an
unchanged run shows:

- a barrier has nothing to order where no warp accesses, between the barriers before and behind it, what another one has
  written on the other side of it, or the other way round; nor, where it stands before an atomic that releases, has
  another warp written to global memory. Triton puts barriers between all accesses to shared memory that it cannot tell
  apart; kernels put them around atomics for layouts in which several warps write.
- or all that it orders are reads whose values nobody uses: of warps that hold a copy.
- a fence between proxies has nothing to show where every way back leads to another one before a store.
- a guard changes nothing where it holds for all threads that come there; where a thread that it keeps from storing has
  the same value for the same address as one that stores; and where nobody looks at what a thread would load or store.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from emulator.execution import Schedule
from emulator.faults import Fault, MemoryFault, UndefinedRegister
from emulator.launcher import Allocations, Compiled, compiled, run
from emulator.machine import Result
from emulator.parsing import Instruction, Kernel
from emulator.probing import Interval, Probe
from emulator.races import ATOMIC, WRITE

from emulated.cases import Case, Plan, planned

SCHEDULES = (
    Schedule("random"),
    Schedule("reversed", together=1, warps="reversed"),
    Schedule("forward", warps="forward"),
)
_TARGETS = {
    "barrier": (r"bar\.sync\s+0;", ""),
    "acquire": (r"\.acq_rel", ".release"),
    "release": (r"\.acq_rel", ".acquire"),
    "order": (r"\.acq_rel", ".relaxed"),
    "guard": (r"@!?%p\d+\s+(?=(?:ld|st|atom)\.)", ""),
    "wait": (r"cp\.async\.wait_group\s+\d+;", ""),
    "proxy fence": (r"fence\.proxy\.async\.shared::cta;", ""),
}


@dataclass(frozen=True)
class Mutation:
    """A text without something, and the line of the text where it was."""

    line: int
    text: str


@dataclass
class Subject:
    """One launch of a case, whose text is changed."""

    make: Callable[[], Case]
    plan: Plan
    index: int
    architecture: int = 80

    def __post_init__(self) -> None:
        with planned(self.plan):
            self._codes = [compiled(launch, self.architecture) for launch in self.make().launches(self.architecture)]
        self._unused = [_pairs(self._run(self._codes, schedule)) for schedule in SCHEDULES]

    @property
    def kernel(self) -> Kernel:
        """As it is."""
        return self._codes[self.index].kernel

    def mutations(self, kind: str) -> Iterator[Mutation]:
        """All of a kind."""
        pattern, replacement = _TARGETS[kind]
        text = self._codes[self.index].ptx
        for match in re.finditer(pattern, text):
            line = text.count("\n", 0, match.start()) + 1
            yield Mutation(line, text[: match.start()] + replacement + text[match.end() :])

    def outcome(self, mutation: Mutation) -> str:
        """noticed, where some run of it faults or is wrong; unused, where reads race that nobody uses; or unnoticed."""
        codes = list(self._codes)
        codes[self.index] = replace(codes[self.index], ptx=mutation.text)
        outcome = "unnoticed"
        for schedule, unused in zip(SCHEDULES, self._unused, strict=True):
            try:
                if _pairs(self._run(codes, schedule)) - unused:
                    outcome = "unused"
            # Values that are not finite are refused by the library.
            except (Fault, AssertionError, ValueError):
                return "noticed"
        return outcome

    def probed(self, spoiled: frozenset[int] = frozenset()) -> Probe:
        """A run of the unchanged text."""
        probe = Probe(spoiled)
        self._run(self._codes, SCHEDULES[0], probe)
        return probe

    def _run(self, codes: list[Compiled], schedule: Schedule, probe: Probe | None = None) -> Result:
        with planned(self.plan):
            torch.manual_seed(0)
            case = self.make()
            with Allocations() as fresh:
                launches = case.launches(self.architecture)
            results = run(launches, codes, fresh, schedule, probes={self.index: probe} if probe else None)
            case.check()
        return results[self.index]


def _pairs(result: Result) -> set[frozenset[str]]:
    """Instructions whose races nobody is touched by."""
    return {frozenset((race.first.text, race.second.text)) for race in result.unused}


def idle_barriers(subject: Subject) -> set[int]:
    """Lines of barriers that have nothing to order."""
    instructions = subject.kernel.instructions
    needed = set()
    for intervals in subject.probed().intervals.values():
        for before, behind in pairwise(intervals):
            if before.barrier not in needed and _conflict(before, behind):
                needed.add(before.barrier)
    barriers = [ins for ins in instructions if ins.opcode == "bar" and "warp" not in ins.modifiers]
    return {ins.line for ins in barriers if ins.index not in needed}


def _conflict(before: Interval, behind: Interval) -> bool:
    """Whether different warps access a cell on both sides, one of them to write it; or one publishes for others."""
    for space in ("shared", "global"):
        for writes_before, writes_behind in ((True, False), (False, True)):
            first = _extremes(before, space, writes_before)
            second = _extremes(behind, space, writes_behind)
            if any(len({*first[cell], *second[cell]}) > 1 for cell in first.keys() & second.keys()):
                return True
    publishers = {int(warp) for accesses in behind.accesses if accesses.kind == ATOMIC for warp in accesses.warps}
    writers = {warp for pair in _extremes(before, "global", True).values() for warp in pair}
    return bool(publishers) and not writers <= publishers


def _extremes(interval: Interval, space: str, writes: bool) -> dict[int, tuple[int, int]]:
    """The lowest and the highest warp that accesses, or writes, each cell."""
    found: dict[int, tuple[int, int]] = {}
    for accesses in interval.accesses:
        if accesses.space == space and (accesses.kind in (WRITE, ATOMIC) or not writes):
            pairs = np.unique(np.stack([accesses.cells, accesses.warps], 1), axis=0)
            for cell, warp in pairs.tolist():
                low, high = found.get(cell, (warp, warp))
                found[cell] = min(low, warp), max(high, warp)
    return found


def idle_fences(subject: Subject) -> set[int]:
    """Lines of proxy fences behind others, with no store between."""
    kernel = subject.kernel
    fences = [ins for ins in kernel.instructions if ins.opcode == "fence" and "proxy" in ins.modifiers]
    return {fence.line for fence in fences if not _stores_before(kernel, fence)}


def _stores_before(kernel: Kernel, fence: Instruction) -> bool:
    sources: dict[int, list[int]] = {}
    for i, ins in enumerate(kernel.instructions):
        if ins.opcode != "ret" and (ins.opcode != "bra" or ins.guard):
            sources.setdefault(i + 1, []).append(i)
        if ins.opcode == "bra":
            sources.setdefault(kernel.labels[ins.operands[0].name], []).append(i)
    pending, seen = list(sources.get(fence.index, [])), set()
    while pending:
        i = pending.pop()
        ins = kernel.instructions[i]
        if i == 0 or (ins.opcode in ("st", "cp") and "shared" in ins.modifiers):
            return True
        if i not in seen and not (ins.opcode == "fence" and "proxy" in ins.modifiers):
            pending.extend(sources.get(i, []))
        seen.add(i)
    return False


def idle_guards(subject: Subject) -> set[int]:
    """Lines of guards that keep nobody from anything, or stores from what others store."""
    probe = subject.probed()
    guarded = [ins for ins in subject.kernel.instructions if ins.guard and ins.opcode in ("ld", "st", "atom")]
    idle = [
        i for i in guarded if i.index not in probe.selective or (i.opcode == "st" and i.index not in probe.distinct)
    ]
    return {ins.line for ins in idle}


def unused_accesses(subject: Subject, lines: Sequence[int]) -> set[int]:
    """Those of the lines whose guards keep threads from loading or storing what nobody looks at."""
    found = set()
    for ins in subject.kernel.instructions:
        if ins.line in lines and ins.opcode in ("ld", "st"):
            try:
                subject.probed(frozenset({ins.index}))
            except (UndefinedRegister, MemoryFault):
                continue
            found.add(ins.line)
    return found
