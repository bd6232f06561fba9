"""What a run leaves behind for those who ask why a barrier or a guard is there."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from emulator.parsing import Instruction
from emulator.registers import Active


@dataclass(frozen=True)
class Accesses:
    """What some warps do with some cells, one entry each."""

    space: str
    kind: int
    warps: np.ndarray
    cells: np.ndarray


@dataclass
class Interval:
    """What a block accesses between two barriers."""

    barrier: int | None = None  # the instruction that ends it
    accesses: list[Accesses] = field(default_factory=list)


@dataclass
class Probe:
    """spoiled: guarded loads and stores; what they would do for lanes whose guard does not hold counts as not written.

    Nobody may look at it then: whoever does faults.
    """

    spoiled: frozenset[int] = frozenset()
    intervals: dict[int, list[Interval]] = field(default_factory=lambda: defaultdict(lambda: [Interval()]))
    # Guards that did not hold for some lane that came there.
    selective: set[int] = field(default_factory=set)
    # Guarded stores that would have written something else, had their guard held for all that came there.
    distinct: set[int] = field(default_factory=set)
    # By instruction, as it is built: what lanes would store and where, one value each; how their results are spoiled.
    stored: dict[int, Callable[[Active], np.ndarray]] = field(default_factory=dict)
    spoil: dict[int, Callable[[Active], None]] = field(default_factory=dict)

    def accessed(self, blocks: np.ndarray, accesses: Accesses) -> None:
        """Lanes of these blocks access memory."""
        for block in np.unique(blocks):
            here = blocks == block
            mine = replace(accesses, warps=accesses.warps[here], cells=accesses.cells[here])
            self.intervals[int(block)][-1].accesses.append(mine)

    def barrier(self, block: int, ins: int) -> None:
        """A block has come to a barrier."""
        self.intervals[block][-1].barrier = ins
        self.intervals[block].append(Interval())

    def guarded(self, ins: Instruction, active: Active, chosen: Active) -> None:
        """Some of the active lanes were chosen by a guard, and have gone first."""
        left_out = active.only(~chosen.mask)
        if not left_out.mask.any():
            return
        self.selective.add(ins.index)
        if ins.index in self.stored:
            stored = self.stored[ins.index]
            if not np.isin(stored(left_out), stored(chosen)).all():
                self.distinct.add(ins.index)
        if ins.index in self.spoiled:
            self.spoil[ins.index](left_out)


def joined(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Values of 64 bits beside one another as one value each."""
    rows = np.ascontiguousarray(np.stack([column.astype(np.uint64) for column in columns], 1))
    return rows.view(f"V{8 * len(columns)}").ravel()
