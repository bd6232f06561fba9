"""The functions that a tapped network calls instead of its own operations.

A tap returns the value for the next operation of the network, and what is wanted of it: the features, their moments, or
both. If only moments are wanted, features are not kept.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moment_ops.ops.relu_moments import identity_moments, relu_moments

MOMENTS, FEATURES, BOTH = "moments", "features", "both"


class Collected(NamedTuple):
    """The moments of one tap over one batch: (F,) mean and variance, features if wanted, N, and the shape of a row."""

    mean: Tensor
    var: Tensor
    features: Tensor | None
    rows: int
    shape: tuple[int, ...]


def _collected(y: Tensor, mean: Tensor, var: Tensor, wanted: str) -> Collected:
    return Collected(mean, var, y if wanted == BOTH else None, y.shape[0], tuple(y.shape[1:]))


def relu_tap(x: Tensor, bias: Tensor | None, wanted: str) -> tuple[Tensor, Any]:
    """`relu(x + bias)`, and what is wanted of it."""
    if wanted == FEATURES:
        y = torch.relu(x if bias is None else x + bias.view(-1, *[1] * (x.dim() - 2)))
        return y, y
    y, mean, var = relu_moments(x, bias)
    return y, _collected(y, mean, var, wanted)


def identity_tap(value: Any, wanted: str, copied: bool = False) -> tuple[Any, Any]:
    """The output of a call, and what is wanted of it. Of a tuple or a list, the first Tensor is tapped.

    With `copied`, a copy goes on through the network, which may write to it.
    """
    if isinstance(value, (tuple, list)):
        at = next((i for i, item in enumerate(value) if isinstance(item, Tensor)), None)
        if at is not None:
            y, statistic = identity_tap(value[at], wanted, copied)
            items = [*value[:at], y, *value[at + 1 :]]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items), statistic
    if not isinstance(value, Tensor):
        raise TypeError(f"layers: a selected module returned {type(value).__name__}, expected a Tensor")
    if wanted == FEATURES:
        return value.clone() if copied else value, value
    y, mean, var = identity_moments(value)
    return y.clone() if copied else y, _collected(y, mean, var, wanted)


def bias_in_convolution(bias: Tensor) -> Tensor | None:
    """The bias, except on a GPU, where PyTorch adds it in a separate pass and the tap adds it instead."""
    return None if bias.is_cuda else bias


def bias_in_tap(bias: Tensor) -> Tensor | None:
    """The bias on a GPU, where the convolution leaves it out."""
    return bias if bias.is_cuda else None


ALL = (relu_tap, identity_tap, bias_in_convolution, bias_in_tap)
