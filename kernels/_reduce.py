"""Mean and sum of squared deviations over rows, as device functions.

Rows go in blocks of 512. Every column of a block is shifted by a pivot, the mean of its first rows, on load: without it
the merges lose the bound of 1e-5 at |mean|/std = 1e3, and with the first row alone an outlier there costs the digits of
all other rows. Tiles are reduced in two passes in registers and merged one after another, in the dtype of the
statistics; blocks, and chunks of blocks, are merged in float64, where the number of merges does not matter.
"""

import triton
import triton.language as tl

from moment_ops.kernels._common import arrive, locate, merge, pick, pick_integer

BLOCK = tl.constexpr(512)


@triton.jit
def rectified(value, bias, dtype: tl.constexpr):
    """relu(value + bias) in `dtype`, rounded to the dtype of `value` before the ReLU, as by an addition of its own."""
    wide = value.to(dtype)
    if bias is not None:
        wide = (wide + bias).to(value.dtype).to(dtype)
    # NaN and -0 stay, as in torch.
    return tl.where(wide < 0, 0.0, wide)


@triton.jit
def load_rows(x, y, row, y_stride, bias, mask, dtype: tl.constexpr):
    """Features at pointers x; where there is a y, they become relu(x + bias), which is kept there, `row` rows on."""
    value = tl.load(x, mask=mask, other=0.0)
    if y is None:
        return value.to(dtype)
    else:
        result = rectified(value, bias, dtype)
        tl.store(y + row * y_stride, result.to(value.dtype), mask=mask)
        return result


