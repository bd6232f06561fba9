"""`gram` and `gram_backward`: products of the rows of many layers, two launches forward and one backward.

Forward, a program multiplies one tile of an upper triangle over a chunk of the columns; chunks are then added in order.
The rows of a layer lie in several tensors: every row of a tile has its offset from the first of them.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moment_ops.kernels import _gram_plan, _launch
from moment_ops.kernels._architectures import Architecture, architecture_of, gram_mode
from moment_ops.kernels._common import pick_integer
from moment_ops.kernels._launch import Launch
from moment_ops.kernels._products import multiply, promote
from moment_ops.kernels._tiles import gram_gradient_tile, gram_tile
from moment_ops.kernels._triangle import block_pair
from moment_ops.kernels.covariance import unit_columns

# Dtypes that the kernels take; a literal, which is read without importing Triton.
OPERATORS = {
    "gram": ("float32", "bfloat16", "float16"),
    "gram_backward": ("float32", "bfloat16", "float16"),
}

# Sides of the parts of a tile that are folded, and chunks that are loaded at a time.
_FOLD_SIDE = 32
_FOLD_CHUNKS = 8


@triton.jit
def pick_group(values, layers, program, GROUP: tl.constexpr):
    """The entry of a group in the layer that a program works on; see `pick`."""
    GROUPS: tl.constexpr = len(layers.firsts)
    encoded = program * 16
    picked = values[GROUP]
    for i in tl.static_range(1, len(layers.starts)):
        picked = tl.where(encoded >= layers.starts[i], values[i * GROUPS + GROUP], picked)
    return picked


@triton.jit
def row_pointers(tensors, strides, layers, program, row):
    """(ROWS, 1) pointers to rows, counted over all groups."""
    first = pick_group(tensors, layers, program, 0)
    address = first.to(tl.int64)
    UNIT: tl.constexpr = layers.VECTOR * (first.dtype.element_ty.primitive_bitwidth // 8)
    wide = row.to(tl.int64)
    offset = wide * ((pick_group(strides, layers, program, 0) >> 4).to(tl.int64) * layers.VECTOR)
    # A choice of offsets: one of pointers fails to compile for AMD.
    for group in tl.static_range(1, len(layers.firsts)):
        stride = (pick_group(strides, layers, program, group) >> 4).to(tl.int64) * layers.VECTOR
        distance = pick_group(tensors, layers, program, group).to(tl.int64) - address
        begin = distance // UNIT * layers.VECTOR - (layers.firsts[group] >> 4) * stride
        offset = tl.where(row >= (layers.firsts[group] >> 4), begin + wide * stride, offset)
    # From a number, not from the tensor: of a small one, Triton for AMD takes offsets for 32 bits wide.
    base = tl.multiple_of(address.to(first.dtype), UNIT)
    return base + offset[:, None]


@triton.jit
def shifted(at, layers, program, row, row_mask, column, column_mask):
    """(ROWS, COLUMNS) rows at pointers `at` less the shifts of their groups, float32, zero beyond the last column."""
    value = tl.load(at + column[None, :], mask=row_mask[:, None] & column_mask[None, :], other=0.0).to(tl.float32)
    pointer = pick_group(layers.shifts, layers, program, 0)
    less = tl.load(pointer + column, mask=column_mask, other=0.0)[None, :]
    for group in tl.static_range(1, len(layers.firsts)):
        pointer = pick_group(layers.shifts, layers, program, group)
        of_group = tl.load(pointer + column, mask=column_mask, other=0.0)[None, :]
        less = tl.where((row >= (layers.firsts[group] >> 4))[:, None], of_group, less)
    return value - less


@triton.jit(do_not_specialize=["rows", "chunk_blocks"])
def gram_kernel(
    layers,
    partials,  # (programs, SIDE, SIDE) float64
    rows,
    chunk_blocks,
    tile,
):
    """The products of one tile over one chunk of columns."""
    SIDE: tl.constexpr = tile.COLUMNS
    PROMOTED: tl.constexpr = tile.PROMOTED
    program = tl.program_id(0)
    local = program - pick_integer(layers.starts, layers, program)
    width = pick_integer(layers.columns, layers, program) * layers.VECTOR
    blocks = tl.cdiv(rows, SIDE)
    tiles = blocks * (blocks + 1) // 2
    # Tiles of the same columns run together: they read the same rows.
    row_block, column_block = block_pair(local % tiles, blocks)
    lane = tl.arange(0, SIDE)
    left_row = row_block * SIDE + lane
    right_row = column_block * SIDE + lane
    left_mask = left_row < rows
    right_mask = right_row < rows
    left_at = row_pointers(layers.inputs, layers.strides, layers, program, left_row)
    right_at = row_pointers(layers.inputs, layers.strides, layers, program, right_row)
    slot = partials + program.to(tl.int64) * (SIDE * SIDE) + (lane[:, None] * SIDE + lane[None, :])
    begin = local // tiles * chunk_blocks * PROMOTED
    # Not a sum, which could overflow.
    end = begin + tl.minimum(chunk_blocks * PROMOTED, width - begin)
    for block in range(begin, end, PROMOTED):
        stop = block + tl.minimum(PROMOTED, end - block)
        total = tl.zeros([SIDE, SIDE], tl.float32)
        for first in tl.range(block, stop, tile.DEPTH * tile.STEPS, num_stages=tile.STAGES):
            # Not `total` itself: the sums of tensor cores are truncated.
            part = tl.zeros([SIDE, SIDE], tl.float32)
            for step in tl.static_range(tile.STEPS):
                column = first + step * tile.DEPTH + tl.arange(0, tile.DEPTH)
                inside = column < stop
                left = shifted(left_at, layers, program, left_row, left_mask, column, inside)
                right = shifted(right_at, layers, program, right_row, right_mask, column, inside)
                part = multiply(left, tl.trans(right), part, tile.MODE, tile.BF16)
            total = promote(total, part)
        # The sum over blocks is in memory: registers are for products.
        promoted = total.to(tl.float64)
        if block > begin:
            promoted += tl.load(slot)
        tl.store(slot, promoted)
        tl.debug_barrier()


class Sums(NamedTuple):
    """Layers whose tiles are summed over chunks."""

    starts: Any  # first programs
    firsts: Any  # of the launch that left the partials
    chunks: Any
    positions: Any  # in the whole list


@triton.jit(do_not_specialize=["rows"])
def gram_fold_kernel(
    out,  # (L, R, R) float64
    partials,  # (programs, SIDE, SIDE) float64
    sums,
    rows,
    SIDE: tl.constexpr,
    PART: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The sums over chunks in order, into both triangles: what was computed below the diagonal is not used."""
    program = tl.program_id(0)
    local = program - pick_integer(sums.starts, sums, program)
    first = pick_integer(sums.firsts, sums, program)
    count = pick_integer(sums.chunks, sums, program)
    layer = pick_integer(sums.positions, sums, program).to(tl.int64)
    blocks = tl.cdiv(rows, SIDE)
    tiles = blocks * (blocks + 1) // 2
    PARTS: tl.constexpr = SIDE // PART
    tile = local // (PARTS * PARTS)
    row_block, column_block = block_pair(tile, blocks)
    inner_row = local % (PARTS * PARTS) // PARTS * PART + tl.arange(0, PART)
    inner_column = local % PARTS * PART + tl.arange(0, PART)
    at = partials + (inner_row[:, None] * SIDE + inner_column[None, :])  # (PART, PART)
    total = tl.zeros([PART, PART], tl.float64)
    for begin in range(0, count, CHUNKS):
        # Unrolled, so that all of them are on their way at once.
        for i in tl.static_range(CHUNKS):
            inside = tl.full([PART, PART], begin + i, tl.int32) < count
            slot = (first + (begin + i) * tiles + tile).to(tl.int64) * (SIDE * SIDE)
            total += tl.load(at + slot, mask=inside, other=0.0)
    row = row_block * SIDE + inner_row
    column = column_block * SIDE + inner_column
    wide = rows.to(tl.int64)
    matrix = out + layer * wide * wide
    mask = (row < rows)[:, None] & (column < rows)[None, :] & (row[:, None] <= column[None, :])
    tl.store(matrix + row.to(tl.int64)[:, None] * wide + column[None, :], total, mask=mask)
    mirrored = matrix + column.to(tl.int64)[:, None] * wide + row[None, :]
    tl.store(mirrored, tl.trans(total), mask=tl.trans(mask & (row[:, None] < column[None, :])))


