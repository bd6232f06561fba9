"""Happens-before with vector clocks, a clock per warp, and the accesses to memory that nothing orders.

A warp's time is cut into epochs: it begins a new one whenever others may learn what it did in the old one, at barriers,
releases and fences. Its row is (warp, epoch, what it knows): the last epoch of every other warp that happened before,
and, for reads through the asynchronous proxy, the last one with a proxy fence on the way.
Accesses are kept in a log of rows and looked at together: an access races with the last write before it, or a read with
the next write behind it, unless the later one knows the earlier one's epoch. As in FastTrack (Flanagan & Freund 2009),
the first race on every cell of memory is found that way.

A write that changes nothing is silent: Triton has several warps write the same value, which does no harm. A write and
the silent ones behind it are a run, and whatever must be ordered with one write must be with all of its run.
"""

from dataclasses import dataclass, field

import numpy as np

from emulator.memory import Memory
from emulator.parsing import Instruction
from emulator.probing import Accesses, Probe

READ, WRITE, ATOMIC, ASYNC_READ = range(4)
_NAMES = ("read", "write", "atomic", "asynchronous read")
_IS_READ = np.array([True, False, False, True])


class Clocks:
    """What every warp of a launch knows of all others."""

    def __init__(self, blocks: int, warps_per_block: int) -> None:
        self.warps_per_block = warps_per_block
        count = blocks * warps_per_block
        self.vectors = [np.full(count, -1, np.int32)]
        self.warp, self.epoch, self.vector = list(range(count)), [0] * count, [0] * count
        # What is known behind a proxy fence.
        self.proxied = [0] * count
        # The row of every warp.
        self.row = np.arange(count, dtype=np.int32)
        self._released: dict[object, np.ndarray | None] = {}
        self._fenced: dict[int, np.ndarray] = {}
        self._read: dict[int, np.ndarray] = {}

    def barrier(self, block: int) -> None:
        """The warps of a block learn from one another."""
        warps = range(block * self.warps_per_block, (block + 1) * self.warps_per_block)
        known = np.maximum.reduce([self._own(warp) for warp in warps])
        proxied = np.maximum.reduce([self.vectors[self.proxied[self.row[warp]]] for warp in warps])
        self.vectors += [known, proxied]
        for warp in warps:
            self._advance(warp, len(self.vectors) - 2, len(self.vectors) - 1)

    def atomic(self, warp: int, location: object, semantics: str) -> None:
        """A read and a write of a location.

        Whoever acquires there learns what those before have released; relaxed ones pass that on, and do so for the
        fences around them.
        """
        before = self._released.get(location)
        if before is not None:
            if semantics in ("acquire", "acq_rel"):
                self._learn(warp, before)
            else:
                self._read[warp] = np.maximum(self._read.get(warp, before), before)
        given = self._fenced.get(warp)
        if semantics in ("release", "acq_rel"):
            given = self._own(warp)
        if given is not None:
            self._released[location] = given if before is None else np.maximum(before, given)
        if semantics in ("release", "acq_rel"):
            self._advance(warp)

    def fence(self, warp: int) -> None:
        """Before a relaxed atomic it is a release, behind one an acquire."""
        if warp in self._read:
            self._learn(warp, self._read[warp])
        self._fenced[warp] = self._own(warp)
        self._advance(warp)

    def proxy_fence(self, warp: int) -> None:
        """The asynchronous proxy sees what the warp knows."""
        self.vectors.append(self._own(warp))
        self._advance(warp, proxied=len(self.vectors) - 1)

    def _own(self, warp: int) -> np.ndarray:
        """What it knows, itself included."""
        row = self.row[warp]
        known = self.vectors[self.vector[row]].copy()
        known[warp] = self.epoch[row]
        return known

    def _learn(self, warp: int, what: np.ndarray) -> None:
        self.vectors.append(np.maximum(self.vectors[self.vector[self.row[warp]]], what))
        self._advance(warp, len(self.vectors) - 1)

    def _advance(self, warp: int, vector: int | None = None, proxied: int | None = None) -> None:
        row = self.row[warp]
        self.row[warp] = len(self.warp)
        self.warp.append(warp)
        self.epoch.append(self.epoch[row] + 1)
        self.vector.append(self.vector[row] if vector is None else vector)
        self.proxied.append(self.proxied[row] if proxied is None else proxied)


@dataclass(frozen=True)
class RaceReport:
    """Two instructions that race, how often, and an example."""

    first: Instruction
    second: Instruction
    kinds: str
    count: int
    example: str
    is_read: bool

    def __str__(self) -> str:
        return f"{self.kinds}, {self.count} times, for example {self.example}:\n  {self.first}\n  {self.second}"


