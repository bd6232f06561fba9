"""What a covariance loss is given: targets, samples, weights and options, checked; and the choice of the method."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from moment_ops.covariances import missing_memory
from moment_ops.losses.dual import ESTIMATORS
from moment_ops.ops import checks
from moment_ops.ops.layout import columns_of
from moment_ops.ops.reference_covariance import PRECISIONS
from moment_ops.statistics import Moments

METHODS = ("auto", "primal", "dual")
CovarianceTarget: TypeAlias = Moments | checks.Features
LayerWeight: TypeAlias = float | Sequence[float]


def layer_weights(weight: Any, name: str, layers: int) -> list[float]:
    """A float, or one per layer, as a list."""
    if isinstance(weight, (int, float)) and not isinstance(weight, bool):
        return [float(weight)] * layers
    if not isinstance(weight, Sequence) or not all(isinstance(w, (int, float)) for w in weight):
        raise TypeError(f"{name}: got {type(weight).__name__}, expected a float or one float per layer")
    if len(weight) != layers:
        raise ValueError(f"{name}: got {len(weight)} weights, expected one per layer, {layers}")
    return [float(w) for w in weight]


def is_zero(weight: LayerWeight) -> bool:
    return not any(weight) if isinstance(weight, Sequence) else weight == 0


def joined(layers: Sequence[Tensor], joint: bool) -> list[Tensor]:
    """All columns as one layer, where they are to be one feature vector."""
    return [torch.cat([x.flatten(1) for x in layers], 1)] if joint else list(layers)


def check_one_of(target: Any, samples: Any) -> None:
    if (target is None) == (samples is None):
        got = "neither" if target is None else "both"
        raise ValueError(f"target, samples: got {got}, expected exactly one of them")


def matrices_of(target: CovarianceTarget) -> list[Tensor]:
    """The target's covariances, one (D, D) per layer; shapes and types are checked."""
    if isinstance(target, Moments):
        if target.cov is None:
            raise ValueError("target: got Moments without covariances, expected one per layer")
        return list(target.cov)
    matrices = checks.features(target, "target")
    for i, matrix in enumerate(matrices):
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or matrix.numel() == 0:
            label = "target" if isinstance(target, Tensor) else f"target[{i}]"
            raise ValueError(f"{label}: got shape {tuple(matrix.shape)}, expected a square matrix (D, D)")
    return matrices


def names_of(given: Any) -> tuple[str, ...] | None:
    """The names of the layers of a target or of samples."""
    return given.names if isinstance(given, Moments) else checks.names_of(given)


def check_mean_weight(target: Any, mean_weight: LayerWeight) -> None:
    if target is not None and not isinstance(target, Moments) and not is_zero(mean_weight):
        raise ValueError(
            f"mean_weight: got {mean_weight!r}, expected 0 with matrices as target; give Moments, which have means"
        )


def check_values(matrices: Sequence[Tensor]) -> None:
    """As those of Moments: finite, symmetric, variances not negative. Reads from the device."""
    for matrix in matrices:
        Moments(matrix.new_zeros(len(matrix)), cov=(matrix.detach(),), validate=False).check_values()


def check_layers(layers: Sequence[Tensor], widths: Sequence[int], name: str) -> None:
    if len(layers) != len(widths):
        raise ValueError(f"input: got {len(layers)} layers, expected {len(widths)} as in {name}")
    for i, (x, width) in enumerate(zip(layers, widths, strict=True)):
        if columns_of(x) != width:
            label = "input" if len(layers) == 1 else f"input[{i}]"
            raise ValueError(
                f"{label}: got {columns_of(x)} columns in shape {tuple(x.shape)}, expected {width} as {name}"
            )


def check_rows(layers: Sequence[Tensor], correction: int, name: str = "input") -> None:
    rows = layers[0].shape[0]
    if rows <= max(correction, 1):
        raise ValueError(f"{name}: got a batch of {rows}, expected more than {max(correction, 1)} rows")


def check_options(method: Any, reduction: Any, precision: Any, estimator: Any, correction: Any, joint: Any) -> None:
    checks.option(method, "method", METHODS)
    checks.option(reduction, "reduction", ("sum", "mean"))
    checks.option(precision, "precision", PRECISIONS)
    checks.option(estimator, "estimator", ESTIMATORS)
    checks.correction(correction)
    if not isinstance(joint, bool):
        raise TypeError(f"joint: got {joint!r}, expected a bool")


def choose_method(method: str, layers: Sequence[Tensor], rows: int, *, kept: bool, estimator: str, joint: bool) -> str:
    """The method for samples, "primal" or "dual".

    Args:
        layers: the samples' features, M rows.
        rows: N of the batch.
        kept: the target's covariance is computed once and kept, so that its products do not count.
    """
    if method == "primal" and estimator == "unbiased":
        raise ValueError("estimator: got 'unbiased' with method 'primal', expected method 'dual'")
    if method != "auto":
        return method
    widths = [sum(columns_of(x) for x in layers)] if joint else [columns_of(x) for x in layers]
    if estimator == "unbiased":
        return "dual"
    if any(missing_memory(width, layers[0].dtype, layers[0].device) for width in widths):
        return "dual"
    theirs = layers[0].shape[0]
    both = rows + theirs
    primal = sum(((rows if kept else both) + 2 * rows) * width**2 for width in widths)
    dual = sum((both**2 + 2 * rows * both) * width for width in widths)
    return "dual" if dual < primal else "primal"


def check_not_dual(method: str) -> None:
    if method == "dual":
        raise ValueError("method: got 'dual' with a target matrix, expected samples: the dual way never forms matrices")


def scales(weights: Sequence[float], widths: Sequence[int], reduction: str) -> list[float]:
    r = 1 / sum(width * width for width in widths) if reduction == "mean" else 1.0
    return [r * w for w in weights]


def same_dtype(layers: Sequence[Tensor], samples: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Both in the wider of their dtypes."""
    dtype = torch.promote_types(layers[0].dtype, samples[0].dtype)
    return [x.to(dtype) for x in layers], [y.to(dtype) for y in samples]


def check_device(layers: Sequence[Tensor], matrices: Sequence[Tensor]) -> None:
    for i, matrix in enumerate(matrices):
        if matrix.device != layers[0].device:
            raise ValueError(f"input: got device {layers[0].device}, expected {matrix.device} as target[{i}]")
