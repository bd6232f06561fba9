"""How Gram matrices are dealt out to programs.

The rows of a layer lie in several tensors, its groups; all layers have the same numbers of rows. A program multiplies a
tile of the upper triangle over a chunk of the columns, or computes a tile of the rows.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import triton.language as tl
from torch import Tensor

from moment_ops.kernels._architectures import Architecture, most_layers
from moment_ops.kernels._plan import Group, Key, deal, encoded, first_programs, group, key, padded, running
from moment_ops.kernels._records import GroupedLayers
from moment_ops.kernels._tiles import ProductTile

# Programs that keep a large GPU busy; each leaves a tile in the workspace, 32 KiB.
_PROGRAMS = 528
# Columns whose products are summed in float32 before they are added in float64.
PROMOTED_COLUMNS = 1024
# Groups that a program chooses from, a select per row each.
MOST_GROUPS = 8


@dataclass(frozen=True, kw_only=True)
class Batch(Group):
    """One launch over tiles of products of rows."""

    chunk_blocks: int  # of a chunk of columns, in blocks of PROMOTED_COLUMNS
    firsts: tuple[int, ...]  # rows of the groups
    chunks: tuple[int, ...]

    def grouped(
        self, inputs: Sequence[Tensor], shifts: Sequence[Tensor], outputs: Sequence[Tensor] | None = None
    ) -> GroupedLayers:
        """The layers of the kernels, as all have them."""
        return GroupedLayers(
            inputs=self.tensors(inputs),
            outputs=None if outputs is None else self.tensors(outputs),
            shifts=self.tensors(shifts),
            factors=None,
            strides=self.strides[0],
            output_strides=None if outputs is None else self.strides[1],
            wanted=None,
            starts=self.starts,
            columns=self.columns,
            firsts=self.firsts,
            positions=None,
            VECTOR=tl.constexpr(self.vector),
        )

    def every(self, step: int) -> tuple[int, ...]:
        """First programs of the layers where each has `step` of them."""
        return first_programs([step * i for i in range(len(self.layers))])


def blocks(count: int, size: int) -> int:
    """Blocks of `size` that hold `count`."""
    return -(-count // size)


def triangle_batches(
    rows: Sequence[Tensor], shift: Sequence[Tensor], layers: int, tile: ProductTile, architecture: Architecture
) -> tuple[Batch, ...]:
    """The launches over tiles of the upper triangles and chunks of the columns."""
    most = most_layers(architecture)
    return _batches(key([rows], [shift], layers), rows[0].element_size(), tile, most, True)


def output_batches(
    rows: Sequence[Tensor],
    out: Sequence[Tensor],
    shift: Sequence[Tensor],
    layers: int,
    tile: ProductTile,
    architecture: Architecture,
) -> tuple[Batch, ...]:
    """The launches over tiles of all rows, (R, D) of every layer; `out` has a tensor for every one of `rows`."""
    most = most_layers(architecture)
    return _batches(key([rows, out], [shift], layers), rows[0].element_size(), tile, most, False)


@functools.lru_cache(maxsize=256)
def _batches(layers: Key, itemsize: int, tile: ProductTile, most_tensors: int, triangle: bool) -> tuple[Batch, ...]:
    counts = layers[0].rows
    row_tiles = blocks(sum(counts), tile.rows)
    most = 1 << ((most_tensors // len(counts)).bit_length() - 1)
    result = []
    for vector, positions in deal(layers, itemsize, lambda i: (), most):
        widths = [layers[i].columns for i in positions]
        if triangle:
            tiles = row_tiles * (row_tiles + 1) // 2
            chunk_blocks = _chunk_blocks(tiles, widths)
            chunks = [blocks(width, chunk_blocks * PROMOTED_COLUMNS) for width in widths]
        else:
            tiles, chunk_blocks = row_tiles, 1
            chunks = [blocks(width, tile.columns) for width in widths]
        result.append(
            group(
                Batch,
                layers,
                vector,
                positions,
                [tiles * count for count in chunks],
                chunk_blocks=chunk_blocks,
                firsts=encoded(running(counts)),
                chunks=encoded(padded(chunks, 0)),
            )
        )
    return tuple(result)


def _chunk_blocks(tiles: int, widths: Sequence[int]) -> int:
    """The shortest chunks of columns of which there are not more than keep a GPU busy."""
    count, longest = 1, blocks(max(widths), PROMOTED_COLUMNS)
    while tiles * sum(blocks(width, count * PROMOTED_COLUMNS) for width in widths) > _PROGRAMS and count < longest:
        count *= 2
    return count
