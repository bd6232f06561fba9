"""Checks of features and options that the losses of covariances share."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moment_ops.distributed import ProcessGroup, group_size, merge_covariances
from moment_ops.losses.covariance_matching import Merge
from moment_ops.ops import checks
from moment_ops.ops.layout import as_rows, columns_of
from moment_ops.ops.reference_covariance import PRECISIONS
from moment_ops.statistics import Moments


def check_options(reduction: Any, precision: Any, correction: Any, joint: Any) -> None:
    checks.option(reduction, "reduction", ("sum", "mean"))
    checks.option(precision, "precision", PRECISIONS)
    checks.correction(correction)
    if not isinstance(joint, bool):
        raise TypeError(f"joint: got {joint!r}, expected a bool")


def joined(features: Sequence[Tensor], joint: bool) -> list[Tensor]:
    """With `joint`, one layer of all columns."""
    return [torch.cat([as_rows(x) for x in features], 1)] if joint else list(features)


def widths_of(features: Sequence[Tensor], joint: bool) -> list[int]:
    """Columns of every covariance."""
    widths = [columns_of(x) for x in features]
    return [sum(widths)] if joint else widths


def check_widths(features: Sequence[Tensor], widths: Sequence[int], name: str, names: Sequence[str] | None) -> None:
    """The features called `names` have as many columns as `name` has."""
    if len(features) != len(widths):
        raise ValueError(f"input: got {len(features)} layers, expected {len(widths)} as in {name}")
    for i, (x, width) in enumerate(zip(features, widths, strict=True)):
        if columns_of(x) != width:
            label = checks.label_of("input", i, features, names)
            raise ValueError(
                f"{label}: got {columns_of(x)} columns in shape {tuple(x.shape)}, expected {width} as in {name}"
            )


def check_rows(rows: int, correction: int, name: str = "input") -> None:
    if rows <= max(correction, 1):
        raise ValueError(f"{name}: got a batch of {rows}, expected more than {max(correction, 1)} rows")


def check_device(features: Sequence[Tensor], others: Sequence[Tensor], name: str) -> None:
    """The features are on the device of all others."""
    for other in others:
        if other.device != features[0].device:
            raise ValueError(f"input: got device {features[0].device}, expected {other.device} as in {name}")


def scales(weights: Sequence[float], widths: Sequence[int], reduction: str) -> list[float]:
    """The weights of squared Frobenius norms, multiplied by the factor of the reduction."""
    r = 1 / sum(width * width for width in widths) if reduction == "mean" else 1.0
    return [r * w for w in weights]


def means(packed: Tensor, widths: Sequence[int]) -> Moments:
    """Packed means of (N, D) layers."""
    return Moments(packed, shapes=tuple((width,) for width in widths), validate=False)


def merge_over(
    process_group: ProcessGroup, widths: Sequence[int], pivot: Tensor | None, correction: int
) -> Merge | None:
    """How `match_covariances` merges over several processes; None on one process."""
    if group_size(process_group) == 1:
        return None
    return partial(merge_covariances, widths=widths, pivot=pivot, correction=correction, process_group=process_group)


def names_of(given: Any) -> tuple[str, ...] | None:
    """The names of the layers of a target or of other features, or None."""
    return given.names if isinstance(given, Moments) else checks.names_of(given)
