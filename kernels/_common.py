"""Device functions that kernels share: finding a program's layer, columns and rows, merging moments, arriving last."""

import struct

import triton
import triton.language as tl

from moment_ops.kernels._tiles import STRIP_BYTES

STRIP_BITS = tl.constexpr(8 * STRIP_BYTES)


def bits(value: float) -> int:
    """The bits of a float64 as a signed integer: a Python float would be rounded to float32 on its way."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


@triton.jit
def double(bits):
    """The float64 with these bits. Python floats reach a kernel as float32, so the host passes bits."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def is_finite(value):
    """By magnitude: `value - value == 0` of a product is contracted to fma(a, b, -(a * b)), the product's rounding."""
    return tl.abs(value) < float("inf")


@triton.jit
def pick(values, layers, program):
    """The entry of the layer that a program works on.

    A chain of selects, not a table in memory: it keeps what is known about the pointers' alignment, and nothing has to
    be copied to the device.
    """
    encoded = program * 16
    picked = values[0]
    for i in tl.static_range(1, len(layers.starts)):
        picked = tl.where(encoded >= layers.starts[i], values[i], picked)
    return picked


@triton.jit
def pick_integer(values, layers, program):
    """As `pick`, of integers, which come sixteenfold."""
    return pick(values, layers, program) >> 4


@triton.jit
def locate(layers, program, strip):
    """Where a program works: (strips, chunk, begin, width).

    strips: of the layer; chunk: of the rows; begin: the first column, in memory order; width: the layer's columns.
    """
    local = program - pick_integer(layers.starts, layers, program)
    # Multiplying by VECTOR tells the compiler that accesses may be that wide.
    width = pick_integer(layers.columns, layers, program) * layers.VECTOR
    strips = tl.cdiv(width, strip.COLUMNS)
    return strips, local // strips, local % strips * strip.COLUMNS, width


@triton.jit
def strip_columns(layers, program, strip, begin, width, LANES: tl.constexpr):
    """The columns of a strip that begins there, over and over for LANES of them: (column, mask, packed), (LANES).

    column: in memory order; packed: int64 positions in the packed vectors, where a channels-last layer has its columns
    transposed.
    """
    lane = tl.arange(0, LANES) % strip.COLUMNS
    mask = lane < width - begin
    column = begin + lane
    first = pick_integer(layers.offsets, layers, program).to(tl.int64) * layers.VECTOR
    if strip.PERMUTED:
        inner = pick_integer(layers.inners, layers, program)
        packed = first + (column % inner) * (width // inner) + column // inner
    else:
        packed = first + column
    return column, mask, packed


@triton.jit
def tile_at(begin, x, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, LANES) pointers to the tile from row `begin` on; x: (LANES) pointers to row 0.

    The lanes of a wide strip read a row at once; those of a narrow one read as many rows as it fits into them, and the
    next rows are as far on. `begin` is added first: a thread then keeps a pointer in registers, not one for each row.
    """
    LANES: tl.constexpr = x.shape[0]
    GROUPS: tl.constexpr = LANES // COLUMNS
    group = tl.arange(0, LANES) // COLUMNS
    return (x + group * stride + begin * stride)[None, :] + tl.arange(0, ROWS)[:, None] * (GROUPS * stride)


@triton.jit
def rows_of_lanes(rows, LANES: tl.constexpr, COLUMNS: tl.constexpr):
    """How many of `rows` rows each lane has; (LANES)."""
    GROUPS: tl.constexpr = LANES // COLUMNS
    return (rows + (GROUPS - 1) - tl.arange(0, LANES) // COLUMNS) // GROUPS


@triton.jit
def merge(mean_a, m2_a, count_a, mean_b, m2_b, count_b):
    """Moments of two groups of rows together (Chan, Golub & LeVeque 1979), in the dtype of the moments; 0 of none."""
    rows_a = tl.cast(count_a, mean_a.dtype)
    rows_b = tl.cast(count_b, mean_a.dtype)
    share = rows_b / tl.maximum(rows_a + rows_b, 1.0)
    delta = mean_b - mean_a
    return mean_a + delta * share, m2_a + (m2_b + delta * delta * (rows_a * share))


@triton.jit
def arrive(ticket, programs):
    """Whether this is the last of `programs` programs to arrive; it then sees all that the others have stored.

    Nobody waits. The barrier puts the stores of all threads before the atomic of one of them, whose release and acquire
    make them visible to the last program. Who is last differs from run to run, so what the last one does must not
    depend on which it is.
    """
    tl.debug_barrier()
    arrived = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return arrived == programs - 1
