"""`covariance_match_`: the average's step, the loss and its derivative as the epilogue of the covariances' products."""

import struct
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from moment_ops.kernels import _launch, _plan
from moment_ops.kernels._averages import (
    OPTIONS,
    Entries,
    Vectors,
    average_argument,
    load_started,
    numbers_of,
    option_arguments,
    store_started,
    vectors_of,
)
from moment_ops.kernels._common import is_finite, pick, pick_integer
from moment_ops.kernels._covariance_plan import triangle_groups
from moment_ops.kernels._product_tiles import Architecture, architecture_of, forward_tile, product_mode
from moment_ops.kernels._triangle import BLOCK, packed_block
from moment_ops.kernels.covariance import (
    covariances,
    fold_quarter,
    product_arguments,
    products,
    quarters,
    shifts_launches,
    unit_columns,
)
from moment_ops.kernels.match import COUNTS, finish_loss, loss_arguments, match_quantity
from moment_ops.ops.records import CovarianceMatch


@triton.jit
def weight_of(bits):
    """The float32 weight of `weight_bits`."""
    return ((bits >> 4) & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def match_quarter(
    sums,
    rows,
    correction,
    rest,
    row,
    column,
    width,
    quarter,
    target,
    target_is_full,
    packed_start,
    weight,
    vectors,
    average,
    numbers,
    TILE: tl.constexpr,
):
    """Match a quarter of a tile; returns its share of the loss, float64."""
    SIDE: tl.constexpr = BLOCK // TILE
    row_columns = row * TILE + tl.arange(0, TILE)
    column_columns = column * TILE + quarter * (TILE // 4) + tl.arange(0, TILE // 4)
    value = covariances(sums, rows, correction, rest, row_columns, column_columns, width, True)
    mask = (row_columns < width)[:, None] & (column_columns < width)[None, :]  # (TILE, TILE / 4)
    offset, stride = packed_block(width, row // SIDE, column // SIDE)
    full_offset = (row // SIDE * BLOCK).to(tl.int64) * width + column // SIDE * BLOCK
    inner_row = (row % SIDE * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None]
    inner_column = (column % SIDE * TILE + quarter * (TILE // 4) + tl.arange(0, TILE // 4))[None, :]
    packed = (packed_start + offset) + (inner_row * stride + inner_column)
    target_offset = tl.where(target_is_full, full_offset, offset)
    target_stride = tl.where(target_is_full, width.to(tl.int64), stride)
    goal = tl.load(target + target_offset + (inner_row * target_stride + inner_column), mask=mask, other=0.0)
    finite = is_finite(value)
    entries = Entries(packed, mask, finite, load_started(average, packed, mask, finite))
    share = match_quantity(value, goal, weight, vectors, entries, average, numbers)
    store_started(average, entries)
    # Blocks beside the diagonal stand for two of the matrix.
    return share * tl.where(row // SIDE == column // SIDE, 1.0, 2.0).to(tl.float64)


@triton.jit(do_not_specialize=["rows", "chunk_rows", "chunks", "correction", *OPTIONS, "reduction", *COUNTS])
def covariance_match_kernel(
    inputs,  # LAYERS x (rows, D)
    starts,
    widths,
    strides,
    offsets,
    packed,
    targets,  # LAYERS x (D, D), or packed
    full,  # which of them are (D, D)
    weights,
    shift,  # (columns)
    rest,  # (columns)
    partials,  # (programs, TILE, TILE) float32, or None
    tickets,  # (programs) int32 zeros, or None
    rows,
    chunk_rows,
    chunks,
    correction,
    vectors,
    option0: tl.int64,  # bits of float64, as all scalars
    option1: tl.int64,
    option2: tl.int64,
    option3: tl.int64,
    option4: tl.int64,
    option5: tl.int64,
    reduction: tl.int64,
    average,
    loss,
    arrivals,
    entries,
    first_entry,
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
    """The matching loss of covariances: the program that completes a tile matches it."""
    complete, total, first, tiles, width, offset, row, column = products(
        inputs, starts, widths, strides, offsets, shift, partials, tickets, rows, chunk_rows, chunks, LAYERS, VECTOR,
        CENTERED, MODE, BF16, DEPTH, STEPS, STAGES, TILE, LONG, PROMOTED,
    )  # fmt: skip
    if complete:
        program = tl.program_id(0)
        numbers = numbers_of(average, reduction, option0, option1, option2, option3, option4, option5)
        target = pick(targets, starts, program, LAYERS)
        target_is_full = pick_integer(full, starts, program, LAYERS) != 0
        packed_start = pick_integer(packed, starts, program, LAYERS).to(tl.int64) * VECTOR
        weight = weight_of(pick(weights, starts, program, LAYERS))
        share = tl.zeros((), tl.float64)
        if partials is None:
            parts = quarters(total, TILE)
            for quarter in tl.static_range(4):
                share += match_quarter(
                    parts[quarter], rows, correction, rest + offset, row, column, width, quarter, target,
                    target_is_full, packed_start, weight, vectors, average, numbers, TILE,
                )  # fmt: skip
        else:
            for quarter in range(4):
                sums = fold_quarter(partials, first, tiles, chunks, quarter, TILE)
                share += match_quarter(
                    sums, rows, correction, rest + offset, row, column, width, quarter, target, target_is_full,
                    packed_start, weight, vectors, average, numbers, TILE,
                )  # fmt: skip
        finish_loss(share, first_entry + first, loss, arrivals, entries, average)


def weight_bits(value: float) -> int:
    """The bits of a float32 as an integer of 64 bits, sixteenfold (`encoded` in _plan.py says why)."""
    return 16 * (struct.unpack("<I", struct.pack("<f", value))[0] + (1 << 32))


def covariance_match_launches(
    x: Sequence[Tensor],
    correction: int,
    match: CovarianceMatch,
    loss: Tensor,
    mean: Tensor,
    grad: Tensor | None,
    architecture: Architecture,
) -> list[_plan.Launch]:
    """The launches of `covariance_match_`: those that come last complete the loss."""
    shift, rest = _launch.workspace(2 * len(mean), mean.dtype, mean.device).view(2, -1)
    mode = product_mode(match.precision, x[0].dtype, True, architecture)
    tile = forward_tile(mode, architecture, len(x[0]), [layer.shape[1] for layer in x])
    groups = triangle_groups(x, tile, architecture)
    shared = {
        **loss_arguments(sum(g.programs for g in groups), sum(g.tiles for g in groups), loss),
        "vectors": Vectors(None, None, grad, vectors_of(match.average, match.state, 0)),
        "reduction": _plan.bits(1.0),
        **option_arguments(match.average, match.options),
        "average": average_argument(match.average, match.state, match.update),
    }
    launches, first = shifts_launches(x, mean, shift, rest), 0
    for group in groups:
        arguments = {
            **product_arguments(group, x, shift, rest, correction, True, mode, tile),
            "packed": group.packed,
            "targets": group.tensors(match.target),
            "full": group.integers([int(t.dim() == 2) for t in match.target]),
            "weights": tuple(map(weight_bits, _plan.padded([match.weight[i] for i in group.layers], 0.0))),
            "first_entry": first,
            **shared,
        }
        launches.append(_plan.Launch(covariance_match_kernel, group.programs, arguments, tile.warps, tile.registers))
        first += group.programs
    return launches


def covariance_match_(
    x: Sequence[Tensor], correction: int, match: CovarianceMatch, loss: Tensor, mean: Tensor, grad: Tensor | None
) -> None:
    """Fill the loss, the packed means and, where it is given, the packed derivative; advance the state."""
    match = match._replace(target=[t.contiguous() for t in match.target])
    _launch.run(
        covariance_match_launches,
        mean.device,
        unit_columns(x),
        correction,
        match,
        loss,
        mean,
        grad,
        architecture_of(mean.device),
    )
