"""Mean and sum of squared deviations over rows, as device functions.

A column is shifted by a pivot, its first row, on load: without it the merges lose the bound of 1e-5 at |mean|/std = 1e3.
Tiles are reduced in two passes in registers and merged one after another inside blocks of 512 rows, in the dtype of the
statistics; blocks and chunks of rows are merged in float64, where the number of merges does not matter.
"""

import triton
import triton.language as tl

from moment_ops.kernels._common import arrive, locate, merge, pick, pick_integer

BLOCK = tl.constexpr(512)


@triton.jit
def block_moments(x, stride, mask, pivot, rows, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """(mean - pivot, m2) of at most 512 rows; x: (BLOCK_COLUMNS) pointers to the first of them."""
    row = tl.arange(0, BLOCK_ROWS)
    tile = x[None, :] + row[:, None] * stride  # (BLOCK_ROWS, BLOCK_COLUMNS)
    mean = tl.zeros([BLOCK_COLUMNS], pivot.dtype)
    m2 = tl.zeros([BLOCK_COLUMNS], pivot.dtype)
    full = rows // BLOCK_ROWS * BLOCK_ROWS
    for begin in range(0, full, BLOCK_ROWS):
        # Masked columns are 0 - 0: no selects here.
        value = tl.load(tile + begin * stride, mask=mask[None, :], other=0.0).to(pivot.dtype) - pivot[None, :]
        tile_mean = tl.sum(value, axis=0) * (1.0 / BLOCK_ROWS)
        value = value - tile_mean[None, :]
        tile_m2 = tl.sum(value * value, axis=0)
        mean, m2 = merge(mean, m2, begin, tile_mean, tile_m2, BLOCK_ROWS)
    if full < rows:
        here = mask[None, :] & (row < rows - full)[:, None]
        value = tl.load(tile + full * stride, mask=here, other=0.0).to(pivot.dtype) - pivot[None, :]
        value = tl.where(here, value, 0.0)
        tile_mean = tl.sum(value, axis=0) / tl.cast(rows - full, pivot.dtype)
        value = tl.where(here, value - tile_mean[None, :], 0.0)
        tile_m2 = tl.sum(value * value, axis=0)
        mean, m2 = merge(mean, m2, full, tile_mean, tile_m2, rows - full)
    return mean, m2


@triton.jit
def chunk_moments(
    x, stride, mask, pivot, rows, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, LONG: tl.constexpr
):
    """(mean - pivot, m2) of any number of rows: float64 where LONG, that is for more than 512 rows."""
    if LONG:
        mean = tl.zeros([BLOCK_COLUMNS], tl.float64)
        m2 = tl.zeros([BLOCK_COLUMNS], tl.float64)
        for begin in range(0, rows, BLOCK):
            count = tl.minimum(rows - begin, BLOCK)
            block_mean, block_m2 = block_moments(
                x + begin * stride, stride, mask, pivot, count, BLOCK_ROWS, BLOCK_COLUMNS
            )
            mean, m2 = merge(mean, m2, begin, block_mean.to(tl.float64), block_m2.to(tl.float64), count)
    else:
        mean, m2 = block_moments(x, stride, mask, pivot, rows, BLOCK_ROWS, BLOCK_COLUMNS)
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
    """(mean - pivot, m2) in float64 of a strip whose chunks were left by programs first, first + strips, ..., in order."""
    lane = tl.arange(0, BLOCK_COLUMNS)
    mean = tl.zeros([BLOCK_COLUMNS], tl.float64)
    m2 = tl.zeros([BLOCK_COLUMNS], tl.float64)
    for begin in range(0, chunks, BLOCK_CHUNKS):
        chunk = begin + tl.arange(0, BLOCK_CHUNKS)
        valid = chunk < chunks
        count = tl.where(valid, tl.minimum(chunk_rows, rows - chunk * chunk_rows), 0).to(tl.float64)[:, None]
        at = partials + (first + chunk * strips).to(tl.int64)[:, None] * (2 * BLOCK_COLUMNS) + lane[None, :]
        # Past the L1 cache, which does not follow other processors' stores.
        chunk_mean = tl.load(at, mask=valid[:, None], other=0.0, cache_modifier=".cg")  # (BLOCK_CHUNKS, BLOCK_COLUMNS)
        chunk_m2 = tl.load(at + BLOCK_COLUMNS, mask=valid[:, None], other=0.0, cache_modifier=".cg")
        total = tl.sum(tl.sum(count, axis=0), axis=0)
        tile_mean = tl.sum(count * chunk_mean, axis=0) / total
        delta = chunk_mean - tile_mean[None, :]
        tile_m2 = tl.sum(chunk_m2 + count * (delta * delta), axis=0)
        mean, m2 = merge(mean, m2, begin * chunk_rows, tile_mean, tile_m2, total)
    return mean, m2


@triton.jit
def finish(mean, m2, pivot, rows, correction):
    """(mean, variance) in the dtype of the statistics; NaN variances without degrees of freedom, as in torch."""
    freedom = tl.cast(rows - correction, tl.float64)
    factor = tl.where(freedom > 0, 1.0 / tl.where(freedom > 0, freedom, 1.0), float("nan"))
    return (mean + pivot.to(mean.dtype)).to(pivot.dtype), (m2 * factor.to(m2.dtype)).to(pivot.dtype)


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
    dtype: tl.constexpr,
    LAYERS: tl.constexpr,
    VECTOR: tl.constexpr,
    PERMUTED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    LONG: tl.constexpr,
):
    """The moments of a program's strip: (complete, mean, var, packed, mask, first).

    complete: whether this program has them all, which one of a strip's programs does, `first` being the first of them.
    """
    program = tl.program_id(0)
    strip, strips, chunk, column, mask, packed = locate(
        starts, columns, offsets, inners, program, LAYERS, VECTOR, BLOCK_COLUMNS, PERMUTED
    )
    x = pick(inputs, starts, program, LAYERS) + column  # (BLOCK_COLUMNS)
    stride = pick_integer(strides, starts, program, LAYERS).to(tl.int64) * VECTOR
    pivot = tl.load(x, mask=mask, other=0.0).to(dtype)
    begin = chunk * chunk_rows
    count = tl.minimum(rows - begin, chunk_rows)
    mean, m2 = chunk_moments(x + begin * stride, stride, mask, pivot, count, BLOCK_ROWS, BLOCK_COLUMNS, LONG)
    first = program - chunk * strips
    complete = tl.full((), 1, tl.int32) == 1
    if partials is not None:
        mean, m2 = mean.to(tl.float64), m2.to(tl.float64)
        store_partial(partials, program, mean, m2, BLOCK_COLUMNS)
        complete = arrive(tickets + first, chunks)
        if complete:
            mean, m2 = fold_partials(partials, first, strips, chunks, rows, chunk_rows, BLOCK_CHUNKS, BLOCK_COLUMNS)
    mean, var = finish(mean, m2, pivot, rows, correction)
    return complete, mean, var, packed, mask, first
