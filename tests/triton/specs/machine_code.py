"""What NVIDIA machine code asks of a GPU, read with the tools that Triton brings; needs no GPU and no driver.

Memory is kept busy by bytes in flight (Little's law): bandwidth times latency of them, over all processors. An
instruction names the scoreboards that it waits for, and a load the one that it signals, so that what is in flight can
be read off the code. Time is counted in round trips to memory, and everything else takes none: operands, predicates and
pairs of registers are the compiler's concern, which has turned them into scoreboards.
"""

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

# What a processor has room for, by compute capability: threads, blocks, bytes of shared memory.
_PROCESSORS = {
    80: (2048, 32, 164 * 1024),
    86: (1536, 16, 100 * 1024),
    90: (2048, 32, 228 * 1024),
    100: (2048, 32, 228 * 1024),
    120: (1536, 24, 100 * 1024),
}
# Products of 16 bits per cycle and partition: A100 (312 TFLOP/s), H100 (989 TFLOP/s).
_TENSOR_PRODUCTS = {8: 256, 9: 512}
_MATRIX_SHAPE = re.compile(r"HMMA\.168(?P<depth>8|16)|(?P<warps>HGMMA)\.(?P<m>\d+)x(?P<n>\d+)x(?P<k>\d+)")
# A processor has four partitions; a warp takes registers of one of them, 256 at a time.
_REGISTERS = 64 * 1024
_PARTITIONS = 4
_REGISTER_UNIT = 256
# Shared memory is given out in units, and the system takes some of every block.
_SHARED_UNIT = 128
_SYSTEM_SHARED = 1024


