"""`relu_moments` and `relu_moments_backward`: a tap, one launch each way."""

import triton
import triton.language as tl
from torch import Tensor

from moment_ops.kernels import _launch, _plan
from moment_ops.kernels._order import in_memory_order, is_native, restore_logical_order, vector_in_memory_order
from moment_ops.kernels._reduce import reduce_columns
from moment_ops.kernels.moments import backward_launches, reduction_arguments

OPERATORS = {
    "relu_moments": ("float32", "bfloat16", "float16", "float64"),
    "relu_moments_backward": ("float32", "bfloat16", "float16", "float64"),
}


@triton.jit(do_not_specialize=["channel_columns", "rows", "chunk_rows", "chunks", "correction"])
def relu_moments_kernel(
    inputs,  # LAYERS x (rows, columns)
    outputs,  # likewise
    starts,
    columns,
    strides,
    output_strides,
    offsets,
    inners,
    bias,  # (columns / channel_columns) or None
    channel_columns,
    mean_out,  # (F)
    var_out,  # (F)
    partials,  # (programs, 2, BLOCK_COLUMNS) float64, or None
    tickets,  # (programs) int32 zeros, or None
    rows,
    chunk_rows,
    chunks,
    correction,
    LAYERS: tl.constexpr,
    VECTOR: tl.constexpr,
    PERMUTED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """relu(x + bias), and its moments, packed."""
    complete, mean, var, packed, mask, _ = reduce_columns(
        inputs, starts, columns, strides, offsets, inners, partials, tickets, rows, chunk_rows, chunks, correction,
        outputs, output_strides, bias, channel_columns, mean_out.dtype.element_ty, LAYERS, VECTOR, PERMUTED,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_CHUNKS,
    )  # fmt: skip
    if complete:
        tl.store(mean_out + packed, mean, mask=mask)
        tl.store(var_out + packed, var, mask=mask)


def relu_moments_launches(
    x: Tensor, bias: Tensor | None, correction: int, y: Tensor, mean: Tensor, var: Tensor
) -> list[_plan.Launch]:
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
    (group,) = _plan.groups("tap", [x], [y])
    arguments = {
        **reduction_arguments(group, [x], correction),
        "outputs": group.tensors([y]),
        "output_strides": group.strides[1],
        "bias": bias,
        "channel_columns": channel_columns,
        "mean_out": mean,
        "var_out": var,
    }
    return [_plan.Launch(relu_moments_kernel, group.programs, arguments, group.tile.warps, _plan.REGISTERS)]


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
) -> list[_plan.Launch]:
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
