"""Mean and sum of squared deviations over rows, as device functions.

Rows are dealt out to groups of threads, and a thread sums over its own rows alone. A group shifts every column by a
pivot, the mean of its first tile, on load: without it the merges lose the bound of 1e-5 at |mean|/std = 1e3, and with
the first row alone an outlier there costs the digits of all other rows. Tiles are reduced in two passes in registers
and merged one after another, at most 512 rows of a thread, in the dtype of the statistics; then groups, all at once.
Chunks of rows, of several programs, are merged in float64, where the number of merges does not matter.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from moment_ops.kernels._common import (
    STRIP_BITS,
    arrive,
    is_finite,
    locate,
    merge,
    pick,
    pick_integer,
    rows_of_lanes,
    strip_columns,
    tile_at,
)


@triton.jit
def rectified(value, bias, dtype: tl.constexpr):
    """relu(value + bias), added in `dtype`, in the dtype of `value`.

    Rounding after the ReLU gives the bits of rounding before it: a sum of two numbers of a dtype never rounds to 0.
    """
    wide = value.to(dtype)
    if bias is not None:
        wide += bias
    # NaN and -0 stay, as in torch.
    return tl.where(wide < 0, 0.0, wide).to(value.dtype)


@triton.jit
def kept(value, begin, y, y_stride, bias, mask, dtype: tl.constexpr, COLUMNS: tl.constexpr):
    """Features in `dtype`; where there is a y, they become relu(x + bias), stored there from row `begin` on."""
    if y is not None:
        value = rectified(value, bias, dtype)
        tl.store(tile_at(begin, y, y_stride, value.shape[0], COLUMNS), value, mask=mask)
    return value.to(dtype)


@triton.jit
def tile_moments(value, here, count):
    """(mean, m2), (LANES), over the rows of a tile that are `here`, `count` of them in each lane."""
    mean = tl.sum(tl.where(here, value, 0.0), axis=0) / tl.maximum(count, 1).to(value.dtype)
    value = tl.where(here, value - mean[None, :], 0.0)
    return mean, tl.sum(value * value, axis=0)


@triton.jit
def fold_groups(pivot, mean, m2, rows, COLUMNS: tl.constexpr):
    """(pivot, mean - pivot, m2), (COLUMNS), of all rows from those of each lane."""
    LANES: tl.constexpr = pivot.shape[0]
    GROUPS: tl.constexpr = LANES // COLUMNS
    count = tl.reshape(rows_of_lanes(rows, LANES, COLUMNS).to(mean.dtype), [GROUPS, COLUMNS])
    pivot = tl.reshape(pivot, [GROUPS, COLUMNS])
    mean = tl.reshape(mean, [GROUPS, COLUMNS])
    m2 = tl.reshape(m2, [GROUPS, COLUMNS])
    # The pivot of one group, which may have had an outlier, and then the mean relative to it: that of equal means is
    # these, without rounding.
    first = tl.sum(tl.where(tl.arange(0, GROUPS)[:, None] == 0, pivot, 0.0), axis=0)
    center = first + tl.sum(count * ((pivot - first[None, :]) + mean), axis=0) / tl.cast(rows, mean.dtype)
    mean = (pivot - center[None, :]) + mean
    total = tl.sum(count * mean, axis=0) / tl.cast(rows, mean.dtype)
    delta = mean - total[None, :]
    return center, total, tl.sum(m2 + count * (delta * delta), axis=0)


@triton.jit
def block_moments(x, stride, y, y_stride, bias, mask, rows, dtype: tl.constexpr, strip):
    """(pivot, mean - pivot, m2), (COLUMNS), of rows of which each lane has at most 512.

    x, y: (LANES) pointers to row 0; bias: likewise, to each column's.
    """
    LANES: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = strip.COLUMNS
    GROUPS: tl.constexpr = LANES // COLUMNS
    ROWS: tl.constexpr = strip.ROWS // GROUPS
    active = mask[None, :]
    row = tl.arange(0, ROWS)[:, None]
    count = tl.minimum(rows_of_lanes(rows, LANES, COLUMNS), ROWS)  # (LANES)
    here = row < count[None, :]  # (ROWS, LANES)
    value = tl.load(tile_at(0, x, stride, ROWS, COLUMNS), mask=active & here, other=0.0)
    added = None
    if bias is not None:
        # After the first features, so that both are in flight together.
        added = tl.load(bias, mask=mask, other=0.0).to(dtype)[None, :]
    value = kept(value, 0, y, y_stride, added, active & here, dtype, COLUMNS)
    # Relative to the first row, so that the pivot of a constant column is that constant.
    first = tl.sum(tl.where(row == 0, value, 0.0), axis=0)
    pivot = first + tl.sum(tl.where(here, value - first[None, :], 0.0), axis=0) / tl.maximum(count, 1).to(dtype)
    mean, m2 = tile_moments(value - pivot[None, :], here, count)

    full = rows // strip.ROWS * strip.ROWS
    for begin in range(strip.ROWS, full, strip.ROWS):
        value = tl.load(tile_at(begin, x, stride, ROWS, COLUMNS), mask=active, other=0.0)
        # Masked columns are 0 - 0: no selects here.
        value = kept(value, begin, y, y_stride, added, active, dtype, COLUMNS) - pivot[None, :]
        tile_mean = tl.sum(value, axis=0) * (1.0 / ROWS)
        value = value - tile_mean[None, :]
        mean, m2 = merge(mean, m2, begin // GROUPS, tile_mean, tl.sum(value * value, axis=0), ROWS)
    if (full < rows) & (full > 0):
        count = rows_of_lanes(rows - full, LANES, COLUMNS)
        here = row < count[None, :]
        value = tl.load(tile_at(full, x, stride, ROWS, COLUMNS), mask=active & here, other=0.0)
        value = kept(value, full, y, y_stride, added, active & here, dtype, COLUMNS)
        tile_mean, tile_m2 = tile_moments(value - pivot[None, :], here, count)
        mean, m2 = merge(mean, m2, full // GROUPS, tile_mean, tile_m2, count)
    if GROUPS == 1:
        return pivot, mean, m2
    else:
        return fold_groups(pivot, mean, m2, rows, COLUMNS)


@triton.jit
def store_partial(partials, program, mean, m2, COLUMNS: tl.constexpr):
    """Leave a chunk's moments for the program that folds them."""
    at = partials + program.to(tl.int64) * (2 * COLUMNS) + tl.arange(0, COLUMNS)
    tl.store(at, mean)
    tl.store(at + COLUMNS, m2)