@triton.jit
def block_moments(
    x,
    stride,
    y,
    y_stride,
    bias,
    mask,
    rows,
    dtype: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """(pivot, mean - pivot, m2) of at most 512 rows; x, y: (BLOCK_COLUMNS) pointers to the first of them."""
    row = tl.arange(0, BLOCK_ROWS)
    tile = x[None, :] + row[:, None] * stride  # (BLOCK_ROWS, BLOCK_COLUMNS)
    here = mask[None, :] & (row < rows)[:, None]
    count = tl.cast(tl.minimum(rows, BLOCK_ROWS), dtype)
    # Relative to the first row, so that the pivot of a constant column is that constant.
    first = tl.load(x, mask=mask, other=0.0)
    if y is None:
        pivot = first.to(dtype)
        kept = None
    else:
        pivot = rectified(first, bias, dtype)
        kept = y[None, :] + row[:, None] * y_stride
    value = load_rows(tile, kept, 0, y_stride, bias, here, dtype)
    pivot += tl.sum(tl.where(here, value - pivot[None, :], 0.0), axis=0) / count
    value = tl.where(here, value - pivot[None, :], 0.0)
    mean = tl.sum(value, axis=0) / count
    value = tl.where(here, value - mean[None, :], 0.0)
    m2 = tl.sum(value * value, axis=0)

    full = rows // BLOCK_ROWS * BLOCK_ROWS
    for begin in range(BLOCK_ROWS, full, BLOCK_ROWS):
        # Masked columns are 0 - 0: no selects here.
        value = load_rows(tile + begin * stride, kept, begin, y_stride, bias, mask[None, :], dtype)
        value = value - pivot[None, :]
        tile_mean = tl.sum(value, axis=0) * (1.0 / BLOCK_ROWS)
        value = value - tile_mean[None, :]
        tile_m2 = tl.sum(value * value, axis=0)
        mean, m2 = merge(mean, m2, begin, tile_mean, tile_m2, BLOCK_ROWS)
    if (full < rows) & (full > 0):
        here = mask[None, :] & (row < rows - full)[:, None]
        value = load_rows(tile + full * stride, kept, full, y_stride, bias, here, dtype)
        value = tl.where(here, value - pivot[None, :], 0.0)
        tile_mean = tl.sum(value, axis=0) / tl.cast(rows - full, dtype)
        value = tl.where(here, value - tile_mean[None, :], 0.0)
        tile_m2 = tl.sum(value * value, axis=0)
        mean, m2 = merge(mean, m2, full, tile_mean, tile_m2, rows - full)
    return pivot, mean, m2


@triton.jit
def chunk_moments(
    x,
    stride,
    y,
    y_stride,
    bias,
    mask,
    rows,
    dtype: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    LONG: tl.constexpr,
    FOLDED: tl.constexpr,
):
    """(mean, m2) of any number of rows, float64 where FOLDED; LONG: there may be more than 512."""
    count = rows
    if LONG:
        count = tl.minimum(rows, BLOCK)
    pivot, mean, m2 = block_moments(x, stride, y, y_stride, bias, mask, count, dtype, BLOCK_ROWS, BLOCK_COLUMNS)
    if FOLDED:
        mean = pivot.to(tl.float64) + mean.to(tl.float64)
        m2 = m2.to(tl.float64)
        if LONG:
            for begin in range(BLOCK, rows, BLOCK):
                count = tl.minimum(rows - begin, BLOCK)
                kept = y
                if y is not None:
                    kept = y + begin * y_stride
                pivot, block_mean, block_m2 = block_moments(
                    x + begin * stride, stride, kept, y_stride, bias, mask, count, dtype, BLOCK_ROWS, BLOCK_COLUMNS
                )
                block_mean = pivot.to(tl.float64) + block_mean.to(tl.float64)
                mean, m2 = merge(mean, m2, begin, block_mean, block_m2.to(tl.float64), count)
    else:
        mean = pivot + mean
    return mean, m2


@triton.jit
def store_partial(partials, program, mean, m2, BLOCK_COLUMNS: tl.constexpr):
    """Leave a chunk's moments for the program that folds them."""
    at = partials + program.to(tl.int64) * (2 * BLOCK_COLUMNS) + tl.arange(0, BLOCK_COLUMNS)
    tl.store(at, mean)
    tl.store(at + BLOCK_COLUMNS, m2)


@triton.jit
def fold_partials(
    partials, first, strips, chunks, rows, chunk_rows, BLOCK_CHUNKS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """(mean, m2) in float64 of a strip whose chunks were left by programs first, first + strips, ..., in order."""
    lane = tl.arange(0, BLOCK_COLUMNS)
    # Loads go past the L1 cache, which does not follow other processors' stores.
    # Relative to one of them, equal means have a mean without rounding.
    pivot = tl.load(partials + first.to(tl.int64) * (2 * BLOCK_COLUMNS) + lane, cache_modifier=".cg")
    mean = tl.zeros([BLOCK_COLUMNS], tl.float64)
    m2 = tl.zeros([BLOCK_COLUMNS], tl.float64)
    for begin in range(0, chunks, BLOCK_CHUNKS):
        chunk = begin + tl.arange(0, BLOCK_CHUNKS)
        valid = chunk < chunks
        count = tl.where(valid, tl.minimum(chunk_rows, rows - chunk * chunk_rows), 0).to(tl.float64)[:, None]
        at = partials + ((first + chunk * strips).to(tl.int64)[:, None] * (2 * BLOCK_COLUMNS) + lane[None, :])
        chunk_mean = tl.load(at, mask=valid[:, None], other=0.0, cache_modifier=".cg")  # (BLOCK_CHUNKS, BLOCK_COLUMNS)
        chunk_mean = tl.where(valid[:, None], chunk_mean - pivot[None, :], 0.0)
        chunk_m2 = tl.load(at + BLOCK_COLUMNS, mask=valid[:, None], other=0.0, cache_modifier=".cg")
        total = tl.sum(tl.sum(count, axis=0), axis=0)
        tile_mean = tl.sum(count * chunk_mean, axis=0) / total
        delta = chunk_mean - tile_mean[None, :]
        tile_m2 = tl.sum(chunk_m2 + count * (delta * delta), axis=0)
        mean, m2 = merge(mean, m2, begin * chunk_rows, tile_mean, tile_m2, total)
    return pivot + mean, m2


@triton.jit
def variance(m2, rows, correction):
    """NaN without degrees of freedom, as in torch."""
    freedom = tl.cast(rows - correction, tl.float64)
    factor = tl.where(freedom > 0, 1.0 / tl.where(freedom > 0, freedom, 1.0), float("nan"))
    return m2 * factor.to(m2.dtype)


@triton.jit
def reduce_columns(
    inputs,
    starts,
    columns,
    strides,
    offsets,
    inners,
    partials,
    tickets,
    rows,
    chunk_rows,
    chunks,
    correction,
    outputs,
    output_strides,
    bias,
    channel_columns,
    dtype: tl.constexpr,
    LAYERS: tl.constexpr,
    VECTOR: tl.constexpr,
    PERMUTED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    LONG: tl.constexpr,
    WIDE: tl.constexpr = False,
):
    """The moments of a program's strip: (complete, mean, var, packed, mask, first).

    complete: whether this program has them all, which one of a strip's programs does, `first` being the first of them.
    With outputs, of a single layer, the moments are those of relu(x + bias), which is kept there; the bias is that of
    packed column // channel_columns. WIDE: the mean is returned in float64.
    """
    program = tl.program_id(0)
    strips, chunk, column, mask, packed = locate(
        starts, columns, offsets, inners, program, LAYERS, VECTOR, BLOCK_COLUMNS, PERMUTED
    )
    x = pick(inputs, starts, program, LAYERS) + column  # (BLOCK_COLUMNS)
    stride = pick_integer(strides, starts, program, LAYERS).to(tl.int64) * VECTOR
    begin = chunk * chunk_rows
    count = tl.minimum(rows - begin, chunk_rows)
    y = None
    y_stride = None
    added = None
    if outputs is not None:
        y_stride = pick_integer(output_strides, starts, program, LAYERS).to(tl.int64) * VECTOR
        y = pick(outputs, starts, program, LAYERS) + column + begin * y_stride
        if bias is not None:
            added = tl.load(bias + packed.to(tl.int32) // channel_columns, mask=mask, other=0.0).to(dtype)
    mean, m2 = chunk_moments(
        x + begin * stride,
        stride,
        y,
        y_stride,
        added,
        mask,
        count,
        dtype,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        LONG,
        LONG or partials is not None or WIDE,
    )
    first = program - chunk * strips
    complete = tl.full((), 1, tl.int32) == 1
    if partials is not None:
        store_partial(partials, program, mean, m2, BLOCK_COLUMNS)
        complete = arrive(tickets + first, chunks)
        if complete:
            mean, m2 = fold_partials(partials, first, strips, chunks, rows, chunk_rows, BLOCK_CHUNKS, BLOCK_COLUMNS)
    var = variance(m2, rows, correction).to(dtype)
    return complete, mean.to(tl.float64 if WIDE else dtype), var, packed, mask, first
