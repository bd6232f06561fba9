"""`covariance_backward` and `covariance_match_backward`: one launch, rows less their mean times a symmetric matrix."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from moment_ops.kernels import _launch
from moment_ops.kernels._architectures import Architecture, architecture_of, gradient_mode
from moment_ops.kernels._common import is_finite, pick, pick_integer
from moment_ops.kernels._covariance_plan import output_groups
from moment_ops.kernels._launch import Launch
from moment_ops.kernels._products import multiply, promote
from moment_ops.kernels._tiles import backward_tile
from moment_ops.kernels._triangle import BLOCK, packed_block
from moment_ops.kernels.covariance import unit_columns

# Dtypes that the kernels take; a literal, which is read without importing Triton.
OPERATORS = {
    "covariance_backward": ("float32", "bfloat16", "float16"),
    "covariance_match_backward": ("float32", "bfloat16", "float16"),
}


@triton.jit
def symmetric_rows(matrix, width, begin, lane, first_column, mask, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """(DEPTH, COLUMNS) rows begin ... of a packed symmetric matrix, within one block of rows and one of columns.

    TRANSPOSED: from the blocks beside the diagonal of the columns' block row, as columns that are rows there.
    """
    # A remainder would hide what it is a multiple of, and that vectors are aligned.
    row_block = begin // BLOCK
    column_block = first_column // BLOCK
    inner_row = begin - row_block * BLOCK + lane
    inner_column = first_column - column_block * BLOCK + tl.arange(0, COLUMNS)
    inside = begin + lane < width
    if TRANSPOSED:
        offset, stride = packed_block(width, column_block, row_block)
        at = matrix + offset + (inner_column.to(tl.int64)[:, None] * stride + inner_row[None, :])
        return tl.trans(tl.load(at, mask=mask[:, None] & inside[None, :], other=0.0))
    else:
        offset, stride = packed_block(width, row_block, column_block)
        at = matrix + offset + (inner_row.to(tl.int64)[:, None] * stride + inner_column[None, :])
        return tl.load(at, mask=inside[:, None] & mask[None, :], other=0.0)


@triton.jit
def doubled_rows(matrix, width, begin, lane, columns, mask):
    """(DEPTH, COLUMNS) rows begin ... of a (D, D) matrix and its transpose, added."""
    row = begin + lane
    inside = row < width
    wide = width.to(tl.int64)
    here = tl.load(matrix + row.to(tl.int64)[:, None] * wide + columns[None, :],
                   mask=inside[:, None] & mask[None, :], other=0.0)  # fmt: skip
    across = tl.load(matrix + columns.to(tl.int64)[:, None] * wide + row[None, :],
                     mask=mask[:, None] & inside[None, :], other=0.0)  # fmt: skip
    return here + tl.trans(across)


@triton.jit
def shifted_rows(x, mean, offset, width, begin, lane, mask):
    """(ROWS, DEPTH) features of columns begin ... less their mean, if there is one; x: (ROWS, 1) pointers."""
    column = begin + lane
    inside = column < width
    value = tl.load(x + column[None, :], mask=mask[:, None] & inside[None, :], other=0.0).to(tl.float32)
    if mean is not None:
        value -= tl.load(mean + offset + column, mask=inside, other=0.0)[None, :]
    return value


@triton.jit
def symmetric_row(matrix, width, row, columns, mask, PACKED: tl.constexpr):
    """A row of a symmetric matrix, packed, or (D, D) and added to its transpose; float64, at columns of one block."""
    if PACKED:
        row_block = row // BLOCK
        column_block = tl.min(columns, 0) // BLOCK
        offset, stride = packed_block(width, tl.minimum(row_block, column_block), tl.maximum(row_block, column_block))
        inner_row = tl.cast(row - row_block * BLOCK, tl.int64)
        inner_columns = (columns - column_block * BLOCK).to(tl.int64)
        at = tl.where(row_block > column_block, inner_columns * stride + inner_row, inner_row * stride + inner_columns)
        return tl.load(matrix + offset + at, mask=mask, other=0.0).to(tl.float64)
    else:
        wide = width.to(tl.int64)
        here = tl.load(matrix + tl.cast(row, tl.int64) * wide + columns, mask=mask, other=0.0).to(tl.float64)
        return here + tl.load(matrix + columns.to(tl.int64) * wide + row, mask=mask, other=0.0)


@triton.jit
def store_wide(out, limit, x, mean, matrix, width, offset, row_mask, columns, slope, added, PACKED: tl.constexpr):
    """Gradients that are not below a limit once more: summed in float64, row after row of the matrix.

    out, x: (ROWS, 1) pointers; added: the means' gradient, float64, (COLUMNS).
    """
    mask = columns < width
    total = tl.zeros([row_mask.shape[0], columns.shape[0]], tl.float64)
    for k in tl.range(0, width, num_stages=1):
        left = tl.load(x + k, mask=row_mask[:, None], other=0.0).to(tl.float64)
        if mean is not None:
            left -= tl.load(mean + offset + k)
        total += left * symmetric_row(matrix, width, k, columns, mask, PACKED)[None, :]
    value = (total * slope + added[None, :]).to(tl.float32)
    at = out + columns[None, :]
    here = row_mask[:, None] & mask[None, :]
    stored = tl.load(at, mask=here, other=0.0).to(tl.float32)
    tl.store(at, value.to(out.dtype.element_ty), mask=here & ~(tl.abs(stored) < limit))


@triton.jit
def is_normal(value):
    """Whether a float64 keeps its digits in float32."""
    return (value == 0.0) | ((tl.abs(value) >= 2.0**-126) & (tl.abs(value) < 2.0**128))


@triton.jit(do_not_specialize=["rows", "correction"])
def covariance_backward_kernel(
    layers,
    grad,  # (F) packed matrices; or (D, D), of the only layer
    grad_mean,  # (columns) or None
    mean,  # (columns) or None
    scale,  # () or None
    rows,
    correction,
    PACKED: tl.constexpr,
    tile,
):
    """`grad_mean / N + scale * 2 / (N - correction) (x - mean) G`, with G = (grad + grad') / 2."""
    ROWS: tl.constexpr = tile.ROWS
    COLUMNS: tl.constexpr = tile.COLUMNS
    DEPTH: tl.constexpr = tile.DEPTH
    program = tl.program_id(0)
    first = pick_integer(layers.starts, layers, program)
    width = pick_integer(layers.columns, layers, program) * layers.VECTOR
    offset = pick_integer(layers.offsets, layers, program).to(tl.int64) * layers.VECTOR
    matrix = grad + pick_integer(layers.triangles, layers, program).to(tl.int64) * layers.VECTOR
    # Tiles of the same columns run together: they read the same part of the matrix.
    row_tiles = tl.cdiv(rows, ROWS)
    row = (program - first) % row_tiles * ROWS + tl.arange(0, ROWS)
    first_column = (program - first) // row_tiles * COLUMNS
    columns = first_column + tl.arange(0, COLUMNS)
    row_mask = row < rows
    mask = columns < width
    stride = pick_integer(layers.strides, layers, program).to(tl.int64) * layers.VECTOR
    x = pick(layers.inputs, layers, program) + row.to(tl.int64)[:, None] * stride  # (ROWS, 1)
    lane = tl.arange(0, DEPTH)
    middle = width
    if PACKED:
        middle = (first_column // BLOCK + 1) * BLOCK
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in tl.range(0, tl.minimum(middle, width), DEPTH * tile.STEPS, num_stages=tile.STAGES):
        # Not `total` itself: the sums of tensor cores are truncated.
        part = tl.zeros([ROWS, COLUMNS], tl.float32)
        for step in tl.static_range(tile.STEPS):
            at = begin + step * DEPTH
            left = shifted_rows(x, mean, offset, width, at, lane, row_mask)
            if PACKED:
                right = symmetric_rows(matrix, width, at, lane, first_column, mask, COLUMNS, False)
            else:
                right = doubled_rows(matrix, width, at, lane, columns, mask)
            part = multiply(left, right, part, tile.MODE, tile.BF16)
        total = promote(total, part)
    if PACKED:
        for begin in tl.range(middle, width, DEPTH * tile.STEPS, num_stages=tile.STAGES):
            part = tl.zeros([ROWS, COLUMNS], tl.float32)
            for step in tl.static_range(tile.STEPS):
                at = begin + step * DEPTH
                left = shifted_rows(x, mean, offset, width, at, lane, row_mask)
                right = symmetric_rows(matrix, width, at, lane, first_column, mask, COLUMNS, True)
                part = multiply(left, right, part, tile.MODE, tile.BF16)
            total = promote(total, part)

    freedom = tl.cast(rows - correction, tl.float64)
    slope = tl.where(freedom > 0, (2.0 if PACKED else 1.0) / tl.where(freedom > 0, freedom, 1.0), float("nan"))
    if scale is not None:
        slope = slope * tl.load(scale).to(tl.float64)
    value = total * slope.to(tl.float32)
    if grad_mean is not None:
        value += (tl.load(grad_mean + offset + columns, mask=mask, other=0.0) / tl.cast(rows, tl.float32))[None, :]
    lost = ~is_finite(value) & row_mask[:, None] & mask[None, :]
    output = pick(layers.outputs, layers, program)
    output_stride = pick_integer(layers.output_strides, layers, program).to(tl.int64) * layers.VECTOR
    out = output + row.to(tl.int64)[:, None] * output_stride  # (ROWS, 1)
    tl.store(out + columns[None, :], value.to(output.dtype.element_ty), mask=row_mask[:, None] & mask[None, :])
    # Hardly ever. A slope that is not a number leaves nothing else.
    few_digits = not is_normal(slope)
    if (tl.max(tl.max(lost.to(tl.int32), 1), 0) > 0 or few_digits) and slope == slope:
        tl.debug_barrier()
        PART: tl.constexpr = COLUMNS // 8
        limit = tl.where(few_digits, 0.0, float("inf"))
        for part in range(8):
            some = first_column + part * PART + tl.arange(0, PART)
            added = tl.zeros([PART], tl.float64)
            if grad_mean is not None:
                added = tl.load(grad_mean + offset + some, mask=some < width, other=0.0).to(tl.float64)
                added = added / tl.cast(rows, tl.float64)
            store_wide(out, limit, x, mean, matrix, width, offset, row_mask, some, slope, added, PACKED)


def backward_launches(
    grad: Tensor,
    grad_mean: Tensor | None,
    x: Sequence[Tensor],
    mean: Tensor,
    scale: Tensor | None,
    correction: int,
    centered: bool,
    precision: str,
    out: Sequence[Tensor],
    architecture: Architecture,
) -> list[Launch]:
    """The launches of the backward of layers (N, D) whose columns are neighbours, and of their outputs.

    grad: packed matrices, or the (D, D) one of the only layer.
    """
    mode = gradient_mode(precision, x[0].dtype, architecture)
    tile = backward_tile(mode, architecture, len(x[0]), [rows.shape[1] for rows in x])
    launches = []
    for group in output_groups(x, out, tile, architecture):
        arguments = {
            "layers": group.record(x, out)._replace(triangles=group.triangles),
            "grad": grad,
            "grad_mean": grad_mean,
            "mean": mean if centered else None,
            "scale": scale,
            "rows": group.rows,
            "correction": correction,
            "PACKED": grad.dim() == 1,
            "tile": tile.record(mode),
        }
        launches.append(Launch(covariance_backward_kernel, group.programs, arguments, tile.warps, tile.registers))
    return launches


def _fill(
    grad: Tensor,
    grad_mean: Tensor | None,
    x: Sequence[Tensor],
    mean: Tensor,
    scale: Tensor | None,
    correction: int,
    centered: bool,
    precision: str,
    out: Sequence[Tensor],
) -> None:
    written = unit_columns(out)
    architecture = architecture_of(mean.device)
    _launch.run(
        backward_launches, mean.device, grad, grad_mean, unit_columns(x), mean, scale, correction, centered, precision,
        written, architecture,
    )  # fmt: skip
    for y, w in zip(out, written, strict=True):
        if w is not y:
            y.copy_(w)


def covariance_backward(
    grad: Tensor | None,
    grad_mean: Tensor | None,
    x: Tensor,
    mean: Tensor,
    correction: int,
    centered: bool,
    precision: str,
    out: Tensor,
) -> None:
    """Fill `out` with `grad_mean / N + (X - mean) (grad + grad') / (N - correction)`."""
    if grad is None:
        out.zero_()
        if grad_mean is not None:
            out += grad_mean / len(x)
        return
    _fill(grad, grad_mean, [x], mean, None, correction, centered, precision, [out])


def covariance_match_backward(
    grad: Tensor,
    grad_mean: Tensor | None,
    x: Sequence[Tensor],
    mean: Tensor,
    scale: Tensor | None,
    correction: int,
    precision: str,
    out: Sequence[Tensor],
) -> None:
    """Fill `out` with `grad_mean / N + scale * 2 / (N - correction) (X - mean) G`, G packed."""
    _fill(grad, grad_mean, x, mean, scale, correction, True, precision, out)
