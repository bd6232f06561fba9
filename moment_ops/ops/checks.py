"""Argument checks from shapes, dtypes, devices and strides alone: nothing here reads from a device."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moment_ops.ops import plans
from moment_ops.ops.library import has_tangent, no_forward_mode

FEATURE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def features(input: Any, name: str = "input") -> list[Tensor]:
    """A tensor or a sequence of tensors as a list of layers, checked."""
    layers = [input] if isinstance(input, Tensor) else input
    if not isinstance(layers, (list, tuple)):
        raise TypeError(f"{name}: got {type(input).__name__}, expected a Tensor or a sequence of Tensors")
    if len(layers) == 0:
        raise ValueError(f"{name}: got an empty sequence, expected at least one Tensor")
    for i, x in enumerate(layers):
        label = name if isinstance(input, Tensor) else f"{name}[{i}]"
        if not isinstance(x, Tensor):
            raise TypeError(f"{label}: got {type(x).__name__}, expected a Tensor")
        if x.dtype not in FEATURE_DTYPES:
            raise TypeError(f"{label}: got dtype {x.dtype}, expected float32, bfloat16, float16 or float64")
        if x.layout != torch.strided:
            raise TypeError(f"{label}: got layout {x.layout}, expected a strided Tensor")
        if x.dim() == 0:
            raise ValueError(f"{label}: got a scalar Tensor, expected the batch on dimension 0")
        if x.dtype != layers[0].dtype:
            raise TypeError(f"{label}: got dtype {x.dtype}, expected {layers[0].dtype} as in {name}[0]")
        if x.device != layers[0].device:
            raise ValueError(f"{label}: got device {x.device}, expected {layers[0].device} as in {name}[0]")
    _no_forward_mode(layers, name)
    return list(layers)


class Batch(NamedTuple):
    """Features with the batch on dimension 0 that have passed the checks."""

    layers: Sequence[Tensor]
    signature: plans.Signature | None
    shapes: tuple[tuple[int, ...], ...]  # of a row of every layer
    requires_grad: bool  # of any layer


_BATCHES: plans.Plans[tuple[tuple[tuple[int, ...], ...], bool]] = plans.Plans()


def batch_of(input: Any, name: str = "input") -> Batch:
    """A tensor or a sequence of tensors with the batch on dimension 0, checked once per signature."""
    layers = [input] if isinstance(input, Tensor) else input

    signature = plans.signature(layers) if isinstance(layers, (list, tuple)) else None
    return Batch(layers, signature, *_BATCHES.find(signature, None, _check_batch, input, name))


def _check_batch(input: Any, name: str) -> tuple[tuple[tuple[int, ...], ...], bool]:
    layers = features(input, name)
    batch(layers, 0, name)
    return tuple(tuple(x.shape[1:]) for x in layers), any(x.requires_grad for x in layers)


def batch(layers: Sequence[Tensor], dim: int, name: str = "input") -> None:
    """Every layer has the same number of rows, at least one, and at least one column."""
    rows = layers[0].shape[dim]
    for i, x in enumerate(layers):
        label = name if len(layers) == 1 else f"{name}[{i}]"
        if x.shape[dim] == 0:
            raise ValueError(f"{label}: got an empty batch of shape {tuple(x.shape)}, expected at least one row")
        if x.shape[dim] != rows:
            raise ValueError(f"{label}: got batch size {x.shape[dim]}, expected {rows} as in {name}[0]")
        if x.numel() == 0:
            raise ValueError(f"{label}: got shape {tuple(x.shape)} without elements")


def dimensions(dim: Any, layers: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """The reduced dimensions of every layer: ascending, non-negative."""
    dims = (dim,) if isinstance(dim, int) else dim
    if isinstance(dim, bool) or not isinstance(dims, (list, tuple)) or not all(isinstance(d, int) for d in dims):
        raise TypeError(f"dim: got {dim!r}, expected an int or a sequence of ints")
    if len(dims) == 0:
        raise ValueError("dim: got an empty sequence, expected at least one dimension")
    result = []
    for x in layers:
        for d in dims:
            if not -x.dim() <= d < x.dim():
                raise ValueError(f"dim: got {d}, out of range for a layer of shape {tuple(x.shape)}")
        normalized = tuple(sorted(d % x.dim() for d in dims))
        if len(set(normalized)) != len(normalized):
            raise ValueError(f"dim: got {dim!r}, which names a dimension of shape {tuple(x.shape)} twice")
        result.append(normalized)
    return result


def correction(value: Any) -> int:
    """The degrees of freedom that are subtracted from N."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"correction: got {value!r}, expected an int")
    if value < 0:
        raise ValueError(f"correction: got {value}, expected a non-negative int")
    return value


def channel_bias(bias: Any, x: Tensor) -> None:
    """One value per channel, dimension 1 of `x`."""
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
    _no_forward_mode([bias], "bias")


def option(value: Any, name: str, options: Sequence[str]) -> str:
    """One of several words."""
    if value not in options:
        raise ValueError(f"{name}: got {value!r}, expected {' or '.join(map(repr, options))}")
    return value


def _no_forward_mode(layers: Sequence[Tensor], name: str) -> None:
    """Forward-mode differentiation would silently give zero tangents."""
    if not torch.compiler.is_compiling() and has_tangent(layers):
        raise NotImplementedError(no_forward_mode(name))


def embeddings(x: Any, name: str) -> None:
    """(N, D) of features with at least two rows."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected a Tensor")
    features(x, name)
    if x.dim() != 2:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected (N, D)")
    if x.shape[0] < 2 or x.shape[1] == 0:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected at least two rows and one column")
