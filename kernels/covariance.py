"""`covariance` and `covariance_match_`: two launches for a list of layers, the columns' means, then the products.

A program multiplies one tile of an upper triangle, from rows less a shift close to their mean. What the shift leaves of
the mean is subtracted from the products, as `rows * rest rest'`: without cancellation, for it is an eighth of a
standard deviation at most. Large columns are multiplied by a power of two, so that sums of their products fit. Tiles
below the diagonal are never computed.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moment_ops.kernels import _column_plan, _launch
from moment_ops.kernels._architectures import Architecture, architecture_of, product_mode
from moment_ops.kernels._common import arrive, is_finite, pick, pick_integer
from moment_ops.kernels._covariance_plan import PROMOTED_ROWS, TileGroup, triangle_groups
from moment_ops.kernels._launch import Launch
from moment_ops.kernels._products import multiply, promote
from moment_ops.kernels._records import Partials, Rows, Shifts
from moment_ops.kernels._reduce import reduce_columns, variance
from moment_ops.kernels._tiles import REDUCTION_REGISTERS, SHIFT_REGISTERS, ProductTile, forward_tile
from moment_ops.kernels._triangle import BLOCK, block_pair
from moment_ops.kernels.moments import CUT, reduction_arguments

# Dtypes that the kernels take; a literal, which is read without importing Triton.
OPERATORS = {
    "covariance": ("float32", "bfloat16", "float16"),
}


@triton.jit
def exponent_of(value):
    """Of a positive float32, 128 of an infinite one."""
    return (value.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def power_of_two(exponent):
    """float32, of exponents of normal numbers."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def room(mean, var):
    """The scale of columns, float32: 1, or what makes those beyond 2**50 as small as 2**41.

    Up to 2**28 products of such columns have a sum; products with the smallest numbers keep their digits.
    """
    exponent = tl.maximum(exponent_of(tl.abs(mean)), exponent_of(var) >> 1)
    wanted = is_finite(mean) & (var >= 0) & (exponent > 50)
    return power_of_two(tl.where(wanted, 40 - tl.minimum(exponent, 127), 0))


@triton.jit(do_not_specialize=[*CUT])
def shifts_kernel(
    layers,
    mean_out,  # (F)
    shifts,
    partials,
    rows,
    chunk_rows,
    chunks,
    correction,
    strip,
):
    """The mean of every column, a shift close to it, and the rest."""
    cut = Rows(rows, chunk_rows, chunks, correction)
    got = reduce_columns(layers, None, None, partials, cut, tl.float32, strip, WIDE=True)
    if got.complete:
        shift = got.mean.to(tl.float32)
        scale = room(shift, got.var)
        tl.store(mean_out + got.packed, shift, mask=got.mask)
        tl.store(shifts.scale + got.packed, scale, mask=got.mask)
        if layers.inputs[0].dtype.element_ty.primitive_bitwidth == 16:
            # A multiple of an eighth of the deviation has few bits: differences from it then have few, too.
            exponent = exponent_of(got.var)
            unit = power_of_two((exponent >> 1) - 2)
            coarse = tl.floor(shift / unit + 0.5) * unit
            shift = tl.where((got.var > 0) & (exponent > -127) & (exponent < 128), coarse, shift)
        rest = (got.mean - shift.to(tl.float64)).to(tl.float32)
        tl.store(shifts.shift + got.packed, shift * scale, mask=got.mask)
        tl.store(shifts.rest + got.packed, rest * scale, mask=got.mask)


