"""`covariance_match_`: the average's step, the loss and its derivative as the epilogue of the covariances' products."""

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from moment_ops.kernels import _launch
from moment_ops.kernels._architectures import Architecture, architecture_of, product_mode
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
from moment_ops.kernels._common import bits, is_finite, pick, pick_integer
from moment_ops.kernels._covariance_plan import triangle_groups
from moment_ops.kernels._launch import Launch
from moment_ops.kernels._plan import padded
from moment_ops.kernels._records import Rows
from moment_ops.kernels._tiles import forward_tile
from moment_ops.kernels._triangle import BLOCK, packed_block
from moment_ops.kernels.covariance import (
    covariances,
    fold_quarter,
    product_arguments,
    products,
    quarters,
    shifts_launches,
    shifts_of,
    unit_columns,
)
from moment_ops.kernels.match import COUNTS, finish_loss, loss_arguments, match_quantity
from moment_ops.kernels.moments import CUT
from moment_ops.ops.records import CovarianceMatch

# Dtypes that the kernels take; a literal, which is read without importing Triton.
OPERATORS = {
    "covariance_match_": ("float32", "bfloat16", "float16"),
}


@triton.jit
def weight_of(bits):
    """The float32 weight of `weight_bits`."""
    return ((bits >> 4) & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)


class Targets(NamedTuple):
    """Layers' targets."""

    targets: Any  # (D, D), or packed
    full: Any  # whether it is (D, D)
    weights: Any  # as `weight_bits` has them


class Target(NamedTuple):
    """One of them."""

    matrix: Any
    full: Any
    weight: Any  # float32


@triton.jit
def match_quarter(sums, of_layer, start, vectors, average, numbers, cut, shifts, got, quarter, SIDE: tl.constexpr):
    """Match a quarter of a tile; returns its share of the loss, float64.

    of_layer: the target; start: where the layer's triangle begins in packed vectors.
    """
    TILES: tl.constexpr = BLOCK // SIDE
    row, column, width = got.row, got.column, got.width
    row_columns = row * SIDE + tl.arange(0, SIDE)
    column_columns = column * SIDE + quarter * (SIDE // 4) + tl.arange(0, SIDE // 4)
    value = covariances(sums, cut, shifts, got, row_columns, column_columns)
    mask = (row_columns < width)[:, None] & (column_columns < width)[None, :]  # (SIDE, SIDE / 4)
    offset, stride = packed_block(width, row // TILES, column // TILES)
    full_offset = (row // TILES * BLOCK).to(tl.int64) * width + column // TILES * BLOCK
    inner_row = (row % TILES * SIDE + tl.arange(0, SIDE)).to(tl.int64)[:, None]
    inner_column = (column % TILES * SIDE + quarter * (SIDE // 4) + tl.arange(0, SIDE // 4))[None, :]
    packed = (start + offset) + (inner_row * stride + inner_column)
    target_offset = tl.where(of_layer.full, full_offset, offset)
    target_stride = tl.where(of_layer.full, width.to(tl.int64), stride)
    target = tl.load(of_layer.matrix + target_offset + (inner_row * target_stride + inner_column), mask=mask, other=0.0)
    finite = is_finite(value)
    entries = Entries(packed, mask, finite, load_started(average, packed, mask, finite))
    share = match_quantity(value, target, of_layer.weight, vectors, entries, average, numbers)
    store_started(average, entries)
    # Blocks beside the diagonal stand for two of the matrix.
    return share * tl.where(row // TILES == column // TILES, 1.0, 2.0).to(tl.float64)


@triton.jit(do_not_specialize=[*CUT, *OPTIONS, "reduction", *COUNTS])
def covariance_match_kernel(
    layers,
    targets,
    shifts,
    partials,
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
    tile,
):
    """The matching loss of covariances: the program that completes a tile matches it."""
    cut = Rows(rows, chunk_rows, chunks, correction)
    SIDE: tl.constexpr = tile.COLUMNS
    got = products(layers, shifts, partials, cut, tile)
    if got.complete:
        program = tl.program_id(0)
        numbers = numbers_of(average, reduction, (option0, option1, option2, option3, option4, option5))
        matrix = pick(targets.targets, layers, program)
        is_full = pick_integer(targets.full, layers, program) != 0
        start = pick_integer(layers.triangles, layers, program).to(tl.int64) * layers.VECTOR
        target = Target(matrix, is_full, weight_of(pick(targets.weights, layers, program)))
        share = tl.zeros((), tl.float64)
        if partials is None:
            parts = quarters(got.total, SIDE)
            for quarter in tl.static_range(4):
                share += match_quarter(
                    parts[quarter], target, start, vectors, average, numbers, cut, shifts, got, quarter, SIDE
                )
        else:
            for quarter in range(4):
                sums = fold_quarter(partials.partials, got.first, got.tiles, chunks, quarter, SIDE)
                share += match_quarter(sums, target, start, vectors, average, numbers, cut, shifts, got, quarter, SIDE)
        finish_loss(share, first_entry + got.first, loss, arrivals, entries, average)


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
) -> list[Launch]:
    """The launches of `covariance_match_`: those that come last complete the loss."""
    shifts = shifts_of(mean)
    mode = product_mode(match.precision, x[0].dtype, True, architecture)
    tile = forward_tile(mode, architecture, len(x[0]), [layer.shape[1] for layer in x])
    groups = triangle_groups(x, tile, architecture)
    shared = {
        **loss_arguments(sum(g.programs for g in groups), sum(g.tiles for g in groups), loss),
        "vectors": Vectors(None, None, grad, vectors_of(match.average_kind, match.state, 0)),
        "reduction": bits(1.0),
        **option_arguments(match.average_kind, match.options),
        "average": average_argument(match.average_kind, match.state, match.update),
    }
    launches, first = shifts_launches(x, mean, shifts), 0
    for group in groups:
        arguments = {
            **product_arguments(group, x, shifts, correction, mode, tile),
            "layers": group.record(x)._replace(triangles=group.triangles),
            "targets": Targets(
                group.tensors(match.target),
                group.integers([int(t.dim() == 2) for t in match.target]),
                tuple(map(weight_bits, padded([match.weight[i] for i in group.layers], 0.0))),
            ),
            "first_entry": first,
            **shared,
        }
        launches.append(Launch(covariance_match_kernel, group.programs, arguments, tile.warps, tile.registers))
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
