"""How a list of layers is dealt out to launches and programs, from shapes, strides and alignment alone.

A launch takes up to MAX_LAYERS layers that have the same number of rows and agree on whether 128-bit accesses are
possible. A program takes a strip of columns of one layer, over all rows where strips are many, else over some of them.
"""

import functools
import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from moment_ops.kernels._order import inner_columns
from moment_ops.kernels._records import Layers, Strip

# Layers per launch. Kernel arguments are limited to 4 KiB on every driver; a layer takes up to 64 bytes of them.
MAX_LAYERS = 32


class Tile(NamedTuple):
    """What a program holds in registers at a time."""

    rows: int
    columns: int
    warps: int


_WARPS = 4
# What the threads of a program read at once, 16 bytes each: a row of a wide strip, or of a narrow one several rows.
ROW_BYTES = 16 * 32 * _WARPS
# A strip has whole cache lines.
_LINE_BYTES = 128

# Bytes of features that keep a large GPU busy when they are in flight: 40 KiB for each processor (specs.py says why).
IN_FLIGHT = 132 * 40 * 1024
# Registers per thread of a reduction: 512 threads per processor, so that it has 64 KiB in flight.
REGISTERS = 128
# Of a pass over features: 640 threads; of one that adds gradients, with twice as many bytes a thread: 384.
PASS_REGISTERS = 96
ADDED_PASS_REGISTERS = 168

# Rows that a thread merges in the dtype of the statistics; what programs leave is merged in float64.
_BLOCK_ROWS = 512
# Where rows are cut, the fewest tiles of a program: folding what programs leave takes as long as two or three.
_CHUNK_TILES = 2
# More chunks than this would take the one program that folds them longer than the others take to read them.
_MOST_CHUNKS = 256
# Partial moments that a thread folds at a time.
_FOLD_ELEMENTS = 8


