"""Checks of arguments from shapes, dtypes, devices and strides only. Nothing here reads from a device."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from moment_ops.ops import plans
from moment_ops.ops.layout import feature_shape
from moment_ops.ops.library import has_tangent, no_forward_mode

FEATURE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


Features: TypeAlias = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""Of one layer, of several, or of several with names, in order."""


def _tensors(input: Any) -> tuple[Any, tuple[str, ...] | None]:
    """Features as a list, and the names of a mapping."""
    if isinstance(input, Tensor):
        return [input], None
    if not isinstance(input, (list, tuple)) and isinstance(input, Mapping):
        return list(input.values()), tuple(str(key) for key in input)
    return input, None


def names_of(input: Any) -> tuple[str, ...] | None:
    """The names of features that are a mapping."""
    return _tensors(input)[1]


def label(name: str, i: int, names: Sequence[str] | None) -> str:
    """What an error calls one of several layers: by its index, or by its name."""
    return f"{name}[{i if names is None else repr(names[i])}]"


def label_of(name: str, i: int, tensors: Sequence[Any], names: Sequence[str] | None) -> str:
    """What an error calls a layer. A single layer without a name has the name of the argument."""
    return name if len(tensors) == 1 and names is None else label(name, i, names)


def not_nested(x: Tensor, name: str) -> None:
    """Raise TypeError for a nested Tensor, whose rows may have different shapes."""
    if x.is_nested:
        raise TypeError(f"{name}: got a nested Tensor, expected a strided one, whose rows have one shape")


def features(input: Any, name: str = "input") -> list[Tensor]:
    """A Tensor, or a sequence or mapping of Tensors, as a list of features. Checks types, dtypes, devices and
    ranks.
    """
    tensors, names = _tensors(input)
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"{name}: got {type(input).__name__}, expected a Tensor, or a sequence or mapping of Tensors")
    if len(tensors) == 0:
        kind = "sequence" if names is None else "mapping"
        raise ValueError(f"{name}: got an empty {kind}, expected at least one Tensor")
    for i, x in enumerate(tensors):
        called = name if isinstance(input, Tensor) else label(name, i, names)
        if not isinstance(x, Tensor):
            raise TypeError(f"{called}: got {type(x).__name__}, expected a Tensor")
        not_nested(x, called)
        if x.dtype not in FEATURE_DTYPES:
            raise TypeError(f"{called}: got dtype {x.dtype}, expected float32, bfloat16, float16 or float64")
        if x.layout != torch.strided:
            raise TypeError(f"{called}: got layout {x.layout}, expected a strided Tensor")
        if x.dim() == 0:
            raise ValueError(f"{called}: got a scalar Tensor, expected the batch on dimension 0")
        if x.dtype != tensors[0].dtype:
            first = label(name, 0, names)
            raise TypeError(f"{called}: got dtype {x.dtype}, expected {tensors[0].dtype} as in {first}")
        if x.device != tensors[0].device:
            first = label(name, 0, names)
            raise ValueError(f"{called}: got device {x.device}, expected {tensors[0].device} as in {first}")
    check_tangents(tensors, name)
    return list(tensors)


class Batch(NamedTuple):
    """Features with the batch on dimension 0 that have passed the checks."""

    features: Sequence[Tensor]
    signature: plans.Signature | None
    shapes: tuple[tuple[int, ...], ...]  # of a row of every layer
    requires_grad: bool  # of any layer
    names: tuple[str, ...] | None  # those of a mapping


_BATCHES: plans.Plans[tuple[tuple[tuple[int, ...], ...], bool]] = plans.Plans()


def batch_of(input: Any, name: str = "input", *, empty: bool | None = False) -> Batch:
    """Features with the batch on dimension 0. They are checked once per signature, to which names do not belong."""
    tensors, names = _tensors(input)
    signature = plans.signature(tensors) if isinstance(tensors, (list, tuple)) else None
    return Batch(tensors, signature, *_BATCHES.find(signature, empty, _check_batch, input, name, empty), names)