@dataclass(frozen=True)
class Instruction:
    """opcode: with its modifiers; waits: for all that signals these scoreboards; target: the index of a branch's."""

    opcode: str
    operands: str = ""
    waits: frozenset[int] = frozenset()
    signals: int | None = None
    target: int | None = None

    @property
    def name(self) -> str:
        """Without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def width(self) -> int:
        """Bytes per thread of an access to memory."""
        bits = re.search(r"\.[US]?(8|16|32|64|128|256)(?:\.|$)", self.opcode)
        return int(bits[1]) // 8 if bits else 4

    @property
    def exchanges(self) -> bool:
        """Whether it accesses what programs exchange, such as partial sums, and not features or vectors."""
        return ".STRONG.GPU" in self.opcode

    @property
    def loads(self) -> bool:
        """Whether it loads features or vectors, to registers or to shared memory."""
        return self.name in ("LDG", "LDGSTS") and not self.exchanges


@dataclass(frozen=True)
class Flight:
    """The global loads of a thread in a part of the code.

    loaded: bytes, in an iteration of a loop; round_trips: how often it waits for memory, loads that are in flight
    together counted once; first_wait: bytes in flight at the first wait.
    """

    loaded: int
    round_trips: float
    first_wait: int

    @property
    def in_flight(self) -> float:
        """Bytes in flight, on average over time."""
        return self.loaded / self.round_trips if self.round_trips else self.loaded


@dataclass(frozen=True)
class Function:
    """The machine code of a kernel. shared: static bytes, without those of the system."""

    name: str
    architecture: int
    registers: int
    stack: int
    shared: int
    instructions: tuple[Instruction, ...]

    def loads(self, wide: bool) -> int:
        """Loads of features and vectors, of 16 bytes or more or of less."""
        return sum(i.loads and (i.width >= 16) == wide for i in self.instructions)

    def stores(self, wide: bool) -> int:
        """Stores of features and vectors."""
        return sum(i.name == "STG" and not i.exchanges and (i.width >= 16) == wide for i in self.instructions)

    @property
    def spills(self) -> int:
        """Accesses to local memory; ptxas counts spills as stack."""
        return sum(i.name in ("LDL", "STL") for i in self.instructions)

    @property
    def matrix_products(self) -> int:
        """Instructions of tensor cores: of a warp, of a warp group (sm_90) and of the fifth generation (sm_100)."""
        return sum(bool(re.fullmatch("HMMA|HGMMA|UTC[A-Z]*MMA", i.name)) for i in self.instructions)

    @property
    def loops(self) -> list[tuple[int, int]]:
        """Innermost loops over features or vectors, as ranges of instructions."""
        branches = enumerate(self.instructions)
        found = sorted({(i.target, at + 1) for at, i in branches if i.target is not None and i.target <= at})
        innermost = [a for a in found if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in found)]
        return [(begin, end) for begin, end in innermost if any(i.loads for i in self.instructions[begin:end])]

    @property
    def product_share(self) -> tuple[float, float]:
        """(least, most) share of the peak of its multiplying units that the loop with most products can reach.

        Most: each partition issues one instruction per cycle, and products overlap with all else. Least: tensor cores
        wait for all else, and no two lanes read the same word of shared memory. (0, 0) where nothing is known.
        """
        best = (0.0, 0.0, 0.0, 0.0)
        for begin, end in self.loops:
            body = self.instructions[begin:end]
            products = sum((_product_cycles(i, self.architecture) for i in body), 0.0)
            others = float(sum(not _product_cycles(i, self.architecture) for i in body))
            # 128 bytes per cycle, for four partitions.
            shared = float(sum(i.width for i in body if i.name in ("LDS", "STS")))
            best = max(best, (products, float(len(body)), others, shared))
        products, issued, others, shared = best
        if not products:
            return 0.0, 0.0
        waiting = others if self.matrix_products else 0.0
        return products / max(products + waiting, issued, shared), products / max(products, issued)

    @property
    def loop_flights(self) -> list[Flight]:
        """The loads of every loop, when it has run for a while."""
        return [_steady(self.instructions[begin:end]) for begin, end in self.loops]

    @property
    def straight_flight(self) -> Flight:
        """The loads of all other code, from top to bottom."""
        inside = {at for begin, end in self.loops for at in range(begin, end)}
        memory = _Memory()
        memory.run(i for at, i in enumerate(self.instructions) if at not in inside)
        memory.finish()
        return Flight(memory.loaded, memory.now, memory.first_wait)

    @property
    def in_flight(self) -> float:
        """Bytes in flight per thread: in the loop that loads most, or in code without loops."""
        return max(self.loop_flights, key=lambda flight: flight.loaded, default=self.straight_flight).in_flight

    def resident_blocks(self, warps: int, dynamic_shared: int = 0) -> int:
        """Blocks that a processor has room for."""
        return resident_blocks(self.architecture, self.registers, self.shared + dynamic_shared, warps)


class _Load(NamedTuple):
    back: float
    width: int


@dataclass
class _Memory:
    """Global loads on their way to one thread; `now` is in round trips."""

    now: float = 0.0
    loaded: int = 0
    first_wait: int = 0
    # By scoreboard; asynchronous copies to shared memory signal none, but are waited for in groups, oldest first.
    pending: dict[int, list[_Load]] = field(default_factory=lambda: defaultdict(list))
    copies: list[_Load] = field(default_factory=list)
    groups: list[list[_Load]] = field(default_factory=list)

    def run(self, instructions: Iterable[Instruction]) -> None:
        for i in instructions:
            self._wait([load for scoreboard in i.waits for load in self.pending.pop(scoreboard, [])])
            if i.name == "LDG" and i.signals is not None:
                self._load(self.pending[i.signals], i)
            elif i.name == "LDGSTS":
                self._load(self.copies, i)
            elif i.name == "LDGDEPBAR":
                self.groups.append(self.copies)
                self.copies = []
            elif i.name == "DEPBAR" and (left := re.search(r"SB\d,\s*(\w+)", i.operands)):
                awaited = max(0, len(self.groups) - int(left[1], 0))
                groups, self.groups = self.groups[:awaited], self.groups[awaited:]
                self._wait([load for group in groups for load in group])

    def finish(self) -> None:
        """Wait for what the code has not waited for."""
        loads = self._pending()
        for waiting in (self.pending, self.copies, self.groups):
            waiting.clear()
        self._wait(loads)

    def _pending(self) -> list[_Load]:
        return [load for loads in (*self.pending.values(), self.copies, *self.groups) for load in loads]

    def _load(self, loads: list[_Load], instruction: Instruction) -> None:
        loads.append(_Load(self.now + 1.0, instruction.width))
        self.loaded += instruction.width

    def _wait(self, loads: list[_Load]) -> None:
        back = max((load.back for load in loads), default=self.now)
        if back > self.now:
            in_flight = sum(load.width for load in (*loads, *self._pending()) if load.back > self.now)
            self.first_wait = self.first_wait or in_flight
            self.now = back


def _steady(body: Sequence[Instruction], passes: int = 24) -> Flight:
    """An iteration of a loop when it has run for a while, on average: stages of a pipeline take turns of 2, 3 or 4."""
    memory = _Memory()
    for _ in range(passes):
        memory.run(body)
    begin, memory.loaded, memory.first_wait = memory.now, 0, 0
    for _ in range(passes):
        memory.run(body)
    return Flight(memory.loaded // passes, (memory.now - begin) / passes, memory.first_wait)


def _product_cycles(instruction: Instruction, architecture: int) -> float:
    """Cycles that a warp's multiplications take in the units of its partition; 0 of other instructions."""
    family = architecture // 10
    if instruction.name == "FFMA":
        return 2.0 if architecture == 80 else 1.0
    if family not in _TENSOR_PRODUCTS or (shape := _MATRIX_SHAPE.match(instruction.opcode)) is None:
        return 0.0
    if shape["warps"]:
        # A warp group has a warp in every partition.
        products = int(shape["m"]) * int(shape["n"]) * int(shape["k"]) / _PARTITIONS
    else:
        products = 16 * 8 * int(shape["depth"])
    return products / (_TENSOR_PRODUCTS[family] / (2 if "TF32" in instruction.opcode else 1))