@dataclass(frozen=True)
class Group:
    """One launch: `layers` are positions in the list; the integer tuples are padded and sixteenfold."""

    layers: tuple[int, ...]
    itemsize: int
    rows: int
    chunk_rows: int
    chunks: int
    strips: int
    programs: int
    tile: Tile
    vector: int
    permuted: bool
    starts: tuple[int, ...]
    columns: tuple[int, ...]
    offsets: tuple[int, ...]
    inners: tuple[int, ...]
    positions: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    def tensors(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The launch's tensors out of the whole list's, padded."""
        return padded([tensors[i] for i in self.layers], tensors[self.layers[0]])

    @property
    def fold_chunks(self) -> int:
        """Chunks that are folded at a time."""
        return max(1, _FOLD_ELEMENTS * 32 * self.tile.warps // self.tile.columns)

    @property
    def strip(self) -> Strip:
        """The tile of the kernels."""
        return Strip(*map(tl.constexpr, (self.permuted, self.tile.rows, self.tile.columns, self.fold_chunks)))

    def record(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor] | None = None,
        grads: Sequence[Tensor] | None = None,
    ) -> Layers:
        """The layers of the kernels, without positions."""
        return Layers(
            inputs=self.tensors(inputs),
            grads=None if grads is None else self.tensors(grads),
            outputs=None if outputs is None else self.tensors(outputs),
            starts=self.starts,
            columns=self.columns,
            strides=self.strides[0],
            grad_strides=None if grads is None else self.strides[2],
            output_strides=None if outputs is None else self.strides[1],
            offsets=self.offsets,
            inners=self.inners,
            positions=None,
            triangles=None,
            VECTOR=tl.constexpr(self.vector),
        )


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments, as it is launched and as specs.py compiles it."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    warps: int
    registers: int | None = None

    def options(self, hip: bool) -> dict[str, int]:
        """Compiler options."""
        # In large kernels ptxas, left to itself, spills to reach the next step of occupancy. ROCm has no such option.
        if self.registers is None or hip:
            return {"num_warps": self.warps}
        return {"num_warps": self.warps, "maxnreg": self.registers}


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def run(launches: Sequence[Launch], device: torch.device) -> list[Any]:
    """Launch on the current stream of the tensors' device; the compiled kernels, None of the interpreter's."""
    hip = torch.version.hip is not None
    with on(device):
        return [launch.kernel[(launch.programs,)](**launch.arguments, **launch.options(hip)) for launch in launches]


def bits(value: float) -> int:
    """The bits of a float64 as a signed integer: a Python float would be rounded to float32 on its way."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def encoded(values: Sequence[int]) -> tuple[int, ...]:
    """Sixteenfold: Triton compiles a kernel anew for integers in tuples that are 1, or that 16 divides.

    All of them then fall into one class, and layers of other sizes reuse the compiled kernel.
    """
    return tuple(16 * value for value in values)


def padded(values: list[Any], filler: Any) -> tuple[Any, ...]:
    """Filled up to a power of two, so that networks of 17 and 18 layers share a compiled kernel."""
    size = 1 << (len(values) - 1).bit_length()
    return (*values, *[filler] * (size - len(values)))


Key = tuple[tuple[tuple[int, ...], tuple[int, ...], int, tuple[tuple[int, int], ...]], ...]


def groups(kind: str, layers: Sequence[Tensor], *others: Sequence[Tensor]) -> tuple[Group, ...]:
    """The launches over `layers` (rows on dimension 0, dense columns); `others` are lists of the same columns."""
    key = tuple(
        (
            tuple(x.shape),
            x.stride(),
            x.data_ptr() % 16,
            tuple((tensors[i].stride(0), tensors[i].data_ptr() % 16) for tensors in others),
        )
        for i, x in enumerate(layers)
    )
    return _groups(kind, layers[0].element_size(), key)


@functools.lru_cache(maxsize=256)
def _groups(kind: str, itemsize: int, key: Key) -> tuple[Group, ...]:
    wide = 16 // itemsize
    members: dict[tuple[int, int], list[int]] = {}
    columns, offsets, offset = [], [], 0
    for i, (shape, stride, address, others) in enumerate(key):
        columns.append(torch.Size(shape[1:]).numel())
        offsets.append(offset)
        addresses = (address, *(a for _, a in others))
        # A single row has no stride that matters.
        strides = (stride[0], *(s for s, _ in others)) if shape[0] > 1 else ()
        lengths = (*strides, columns[i], offset)
        aligned = not any(addresses) and all(length % wide == 0 for length in lengths)
        members.setdefault((shape[0], wide if aligned else 1), []).append(i)
        offset += columns[i]
    result = []
    for (rows, vector), indices in members.items():
        for begin in range(0, len(indices), MAX_LAYERS):
            result.append(
                _group(kind, itemsize, key, indices[begin : begin + MAX_LAYERS], rows, vector, columns, offsets)
            )
    return tuple(result)


def _group(
    kind: str,
    itemsize: int,
    key: Key,
    layers: list[int],
    rows: int,
    vector: int,
    columns: list[int],
    offsets: list[int],
) -> Group:
    tile = _tile(kind, itemsize, rows, [columns[i] for i in layers])
    strips = [-(-columns[i] // tile.columns) for i in layers]
    chunk_rows = _chunk_rows(kind, itemsize, rows, sum(strips), tile)
    chunks = -(-rows // chunk_rows)
    starts, start = [], 0
    for count in strips:
        starts.append(start)
        start += count * chunks
    # The largest start stands for "no such layer".
    last = 2**27 - 1
    if start > last or max(columns[i] for i in layers) >= 2**31:
        raise ValueError(f"a launch over {rows} rows takes at most {last} programs and layers of 2**31 columns")
    inners = [inner_columns(key[i][0], key[i][1]) or 1 for i in layers]
    strides = [[key[i][1][0] for i in layers]]
    strides += [[key[i][3][j][0] for i in layers] for j in range(len(key[0][3]))]

    def units(values: list[int], filler: int, unit: int = 1) -> tuple[int, ...]:
        return encoded(padded([value // unit for value in values], filler))

    return Group(
        layers=tuple(layers),
        itemsize=itemsize,
        rows=rows,
        chunk_rows=chunk_rows,
        chunks=chunks,
        strips=sum(strips),
        programs=start,
        tile=tile,
        vector=vector,
        permuted=any(inner != 1 for inner in inners),
        starts=units(starts, last),
        columns=units([columns[i] for i in layers], 1, vector),
        offsets=units([offsets[i] for i in layers], 0, vector),
        inners=units(inners, 1),
        positions=units(layers, 0),
        strides=tuple(units(values, 0, vector) for values in strides),
    )


def _tile(kind: str, itemsize: int, rows: int, widths: list[int]) -> Tile:
    """The widest strips of which enough bytes, or all rows, are in flight; narrow ones deal their rows out to threads.

    A thread reads eight rows before it uses the first, or four where it has fewer registers to spare: where gradients
    are in flight, too, or eight columns of 16 bits become 32 and 16 bits again.
    """
    thread_rows = 4 if kind == "apply" or (kind == "tap" and itemsize == 2) else 8
    groups = 1
    while ROW_BYTES // groups > _LINE_BYTES:
        strips = sum(-(-width * itemsize * groups // ROW_BYTES) for width in widths)
        busy = strips * thread_rows * ROW_BYTES >= IN_FLIGHT or groups * thread_rows >= rows
        if busy and (kind == "apply" or rows <= groups * _BLOCK_ROWS):
            break
        groups *= 2
    return Tile(groups * thread_rows, ROW_BYTES // groups // itemsize, _WARPS)


def _chunk_rows(kind: str, itemsize: int, rows: int, strips: int, tile: Tile) -> int:
    """Rows per program."""
    tile_bytes = tile.rows * tile.columns * itemsize

    def busy(chunk: int) -> bool:
        return strips * -(-rows // chunk) * tile_bytes >= IN_FLIGHT

    if kind == "apply":
        # Coefficients are loaded once per program: long chunks, unless programs are few.
        chunk = max(128, tile.rows)
        while chunk > tile.rows and not busy(chunk):
            chunk //= 2
        return chunk
    # What is cut has to be folded: no more programs than are busy, and no cut that saves less than folding takes.
    chunk, most = _CHUNK_TILES * tile.rows, _BLOCK_ROWS * ROW_BYTES // (tile.columns * itemsize)
    if rows <= 2 * chunk:
        return rows
    while chunk < most and (busy(chunk) or -(-rows // chunk) > _MOST_CHUNKS):
        chunk *= 2
    return min(chunk, rows)
