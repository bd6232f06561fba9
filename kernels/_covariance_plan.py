"""How covariances of a list of layers are dealt out to launches and programs, from shapes, strides and alignment alone.

A program computes one tile of the upper triangle of one layer, over all rows where tiles are many, else over some of
them. All layers have the same number of rows.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moment_ops.kernels._plan import MAX_LAYERS, encoded, padded
from moment_ops.ops import backends, triangle

# Programs that keep a large GPU busy, and the fewest rows worth a program of their own.
_PROGRAMS = 264
_CHUNK_ROWS = 512
# Rows whose products are summed before they are added to the sum over all.
PROMOTED_ROWS = 4096
# The largest first program; a larger one stands for "no such layer".
_LAST = 2**27 - 1


class ProductTile(NamedTuple):
    """What a program multiplies at a time: `steps` times `depth` entries of the summed dimension, then it promotes.

    Of outputs, it has (rows, columns).
    """

    rows: int
    columns: int
    depth: int
    steps: int
    warps: int
    stages: int
    registers: int | None = None


# Without tensor cores, tiles are small: operands and sums share the registers; a sum of 32 products is promoted.
_IEEE = ProductTile(64, 64, 16, 2, 4, 3)
# Tensor cores that read operands from shared memory: sm_90 and sm_100.
_LARGE = {
    "tf32": ProductTile(128, 128, 32, 1, 8, 3),
    "tf32x3": ProductTile(128, 128, 32, 1, 8, 2),
    "bf16": ProductTile(128, 128, 64, 1, 8, 3),
    "bf16x3": ProductTile(128, 128, 32, 1, 8, 3),
    "bf16x4": ProductTile(128, 128, 32, 1, 8, 3),
}
# On sm_100, every product of a chain has its own columns of tensor memory, which has 512.
_SM100_FOUR_PRODUCTS = ProductTile(64, 64, 32, 1, 4, 3)
# Operands in registers, two terms of each at half the depth; 99 KiB of shared memory: sm_80 to sm_89, and sm_120.
_REGISTERS = ProductTile(128, 128, 32, 1, 8, 2)
# 64 KiB of shared memory: AMD.
_SMALL = ProductTile(64, 64, 32, 1, 4, 1)
# Fewer programs than this leave a large GPU idle: smaller tiles, then.
_FEW_PROGRAMS = 128


def architecture_of(device: torch.device) -> int:
    """The compute capability of a GPU of NVIDIA, 90 for sm_90; 0 for all others."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def forward_tile(mode: str, architecture: int) -> ProductTile:
    """The square tile of an upper triangle."""
    if mode == "ieee":
        return _IEEE
    if architecture < 80:
        return _SMALL
    if 90 <= architecture < 120:
        return _SM100_FOUR_PRODUCTS if mode == "bf16x4" and architecture >= 100 else _LARGE[mode]
    return _REGISTERS._replace(depth=16) if "x" in mode else _REGISTERS


def backward_tile(mode: str, architecture: int, rows: int, widths: Sequence[int]) -> ProductTile:
    """The tile of an (N, D) gradient."""
    tile = forward_tile(mode, architecture)
    programs = -(-rows // tile.rows) * sum(-(-width // tile.columns) for width in widths)
    if tile.rows == 128 and (rows <= 64 or programs < _FEW_PROGRAMS):
        return tile._replace(rows=64, columns=64, warps=4)
    return tile


def product_mode(precision: str, dtype: torch.dtype, centered: bool) -> str:
    """How operands are multiplied, of features of some dtype, in one of the named precisions.

    Differences of 16-bit features fit into two terms, so that tensor cores give "ieee"; the features into one.
    """
    if precision == "ieee" and dtype == torch.bfloat16:
        return "bf16x4" if centered else "bf16"
    if precision == "ieee" and dtype == torch.float16:
        return "tf32x3" if centered else "tf32"
    return precision


def backward_mode(precision: str, dtype: torch.dtype) -> str:
    """Likewise, of gradients: those of 16-bit features are rounded to 16 bits, and three products are exact enough."""
    return "bf16x3" if precision == "ieee" and dtype != torch.float32 else precision


def operand_dtype() -> Any:
    """The dtype of bfloat16 operands: the interpreter cannot multiply them."""
    import triton.language as tl

    return tl.float32 if backends.interpreted() else tl.bfloat16


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

    @property
    def long(self) -> bool:
        """Whether a program promotes the sums over blocks of rows."""
        return self.chunk_rows > PROMOTED_ROWS


Key = tuple[tuple[tuple[int, ...], int, tuple[int, ...]], ...]


def triangle_groups(layers: Sequence[Tensor], tile: ProductTile) -> tuple[TileGroup, ...]:
    """The launches over tiles of the upper triangles of (N, D) layers."""
    return _groups(_key(layers), layers[0].element_size(), tile, True)


def output_groups(layers: Sequence[Tensor], out: Sequence[Tensor], tile: ProductTile) -> tuple[TileGroup, ...]:
    """The launches over tiles of (N, D) outputs."""
    return _groups(_key(layers, out), layers[0].element_size(), tile, False)


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
def _groups(key: Key, itemsize: int, tile: ProductTile, triangle_tiles: bool) -> tuple[TileGroup, ...]:
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
    result = []
    for vector, indices in members.items():
        for begin in range(0, len(indices), MAX_LAYERS):
            result.append(
                _group(key, indices[begin : begin + MAX_LAYERS], vector, offsets, packed, tile, triangle_tiles)
            )
    return tuple(result)


def _group(
    key: Key,
    layers: list[int],
    vector: int,
    offsets: list[int],
    packed: list[int],
    tile: ProductTile,
    triangle_tiles: bool,
) -> TileGroup:
    rows = key[layers[0]][0][0]
    widths = [key[i][0][1] for i in layers]
    chunk_rows = rows
    if triangle_tiles:
        blocks = [triangle.blocks(width) for width in widths]
        tiles = [count * (count + 1) // 2 * (triangle.BLOCK // tile.columns) ** 2 for count in blocks]
        chunk_rows = _chunk_rows(rows, sum(tiles))
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


def _chunk_rows(rows: int, tiles: int) -> int:
    """Rows per program: whatever is cut leaves partial sums to fold, so no cut where tiles alone keep a GPU busy."""
    chunks = min(-(-_PROGRAMS // tiles), -(-rows // _CHUNK_ROWS))
    if chunks <= 1:
        return rows
    unit = 128
    return -(-rows // (chunks * unit)) * unit