@triton.jit
def locate_tile(layers, program, tile):
    """(tiles, chunk, width, row, column): tiles and columns of a layer, and a program's chunk of rows and tile.

    Chunks of rows are outermost, so that programs that run together read the same rows.
    """
    first = pick_integer(layers.starts, layers, program)
    width = pick_integer(layers.columns, layers, program) * layers.VECTOR
    blocks = tl.cdiv(width, BLOCK)
    TILES: tl.constexpr = BLOCK // tile.COLUMNS
    tiles = blocks * (blocks + 1) // 2 * (TILES * TILES)
    local = program - first
    index = local % tiles
    row, column = block_pair(index // (TILES * TILES), blocks)
    row = row * TILES + index % (TILES * TILES) // TILES
    column = column * TILES + index % TILES
    return tiles, local // tiles, width, row, column


@triton.jit
def tile_products(x, stride, row_columns, column_columns, width, shifts, offset, first, last, tile):
    """(SIDE, SIDE) sums over rows first ... last of products of scaled columns, less a shift where there is one."""
    SIDE: tl.constexpr = tile.COLUMNS
    left_mask = row_columns < width
    right_mask = column_columns < width
    left_scale = tl.load(shifts.scale + offset + row_columns, mask=left_mask, other=0.0)
    right_scale = tl.load(shifts.scale + offset + column_columns, mask=right_mask, other=0.0)
    if shifts.shift is not None:
        shift = shifts.shift + offset
        left_shift = tl.load(shift + row_columns, mask=left_mask, other=0.0)
        right_shift = tl.load(shift + column_columns, mask=right_mask, other=0.0)
    total = tl.zeros([SIDE, SIDE], tl.float32)
    for begin in tl.range(first, last, tile.DEPTH * tile.STEPS, num_stages=tile.STAGES):
        # Not `total` itself: the sums of tensor cores are truncated.
        part = tl.zeros([SIDE, SIDE], tl.float32)
        for step in tl.static_range(tile.STEPS):
            row = begin + step * tile.DEPTH + tl.arange(0, tile.DEPTH)
            here = (row < last)[:, None]
            at = x + row.to(tl.int64)[:, None] * stride  # (DEPTH, 1)
            left = tl.load(at + row_columns[None, :], mask=here & left_mask[None, :], other=0.0).to(tl.float32)
            right = tl.load(at + column_columns[None, :], mask=here & right_mask[None, :], other=0.0).to(tl.float32)
            left = left * left_scale[None, :]
            right = right * right_scale[None, :]
            if shifts.shift is not None:
                # One factor of rows beyond the last is zero, which is enough.
                left = tl.where(here, left - left_shift[None, :], 0.0)
                right = right - right_shift[None, :]
            part = multiply(tl.trans(left), right, part, tile.MODE, tile.BF16)
        total = promote(total, part)
    return total


@triton.jit
def symmetric(total, row, column, MODE: tl.constexpr):
    """The products of tile (row, column), from those of the tile that is not below the diagonal.

    Several products are added in another order across the diagonal.
    """
    if MODE != "ieee" and MODE != "tf32" and MODE != "bf16":
        if row == column:
            total = 0.5 * (total + tl.trans(total))
        elif row > column:
            total = tl.trans(total)
    return total


@triton.jit
def quarters(total, SIDE: tl.constexpr):
    """Four tensors of (SIDE, SIDE / 4): columns in order."""
    left, right = tl.split(total.reshape(SIDE, 2, SIDE // 2).permute(0, 2, 1))
    first, second = tl.split(left.reshape(SIDE, 2, SIDE // 4).permute(0, 2, 1))
    third, fourth = tl.split(right.reshape(SIDE, 2, SIDE // 4).permute(0, 2, 1))
    return first, second, third, fourth


@triton.jit
def fold_quarter(partials, first, tiles, chunks, quarter, SIDE: tl.constexpr):
    """(SIDE, SIDE / 4) columns of a tile, in float64, whose chunks were left by first, first + tiles, ..., in order."""
    row = tl.arange(0, SIDE)
    column = quarter * (SIDE // 4) + tl.arange(0, SIDE // 4)
    at = row[:, None] * SIDE + column[None, :]
    total = tl.zeros([SIDE, SIDE // 4], tl.float64)
    for chunk in range(0, chunks):
        slot = partials + (first + chunk * tiles).to(tl.int64) * (SIDE * SIDE)
        # Past the L1 cache, which does not follow other processors' stores.
        total += tl.load(slot + at, cache_modifier=".cg").to(tl.float64)
    return total


class Products(NamedTuple):
    """What `products` returns."""

    complete: Any  # whether this program has them all
    total: Any  # or, where there are partials, in those of programs first, first + tiles, ...
    first: Any
    tiles: Any  # of the layer
    width: Any  # columns of the layer
    offset: Any  # of the layer's columns
    row: Any  # of the tile
    column: Any


@triton.jit
def products(layers, shifts, partials, cut, tile):
    """A program's sums of products."""
    SIDE: tl.constexpr = tile.COLUMNS
    program = tl.program_id(0)
    tiles, chunk, width, row, column = locate_tile(layers, program, tile)
    x = pick(layers.inputs, layers, program)
    stride = pick_integer(layers.strides, layers, program).to(tl.int64) * layers.VECTOR
    offset = pick_integer(layers.offsets, layers, program).to(tl.int64) * layers.VECTOR
    lane = tl.arange(0, SIDE)
    left = row * SIDE + lane
    right = column * SIDE + lane
    if tile.MODE != "ieee" and tile.MODE != "tf32" and tile.MODE != "bf16":
        left = tl.minimum(row, column) * SIDE + lane
        right = tl.maximum(row, column) * SIDE + lane
    begin = chunk * cut.chunk_rows
    end = tl.minimum(begin + cut.chunk_rows, cut.rows)
    # Small tiles of the last block may lie beyond the last column.
    end = tl.where(tl.maximum(row, column) * SIDE < width, end, begin)
    first = program - chunk * tiles
    complete = tl.full((), 1, tl.int32) == 1
    if tile.PROMOTED > 0:
        slot = partials.partials + program.to(tl.int64) * (SIDE * SIDE) + (lane[:, None] * SIDE + lane[None, :])
        total = tl.zeros([SIDE, SIDE], tl.float32)
        # At least once: what is folded has to be there, also beyond the last column.
        for block in range(begin, tl.maximum(end, begin + 1), tile.PROMOTED):
            stop = tl.minimum(block + tile.PROMOTED, end)
            total = tile_products(x, stride, left, right, width, shifts, offset, block, stop, tile)
            total = symmetric(total, row, column, tile.MODE)
            # The sum over blocks is in memory: registers are for products.
            if block > begin:
                total += tl.load(slot)
            tl.store(slot, total)
            tl.debug_barrier()
    else:
        total = tile_products(x, stride, left, right, width, shifts, offset, begin, end, tile)
        total = symmetric(total, row, column, tile.MODE)
        if partials is not None:
            slot = partials.partials + program.to(tl.int64) * (SIDE * SIDE) + (lane[:, None] * SIDE + lane[None, :])
            tl.store(slot, total)
    if partials is not None:
        complete = arrive(partials.tickets + first, cut.chunks)
    return Products(complete, total, first, tiles, width, offset, row, column)


@triton.jit
def covariances(sums, cut, shifts, got, row_columns, column_columns):
    """Covariances, float32, of sums of products of scaled columns, less a shift where there is one."""
    left_mask = row_columns < got.width
    right_mask = column_columns < got.width
    if shifts.rest is not None:
        rest = shifts.rest + got.offset
        left = tl.load(rest + row_columns, mask=left_mask, other=0.0).to(sums.dtype)
        right = tl.load(rest + column_columns, mask=right_mask, other=0.0).to(sums.dtype)
        # The product first: it is the same on both sides of the diagonal.
        sums -= left[:, None] * right[None, :] * tl.cast(cut.rows, sums.dtype)
    scale = shifts.scale + got.offset
    left = power_of_two(-exponent_of(tl.load(scale + row_columns, mask=left_mask, other=1.0)))
    right = power_of_two(-exponent_of(tl.load(scale + column_columns, mask=right_mask, other=1.0)))
    return variance(sums, cut.rows, cut.correction).to(tl.float32) * left[:, None] * right[None, :]


@triton.jit
def store_covariance(sums, cov, cut, shifts, got, quarter, SIDE: tl.constexpr):
    """A quarter of a tile and its mirror image into a (D, D) matrix."""
    row_columns = got.row * SIDE + tl.arange(0, SIDE)
    column_columns = got.column * SIDE + quarter * (SIDE // 4) + tl.arange(0, SIDE // 4)
    value = covariances(sums, cut, shifts, got, row_columns, column_columns)
    mask = (row_columns < got.width)[:, None] & (column_columns < got.width)[None, :]
    wide = got.width.to(tl.int64)
    tl.store(cov + row_columns.to(tl.int64)[:, None] * wide + column_columns[None, :], value, mask=mask)
    if got.row // (BLOCK // SIDE) < got.column // (BLOCK // SIDE):
        mirrored = cov + column_columns.to(tl.int64)[:, None] * wide + row_columns[None, :]
        tl.store(mirrored, tl.trans(value), mask=tl.trans(mask))


@triton.jit(do_not_specialize=[*CUT])
def covariance_kernel(
    layers,
    shifts,
    cov,  # (D, D), of the only layer
    partials,
    rows,
    chunk_rows,
    chunks,
    correction,
    tile,
):
    """The full covariance matrix."""
    cut = Rows(rows, chunk_rows, chunks, correction)
    SIDE: tl.constexpr = tile.COLUMNS
    got = products(layers, shifts, partials, cut, tile)
    if got.complete:
        if partials is None:
            parts = quarters(got.total, SIDE)
            for quarter in tl.static_range(4):
                store_covariance(parts[quarter], cov, cut, shifts, got, quarter, SIDE)
        else:
            for quarter in range(4):
                sums = fold_quarter(partials.partials, got.first, got.tiles, chunks, quarter, SIDE)
                store_covariance(sums, cov, cut, shifts, got, quarter, SIDE)


def unit_columns(layers: Sequence[Tensor]) -> list[Tensor]:
    """Layers whose columns are neighbours in memory: themselves, or copies."""
    return [x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous() for x in layers]


def shifts_of(mean: Tensor) -> Shifts:
    """Room for shifts of columns that have these means."""
    return Shifts(*_launch.workspace(3 * len(mean), mean.dtype, mean.device).view(3, -1))


def shifts_launches(layers: Sequence[Tensor], mean: Tensor, shifts: Shifts) -> list[Launch]:
    """The launches that fill the mean and the shifts of (N, D) layers."""
    return [
        Launch(
            shifts_kernel,
            group.programs,
            {
                "mean_out": mean,
                "shifts": shifts,
                **reduction_arguments(group, layers, correction=0),
            },
            group.tile.warps,
            SHIFT_REGISTERS if group.itemsize == 2 else REDUCTION_REGISTERS,
        )
        for group in _column_plan.groups("reduce", layers)
    ]


def product_arguments(
    group: TileGroup, layers: Sequence[Tensor], shifts: Shifts, correction: int, mode: str, tile: ProductTile
) -> dict[str, Any]:
    """What the kernels that multiply rows have in common, workspace included."""
    partials = None
    if group.chunks > 1 or group.long:
        partials = Partials(
            _launch.workspace(group.programs * tile.rows * tile.columns, torch.float32, layers[0].device),
            _launch.workspace(group.programs, torch.int32, layers[0].device, zeroed=True),
        )
    return {
        "layers": group.record(layers),
        "shifts": shifts,
        "partials": partials,
        "rows": group.rows,
        "chunk_rows": group.chunk_rows,
        "chunks": group.chunks,
        "correction": correction,
        "tile": tile.record(mode, PROMOTED_ROWS if group.long else 0),
    }


def covariance_launches(
    x: Tensor, correction: int, centered: bool, precision: str, cov: Tensor, mean: Tensor, architecture: Architecture
) -> list[Launch]:
    """The launches of `covariance` of x (N, D)."""
    shifts = shifts_of(mean)
    mode = product_mode(precision, x.dtype, centered, architecture)
    tile = forward_tile(mode, architecture, len(x), [x.shape[1]])
    (group,) = triangle_groups([x], tile, architecture)
    arguments = {**product_arguments(group, [x], shifts, correction, mode, tile), "cov": cov}
    if not centered:
        arguments["shifts"] = Shifts(None, None, shifts.scale)
    launch = Launch(covariance_kernel, group.programs, arguments, tile.warps, tile.registers)
    return [*shifts_launches([x], mean, shifts), launch]


def covariance(x: Tensor, correction: int, centered: bool, precision: str, cov: Tensor, mean: Tensor) -> None:
    """Fill `cov` (D, D) and `mean` (D,) from `x` (N, D)."""
    (x,) = unit_columns([x])
    architecture = architecture_of(x.device)
    _launch.run(covariance_launches, x.device, x, correction, centered, precision, cov, mean, architecture)