@triton.jit
def fold_partials(partials, first, strips, cut, strip):
    """(mean, m2) in float64 of a strip whose chunks were left by programs first, first + strips, ..., in order."""
    COLUMNS: tl.constexpr = strip.COLUMNS
    lane = tl.arange(0, COLUMNS)
    # Loads go past the L1 cache, which does not follow other processors' stores.
    # Relative to one of them, equal means have a mean without rounding.
    pivot = tl.load(partials + first.to(tl.int64) * (2 * COLUMNS) + lane, cache_modifier=".cg")
    mean = tl.zeros([COLUMNS], tl.float64)
    m2 = tl.zeros([COLUMNS], tl.float64)
    for begin in range(0, cut.chunks, strip.FOLD_CHUNKS):
        chunk = begin + tl.arange(0, strip.FOLD_CHUNKS)
        valid = chunk < cut.chunks
        left = cut.rows - chunk * cut.chunk_rows
        count = tl.where(valid, tl.minimum(cut.chunk_rows, left), 0).to(tl.float64)[:, None]
        at = partials + ((first + chunk * strips).to(tl.int64)[:, None] * (2 * COLUMNS) + lane[None, :])
        chunk_mean = tl.load(at, mask=valid[:, None], other=0.0, cache_modifier=".cg")  # (FOLD_CHUNKS, COLUMNS)
        chunk_mean = tl.where(valid[:, None], chunk_mean - pivot[None, :], 0.0)
        chunk_m2 = tl.load(at + COLUMNS, mask=valid[:, None], other=0.0, cache_modifier=".cg")
        total = tl.sum(tl.sum(count, axis=0), axis=0)
        tile_mean = tl.sum(count * chunk_mean, axis=0) / total
        delta = chunk_mean - tile_mean[None, :]
        tile_m2 = tl.sum(chunk_m2 + count * (delta * delta), axis=0)
        mean, m2 = merge(mean, m2, begin * cut.chunk_rows, tile_mean, tile_m2, total)
    return pivot + mean, m2


@triton.jit
def variance(m2, rows, correction):
    """NaN without degrees of freedom, as in torch."""
    freedom = tl.cast(rows - correction, tl.float64)
    factor = tl.where(freedom > 0, 1.0 / tl.where(freedom > 0, freedom, 1.0), float("nan"))
    return m2 * factor.to(m2.dtype)