def _check_batch(input: Any, name: str, empty: bool | None) -> tuple[tuple[tuple[int, ...], ...], bool]:
    tensors = features(input, name)
    batch(tensors, 0, name, names_of(input), empty=empty)
    return tuple(tuple(x.shape[1:]) for x in tensors), any(x.requires_grad for x in tensors)


def batch(
    tensors: Sequence[Tensor],
    dim: int,
    name: str = "input",
    names: Sequence[str] | None = None,
    *,
    empty: bool | None = False,
) -> None:
    """Check that all layers have the same number of rows, at least one row, and at least one column.

    Args:
        empty: whether there may be no rows. None permits it if there are several processes.
    """
    rows = tensors[0].shape[dim]
    if empty is None:
        empty = rows == 0 and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    for i, x in enumerate(tensors):
        called = label_of(name, i, tensors, names)
        if x.shape[dim] == 0 and not empty:
            raise ValueError(f"{called}: got an empty batch of shape {tuple(x.shape)}, expected at least one row")
        if x.shape[dim] != rows:
            first = label(name, 0, names)
            raise ValueError(f"{called}: got batch size {x.shape[dim]}, expected {rows} as in {first}")
        if x.numel() == 0 and 0 in feature_shape(x, dim):
            raise ValueError(f"{called}: got shape {tuple(x.shape)} without elements")


def dimensions(dim: Any, tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """The reduced dimensions of every layer, ascending and non-negative."""
    dims = (dim,) if isinstance(dim, int) else dim
    if isinstance(dim, bool) or not isinstance(dims, (list, tuple)) or not all(isinstance(d, int) for d in dims):
        raise TypeError(f"dim: got {dim!r}, expected an int or a sequence of ints")
    if len(dims) == 0:
        raise ValueError("dim: got an empty sequence, expected at least one dimension")
    result = []
    for x in tensors:
        for d in dims:
            if not -x.dim() <= d < x.dim():
                raise ValueError(f"dim: got {d}, out of range for a layer of shape {tuple(x.shape)}")
        normalized = tuple(sorted(d % x.dim() for d in dims))
        if len(set(normalized)) != len(normalized):
            raise ValueError(f"dim: got {dim!r}, which names a dimension of shape {tuple(x.shape)} twice")
        result.append(normalized)
    return result


def correction(value: Any) -> int:
    """Check c, the number that is subtracted from N in a divisor."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"correction: got {value!r}, expected an int")
    if value < 0:
        raise ValueError(f"correction: got {value}, expected a non-negative int")
    return value


def channel_bias(bias: Any, x: Tensor) -> None:
    """Check a bias with one value per channel, on dimension 1 of `x`."""
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias: got {type(bias).__name__}, expected a Tensor")
    if bias.dtype != x.dtype:
        raise TypeError(f"bias: got dtype {bias.dtype}, expected {x.dtype} as x")
    if bias.device != x.device:
        raise ValueError(f"bias: got device {bias.device}, expected {x.device} as x")
    if x.dim() < 2:
        raise ValueError(f"bias: x has shape {tuple(x.shape)}, without channels on dimension 1")
    if bias.dim() != 1 or bias.shape[0] != x.shape[1]:
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, expected ({x.shape[1]},)")
    check_tangents([bias], "bias")


def option(value: Any, name: str, options: Sequence[str]) -> str:
    """Check that a value is one of several options."""
    if value not in options:
        raise ValueError(f"{name}: got {value!r}, expected {' or '.join(map(repr, options))}")
    return value


def check_tangents(tensors: Sequence[Tensor | None], name: str) -> None:
    """Raise an error for forward-mode differentiation, which would silently give zero tangents."""
    if not torch.compiler.is_compiling() and has_tangent(tensors):
        raise NotImplementedError(no_forward_mode(name))