def resident_blocks(architecture: int, registers: int, shared: int, warps: int) -> int:
    """Blocks that a processor of this compute capability has room for, by what a thread and a block take."""
    threads, blocks, memory = _PROCESSORS[architecture]
    of_warp = -(-32 * registers // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = _REGISTERS // _PARTITIONS // of_warp * _PARTITIONS // warps
    of_block = -(-(shared + _SYSTEM_SHARED) // _SHARED_UNIT) * _SHARED_UNIT
    return min(blocks, threads // (32 * warps), by_registers, memory // of_block)


def tool(name: str) -> str:
    """The path of cuobjdump or nvdisasm, in Triton or on the PATH."""
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin" / name if triton and triton.origin else None
    path = str(bundled) if bundled and bundled.exists() else shutil.which(name)
    if path is None:
        raise FileNotFoundError(f"no {name}: neither in triton nor on the PATH")
    return path


def _output(name: str, *arguments: str | Path, folder: str | None = None) -> str:
    command = [tool(name), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


_LABEL = re.compile(r"\s*(\.L_\w+):")
# An instruction has 128 bits: the second word is on a line of its own.
_FIRST_WORD = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/")
_SECOND_WORD = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/")
_NO_SCOREBOARD = 7


def parse(code: str) -> tuple[Instruction, ...]:
    """The instructions of a function, as `nvdisasm -c -hex` prints them."""
    found: list[tuple[str, str, int]] = []
    labels: dict[str, int] = {}
    opcode = operands = ""
    for line in code.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif first := _FIRST_WORD.match(line):
            opcode, operands = first[1], first[2]
        elif opcode and (second := _SECOND_WORD.match(line)):
            found.append((opcode, operands, int(second[1], 16)))
            opcode = ""
    instructions = []
    for opcode, operands, word in found:
        signals, waits = word >> 46 & 0b111, word >> 52 & 0b111111
        branch = re.search(r"`\((\.L_\w+)\)", operands) if opcode.startswith("BRA") else None
        instructions.append(
            Instruction(
                opcode,
                operands,
                frozenset(scoreboard for scoreboard in range(6) if waits >> scoreboard & 1),
                None if signals == _NO_SCOREBOARD else signals,
                labels[branch[1]] if branch else None,
            )
        )
    return tuple(instructions)


def functions(cubin: Path) -> dict[str, Function]:
    """The kernels in a cubin, by name."""
    usage = _output("cuobjdump", "--dump-resource-usage", cubin)
    code = _output("nvdisasm", "-c", "-hex", cubin)
    architecture = int(re.findall(r"(?:EF_CUDA_SM|\.target\s+sm_)(\d+)", code)[0])
    parts = {part.partition(",")[0].removeprefix(".text."): part for part in re.split(r"\n\t?\.section\t", code)[1:]}
    found = {}
    for name, numbers in re.findall(r"Function (\S+):\s*\n\s*(.*)", usage):
        used = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", numbers)}
        # From sm_90 on those of the system are counted where there are others.
        shared = max(0, used["SHARED"] - (_SYSTEM_SHARED if architecture >= 90 else 0))
        found[name] = Function(name, architecture, used["REG"], used["STACK"], shared, parse(parts[name]))
    return found


def library_functions(library: Path) -> dict[int, dict[str, Function]]:
    """The kernels in a shared library, by architecture and (mangled) name."""
    found: dict[int, dict[str, Function]] = defaultdict(dict)
    with tempfile.TemporaryDirectory() as folder:
        _output("cuobjdump", "--extract-elf", "all", library, folder=folder)
        for cubin in Path(folder).glob("*.cubin"):
            for name, function in functions(cubin).items():
                found[function.architecture][name] = function
    return dict(found)
