"""What instructions work on: registers, memories, clocks, and copies that are on their way."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from emulator.memory import GlobalMemory, SharedMemory
from emulator.parsing import Instruction
from emulator.probing import Probe
from emulator.races import AccessLog, Clocks
from emulator.registers import Active, Registers


@dataclass
class Copy:
    """An asynchronous copy of `size` bytes per lane, of which the first `wanted` are read and the rest are zeros."""

    lanes: np.ndarray
    group: np.ndarray
    source: np.ndarray  # offsets in global memory
    destination: np.ndarray  # offsets in shared memory
    wanted: np.ndarray
    size: int
    instruction: Instruction


@dataclass
class Product:
    """A product of warp groups that is on its way, for the lanes of the mask."""

    mask: np.ndarray
    groups: np.ndarray  # (lanes)
    descriptors: np.ndarray  # (warp groups)
    added: np.ndarray  # (warp groups)
    complete: Callable[[Active, "Product"], None]


@dataclass
class State:
    """Of all lanes of a machine."""

    registers: Registers
    global_memory: GlobalMemory
    shared_memory: SharedMemory
    parameters: np.ndarray  # bytes
    clocks: Clocks
    global_log: AccessLog
    shared_log: AccessLog
    threads: int
    seen_as_bits: set[str]
    written: dict[str, np.ndarray]
    packed: dict[str, list[str]]
    random: np.random.Generator
    inexact: bool
    fused: dict[int, tuple[Instruction, int]]  # sums and the products that they are fused with
    contested: dict[int, set[int]]  # warps of loads whose result counts as not written
    probe: Probe | None
    blocks: np.ndarray  # that run now; -1 where there is none
    warps: np.ndarray = field(init=False)  # (lanes) of the whole launch
    rows: np.ndarray = field(init=False)  # (lanes) of the clocks
    shuffles: dict[int, np.ndarray] = field(default_factory=dict)  # the lanes that values came from last
    copies: list[Copy] = field(default_factory=list)
    groups: np.ndarray = field(init=False)  # (lanes) of copies that were committed
    products: list[Product] = field(default_factory=list)
    product_groups: np.ndarray = field(init=False)  # (lanes)

    def __post_init__(self) -> None:
        self.groups = np.zeros(self.registers.lanes, np.int64)
        self.product_groups = self.groups.copy()

    def begin(self, blocks: np.ndarray) -> None:
        """Other blocks take the place of those before."""
        self.blocks = blocks
        warps = self.threads // 32
        first = np.repeat(np.maximum(blocks, 0) * warps, self.threads)
        self.warps = first + np.tile(np.arange(self.threads) // 32, len(blocks))
        self.refresh()
        self.groups[...] = 0
        self.product_groups[...] = 0
        for written in self.written.values():
            written[...] = False
        self.shared_memory.reset()

    def refresh(self) -> None:
        """Read the clocks again."""
        self.rows = self.clocks.row[self.warps]

    def forget(self, names: Sequence[str], active: Active) -> None:
        """Registers count as not written."""
        for name in names:
            self.written[name] &= ~active.mask

    def lane(self, index: int) -> str:
        """Its name."""
        return f"thread {index % self.threads} of block {self.blocks[index // self.threads]}"

    def warps_of(self, active: Active) -> np.ndarray:
        """The warps with active lanes."""
        return np.unique(self.warps[active.mask])

    def approximated(self, exact: np.ndarray, units: int) -> np.ndarray:
        """What an approximate instruction may return: exact, or wrong by so many units in the last place."""
        if not self.inexact:
            return exact
        bits = exact.view(np.uint32)
        error = ((bits * np.uint32(2654435761)) >> np.uint32(24)) % np.uint32(2 * units + 1)
        wrong = (bits + error - np.uint32(units)).view(np.float32)
        normal = (np.abs(exact) > 2.0**-120) & (np.abs(exact) < 2.0**120)
        return np.where(normal, wrong, exact)