@triton.jit(do_not_specialize=["rows", "factor_stride"])
def gram_backward_kernel(
    layers,  # with factors (L, R, factor_stride * 4) float32, symmetric, zero beyond R
    rows,
    factor_stride,
    tile,
):
    """A tile of factors (R, R) times the rows less their shift (R, D)."""
    ROWS: tl.constexpr = tile.ROWS
    COLUMNS: tl.constexpr = tile.COLUMNS
    program = tl.program_id(0)
    local = program - pick_integer(layers.starts, layers, program)
    width = pick_integer(layers.columns, layers, program) * layers.VECTOR
    row_tiles = tl.cdiv(rows, ROWS)
    # Tiles of the same columns run together: they read the same rows.
    row = local % row_tiles * ROWS + tl.arange(0, ROWS)
    column = local // row_tiles * COLUMNS + tl.arange(0, COLUMNS)
    column_mask = column < width
    written = (row < rows) & (pick_group(layers.wanted, layers, program, 0) > 0)
    for group in tl.static_range(1, len(layers.firsts)):
        of_group = (row < rows) & (pick_group(layers.wanted, layers, program, group) > 0)
        written = tl.where(row >= (layers.firsts[group] >> 4), of_group, written)
    # Tiles of which nothing is wanted have nothing to sum.
    last = tl.where(tl.max(written.to(tl.int32), 0) > 0, rows, 0)
    wide = factor_stride.to(tl.int64) * 4
    layer = pick_integer(layers.positions, layers, program).to(tl.int64)
    factor_at = layers.factors + layer * rows * wide + row.to(tl.int64)[:, None] * wide  # (ROWS, 1)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in tl.range(0, last, tile.DEPTH, num_stages=tile.STAGES):
        other = begin + tl.arange(0, tile.DEPTH)
        inside = other < rows
        # Up to the end of the padding, which is zero: the number of rows would not allow wide loads.
        padded = (other < factor_stride * 4)[None, :]
        factor = tl.load(factor_at + other[None, :], mask=written[:, None] & padded, other=0.0)
        at = row_pointers(layers.inputs, layers.strides, layers, program, other)
        z = shifted(at, layers, program, other, inside, column, column_mask)
        # The shift alone is left of rows beyond the last; it may be infinite.
        z = tl.where(inside[:, None], z, 0.0)
        if tile.MODE == "ieee":
            total = multiply(factor, z, total, tile.MODE, tile.BF16)
        else:
            # Not into `total`: the sums of tensor cores are truncated.
            total = promote(total, multiply(factor, z, tl.zeros([ROWS, COLUMNS], tl.float32), tile.MODE, tile.BF16))
    out = row_pointers(layers.outputs, layers.output_strides, layers, program, row)
    mask = written[:, None] & column_mask[None, :]
    tl.store(out + column[None, :], total.to(layers.outputs[0].dtype.element_ty), mask=mask)


