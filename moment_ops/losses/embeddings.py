"""The check of features for losses of a single layer."""

from typing import Any

from torch import Tensor

from moment_ops.ops import checks
from moment_ops.ops.layout import columns_of


def check_embeddings(x: Any, name: str, alone: bool) -> None:
    """(N, ...) features with at least two rows; with any number of rows on one of several processes."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected a Tensor")
    checks.features(x, name)
    if (alone and x.shape[0] < 2) or columns_of(x) == 0:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected at least two rows and one column")
