"""What a tapped network calls in the place of its own operations.

Every tap gives the value that goes on through the network, and its statistic: the features, their moments, or both, as
is wanted. For moments alone no features are kept.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moment_ops.ops.relu_moments import identity_moments, relu_moments

MOMENTS, FEATURES, BOTH = "moments", "features", "both"


class Collected(NamedTuple):
    """The moments of one tap over one batch: (F,) mean and variance, features if wanted, rows, the shape of a row."""

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
    """A module's output, and what is wanted of it; of a tuple or a list, of its first tensor.

    With `copied`, what goes on through the network is a copy: it may be written to.
    """
    if isinstance(value, (tuple, list)):
        at = next((i for i, item in enumerate(value) if isinstance(item, Tensor)), None)
        if at is not None:
            y, statistic = identity_tap(value[at], wanted, copied)
            items = [*value[:at], y, *value[at + 1 :]]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items), statistic
    if not isinstance(value, Tensor):
        raise TypeError(f"layers: a tapped module returns {type(value).__name__}, expected a Tensor")
    if wanted == FEATURES:
        return value.clone() if copied else value, value
    y, mean, var = identity_moments(value)
    return y.clone() if copied else y, _collected(y, mean, var, wanted)


def bias_in_convolution(bias: Tensor) -> Tensor | None:
    """The bias, except on GPUs, where PyTorch adds it in a pass of its own and the tap does it for nothing."""
    return None if bias.is_cuda else bias


def bias_in_tap(bias: Tensor) -> Tensor | None:
    """The bias where the convolution leaves it out."""
    return bias if bias.is_cuda else None


ALL = (relu_tap, identity_tap, bias_in_convolution, bias_in_tap)
