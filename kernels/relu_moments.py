"""`relu_moments` and `relu_moments_backward`: a tap, one launch each way."""

import triton
import triton.language as tl
from torch import Tensor

from moment_ops.kernels import _column_plan, _launch
from moment_ops.kernels._launch import Launch
from moment_ops.kernels._order import in_memory_order, is_native, restore_logical_order, vector_in_memory_order
from moment_ops.kernels._records import Rows
from moment_ops.kernels._reduce import reduce_columns
from moment_ops.kernels._tiles import REDUCTION_REGISTERS
from moment_ops.kernels.moments import CUT, backward_launches, reduction_arguments

# Dtypes that the kernels take; a literal, which is read without importing Triton.
OPERATORS = {
    "relu_moments": ("float32", "bfloat16", "float16", "float64"),
    "relu_moments_backward": ("float32", "bfloat16", "float16", "float64"),
}


@triton.jit(do_not_specialize=["channel_columns", *CUT])
def relu_moments_kernel(
    layers,
    bias,  # (columns / channel_columns) or None
    channel_columns,
    mean_out,  # (F)
    var_out,  # (F)
    partials,
    rows,
    chunk_rows,
    chunks,
    correction,
    strip,
):
    """relu(x + bias), and its moments, packed."""
    cut = Rows(rows, chunk_rows, chunks, correction)
    got = reduce_columns(layers, bias, channel_columns, partials, cut, mean_out.dtype.element_ty, strip)
    if got.complete:
        tl.store(mean_out + got.packed, got.mean, mask=got.mask)
        tl.store(var_out + got.packed, got.var, mask=got.mask)


def relu_moments_launches(
    x: Tensor, bias: Tensor | None, correction: int, y: Tensor, mean: Tensor, var: Tensor
) -> list[Launch]:
    """The launch of `relu_moments`; x and y have the same columns."""
    channel_columns = 1
    if bias is not None:
        channel_columns = mean.numel() // bias.numel()
        if not is_native(x):
            # Columns are packed as they lie, and so is a bias for each of them.
            bias = bias.view(-1, *[1] * (x.dim() - 2)).expand(x.shape[1:]).reshape(-1)
            bias = vector_in_memory_order(bias, [x])
            channel_columns = 1
    (x,), (y,) = in_memory_order([x]), in_memory_order([y])
    (group,) = _column_plan.groups("tap", [x], [y])
    arguments = {
        **reduction_arguments(group, [x], correction, [y]),
        "bias": bias,
        "channel_columns": channel_columns,
        "mean_out": mean,
        "var_out": var,
    }
    return [Launch(relu_moments_kernel, group.programs, arguments, group.tile.warps, REDUCTION_REGISTERS)]


def relu_moments(x: Tensor, bias: Tensor | None, correction: int, y: Tensor, mean: Tensor, var: Tensor) -> None:
    """Fill y and the packed mean and variance."""
    _launch.run(relu_moments_launches, x.device, x, bias, correction, y, mean, var)
    for vector in (mean, var):
        restore_logical_order(vector, [x])


def relu_moments_backward_launches(
    grad: Tensor | None,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    y: Tensor,
    mean: Tensor,
    correction: int,
    out: Tensor,
) -> list[Launch]:
    """The launch of `relu_moments_backward`; y, grad and out have the same columns."""
    ordered_mean = vector_in_memory_order(mean, [y])
    assert ordered_mean is not None
    return backward_launches(
        [] if grad is None else [grad],
        vector_in_memory_order(grad_mean, [y]),
        vector_in_memory_order(grad_var, [y]),
        [y],
        ordered_mean,
        None,
        correction,
        None,
        [out],
        rectified=True,
    )


def relu_moments_backward(
    grad: Tensor | None,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    y: Tensor,
    mean: Tensor,
    correction: int,
    out: Tensor,
) -> None:
    """Fill the gradient `out`."""
    _launch.run(relu_moments_backward_launches, y.device, grad, grad_mean, grad_var, y, mean, correction, out)
