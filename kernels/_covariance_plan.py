"""How covariances are dealt out to programs.

A program computes one tile of the upper triangle of one layer, over all rows where tiles are many, else over some of
them; or a tile of an output. All layers have the same number of rows.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from moment_ops.kernels._architectures import Architecture, most_layers, processors
from moment_ops.kernels._plan import Group, Key, deal, group, in_units, key, running
from moment_ops.kernels._tiles import CHUNK_ROWS, ProductTile, most_chunks
from moment_ops.ops import triangle

# The most chunks of rows; in rows, what a tile costs besides them, and a chunk the program that folds it.
_MOST_CHUNKS = 256
_TILE_ROWS = 64
_FOLD_ROWS = 16
# Rows whose products are summed before they are added to the sum over all.
PROMOTED_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class TileGroup(Group):
    """One launch over tiles."""

    tiles: int
    chunk_rows: int
    chunks: int
    triangles: tuple[int, ...]

    @property
    def long(self) -> bool:
        """Whether a program promotes the sums over blocks of rows."""
        return self.chunk_rows > PROMOTED_ROWS


def triangle_groups(layers: Sequence[Tensor], tile: ProductTile, architecture: Architecture) -> tuple[TileGroup, ...]:
    """The launches over tiles of the upper triangles of (N, D) layers."""
    return _groups(key([layers]), layers[0].element_size(), tile, architecture, True)


def output_groups(
    layers: Sequence[Tensor], out: Sequence[Tensor], tile: ProductTile, architecture: Architecture
) -> tuple[TileGroup, ...]:
    """The launches over tiles of (N, D) outputs."""
    return _groups(key([layers, out]), layers[0].element_size(), tile, architecture, False)


@functools.lru_cache(maxsize=256)
def _groups(
    layers: Key, itemsize: int, tile: ProductTile, architecture: Architecture, triangle_tiles: bool
) -> tuple[TileGroup, ...]:
    offsets = running([layer.columns for layer in layers])
    triangles = running([triangle.size(layer.columns) for layer in layers])
    slots = processors(architecture) * tile.resident
    result = []
    for vector, positions in deal(layers, itemsize, lambda i: (offsets[i], triangles[i]), most_layers(architecture)):
        (rows,) = layers[positions[0]].rows
        widths = [layers[i].columns for i in positions]
        chunk_rows = rows
        if triangle_tiles:
            blocks = [triangle.blocks(width) for width in widths]
            tiles = [count * (count + 1) // 2 * (triangle.BLOCK // tile.columns) ** 2 for count in blocks]
            chunk_rows = _chunk_rows(rows, sum(tiles), slots)
        else:
            tiles = [-(-rows // tile.rows) * -(-width // tile.columns) for width in widths]
        chunks = -(-rows // chunk_rows)
        result.append(
            group(
                TileGroup,
                layers,
                vector,
                positions,
                [count * chunks for count in tiles],
                tiles=sum(tiles),
                chunk_rows=chunk_rows,
                chunks=chunks,
                offsets=in_units(offsets, positions, vector),
                triangles=in_units(triangles, positions, vector),
            )
        )
    return tuple(result)


def _chunk_rows(rows: int, tiles: int, slots: int) -> int:
    """Rows per program. Programs run in rounds of `slots`, of which the last one leaves processors idle."""

    def rows_of(chunks: int) -> int:
        return rows if chunks == 1 else -(-rows // (chunks * CHUNK_ROWS)) * CHUNK_ROWS

    def duration(chunks: int) -> int:
        size = rows_of(chunks)
        count = -(-rows // size)
        return -(-tiles * count // slots) * (size + _TILE_ROWS) + (count - 1) * _FOLD_ROWS

    return rows_of(min(range(1, min(most_chunks(rows), _MOST_CHUNKS) + 1), key=duration))