def gram_launches(
    rows: Sequence[Tensor], shift: Sequence[Tensor], layers: int, out: Tensor, architecture: Architecture
) -> list[Launch]:
    """The launches of `gram`, products and their sums, of rows and shifts whose columns are neighbours."""
    mode = gram_mode(rows[0].dtype, architecture)
    tile = gram_tile(mode, architecture)
    total = out.shape[1]
    row_tiles = _gram_plan.blocks(total, tile.rows)
    parts = row_tiles * (row_tiles + 1) // 2 * (tile.rows // _FOLD_SIDE) ** 2
    launches = []
    for batch in _gram_plan.triangle_batches(rows, shift, layers, tile, architecture):
        partials = _launch.workspace(batch.programs * tile.rows * tile.columns, out.dtype, out.device)
        products = {
            "layers": batch.grouped(rows, shift),
            "partials": partials,
            "rows": total,
            "chunk_blocks": batch.chunk_blocks,
            "tile": tile.record(mode, _gram_plan.PROMOTED_COLUMNS),
        }
        sums = {
            "out": out,
            "partials": partials,
            "sums": Sums(batch.every(parts), batch.starts, batch.chunks, batch.positions),
            "rows": total,
            "SIDE": tile.columns,
            "PART": _FOLD_SIDE,
            "CHUNKS": _FOLD_CHUNKS,
        }
        launches.append(Launch(gram_kernel, batch.programs, products, tile.warps, tile.registers))
        launches.append(Launch(gram_fold_kernel, parts * len(batch.layers), sums, 4))
    return launches


