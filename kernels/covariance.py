"""`covariance` and `covariance_match_`: two launches for a list of layers, the columns' means, then the products.

A program multiplies one tile of an upper triangle, from rows less a shift close to their mean. What the shift leaves of
the mean is subtracted from the products, as `rows * rest rest'`: without cancellation, for it is an eighth of a
standard deviation at most. Tiles below the diagonal are never computed.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moment_ops.kernels import _launch, _plan
from moment_ops.kernels._common import arrive, pick, pick_integer
from moment_ops.kernels._covariance_plan import PROMOTED_ROWS, TileGroup, triangle_groups
from moment_ops.kernels._product_tiles import (
    Architecture,
    ProductTile,
    architecture_of,
    forward_tile,
    operand_dtype,
    product_mode,
)
from moment_ops.kernels._products import multiply, promote
from moment_ops.kernels._records import Rows
from moment_ops.kernels._reduce import reduce_columns, variance
from moment_ops.kernels._triangle import BLOCK, block_pair
from moment_ops.kernels.moments import CUT, reduction_arguments

# Eight 16-bit columns per thread, their mean in float64 besides; as where moments are folded.
_SHIFT_REGISTERS = 168


@triton.jit(do_not_specialize=[*CUT])
def shifts_kernel(
    layers,
    mean_out,  # (F)
    shift_out,  # (F)
    rest_out,  # (F)
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
        tl.store(mean_out + got.packed, shift, mask=got.mask)
        if layers.inputs[0].dtype.element_ty.primitive_bitwidth == 16:
            # A multiple of an eighth of the deviation has few bits: differences from it then have few, too.
            exponent = (got.var.to(tl.int32, bitcast=True) >> 23) - 127
            unit = (((exponent >> 1) + 125) << 23).to(tl.float32, bitcast=True)
            coarse = tl.floor(shift / unit + 0.5) * unit
            shift = tl.where((got.var > 0) & (exponent > -127) & (exponent < 128), coarse, shift)
        tl.store(shift_out + got.packed, shift, mask=got.mask)
        tl.store(rest_out + got.packed, (got.mean - shift.to(tl.float64)).to(tl.float32), mask=got.mask)


@triton.jit
def locate_tile(starts, widths, chunks, program, LAYERS: tl.constexpr, VECTOR: tl.constexpr, TILE: tl.constexpr):
    """(tiles, chunk, width, row, column): tiles and columns of a layer, and a program's chunk of rows and tile.

    Chunks of rows are outermost, so that programs that run together read the same rows.
    """
    first = pick_integer(starts, starts, program, LAYERS)
    width = pick_integer(widths, starts, program, LAYERS) * VECTOR
    blocks = tl.cdiv(width, BLOCK)
    SIDE: tl.constexpr = BLOCK // TILE
    tiles = blocks * (blocks + 1) // 2 * (SIDE * SIDE)
    local = program - first
    index = local % tiles
    row, column = block_pair(index // (SIDE * SIDE), blocks)
    row = row * SIDE + index % (SIDE * SIDE) // SIDE
    column = column * SIDE + index % SIDE
    return tiles, local // tiles, width, row, column


@triton.jit
def tile_products(
    x,
    stride,
    row_columns,
    column_columns,
    width,
    shift,
    first,
    last,
    CENTERED: tl.constexpr,
    MODE: tl.constexpr,
    BF16: tl.constexpr,
    DEPTH: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
    TILE: tl.constexpr,
):
    """(TILE, TILE) sums over rows first ... last of products of shifted columns."""
    left_mask = row_columns < width
    right_mask = column_columns < width
    if CENTERED:
        left_shift = tl.load(shift + row_columns, mask=left_mask, other=0.0)
        right_shift = tl.load(shift + column_columns, mask=right_mask, other=0.0)
    total = tl.zeros([TILE, TILE], tl.float32)
    for begin in tl.range(first, last, DEPTH * STEPS, num_stages=STAGES):
        # Not `total` itself: the sums of tensor cores are truncated.
        part = tl.zeros([TILE, TILE], tl.float32)
        for step in tl.static_range(STEPS):
            row = begin + step * DEPTH + tl.arange(0, DEPTH)
            here = (row < last)[:, None]
            at = x + row.to(tl.int64)[:, None] * stride  # (DEPTH, 1)
            left = tl.load(at + row_columns[None, :], mask=here & left_mask[None, :], other=0.0).to(tl.float32)
            right = tl.load(at + column_columns[None, :], mask=here & right_mask[None, :], other=0.0).to(tl.float32)
            if CENTERED:
                # One factor of rows beyond the last is zero, which is enough.
                left = tl.where(here, left - left_shift[None, :], 0.0)
                right = right - right_shift[None, :]
            part = multiply(tl.trans(left), right, part, MODE, BF16)
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
def quarters(total, TILE: tl.constexpr):
    """Four tensors of (TILE, TILE / 4): columns in order."""
    left, right = tl.split(total.reshape(TILE, 2, TILE // 2).permute(0, 2, 1))
    first, second = tl.split(left.reshape(TILE, 2, TILE // 4).permute(0, 2, 1))
    third, fourth = tl.split(right.reshape(TILE, 2, TILE // 4).permute(0, 2, 1))
    return first, second, third, fourth


@triton.jit
def fold_quarter(partials, first, tiles, chunks, quarter, TILE: tl.constexpr):
    """(TILE, TILE / 4) columns of a tile, in float64, whose chunks were left by first, first + tiles, ..., in order."""
    row = tl.arange(0, TILE)
    column = quarter * (TILE // 4) + tl.arange(0, TILE // 4)
    at = row[:, None] * TILE + column[None, :]
    total = tl.zeros([TILE, TILE // 4], tl.float64)
    for chunk in range(0, chunks):
        slot = partials + (first + chunk * tiles).to(tl.int64) * (TILE * TILE)
        # Past the L1 cache, which does not follow other processors' stores.
        total += tl.load(slot + at, cache_modifier=".cg").to(tl.float64)
    return total


@triton.jit
def products(
    inputs,
    starts,
    widths,
    strides,
    offsets,
    shift,
    partials,
    tickets,
    rows,
    chunk_rows,
    chunks,
    LAYERS: tl.constexpr,
    VECTOR: tl.constexpr,
    CENTERED: tl.constexpr,
    MODE: tl.constexpr,
    BF16: tl.constexpr,
    DEPTH: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
    TILE: tl.constexpr,
    LONG: tl.constexpr,
    PROMOTED: tl.constexpr,
):
    """A program's sums of products: (complete, total, first, tiles, width, offset, row, column).

    complete: whether this program has them all, in `total` or, where there are partials, in those of programs first,
    first + tiles, ...; offset: of the layer's columns.
    """
    program = tl.program_id(0)
    tiles, chunk, width, row, column = locate_tile(starts, widths, chunks, program, LAYERS, VECTOR, TILE)
    x = pick(inputs, starts, program, LAYERS)
    stride = pick_integer(strides, starts, program, LAYERS).to(tl.int64) * VECTOR
    offset = pick_integer(offsets, starts, program, LAYERS).to(tl.int64) * VECTOR
    lane = tl.arange(0, TILE)
    left = row * TILE + lane
    right = column * TILE + lane
    if MODE != "ieee" and MODE != "tf32" and MODE != "bf16":
        left = tl.minimum(row, column) * TILE + lane
        right = tl.maximum(row, column) * TILE + lane
    begin = chunk * chunk_rows
    end = tl.minimum(begin + chunk_rows, rows)
    # Small tiles of the last block may lie beyond the last column.
    end = tl.where(tl.maximum(row, column) * TILE < width, end, begin)
    first = program - chunk * tiles
    complete = tl.full((), 1, tl.int32) == 1
    if LONG:
        slot = partials + program.to(tl.int64) * (TILE * TILE) + (lane[:, None] * TILE + lane[None, :])
        total = tl.zeros([TILE, TILE], tl.float32)
        # At least once: what is folded has to be there, also beyond the last column.
        for block in range(begin, tl.maximum(end, begin + 1), PROMOTED):
            total = tile_products(
                x, stride, left, right, width, shift + offset, block,
                tl.minimum(block + PROMOTED, end), CENTERED, MODE, BF16, DEPTH, STEPS, STAGES, TILE,
            )  # fmt: skip
            total = symmetric(total, row, column, MODE)
            # The sum over blocks is in memory: registers are for products.
            if block > begin:
                total += tl.load(slot)
            tl.store(slot, total)
            tl.debug_barrier()
    else:
        total = tile_products(
            x, stride, left, right, width, shift + offset, begin, end, CENTERED, MODE,
            BF16, DEPTH, STEPS, STAGES, TILE,
        )  # fmt: skip
        total = symmetric(total, row, column, MODE)
        if partials is not None:
            slot = partials + program.to(tl.int64) * (TILE * TILE) + (lane[:, None] * TILE + lane[None, :])
            tl.store(slot, total)
    if partials is not None:
        complete = arrive(tickets + first, chunks)
    return complete, total, first, tiles, width, offset, row, column


@triton.jit
def covariances(sums, rows, correction, rest, row_columns, column_columns, width, CENTERED: tl.constexpr):
    """Covariances, float32, of sums of products of shifted columns."""
    if CENTERED:
        left = tl.load(rest + row_columns, mask=row_columns < width, other=0.0).to(sums.dtype)
        right = tl.load(rest + column_columns, mask=column_columns < width, other=0.0).to(sums.dtype)
        # The product first: it is the same on both sides of the diagonal.
        sums -= left[:, None] * right[None, :] * tl.cast(rows, sums.dtype)
    return variance(sums, rows, correction).to(tl.float32)


@triton.jit
def store_covariance(
    sums, cov, rows, correction, rest, row, column, width, quarter, CENTERED: tl.constexpr, TILE: tl.constexpr
):
    """A quarter of a tile and its mirror image into a (D, D) matrix."""
    row_columns = row * TILE + tl.arange(0, TILE)
    column_columns = column * TILE + quarter * (TILE // 4) + tl.arange(0, TILE // 4)
    value = covariances(sums, rows, correction, rest, row_columns, column_columns, width, CENTERED)
    mask = (row_columns < width)[:, None] & (column_columns < width)[None, :]
    wide = width.to(tl.int64)
    tl.store(cov + row_columns.to(tl.int64)[:, None] * wide + column_columns[None, :], value, mask=mask)
    if row // (BLOCK // TILE) < column // (BLOCK // TILE):
        mirrored = cov + column_columns.to(tl.int64)[:, None] * wide + row_columns[None, :]
        tl.store(mirrored, tl.trans(value), mask=tl.trans(mask))


@triton.jit(do_not_specialize=["rows", "chunk_rows", "chunks", "correction"])
def covariance_kernel(
    inputs,  # LAYERS x (rows, D)
    starts,
    widths,
    strides,
    offsets,
    shift,  # (F)
    rest,  # (F)
    cov,  # (D, D), of the only layer
    partials,  # (programs, TILE, TILE) float32, or None
    tickets,  # (programs) int32 zeros, or None
    rows,
    chunk_rows,
    chunks,
    correction,
    LAYERS: tl.constexpr,
    VECTOR: tl.constexpr,
    CENTERED: tl.constexpr,
    MODE: tl.constexpr,
    BF16: tl.constexpr,
    DEPTH: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
    TILE: tl.constexpr,
    LONG: tl.constexpr,
    PROMOTED: tl.constexpr,
):
    """The full covariance matrix."""
    complete, total, first, tiles, width, offset, row, column = products(
        inputs, starts, widths, strides, offsets, shift, partials, tickets, rows, chunk_rows, chunks, LAYERS, VECTOR,
        CENTERED, MODE, BF16, DEPTH, STEPS, STAGES, TILE, LONG, PROMOTED,
    )  # fmt: skip
    if complete:
        if partials is None:
            parts = quarters(total, TILE)
            for quarter in tl.static_range(4):
                store_covariance(
                    parts[quarter], cov, rows, correction, rest + offset, row, column, width, quarter, CENTERED, TILE
                )
        else:
            for quarter in range(4):
                sums = fold_quarter(partials, first, tiles, chunks, quarter, TILE)
                store_covariance(
                    sums, cov, rows, correction, rest + offset, row, column, width, quarter, CENTERED, TILE
                )


def unit_columns(layers: Sequence[Tensor]) -> list[Tensor]:
    """Layers whose columns are neighbours in memory: themselves, or copies."""
    return [x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous() for x in layers]


def shifts_launches(layers: Sequence[Tensor], mean: Tensor, shift: Tensor, rest: Tensor) -> list[_plan.Launch]:
    """The launches that fill mean, shift and rest, (F) each, of (N, D) layers."""
    return [
        _plan.Launch(
            shifts_kernel,
            group.programs,
            {
                "mean_out": mean,
                "shift_out": shift,
                "rest_out": rest,
                **reduction_arguments(group, layers, correction=0),
            },
            group.tile.warps,
            _SHIFT_REGISTERS if group.itemsize == 2 else _plan.REGISTERS,
        )
        for group in _plan.groups("reduce", layers)
    ]


def product_arguments(
    group: TileGroup,
    layers: Sequence[Tensor],
    shift: Tensor,
    rest: Tensor,
    correction: int,
    centered: bool,
    mode: str,
    tile: ProductTile,
) -> dict[str, Any]:
    """What the kernels that multiply rows have in common, workspace included."""
    partials = tickets = None
    if group.chunks > 1 or group.long:
        partials = _launch.workspace(group.programs * tile.rows * tile.columns, shift.dtype, shift.device)
        tickets = _launch.workspace(group.programs, torch.int32, shift.device, zeroed=True)
    return {
        "inputs": group.tensors(layers),
        "starts": group.starts,
        "widths": group.widths,
        "strides": group.strides[0],
        "offsets": group.offsets,
        "shift": shift,
        "rest": rest,
        "partials": partials,
        "tickets": tickets,
        "rows": group.rows,
        "chunk_rows": group.chunk_rows,
        "chunks": group.chunks,
        "correction": correction,
        "LAYERS": len(group.starts),
        "VECTOR": group.vector,
        "CENTERED": centered,
        "MODE": mode,
        "BF16": operand_dtype(),
        "DEPTH": tile.depth,
        "STEPS": tile.steps,
        "STAGES": tile.stages,
        "TILE": tile.columns,
        "LONG": group.long,
        "PROMOTED": PROMOTED_ROWS,
    }


def covariance_launches(
    x: Tensor, correction: int, centered: bool, precision: str, cov: Tensor, mean: Tensor, architecture: Architecture
) -> list[_plan.Launch]:
    """The launches of `covariance` of x (N, D)."""
    shift, rest = _launch.workspace(2 * len(mean), mean.dtype, mean.device).view(2, -1)
    mode = product_mode(precision, x.dtype, centered, architecture)
    tile = forward_tile(mode, architecture, len(x), [x.shape[1]])
    (group,) = triangle_groups([x], tile, architecture)
    arguments = {**product_arguments(group, [x], shift, rest, correction, centered, mode, tile), "cov": cov}
    launch = _plan.Launch(covariance_kernel, group.programs, arguments, tile.warps, tile.registers)
    return [*shifts_launches([x], mean, shift, rest), launch]


def covariance(x: Tensor, correction: int, centered: bool, precision: str, cov: Tensor, mean: Tensor) -> None:
    """Fill `cov` (D, D) and `mean` (D,) from `x` (N, D)."""
    (x,) = unit_columns([x])
    architecture = architecture_of(x.device)
    _launch.run(covariance_launches, x.device, x, correction, centered, precision, cov, mean, architecture)
