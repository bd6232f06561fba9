"""How matrices are multiplied on an architecture: the mode of a named precision, and the tile of a program.

An architecture is named as Triton names it: 90 is sm_90 of NVIDIA, "gfx942" is AMD's; 0 stands for the interpreter.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl

from moment_ops.kernels import _records
from moment_ops.kernels._plan import MAX_LAYERS
from moment_ops.ops import backends, triangle

Architecture = int | str

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

    def record(self, mode: str, promoted: int = 0) -> _records.ProductTile:
        """The tile of the kernels."""
        values = (mode, operand_dtype(), self.rows, self.columns, self.depth, self.steps, self.stages, promoted)
        return _records.ProductTile(*map(tl.constexpr, values))


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

# Multiprocessors of the largest GPU of an architecture.
_PROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170, "gfx90a": 104, "gfx942": 304, "gfx950": 256}


def architecture_of(device: torch.device) -> Architecture:
    """The name of a GPU's architecture; 0 for what is no GPU."""
    if device.type != "cuda":
        return 0
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return 10 * properties.major + properties.minor


def processors(architecture: Architecture) -> int:
    """Multiprocessors that are to be kept busy."""
    return _PROCESSORS.get(architecture, 128)


def most_chunks(rows: int) -> int:
    """Programs that are worth having for so many rows."""
    return -(-rows // CHUNK_ROWS)


def most_layers(architecture: Architecture) -> int:
    """Layers of a launch. A wave of AMD has a hundred scalar registers: the arguments of more layers would spill."""
    return 8 if isinstance(architecture, str) else MAX_LAYERS


def _family(architecture: Architecture) -> str:
    if isinstance(architecture, str):
        return "gfx"
    if 90 <= architecture < 120:
        return "sm_90" if architecture < 100 else "sm_100"
    return "sm_80"


def product_mode(precision: str, dtype: torch.dtype, centered: bool, architecture: Architecture) -> str:
    """How operands are multiplied, of features of some dtype, in one of the named precisions.

    Differences of 16-bit features fit into two terms, so that tensor cores give "ieee"; the features into one. AMD's
    matrix instructions take float32, too.
    """
    # gfx90a takes subnormal bfloat16 for zero.
    if precision == "ieee" and dtype == torch.bfloat16 and architecture != "gfx90a":
        return "bf16x4" if centered else "bf16"
    if precision == "ieee" and dtype == torch.float16 and not isinstance(architecture, str):
        return "tf32x3" if centered else "tf32"
    return _available(precision, architecture)


def gradient_mode(precision: str, dtype: torch.dtype, architecture: Architecture) -> str:
    """Likewise, of gradients: those of 16-bit features are rounded to 16 bits, and three products are exact enough."""
    return _available("bf16x3" if precision == "ieee" and dtype != torch.float32 else precision, architecture)


def gram_mode(dtype: torch.dtype, architecture: Architecture) -> str:
    """Likewise, of Gram matrices.

    The shift is any float32, so that differences from it do not fit into two bfloat16, as those of a covariance do:
    two terms of 11 bits, of which three products are float32 to two bits.
    """
    return "ieee" if dtype == torch.float32 or isinstance(architecture, str) else "tf32x3"


def _available(precision: str, architecture: Architecture) -> str:
    """The precision, or a more exact one: of AMD's GPUs, gfx942 alone has tf32."""
    missing = precision == "tf32" and isinstance(architecture, str) and architecture != "gfx942"
    return "bf16x3" if missing else precision


def _small(tile: ProductTile) -> ProductTile:
    return tile if tile.rows < 128 else tile._replace(rows=64, columns=64, warps=4)


def forward_tile(mode: str, architecture: Architecture, rows: int, widths: Sequence[int]) -> ProductTile:
    """The square tile of upper triangles of layers: small where large ones, cut along the rows, leave a GPU idle."""
    tile = _COVARIANCES[_family(architecture)][mode]
    blocks = [triangle.blocks(width) for width in widths]
    programs = sum(n * (n + 1) // 2 for n in blocks) * most_chunks(rows)
    return tile if programs >= processors(architecture) else _small(tile)


def backward_tile(mode: str, architecture: Architecture, rows: int, widths: Sequence[int]) -> ProductTile:
    """The tile of (N, D) gradients."""
    tile = _GRADIENTS[_family(architecture)][mode]
    programs = -(-rows // tile.rows) * sum(-(-width // tile.columns) for width in widths)
    large = rows > 64 and programs >= processors(architecture)
    return tile if large else _small(tile)


def gram_tile(mode: str, architecture: Architecture) -> ProductTile:
    """The square tile of an upper triangle of products of rows."""
    return _GRAMS[_family(architecture)][mode]


def gram_gradient_tile(mode: str, architecture: Architecture) -> ProductTile:
    """The tile of an (R, D) gradient; it has one step."""
    return _GRAM_GRADIENTS[_family(architecture)][mode]


def operand_dtype() -> tl.dtype:
    """The dtype of bfloat16 operands: the interpreter cannot multiply them."""
    return tl.float32 if backends.interpreted() else tl.bfloat16
