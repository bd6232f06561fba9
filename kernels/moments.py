"""`moments` and `moments_backward`: one launch for a list of layers."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moment_ops.kernels import _column_plan, _launch
from moment_ops.kernels._common import (
    STRIP_BITS,
    locate,
    pick,
    pick_integer,
    rows_of_lanes,
    strip_columns,
    tile_at,
)
from moment_ops.kernels._launch import Launch
from moment_ops.kernels._order import (
    in_memory_order,
    restore_logical_order,
    rows_first,
    vector_in_memory_order,
)
from moment_ops.kernels._records import Partials, Rows
from moment_ops.kernels._reduce import reduce_columns
from moment_ops.kernels._tiles import ADDED_PASS_REGISTERS, PASS_REGISTERS, REDUCTION_REGISTERS

# Dtypes that the kernels take; a literal, which is read without importing Triton.
OPERATORS = {
    "moments": ("float32", "bfloat16", "float16", "float64"),
    "moments_backward": ("float32", "bfloat16", "float16", "float64"),
}

# Integers whose values do not specialise a kernel.
CUT = ("rows", "chunk_rows", "chunks", "correction")


@triton.jit(do_not_specialize=[*CUT])
def moments_kernel(
    layers,
    mean_out,  # (F)
    var_out,  # (F) or None
    partials,
    rows,
    chunk_rows,
    chunks,
    correction,
    strip,
):
    """Mean and variance of every column, packed."""
    cut = Rows(rows, chunk_rows, chunks, correction)
    got = reduce_columns(layers, None, None, partials, cut, mean_out.dtype.element_ty, strip)
    if got.complete:
        tl.store(mean_out + got.packed, got.mean, mask=got.mask)
        if var_out is not None:
            tl.store(var_out + got.packed, got.var, mask=got.mask)


@triton.jit
def coefficients(grad_mean, grad_var, mean, count, scale, rows, correction, layer, packed, mask):
    """(a, b, center, unit) of the gradient a + b * (x * unit - center) at positions `packed`.

    Where the mean is large a difference from it may not fit, and half of it does: unit is 1/2, and b twice as large.
    """
    dtype = mean.dtype.element_ty
    # All loads before the first use.
    statistic_rows = rows
    if count is not None:
        statistic_rows = tl.load(count + layer)
    factor = 1.0
    if scale is not None:
        factor = tl.load(scale)
    a = tl.zeros(packed.shape, dtype)
    b = a
    center = a
    if grad_mean is not None:
        a = tl.load(grad_mean + packed, mask=mask, other=0.0)
    if grad_var is not None:
        b = tl.load(grad_var + packed, mask=mask, other=0.0)
        center = tl.load(mean + packed, mask=mask, other=0.0)
    statistic_rows = tl.cast(statistic_rows, tl.float64)
    factor = tl.cast(factor, tl.float64)
    slope = (2.0 * factor / (statistic_rows - correction)).to(dtype)
    # A variance that the loss does not use sends no gradient, also where it has no degrees of freedom.
    b = tl.where(b == 0, b, b * slope)
    large = tl.abs(center) >= (2.0**103 if dtype == tl.float32 else 2.0**970)
    unit = tl.where(large, 0.5, 1.0).to(dtype)
    return a * (factor / statistic_rows).to(dtype), tl.where(large, 2.0 * b, b), center * unit, unit


@triton.jit(do_not_specialize=["rows", "chunk_rows", "correction"])
def moments_backward_kernel(
    layers,
    grad_mean,  # (F) or None
    grad_var,  # (F) or None
    mean,  # (F)
    count,  # (layers of the whole list) int64, or None: `rows`
    scale,  # () or None
    rows,
    chunk_rows,
    correction,
    strip,
    RECTIFIED: tl.constexpr,
):
    """`[grad +] a + b * (x - mean)` for every layer; zero where RECTIFIED features are not positive, NaN aside."""
    accumulate = mean.dtype.element_ty
    LANES: tl.constexpr = STRIP_BITS // layers.inputs[0].dtype.element_ty.primitive_bitwidth
    COLUMNS: tl.constexpr = strip.COLUMNS
    ROWS: tl.constexpr = strip.ROWS * COLUMNS // LANES
    READS: tl.constexpr = RECTIFIED or grad_var is not None
    program = tl.program_id(0)
    _, chunk, left, width = locate(layers, program, strip)
    column, mask, packed = strip_columns(layers, program, strip, left, width, LANES)
    begin = chunk * chunk_rows
    end = tl.minimum(begin + chunk_rows, rows)
    row = tl.arange(0, ROWS)[:, None]
    here = mask[None, :] & (row < rows_of_lanes(end - begin, LANES, COLUMNS)[None, :])  # (ROWS, LANES)
    # The first tiles are in flight together with the coefficients, and each next one while its predecessor is used.
    if READS:
        x_stride = pick_integer(layers.strides, layers, program).to(tl.int64) * layers.VECTOR
        x = pick(layers.inputs, layers, program) + column
        features = tl.load(tile_at(begin, x, x_stride, ROWS, COLUMNS), mask=here, other=0.0)
    if layers.grads is not None:
        g_stride = pick_integer(layers.grad_strides, layers, program).to(tl.int64) * layers.VECTOR
        g = pick(layers.grads, layers, program) + column
        added = tl.load(tile_at(begin, g, g_stride, ROWS, COLUMNS), mask=here, other=0.0)
    layer = pick_integer(layers.positions, layers, program)
    a, b, center, unit = coefficients(grad_mean, grad_var, mean, count, scale, rows, correction, layer, packed, mask)
    y_stride = pick_integer(layers.output_strides, layers, program).to(tl.int64) * layers.VECTOR
    y = pick(layers.outputs, layers, program) + column
    for tile in range(begin, end, strip.ROWS):
        value = tl.zeros([ROWS, LANES], accumulate) + a[None, :]
        if grad_var is not None:
            value += b[None, :] * (features.to(accumulate) * unit[None, :] - center[None, :])
        if layers.grads is not None:
            value += added.to(accumulate)
        if RECTIFIED:
            value = tl.where(features.to(accumulate) <= 0, 0.0, value)
        following = tile + strip.ROWS
        ahead = mask[None, :] & (row < rows_of_lanes(end - following, LANES, COLUMNS)[None, :])
        if READS:
            features = tl.load(tile_at(following, x, x_stride, ROWS, COLUMNS), mask=ahead, other=0.0)
        if layers.grads is not None:
            added = tl.load(tile_at(following, g, g_stride, ROWS, COLUMNS), mask=ahead, other=0.0)
        tl.store(tile_at(tile, y, y_stride, ROWS, COLUMNS), value.to(y.dtype.element_ty), mask=here)
        here = ahead


def reduction_arguments(
    group: _column_plan.ColumnGroup, layers: Sequence[Tensor], correction: int, outputs: Sequence[Tensor] | None = None
) -> dict[str, Any]:
    """What the kernels that reduce over rows have in common, workspace included."""
    x = layers[0]
    partials = None
    if group.chunks > 1:
        partials = Partials(
            _launch.workspace(group.programs * 2 * group.tile.columns, torch.float64, x.device),
            _launch.workspace(group.programs, torch.int32, x.device, zeroed=True),
        )
    return {
        "layers": group.record(layers, outputs),
        "partials": partials,
        "rows": group.rows,
        "chunk_rows": group.chunk_rows,
        "chunks": group.chunks,
        "correction": correction,
        "strip": group.strip,
    }


def moments_launches(layers: Sequence[Tensor], correction: int, mean: Tensor, var: Tensor | None) -> list[Launch]:
    """The launches of `moments` over layers whose rows are on dimension 0."""
    layers = in_memory_order(layers)
    return [
        Launch(
            moments_kernel,
            group.programs,
            {"mean_out": mean, "var_out": var, **reduction_arguments(group, layers, correction)},
            group.tile.warps,
            REDUCTION_REGISTERS,
        )
        for group in _column_plan.groups("reduce", layers)
    ]


def moments(input: Sequence[Tensor], dim: int, correction: int, mean: Tensor, var: Tensor | None) -> None:
    """Fill the packed mean and variance."""
    layers = rows_first(input, dim)
    _launch.run(moments_launches, mean.device, layers, correction, mean, var)
    for vector in (mean, var):
        if vector is not None:
            restore_logical_order(vector, layers)


def backward_launches(
    grad: Sequence[Tensor],
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    layers: Sequence[Tensor],
    mean: Tensor,
    count: Tensor | None,
    correction: int,
    scale: Tensor | None,
    out: Sequence[Tensor],
    rectified: bool = False,
) -> list[Launch]:
    """The launches of `moments_backward` over layers whose rows are on dimension 0.

    rectified: layers are outputs of ReLUs, and the gradients are those of their inputs.
    """
    grad, layers, out = in_memory_order(grad), in_memory_order(layers), in_memory_order(out)
    launches = []
    for group in _column_plan.groups("apply", layers, out, *([grad] if grad else [])):
        arguments = {
            "layers": group.record(layers, out, grad or None)._replace(positions=group.positions),
            "grad_mean": grad_mean,
            "grad_var": grad_var,
            "mean": mean,
            "count": count,
            "scale": scale,
            "rows": group.rows,
            "chunk_rows": group.chunk_rows,
            "correction": correction,
            "strip": group.strip,
            "RECTIFIED": rectified,
        }
        registers = ADDED_PASS_REGISTERS if grad else PASS_REGISTERS
        launches.append(Launch(moments_backward_kernel, group.programs, arguments, group.tile.warps, registers))
    return launches


def moments_backward(
    grad: Sequence[Tensor],
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    input: Sequence[Tensor],
    mean: Tensor,
    count: Tensor,
    dim: int,
    correction: int,
    scale: Tensor | None,
    out: Sequence[Tensor],
) -> None:
    """Fill the gradients `out`; `grad`, empty or one per layer, has the strides of `out`."""
    layers = rows_first(input, dim)
    ordered_mean = vector_in_memory_order(mean, layers)
    assert ordered_mean is not None
    _launch.run(
        backward_launches,
        mean.device,
        rows_first(grad, dim),
        vector_in_memory_order(grad_mean, layers),
        vector_in_memory_order(grad_var, layers),
        layers,
        ordered_mean,
        count,
        correction,
        scale,
        rows_first(out, dim),
    )
