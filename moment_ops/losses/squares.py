"""Means of squares, which are representable although the squares may not be."""

from typing import Any

import torch
from torch import Tensor

from moment_ops.ops.nodes import Node
from moment_ops.ops.room import column_scale, is_readable, is_seen_finite


class _DividedSquares(Node):
    @staticmethod
    def forward(ctx: Any, x: Tensor, divisor: float) -> Tensor:
        ctx.divisor = divisor
        ctx.save_for_backward(x)
        scale = column_scale(x.reshape(-1, 1))
        total = (x * scale).square().sum(dtype=torch.float64) / divisor
        scale = scale.squeeze(0).double()
        return total / scale / scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return (2 * (grad / ctx.divisor)).to(x.dtype) * x, None


def divided_squares(x: Tensor, divisor: float) -> Tensor:
    """`x.square().sum() / divisor` in float64. Twice differentiable."""
    if is_readable(x):
        value = x.square().sum(dtype=torch.float64) / divisor
        if is_seen_finite(value):
            return value
    return _DividedSquares.call(x, divisor)
