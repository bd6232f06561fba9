"""Memory layouts: which features the kernels read as they are, and the gradients' strides.

Native layouts have dense feature dimensions in any order, and rows any distance apart: contiguous, channels-last, every
k-th row, a slice of the leading feature dimension. Other inputs are copied once.
"""

from collections.abc import Sequence

import torch

from moment_ops.ops.nodes import is_transformed

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 statistics for fp64 features, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def feature_shape(x: torch.Tensor, dim: int) -> tuple[int, ...]:
    """The shape of `x` without the reduced dimension."""
    dim %= x.dim()
    return (*x.shape[:dim], *x.shape[dim + 1 :])


def _has_dense_columns(x: torch.Tensor, dim: int) -> bool:
    dim %= x.dim()
    columns = [(stride, size) for i, (stride, size) in enumerate(zip(x.stride(), x.shape, strict=True)) if i != dim]
    expected = 1
    for stride, size in sorted(column for column in columns if column[1] != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def with_dense_columns(x: torch.Tensor, dim: int) -> torch.Tensor:
    """`x` itself if its layout is native, else a copy whose reduced dimension is outermost in memory."""
    if dim == 0 and (x.is_contiguous() or is_channels_last(x)):
        return x
    if _has_dense_columns(x, dim):
        return x
    return x.movedim(dim, 0).contiguous().movedim(0, dim)


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether a 4- or 5-dimensional tensor is channels-last. Within a transform this is unknown, and False."""
    return not is_transformed() and x.dim() in _CHANNELS_LAST and x.is_contiguous(memory_format=_CHANNELS_LAST[x.dim()])


def has_same_columns(a: torch.Tensor, b: torch.Tensor, dim: int) -> bool:
    """Whether the feature dimensions of two tensors of one shape have the same strides. Rows may have others."""
    dim %= a.dim()
    return all(size == 1 or i == dim or a.stride(i) == b.stride(i) for i, size in enumerate(a.shape))


def columns_of(x: torch.Tensor) -> int:
    """The number of columns of features with the batch on dimension 0."""
    return x.shape[1:].numel()


def per_column(values: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """(F,): for every column the entry of its layer in `values`, (L,).

    `repeat_interleave` needs the sizes on the device, and the host would wait for this copy.
    """
    return torch.cat([value.expand(size) for value, size in zip(values.unbind(), sizes, strict=True)])


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """Features with the batch on dimension 0 as (N, D)."""
    if x.dim() == 2:
        return x
    return x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)