def backward_launches(
    factors: Tensor,
    rows: Sequence[Tensor],
    shift: Sequence[Tensor],
    wanted: Sequence[bool],
    out: Sequence[Tensor],
    architecture: Architecture,
) -> list[Launch]:
    """The launches of `gram_backward`; `out` has a tensor for each of `rows`, any where none is wanted.

    factors: (L, R, 4 * ceil(R / 4)) float32, symmetric, zero beyond R.
    """
    layers, total = factors.shape[:2]
    mode = gram_mode(rows[0].dtype, architecture)
    tile = gram_gradient_tile(mode, architecture)
    return [
        Launch(
            gram_backward_kernel,
            batch.programs,
            {
                "layers": batch.grouped(rows, shift, out)._replace(
                    factors=factors, wanted=batch.integers(wanted), positions=batch.positions
                ),
                "rows": total,
                "factor_stride": factors.shape[2] // 4,
                "tile": tile.record(mode),
            },
            tile.warps,
            tile.registers,
        )
        for batch in _gram_plan.output_batches(rows, out, shift, layers, tile, architecture)
    ]


def _must_be_joined(rows: Sequence[Tensor], layers: int) -> bool:
    """Whether the groups are more than a program chooses from, or differ in dtype."""
    return len(rows) > _gram_plan.MOST_GROUPS * layers or len({x.dtype for x in rows}) > 1


def _joined(rows: Sequence[Tensor], shift: Sequence[Tensor], layers: int) -> tuple[list[Tensor], list[Tensor]]:
    """(rows, shift) of one group: copies less their shifts, and zeros."""
    joined = [
        torch.cat([x.to(s.dtype) - s for x, s in zip(rows[i::layers], shift[i::layers], strict=True)])
        for i in range(layers)
    ]
    return joined, [z.new_zeros(z.shape[1]) for z in joined]


def _of_each(rows: Sequence[Tensor], wanted: Sequence[bool], out: Sequence[Tensor]) -> Iterator[Any]:
    """(row tensor, its output or None)."""
    written = iter(out)
    return ((x, next(written) if want else None) for x, want in zip(rows, wanted, strict=True))


def gram(rows: Sequence[Tensor], shift: Sequence[Tensor], layers: int, out: Tensor) -> None:
    """Fill `out` (L, R, R), float64."""
    if _must_be_joined(rows, layers):
        rows, shift = _joined(rows, shift, layers)
    read = unit_columns(rows)
    shifts = [s.contiguous() for s in shift]
    _launch.run(gram_launches, out.device, read, shifts, layers, out, architecture_of(out.device))


def gram_backward(
    grad: Tensor, rows: Sequence[Tensor], shift: Sequence[Tensor], wanted: Sequence[bool], out: Sequence[Tensor]
) -> None:
    """Fill `out`, one tensor per wanted entry of `rows`, with `(grad + grad') (rows - shift)`."""
    if not out:
        return
    layers, total = grad.shape[:2]
    if _must_be_joined(rows, layers):
        joined, zeros = _joined(rows, shift, layers)
        results = [torch.empty_like(z) for z in joined]
        gram_backward(grad, joined, zeros, [True] * layers, results)
        parts = [r.split([len(x) for x in rows[i::layers]]) for i, r in enumerate(results)]
        for i, (_, y) in enumerate(_of_each(rows, wanted, out)):
            if y is not None:
                y.copy_(parts[i % layers][i // layers])
        return
    # Rows of 16 bytes, for wide loads.
    factors = grad.new_zeros((layers, total, -(-total // 4) * 4), dtype=torch.float32)
    torch.add(grad, grad.mT, out=factors[:, :, :total])
    read = unit_columns(rows)
    written = unit_columns(out)
    every = [x if y is None else y for x, y in _of_each(read, wanted, written)]
    architecture = architecture_of(grad.device)
    shifts = [s.contiguous() for s in shift]
    _launch.run(backward_launches, grad.device, factors, read, shifts, wanted, every, architecture)
    for y, w in zip(out, written, strict=True):
        if w is not y:
            y.copy_(w)
