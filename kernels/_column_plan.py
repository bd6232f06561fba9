"""How layers are dealt out to kernels over columns.

A program takes a strip of columns of one layer, over all rows where strips are many, else over some of them.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import triton.language as tl
from torch import Tensor

from moment_ops.kernels._order import inner_columns
from moment_ops.kernels._plan import Group, Key, deal, encoded, group, in_units, key, padded, running
from moment_ops.kernels._records import Strip
from moment_ops.kernels._tiles import LINE_BYTES, STRIP_BYTES, STRIP_WARPS, StripTile

# Bytes of features that keep a large GPU busy when they are in flight: 40 KiB for each processor; the tests' specs say
# why.
IN_FLIGHT = 132 * 40 * 1024

# Rows that a thread merges in the dtype of the statistics; what programs leave is merged in float64.
_MERGED_ROWS = 512
# Where rows are cut, the fewest tiles of a program: folding what programs leave takes as long as two or three.
_CHUNK_TILES = 2
# More chunks than this would take the one program that folds them longer than the others take to read them.
_MOST_CHUNKS = 256
# Partial moments that a thread folds at a time.
_FOLD_ELEMENTS = 8


@dataclass(frozen=True, kw_only=True)
class ColumnGroup(Group):
    """One launch over strips."""

    itemsize: int
    tile: StripTile
    strips: int
    chunk_rows: int
    chunks: int
    permuted: bool

    @property
    def fold_chunks(self) -> int:
        """Chunks that are folded at a time."""
        return max(1, _FOLD_ELEMENTS * 32 * self.tile.warps // self.tile.columns)

    @property
    def strip(self) -> Strip:
        """The strips of the kernels."""
        return Strip(*map(tl.constexpr, (self.permuted, self.tile.rows, self.tile.columns, self.fold_chunks)))


def groups(kind: str, layers: Sequence[Tensor], *others: Sequence[Tensor]) -> tuple[ColumnGroup, ...]:
    """The launches over `layers` (rows on dimension 0, dense columns); `others` are lists of the same columns.

    kind: "reduce", "tap", which writes as much as it reads, or "apply", which sums nothing.
    """
    return _groups(kind, layers[0].element_size(), key((layers, *others)))


@functools.lru_cache(maxsize=256)
def _groups(kind: str, itemsize: int, layers: Key) -> tuple[ColumnGroup, ...]:
    offsets = running([layer.columns for layer in layers])
    return tuple(
        _group(kind, itemsize, layers, offsets, vector, positions)
        for vector, positions in deal(layers, itemsize, lambda i: (offsets[i],))
    )


def _group(
    kind: str, itemsize: int, layers: Key, offsets: Sequence[int], vector: int, positions: Sequence[int]
) -> ColumnGroup:
    chosen = [layers[i] for i in positions]
    (rows,) = chosen[0].rows
    tile = _tile(kind, itemsize, rows, [layer.columns for layer in chosen])
    strips = [-(-layer.columns // tile.columns) for layer in chosen]
    chunk_rows = _chunk_rows(kind, itemsize, rows, sum(strips), tile)
    chunks = -(-rows // chunk_rows)
    inners = [inner_columns((rows, *layer.shape), layer.stride) or 1 for layer in chosen]
    return group(
        ColumnGroup,
        layers,
        vector,
        positions,
        [count * chunks for count in strips],
        itemsize=itemsize,
        tile=tile,
        strips=sum(strips),
        chunk_rows=chunk_rows,
        chunks=chunks,
        permuted=any(inner != 1 for inner in inners),
        offsets=in_units(offsets, positions, vector),
        inners=encoded(padded(inners, 1)),
    )


def _tile(kind: str, itemsize: int, rows: int, widths: list[int]) -> StripTile:
    """The widest strips of which enough bytes, or all rows, are in flight; narrow ones deal their rows out to threads.

    A thread reads eight rows before it uses the first, or four where it has fewer registers to spare: where gradients
    are in flight, too, or eight columns of 16 bits become 32 and 16 bits again.
    """
    thread_rows = 4 if kind == "apply" or (kind == "tap" and itemsize == 2) else 8
    groups = 1
    while STRIP_BYTES // groups > LINE_BYTES:
        strips = sum(-(-width * itemsize * groups // STRIP_BYTES) for width in widths)
        busy = strips * thread_rows * STRIP_BYTES >= IN_FLIGHT or groups * thread_rows >= rows
        if busy and (kind == "apply" or rows <= groups * _MERGED_ROWS):
            break
        groups *= 2
    return StripTile(groups * thread_rows, STRIP_BYTES // groups // itemsize, STRIP_WARPS)


def _chunk_rows(kind: str, itemsize: int, rows: int, strips: int, tile: StripTile) -> int:
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
    chunk, most = _CHUNK_TILES * tile.rows, _MERGED_ROWS * STRIP_BYTES // (tile.columns * itemsize)
    if rows <= 2 * chunk:
        return rows
    while chunk < most and (busy(chunk) or -(-rows // chunk) > _MOST_CHUNKS):
        chunk *= 2
    return min(chunk, rows)
