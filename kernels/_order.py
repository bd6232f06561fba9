"""The order of a layer's columns: in memory, and in the packed vectors.

The kernels know plain and channels-last layouts. Columns in any other order are reduced in memory order, and PyTorch
permutes the layer's vectors, never its features.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


@functools.lru_cache(maxsize=4096)
def inner_columns(shape: tuple[int, ...], stride: tuple[int, ...]) -> int | None:
    """The columns that channels-last layouts put innermost: their memory order is the logical order, rotated.

    1 for plain layouts; None for any other order of dimensions.
    """
    dims = [i for i in range(1, len(shape)) if shape[i] != 1]
    order = sorted(dims, key=lambda i: -stride[i])
    for k in range(max(1, len(dims))):
        if order == dims[k:] + dims[:k]:
            return math.prod(shape[i] for i in dims[:k])
    return None


def is_native(x: Tensor) -> bool:
    """Whether the kernels know where the columns of `x`, rows on dimension 0, go in the packed vectors."""
    return x.is_contiguous() or inner_columns(tuple(x.shape), x.stride()) is not None


def rows_first(tensors: Sequence[Tensor], dim: int) -> list[Tensor]:
    """Views with the reduced dimension on 0."""
    return list(tensors) if dim == 0 else [x.movedim(dim, 0) for x in tensors]


def _memory_order(x: Tensor) -> list[int]:
    """The feature dimensions, from outermost to innermost."""
    return sorted(range(1, x.dim()), key=lambda i: -x.stride(i))


def in_memory_order(layers: Sequence[Tensor]) -> list[Tensor]:
    """Views whose columns the kernels pack as they lie, where they know no better."""
    return [x if is_native(x) else x.permute(0, *_memory_order(x)) for x in layers]


def vector_in_memory_order(vector: Tensor | None, layers: Sequence[Tensor]) -> Tensor | None:
    """A packed vector in the order of `in_memory_order(layers)`: itself where that is the logical order."""
    if vector is None or all(map(is_native, layers)):
        return vector
    parts = []
    for part, x in zip(vector.split([x[0].numel() for x in layers]), layers, strict=True):
        if not is_native(x):
            part = part.view(x.shape[1:]).permute([i - 1 for i in _memory_order(x)]).reshape(-1)
        parts.append(part)
    return torch.cat(parts)


def restore_logical_order(vector: Tensor, layers: Sequence[Tensor]) -> None:
    """Undo `vector_in_memory_order`, in place."""
    if all(map(is_native, layers)):
        return
    for part, x in zip(vector.split([x[0].numel() for x in layers]), layers, strict=True):
        if not is_native(x):
            order = _memory_order(x)
            stored = part.view([x.shape[i] for i in order])
            part.copy_(stored.permute([order.index(i) for i in range(1, x.dim())]).reshape(-1))
