"""How Gram matrices of a list of layers are dealt out to launches and programs, from shapes, strides and alignment.

The rows of a layer lie in several tensors, its groups; all layers have the same numbers of rows.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import triton.language as tl
from torch import Tensor

from moment_ops.kernels._plan import encoded, padded
from moment_ops.kernels._product_tiles import Architecture, ProductTile, most_layers
from moment_ops.kernels._records import GroupedLayers

# Programs that keep a large GPU busy; each leaves a tile in the workspace, 32 KiB.
_PROGRAMS = 528
# Columns whose products are summed in float32 before they are added in float64.
PROMOTED_COLUMNS = 1024
# Groups that a program chooses from, a select per row each.
MOST_GROUPS = 8
# The largest first program; a larger one stands for "no such layer".
_LAST = 2**27 - 1


@dataclass(frozen=True)
class Batch:
    """One launch: `layers` are positions in the list; the integer tuples are padded and sixteenfold."""

    layers: tuple[int, ...]
    groups: int
    vector: int
    programs: int
    # Of a chunk of columns, in blocks of PROMOTED_COLUMNS.
    chunk_blocks: int
    # The first rows of the groups.
    firsts: tuple[int, ...]
    starts: tuple[int, ...]
    widths: tuple[int, ...]
    chunks: tuple[int, ...]
    positions: tuple[int, ...]
    # For every layer, one for every group.
    strides: tuple[tuple[int, ...], ...]

    def tensors(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The launch's tensors out of the whole list's, padded: for every layer, one for every group."""
        count = len(tensors) // self.groups
        groups = [tensors[group * count : (group + 1) * count] for group in range(self.groups)]
        chosen = padded([tuple(group[i] for group in groups) for i in self.layers], tuple(g[0] for g in groups))
        return tuple(value for values in chosen for value in values)

    def integers(self, values: Sequence[int]) -> tuple[int, ...]:
        """Likewise, integers."""
        return encoded(self.tensors(values))  # type: ignore[arg-type]

    def record(
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
            columns=self.widths,
            firsts=self.firsts,
            positions=None,
            VECTOR=tl.constexpr(self.vector),
        )

    def every(self, step: int) -> tuple[int, ...]:
        """First programs of the layers where each has `step` of them."""
        return encoded(padded([step * i for i in range(len(self.layers))], _LAST))


def blocks(count: int, size: int) -> int:
    """Blocks of `size` that hold `count`."""
    return -(-count // size)


def triangle_batches(
    rows: Sequence[Tensor], shift: Sequence[Tensor], layers: int, tile: ProductTile, architecture: Architecture
) -> tuple[Batch, ...]:
    """The launches over tiles of the upper triangles and chunks of the columns."""
    most = most_layers(architecture)
    return _batches(_key(rows, (rows,), shift), layers, rows[0].element_size(), tile, most, True)


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
    return _batches(_key(rows, (rows, out), shift), layers, rows[0].element_size(), tile, most, False)


Key = tuple[tuple[int, int, bool, tuple[int, ...]], ...]


def _key(rows: Sequence[Tensor], tensors: Sequence[Sequence[Tensor]], shift: Sequence[Tensor]) -> Key:
    return tuple(
        (
            *x.shape,
            all(t.data_ptr() % 16 == 0 for t in (shift[i], *(of[i] for of in tensors))),
            tuple(of[i].stride(0) if len(x) > 1 else 0 for of in tensors),
        )
        for i, x in enumerate(rows)
    )


@functools.lru_cache(maxsize=256)
def _batches(
    key: Key, layers: int, itemsize: int, tile: ProductTile, most_tensors: int, triangle: bool
) -> tuple[Batch, ...]:
    groups = len(key) // layers
    wide = 16 // itemsize
    members: dict[int, list[int]] = {}
    for i in range(layers):
        lengths = [length for _, width, _, strides in key[i::layers] for length in (width, *strides)]
        aligned = all(entry[2] for entry in key[i::layers]) and all(length % wide == 0 for length in lengths)
        members.setdefault(wide if aligned else 1, []).append(i)
    most = 1 << ((most_tensors // groups).bit_length() - 1)
    return tuple(
        _batch(key, layers, groups, indices[begin : begin + most], vector, tile, triangle)
        for vector, indices in members.items()
        for begin in range(0, len(indices), most)
    )


def _batch(
    key: Key, layers: int, groups: int, indices: list[int], vector: int, tile: ProductTile, triangle: bool
) -> Batch:
    counts = [key[group * layers][0] for group in range(groups)]
    widths = [key[i][1] for i in indices]
    row_tiles = blocks(sum(counts), tile.rows)
    chunk_blocks = 1
    if triangle:
        tiles = row_tiles * (row_tiles + 1) // 2
        longest = blocks(max(widths), PROMOTED_COLUMNS)

        def cut() -> list[int]:
            return [blocks(width, chunk_blocks * PROMOTED_COLUMNS) for width in widths]

        while tiles * sum(cut()) > _PROGRAMS and chunk_blocks < longest:
            chunk_blocks *= 2
        chunks = cut()
    else:
        tiles = row_tiles
        chunks = [blocks(width, tile.columns) for width in widths]
    starts, start = [], 0
    for count in chunks:
        starts.append(start)
        start += tiles * count
    if start > _LAST or max(widths) >= 2**31:
        raise ValueError(f"a launch takes at most {_LAST} tiles and layers of 2**31 columns, got {start} tiles")

    def of_groups(which: int) -> tuple[int, ...]:
        nested = padded([tuple(s[3][which] // vector for s in key[i::layers]) for i in indices], (0,) * groups)
        return encoded([value for values in nested for value in values])

    return Batch(
        layers=tuple(indices),
        groups=groups,
        vector=vector,
        programs=start,
        chunk_blocks=chunk_blocks,
        firsts=encoded([sum(counts[:group]) for group in range(groups)]),
        starts=encoded(padded(starts, _LAST)),
        widths=encoded(padded([width // vector for width in widths], 1)),
        chunks=encoded(padded(chunks, 0)),
        positions=encoded(padded(indices, 0)),
        strides=tuple(of_groups(which) for which in range(len(key[0][3]))),
    )
