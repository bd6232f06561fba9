"""The weights of a loss: numbers, one number per layer, or a vector."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Weight: TypeAlias = float | Sequence[float] | Tensor


def unpack_weight(weight: Weight, name: str, sizes: Sequence[int], like: Tensor) -> tuple[float, Tensor | None]:
    """A weight as a scale and, where it differs between columns, a packed vector."""
    if isinstance(weight, Tensor):
        if weight.shape != like.shape:
            raise ValueError(f"{name}: got shape {tuple(weight.shape)}, expected {tuple(like.shape)}, one per column")
        if not weight.is_floating_point():
            raise TypeError(f"{name}: got dtype {weight.dtype}, expected a floating-point Tensor")
        if weight.requires_grad:
            raise ValueError(f"{name}: got a Tensor that requires grad, expected a constant: weights get no gradients")
        return 1.0, weight.to(device=like.device, dtype=like.dtype)
    if isinstance(weight, (int, float)):
        return float(weight), None
    if not isinstance(weight, Sequence) or not all(isinstance(w, (int, float)) for w in weight):
        raise TypeError(f"{name}: got {type(weight).__name__}, expected a float, one float per layer, or a Tensor")
    if len(weight) != len(sizes):
        raise ValueError(f"{name}: got {len(weight)} weights, expected one per layer, {len(sizes)}")
    return 1.0, torch.cat([like.new_full((size,), float(w)) for w, size in zip(weight, sizes, strict=True)])
