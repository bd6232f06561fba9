"""The covariance loss through explicit matrices, as autograd nodes over `covariance_match_` and `match_`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moment_ops.averages import Average
from moment_ops.losses.matching import Matcher
from moment_ops.ops import triangle
from moment_ops.ops.covariance import covariance as covariance_op
from moment_ops.ops.covariance import covariance_match_backward
from moment_ops.ops.layout import columns_of, statistics_dtype
from moment_ops.ops.nodes import Node, wants_grad

# From packed means, packed covariances over N and N to those over all processes.
Merge = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


class _MatchCovariance(Node):
    """(loss, means) of features: the operator `covariance_match_`; backward reads the features once more."""

    @staticmethod
    def forward(
        ctx: Any,
        correction: int,
        weight: list[float],
        average: tuple[str, list[float], float],
        update: bool,
        keep: bool,
        precision: str,
        layers: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        features, target, state = tensors[:layers], tensors[layers : 2 * layers], tensors[2 * layers :]
        kind, options, ctx.curvature = average
        loss, mean, grad = torch.ops.moment_ops.covariance_match_.default(
            list(features),
            correction,
            list(target),
            weight,
            kind,
            options,
            list(state),
            update,
            keep,
            precision,
        )
        ctx.correction, ctx.weight, ctx.precision = correction, weight, precision
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mean, grad, *features)
        return loss, mean

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_mean: Tensor | None) -> tuple[Tensor | None, ...]:
        mean, derivative, *features = ctx.saved_tensors
        if grad is None:
            grad = mean.new_zeros(())
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            d_features = _differentiable_backward(ctx, features, derivative, grad, grad_mean)
        else:
            d_features = covariance_match_backward(
                features,
                mean,
                derivative,
                grad_mean,
                scale=grad,
                correction=ctx.correction,
                precision=ctx.precision,
            )
        others = len(ctx.needs_input_grad) - 7 - len(features)
        return *([None] * 7), *d_features, *([None] * others)


def _differentiable_backward(
    ctx: Any, features: Sequence[Tensor], derivative: Tensor, grad: Tensor, grad_mean: Tensor | None
) -> list[Tensor]:
    """For a backward that is differentiated: the saved derivative with its dependence on the covariance put back."""
    widths = [x[0].numel() for x in features]
    grad_means = [None] * len(features) if grad_mean is None else list(grad_mean.split(widths))
    saved = triangle.split(derivative, widths)
    results = []
    for x, width, packed, weight, g in zip(features, widths, saved, ctx.weight, grad_means, strict=True):
        cov, mean = covariance_op(x, ctx.correction, True, ctx.precision)
        full = triangle.unpack(packed, width) + 2 * weight * ctx.curvature * (cov - cov.detach())
        results.append(
            torch.ops.moment_ops.covariance_backward.default(
                grad * full, g, x, mean, ctx.correction, True, ctx.precision
            )
        )
    return results


def match_covariances(
    layers: Sequence[Tensor],
    target: Sequence[Tensor],
    *,
    correction: int,
    weight: Sequence[float],
    precision: str,
    average: Average | None = None,
    state: Sequence[Tensor] = (),
    update: bool = False,
    merge: Merge | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum of weighted squared Frobenius distances, and the packed means; both differentiable.

    Args:
        layers: (N, ...) features.
        target: per layer a symmetric (D, D) matrix or its packed triangle.
        state: of the average, on packed triangles.
        merge: over processes.
    """
    widths = [columns_of(x) for x in layers]
    configuration: tuple[str, list[float], float] = ("none", [], 1.0)
    if average is not None:
        configuration = average.kind, average.options(sum(width * width for width in widths)), average.curvature
    dtype = statistics_dtype(layers[0].dtype)
    wants_target = wants_grad(*target) and torch.is_grad_enabled()
    if merge is None and not wants_target and all(t.dtype == dtype for t in target):
        keep = torch.is_grad_enabled() and wants_grad(*layers)
        return _MatchCovariance.call(
            correction, list(weight), configuration, update, keep, precision, len(layers), *layers, *target, *state
        )

    results = [covariance_op(x, correction if merge is None else 0, True, precision) for x in layers]
    mean = torch.cat([m for _, m in results])
    packed = torch.cat([triangle.pack(cov) for cov, _ in results])
    if merge is not None:
        mean, packed = merge(mean, packed, layers[0].shape[0])
    goal = torch.cat([t if t.dim() == 1 else triangle.pack(t) for t in target])
    entry_weight = torch.cat([w * triangle.counts([width], goal) for width, w in zip(widths, weight, strict=True)])
    matcher = Matcher(
        (goal, None),
        (tuple(goal.shape),),
        correction,
        ((1.0, entry_weight), (1.0, None)),
        "sum",
        average,
        state,
        update,
    )
    # Averages count the entries of full matrices.
    matcher.average = configuration
    return matcher.from_moments(packed, None, None, correction), mean
