"""What a program has in registers: the strips of the kernels over columns, the tiles of those that multiply."""

from collections.abc import Sequence
from typing import NamedTuple

import triton.language as tl

from moment_ops.kernels import _records
from moment_ops.kernels._architectures import Architecture, family, operand_dtype, processors
from moment_ops.ops import triangle


class StripTile(NamedTuple):
    """What a program over columns reads at a time."""

    rows: int
    columns: int
    warps: int


STRIP_WARPS = 4
# What the threads of a program read at once, 16 bytes each: a row of a wide strip, or of a narrow one several rows.
STRIP_BYTES = 16 * 32 * STRIP_WARPS
# A strip has whole cache lines.
LINE_BYTES = 128

# Registers per thread of a reduction over rows: 512 threads per processor, so that it has 64 KiB in flight.
REDUCTION_REGISTERS = 128
# Eight 16-bit columns per thread, their mean in float64 besides; as where moments are folded.
SHIFT_REGISTERS = 168
# Of a pass over features: 640 threads; of one that adds gradients, with twice as many bytes a thread: 384.
PASS_REGISTERS = 96
ADDED_PASS_REGISTERS = 168

# What a program matches of given moments, by the size of a number: 1,024 threads, whose vectors are in flight together.
MATCH_TILES = {4: StripTile(1, 512, 4), 8: StripTile(1, 256, 4)}
MATCH_REGISTERS = 64

# Rows of the smallest chunk that is worth a program of its own.
CHUNK_ROWS = 128


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

    @property
    def resident(self) -> int:
        """Programs that share a multiprocessor: the registers of eight warps with 64 sums a thread fill it."""
        return 3 if self.warps < 8 else 1

    def record(self, mode: str, promoted: int = 0) -> _records.Tile:
        """The tile of the kernels."""
        values = (mode, operand_dtype(), self.rows, self.columns, self.depth, self.steps, self.stages, promoted)
        return _records.Tile(*map(tl.constexpr, values))


# Without tensor cores operands and sums share the registers; a sum of 32 products is promoted. Larger tiles read less
# shared memory, but one program fills a multiprocessor.
_IEEE = ProductTile(64, 64, 16, 2, 4, 2, 168)
# Tensor cores take operands from registers; 99 KiB of shared memory. sm_120, too.
_SM80 = {
    "ieee": _IEEE,
    "tf32": ProductTile(128, 128, 16, 1, 8, 3),
    "tf32x3": ProductTile(64, 64, 32, 1, 4, 3),
    "bf16": ProductTile(128, 128, 32, 1, 8, 3),
    "bf16x3": ProductTile(128, 128, 16, 1, 8, 3),
    "bf16x4": ProductTile(128, 128, 16, 1, 8, 3),
}
# From shared memory.
_SM90 = {
    "ieee": _IEEE,
    "tf32": ProductTile(128, 128, 32, 1, 8, 3),
    "tf32x3": ProductTile(64, 64, 32, 1, 4, 3),
    "bf16": ProductTile(128, 128, 64, 1, 8, 3),
    "bf16x3": ProductTile(128, 128, 32, 1, 8, 3),
    "bf16x4": ProductTile(128, 128, 32, 1, 8, 3),
}
_SM100 = {
    **_SM90,
    # Triton 3.6 takes more registers.
    "ieee": _IEEE._replace(registers=224),
    # Every product of a chain has its own columns of tensor memory, which has 512.
    "bf16x4": ProductTile(64, 64, 32, 1, 4, 3),
}
# 64 KiB of shared memory, for operands alone: what is loaded ahead stays in registers.
_GFX = dict.fromkeys(("ieee", "tf32", "bf16", "bf16x3", "bf16x4"), ProductTile(128, 128, 32, 1, 8, 2))
# Reading the packed matrix takes scalar registers, of which larger tiles would spill some.
_GFX_GRADIENTS = dict.fromkeys(_GFX, ProductTile(64, 64, 16, 1, 4, 2))

_COVARIANCES = {"sm_80": _SM80, "sm_90": _SM90, "sm_100": _SM100, "gfx": _GFX}
_GRADIENTS = {**_COVARIANCES, "gfx": _GFX_GRADIENTS}

# Rows are a few hundred: larger tiles would be mostly empty.
_GRAM = {"ieee": ProductTile(64, 64, 16, 2, 4, 3), "tf32x3": ProductTile(64, 64, 32, 1, 4, 3)}
# Pointers to the rows that are summed take registers of their own: four warps of "ieee" would spill.
_GRAM_GRADIENT = {"ieee": ProductTile(64, 64, 16, 1, 8, 3, 255), "tf32x3": ProductTile(64, 64, 32, 1, 4, 3)}
_GFX_GRAM = {"ieee": ProductTile(64, 64, 32, 1, 4, 2)}

_GRAMS = {
    "sm_80": {**_GRAM, "tf32x3": ProductTile(64, 64, 16, 1, 4, 3)},
    "sm_90": _GRAM,
    "sm_100": _GRAM,
    "gfx": _GFX_GRAM,
}
_GRAM_GRADIENTS = {"sm_80": _GRAM_GRADIENT, "sm_90": _GRAM_GRADIENT, "sm_100": _GRAM_GRADIENT, "gfx": _GFX_GRAM}


def most_chunks(rows: int) -> int:
    """Programs that are worth having for so many rows."""
    return -(-rows // CHUNK_ROWS)


def _small(tile: ProductTile) -> ProductTile:
    return tile if tile.rows < 128 else tile._replace(rows=64, columns=64, warps=4)


def forward_tile(mode: str, architecture: Architecture, rows: int, widths: Sequence[int]) -> ProductTile:
    """The square tile of upper triangles of layers: small where large ones, cut along the rows, leave a GPU idle."""
    tile = _COVARIANCES[family(architecture)][mode]
    blocks = [triangle.blocks(width) for width in widths]
    programs = sum(n * (n + 1) // 2 for n in blocks) * most_chunks(rows)
    return tile if programs >= processors(architecture) else _small(tile)


def backward_tile(mode: str, architecture: Architecture, rows: int, widths: Sequence[int]) -> ProductTile:
    """The tile of (N, D) gradients."""
    tile = _GRADIENTS[family(architecture)][mode]
    programs = -(-rows // tile.rows) * sum(-(-width // tile.columns) for width in widths)
    large = rows > 64 and programs >= processors(architecture)
    return tile if large else _small(tile)


def gram_tile(mode: str, architecture: Architecture) -> ProductTile:
    """The square tile of an upper triangle of products of rows."""
    return _GRAMS[family(architecture)][mode]


def gram_gradient_tile(mode: str, architecture: Architecture) -> ProductTile:
    """The tile of an (R, D) gradient; it has one step."""
    return _GRAM_GRADIENTS[family(architecture)][mode]