@dataclass
class _Accesses:
    """One entry per cell that a lane has accessed."""

    cell: np.ndarray
    row: np.ndarray
    order: np.ndarray
    kind: np.ndarray
    instruction: np.ndarray
    silent: np.ndarray

    def __getitem__(self, index: np.ndarray) -> "_Accesses":
        return _Accesses(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def __len__(self) -> int:
        return len(self.cell)

    @classmethod
    def joined(cls, parts: "list[_Accesses]") -> "_Accesses":
        """One behind the other."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))


@dataclass
class _Runs:
    """The runs of writes among sorted accesses."""

    writes: np.ndarray  # indices of the accesses
    run: np.ndarray  # of every write
    first: np.ndarray  # of every run, which of the writes begins it
    count: np.ndarray
    cell: np.ndarray

    @classmethod
    def of(cls, accesses: _Accesses) -> "_Runs":
        """Those of sorted accesses."""
        writes = np.flatnonzero(~_IS_READ[accesses.kind])
        cells = accesses.cell[writes]
        begins = ~accesses.silent[writes]
        begins |= np.diff(cells, prepend=-1) != 0
        first = np.flatnonzero(begins)
        return cls(writes, np.cumsum(begins) - 1, first, np.diff(first, append=len(writes)), cells[first])


# Entries that are looked at together.
_MOST_ENTRIES = 1 << 20


@dataclass
class AccessLog:
    """The accesses to one memory. cell: bytes that are always accessed together."""

    memory: Memory
    clocks: Clocks
    instructions: list[Instruction]
    cell: int
    probe: Probe | None = None
    reports: dict[tuple[int, int, int, int], RaceReport] = field(default_factory=dict)
    # The warps of an instruction whose reads race.
    reads: dict[int, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._entries: list[tuple[np.ndarray, int, np.ndarray, int, int, np.ndarray | None]] = []
        self._count = 0
        self._order = 0
        self._kept: _Accesses | None = None
        self._written = np.zeros(len(self.memory.bytes) // self.cell, bool)

    def add(
        self,
        positions: np.ndarray,
        width: int,
        rows: np.ndarray,
        kind: int,
        ins: Instruction,
        silent: np.ndarray | None = None,
    ) -> None:
        """Lanes of these rows access these positions."""
        self._entries.append((positions, width // self.cell, rows, kind, ins.index, silent))
        if not _IS_READ[kind]:
            cells = positions[:, None] * (width // self.cell) + np.arange(width // self.cell)
            self._written[cells.ravel()] = True
        if self.probe:
            unit = width // self.cell
            cells = (positions[:, None] * unit + np.arange(unit)).ravel()
            warps = np.repeat(np.array(self.clocks.warp)[rows], unit)
            accesses = Accesses(self.memory.space, kind, warps, cells)
            self.probe.accessed(warps // self.clocks.warps_per_block, accesses)
        self._count += len(positions) * (width // self.cell)
        if self._count > _MOST_ENTRIES:
            self._look(final=False)

    def finish(self) -> None:
        """Look at all accesses, and forget them."""
        self._look(final=True)
        self._kept = None
        self._written[...] = False

    def _look(self, final: bool) -> None:
        accesses = self._collected()
        if accesses is None:
            return
        # What nobody writes can wait, and is no race in the end.
        written = self._written[accesses.cell]
        waiting = accesses[~written]
        accesses = accesses[written]
        accesses = accesses[np.lexsort((accesses.silent, accesses.order, accesses.cell))]
        runs = _Runs.of(accesses)
        self._neighbours(accesses, runs)
        self._atomics(accesses)
        if not final:
            self._kept = self._latest(_Accesses.joined([self._last(accesses, runs), waiting]))

    def _collected(self) -> _Accesses | None:
        if not self._entries:
            return None
        parts = [self._kept] if self._kept is not None else []
        for positions, count, rows, kind, ins, silent in self._entries:
            cell, row = positions.astype(np.int32), rows
            if silent is None:
                silent = np.zeros(len(positions), bool)
            if count > 1:
                cell = (cell[:, None] * count + np.arange(count, dtype=np.int32)).ravel()
                row, silent = np.repeat(rows, count), np.repeat(silent, count)
            self._order += 1
            order, instruction = (np.full(len(cell), value, np.int32) for value in (self._order, ins))
            kinds = np.full(len(cell), kind, np.int8)
            parts.append(_Accesses(cell, row, order, kinds, instruction, silent))
        self._entries, self._count = [], 0
        return _Accesses.joined(parts)

    def _neighbours(self, accesses: _Accesses, runs: _Runs) -> None:
        """Reads with the run of writes before and the one behind them, writes with the run before theirs."""
        if not len(runs.writes):
            return
        is_write = ~_IS_READ[accesses.kind]
        before = np.cumsum(is_write) - is_write  # writes
        reads = np.flatnonzero(~is_write)
        cell = accesses.cell[reads]

        last = before[reads] - 1
        run = runs.run[last]
        inside = (last >= 0) & (runs.cell[run] == cell)
        self._pairs(accesses, runs, reads[inside], runs.first[run[inside]], (last - runs.first[run] + 1)[inside])

        following = np.where(inside, run + 1, runs.run[np.minimum(before[reads], len(runs.run) - 1)])
        following = np.minimum(following, len(runs.cell) - 1)
        ahead = (runs.cell[following] == cell) & (runs.writes[runs.first[following]] > reads)
        self._pairs(accesses, runs, reads[ahead], runs.first[following[ahead]], runs.count[following[ahead]], True)

        previous = runs.run - 1
        behind = (previous >= 0) & (runs.cell[previous] == accesses.cell[runs.writes])
        previous = previous[behind]
        self._pairs(accesses, runs, runs.writes[behind], runs.first[previous], runs.count[previous])

    def _pairs(
        self,
        accesses: _Accesses,
        runs: _Runs,
        one: np.ndarray,
        first: np.ndarray,
        count: np.ndarray,
        later: bool = False,
    ) -> None:
        """Every access of `one` with `count` writes from `first` on, which come later or before it."""
        start = np.cumsum(count) - count
        others = np.repeat(first - start, count) + np.arange(count.sum())
        pair = np.repeat(one, count), runs.writes[others]
        self._report(accesses, *(pair if later else pair[::-1]))

    def _atomics(self, accesses: _Accesses) -> None:
        """All pairs on cells with atomics: one that is not ordered behind the one before is no race with it."""
        if not (accesses.kind == ATOMIC).any():
            return
        begins = np.flatnonzero(np.diff(accesses.cell, prepend=-1))
        lengths = np.diff(begins, append=len(accesses))
        atomic = np.add.reduceat(accesses.kind == ATOMIC, begins) > 0
        for begin, length in zip(begins[atomic], lengths[atomic], strict=True):
            first, second = np.triu_indices(length, 1)
            self._report(accesses, begin + first, begin + second)

    def _report(self, accesses: _Accesses, first: np.ndarray, second: np.ndarray) -> None:
        clocks = self.clocks
        warp, epoch = np.array(clocks.warp), np.array(clocks.epoch)
        rows, later = accesses.row[first], accesses.row[second]
        kinds = accesses.kind[first], accesses.kind[second]
        asynchronous = kinds[1] == ASYNC_READ
        open_ = ((warp[rows] != warp[later]) | asynchronous) & ~((kinds[0] == ATOMIC) & (kinds[1] == ATOMIC))
        open_ &= ~(_IS_READ[kinds[0]] & _IS_READ[kinds[1]])
        first, second, rows, later, asynchronous = (x[open_] for x in (first, second, rows, later, asynchronous))
        if not len(first):
            return
        vector = np.where(asynchronous, np.array(clocks.proxied)[later], np.array(clocks.vector)[later])
        racing = np.stack(clocks.vectors)[vector, warp[rows]] < epoch[rows]
        for i, j in zip(first[racing], second[racing], strict=True):
            self._note(accesses, int(i), int(j), int(warp[accesses.row[i]]), int(warp[accesses.row[j]]))

    def _note(self, accesses: _Accesses, i: int, j: int, one: int, other: int) -> None:
        key = (*(int(accesses.instruction[k]) for k in (i, j)), *(int(accesses.kind[k]) for k in (i, j)))
        for instruction, kind, warp in zip(key[:2], key[2:], (one, other), strict=True):
            if kind == READ:
                self.reads.setdefault(instruction, set()).add(warp)
        old = self.reports.get(key)
        warps = self.clocks.warps_per_block
        places = [f"warp {w % warps} of block {w // warps}" for w in (one, other)]
        example = f"{places[0]} and {places[1]} {self.memory.describe(int(accesses.cell[i]) * self.cell)}"
        self.reports[key] = RaceReport(
            self.instructions[key[0]],
            self.instructions[key[1]],
            f"{_NAMES[key[2]]} and {_NAMES[key[3]]} that nothing orders",
            1 if old is None else old.count + 1,
            example if old is None else old.example,
            READ in key[2:],
        )

    def _last(self, accesses: _Accesses, runs: _Runs) -> _Accesses:
        """The last run of writes to every cell and what reads it since."""
        last_run = np.flatnonzero(np.diff(runs.cell, append=-1))
        begin = runs.writes[runs.first[last_run]]
        cells = runs.cell[last_run]
        here = np.arange(len(accesses))
        keep = here >= begin[np.searchsorted(cells, accesses.cell)]
        return accesses[keep | (accesses.kind == ATOMIC)]

    def _latest(self, accesses: _Accesses) -> _Accesses:
        """Of the accesses of a warp to a cell the last one of each kind: who knows of it knows of those before."""
        warp = np.array(self.clocks.warp)[accesses.row]
        order = np.lexsort((accesses.order, accesses.kind, warp, accesses.cell))
        accesses, warp = accesses[order], warp[order]
        following = [np.diff(x, append=-1) != 0 for x in (accesses.cell, warp, accesses.kind)]
        return accesses[np.logical_or.reduce(following) | (accesses.kind == ATOMIC)]
