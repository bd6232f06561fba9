"""How covariances of a list of layers are dealt out to launches and programs, from shapes, strides and alignment alone.

A program computes one tile of the upper triangle of one layer, over all rows where tiles are many, else over some of
them. All layers have the same number of rows.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import triton.language as tl
from torch import Tensor

from moment_ops.kernels._plan import encoded, padded
from moment_ops.kernels._product_tiles import (
    CHUNK_ROWS,
    Architecture,
    ProductTile,
    most_chunks,
    most_layers,
    processors,
)
from moment_ops.kernels._records import Layers
from moment_ops.ops import triangle

# The most chunks of rows; in rows, what a tile costs besides them, and a chunk the program that folds it.
_MOST_CHUNKS = 256
_TILE_ROWS = 64
_FOLD_ROWS = 16
# Rows whose products are summed before they are added to the sum over all.
PROMOTED_ROWS = 4096
# The largest first program; a larger one stands for "no such layer".
_LAST = 2**27 - 1


@dataclass(frozen=True)
class TileGroup:
    """One launch: `layers` are positions in the list; the integer tuples are padded and sixteenfold."""

    layers: tuple[int, ...]
    rows: int
    chunk_rows: int
    chunks: int
    tiles: int
    programs: int
    vector: int
    starts: tuple[int, ...]
    widths: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    packed: tuple[int, ...]

    def tensors(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The launch's tensors out of the whole list's, padded."""
        return padded([tensors[i] for i in self.layers], tensors[self.layers[0]])

    def integers(self, values: Sequence[int]) -> tuple[int, ...]:
        """Likewise, integers."""
        return encoded(padded([values[i] for i in self.layers], 0))

    def record(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor] | None = None) -> Layers:
        """The layers of the kernels."""
        return Layers(
            inputs=self.tensors(inputs),
            grads=None,
            outputs=None if outputs is None else self.tensors(outputs),
            starts=self.starts,
            columns=self.widths,
            strides=self.strides[0],
            grad_strides=None,
            output_strides=None if outputs is None else self.strides[1],
            offsets=self.offsets,
            inners=None,
            positions=None,
            triangles=self.packed,
            VECTOR=tl.constexpr(self.vector),
        )

    @property
    def long(self) -> bool:
        """Whether a program promotes the sums over blocks of rows."""
        return self.chunk_rows > PROMOTED_ROWS


Key = tuple[tuple[tuple[int, ...], int, tuple[int, ...]], ...]


def triangle_groups(layers: Sequence[Tensor], tile: ProductTile, architecture: Architecture) -> tuple[TileGroup, ...]:
    """The launches over tiles of the upper triangles of (N, D) layers."""
    return _groups(_key(layers), layers[0].element_size(), tile, architecture, True)


def output_groups(
    layers: Sequence[Tensor], out: Sequence[Tensor], tile: ProductTile, architecture: Architecture
) -> tuple[TileGroup, ...]:
    """The launches over tiles of (N, D) outputs."""
    return _groups(_key(layers, out), layers[0].element_size(), tile, architecture, False)


def _key(layers: Sequence[Tensor], *others: Sequence[Tensor]) -> Key:
    return tuple(
        (
            tuple(x.shape),
            max(t.data_ptr() % 16 for t in (x, *(tensors[i] for tensors in others))),
            (x.stride(0), *(tensors[i].stride(0) for tensors in others)),
        )
        for i, x in enumerate(layers)
    )


@functools.lru_cache(maxsize=256)
def _groups(
    key: Key, itemsize: int, tile: ProductTile, architecture: Architecture, triangle_tiles: bool
) -> tuple[TileGroup, ...]:
    wide = 16 // itemsize
    members: dict[int, list[int]] = {}
    offsets, packed, offset, entry = [], [], 0, 0
    for i, ((rows, width), address, strides) in enumerate(key):
        offsets.append(offset)
        packed.append(entry)
        lengths = (width, offset, entry, *(strides if rows > 1 else ()))
        aligned = address == 0 and all(length % wide == 0 for length in lengths)
        members.setdefault(wide if aligned else 1, []).append(i)
        offset += width
        entry += triangle.size(width)
    most = most_layers(architecture)
    slots = processors(architecture) * tile.resident
    return tuple(
        _group(key, indices[begin : begin + most], vector, offsets, packed, tile, slots, triangle_tiles)
        for vector, indices in members.items()
        for begin in range(0, len(indices), most)
    )


def _group(
    key: Key,
    layers: list[int],
    vector: int,
    offsets: list[int],
    packed: list[int],
    tile: ProductTile,
    slots: int,
    triangle_tiles: bool,
) -> TileGroup:
    rows = key[layers[0]][0][0]
    widths = [key[i][0][1] for i in layers]
    chunk_rows = rows
    if triangle_tiles:
        blocks = [triangle.blocks(width) for width in widths]
        tiles = [count * (count + 1) // 2 * (triangle.BLOCK // tile.columns) ** 2 for count in blocks]
        chunk_rows = _chunk_rows(rows, sum(tiles), slots)
    else:
        tiles = [-(-rows // tile.rows) * -(-width // tile.columns) for width in widths]
    chunks = -(-rows // chunk_rows)
    starts, start = [], 0
    for count in tiles:
        starts.append(start)
        start += count * chunks
    if start > _LAST or max(widths) >= 2**31:
        raise ValueError(f"a launch takes at most {_LAST} tiles and layers of 2**31 columns, got {start} tiles")

    def units(values: Sequence[int], filler: int) -> tuple[int, ...]:
        return encoded(padded([value // vector for value in values], filler))

    return TileGroup(
        layers=tuple(layers),
        rows=rows,
        chunk_rows=chunk_rows,
        chunks=chunks,
        tiles=sum(tiles),
        programs=start,
        vector=vector,
        starts=encoded(padded(starts, _LAST)),
        widths=units(widths, 1),
        strides=tuple(units([key[i][2][j] for i in layers], 0) for j in range(len(key[0][2]))),
        offsets=units([offsets[i] for i in layers], 0),
        packed=units([packed[i] for i in layers], 0),
    )


def _chunk_rows(rows: int, tiles: int, slots: int) -> int:
    """Rows per program. Programs run in rounds of `slots`, of which the last one leaves processors idle."""

    def rows_of(chunks: int) -> int:
        return rows if chunks == 1 else -(-rows // (chunks * CHUNK_ROWS)) * CHUNK_ROWS

    def duration(chunks: int) -> int:
        size = rows_of(chunks)
        count = -(-rows // size)
        return -(-tiles * count // slots) * (size + _TILE_ROWS) + (count - 1) * _FOLD_ROWS

    return rows_of(min(range(1, min(most_chunks(rows), _MOST_CHUNKS) + 1), key=duration))