@triton.jit
def wide_moments(layers, program, left, width, bias, channel_columns, cut, lost, mean, var, dtype: tl.constexpr, strip):
    """(mean, var), (COLUMNS), of a strip, whose columns that are `lost` are read again: where they fit, they come out.

    Sums are in float64, of float64 rows times a power of two that leaves room for their squares. A few columns at a
    time, as this takes registers from what is done always.
    """
    COLUMNS: tl.constexpr = strip.COLUMNS
    WIDTH: tl.constexpr = min(COLUMNS, 128)
    ROWS: tl.constexpr = 512 // WIDTH
    EXPONENT: tl.constexpr = 600 if dtype == tl.float64 else 0
    down = tl.full((), 2.0**-EXPONENT, tl.float64)
    up = tl.full((), 2.0**EXPONENT, tl.float64)
    stride = pick_integer(layers.strides, layers, program).to(tl.int64) * layers.VECTOR
    for begin in range(0, COLUMNS, WIDTH):
        column, mask, packed = strip_columns(layers, program, strip, left + begin, width, WIDTH)
        x = pick(layers.inputs, layers, program) + column  # (WIDTH)
        pivot = tl.zeros([WIDTH], tl.float64)
        m2 = tl.zeros([WIDTH], tl.float64)
        # Relative to 0, and then to the mean.
        for _ in range(2):
            total = tl.zeros([ROWS, WIDTH], tl.float64)
            squares = tl.zeros([ROWS, WIDTH], tl.float64)
            for first in tl.range(0, cut.rows, ROWS, num_stages=1):
                row = first + tl.arange(0, ROWS)
                here = mask[None, :] & (row < cut.rows)[:, None]
                value = tl.load(x[None, :] + row.to(tl.int64)[:, None] * stride, mask=here, other=0.0)
                if layers.outputs is not None:
                    added = None
                    if bias is not None:
                        at = bias + packed.to(tl.int32) // channel_columns
                        added = tl.load(at, mask=mask, other=0.0).to(dtype)[None, :]
                    value = rectified(value, added, dtype)
                deviation = tl.where(here, value.to(tl.float64) * down - pivot[None, :], 0.0)
                total += deviation
                squares += deviation * deviation
            rest = tl.sum(total, axis=0)
            shift = rest / tl.cast(cut.rows, tl.float64)
            m2 = tl.sum(squares, axis=0) - rest * shift
            pivot += shift
        here = lost & (tl.arange(0, COLUMNS) // WIDTH == begin // WIDTH)
        mean = tl.where(here, repeated(pivot * up, COLUMNS).to(mean.dtype), mean)
        wide_var = variance(m2, cut.rows, cut.correction) * up * up
        var = tl.where(here, repeated(wide_var, COLUMNS).to(var.dtype), var)
    return mean, var


@triton.jit
def repeated(values, SIZE: tl.constexpr):
    """(SIZE) values, over and over."""
    return tl.reshape(tl.broadcast_to(values[None, :], [SIZE // values.shape[0], values.shape[0]]), [SIZE])


class Moments(NamedTuple):
    """What `reduce_columns` returns."""

    complete: Any  # whether this program has them, which one of a strip's programs does
    first: Any  # of the strip's programs
    mean: Any
    var: Any
    packed: Any  # positions in packed vectors
    mask: Any


@triton.jit
def reduce_columns(
    layers, bias, channel_columns, partials, cut, dtype: tl.constexpr, strip, WIDE: tl.constexpr = False
):
    """The moments of a program's strip.

    With outputs, of a single layer, the moments are those of relu(x + bias), which is kept there; the bias is that of
    packed column // channel_columns. WIDE: the mean is returned in float64.
    """
    LANES: tl.constexpr = STRIP_BITS // layers.inputs[0].dtype.element_ty.primitive_bitwidth
    COLUMNS: tl.constexpr = strip.COLUMNS
    program = tl.program_id(0)
    strips, chunk, left, width = locate(layers, program, strip)
    column, active, packed_lanes = strip_columns(layers, program, strip, left, width, LANES)
    begin = chunk * cut.chunk_rows
    stride = pick_integer(layers.strides, layers, program).to(tl.int64) * layers.VECTOR
    x = pick(layers.inputs, layers, program) + column + begin * stride  # (LANES)
    y = None
    y_stride = None
    column_bias = None
    if layers.outputs is not None:
        y_stride = pick_integer(layers.output_strides, layers, program).to(tl.int64) * layers.VECTOR
        y = pick(layers.outputs, layers, program) + column + begin * y_stride
        if bias is not None:
            column_bias = bias + packed_lanes.to(tl.int32) // channel_columns
    count = tl.minimum(cut.rows - begin, cut.chunk_rows)
    pivot, mean, m2 = block_moments(x, stride, y, y_stride, column_bias, active, count, dtype, strip)
    _, mask, packed = strip_columns(layers, program, strip, left, width, COLUMNS)
    if partials is not None or WIDE:
        mean = pivot.to(tl.float64) + mean.to(tl.float64)
        m2 = m2.to(tl.float64)
    else:
        mean = pivot + mean
    first = program - chunk * strips
    complete = tl.full((), 1, tl.int32) == 1
    if partials is not None:
        store_partial(partials.partials, program, mean, m2, COLUMNS)
        complete = arrive(partials.tickets + first, cut.chunks)
        if complete:
            mean, m2 = fold_partials(partials.partials, first, strips, cut, strip)
    var = variance(m2, cut.rows, cut.correction)
    # Read again where something that is not finite came out, hardly ever.
    lost = mask & ~(is_finite(mean) & is_finite(m2))
    if complete and tl.max(lost.to(tl.int32), axis=0) > 0:
        mean, var = wide_moments(
            layers, program, left, width, bias, channel_columns, cut, lost, mean, var, dtype, strip
        )
    var = var.to(dtype)
    return Moments(complete, first, mean.to(tl.float64 if WIDE else dtype), var, packed, mask)
