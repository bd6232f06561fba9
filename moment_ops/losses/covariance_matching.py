"""Matching explicit covariances: autograd nodes around the operators `covariance_match_` and `match_`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moment_ops.distributed import covariance_of_rank
from moment_ops.losses.matching import match_moments
from moment_ops.ops import checks, triangle
from moment_ops.ops.averages import AVERAGES, step_for_slope
from moment_ops.ops.covariance import covariance as covariance_op
from moment_ops.ops.covariance import covariance_match_backward
from moment_ops.ops.layout import columns_of, statistics_dtype
from moment_ops.ops.nodes import Node, wants_grad
from moment_ops.ops.records import CovarianceMatch, Match

# From packed means, packed covariances with correction 0 and the number of rows to those of all processes.
Merge = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


class _MatchCovariance(Node):
    """(loss, means) of features, by the operator `covariance_match_`. Backward reads the features once more."""

    @staticmethod
    def forward(ctx: Any, correction: int, match: CovarianceMatch, *features: Tensor) -> tuple[Tensor, Tensor]:
        loss, mean, grad = torch.ops.moment_ops.covariance_match_.default(list(features), correction, *match)
        ctx.correction, ctx.precision = correction, match.precision
        ctx.average_kind, ctx.options, ctx.weight = match.average_kind, match.options, match.weight
        ctx.set_materialize_grads(False)
        step = step_for_slope(match.average_kind, match.options, match.state, match.update)
        ctx.save_for_backward(mean, grad, step, *features)
        return loss, mean

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_mean: Tensor | None) -> tuple[Tensor | None, ...]:
        mean, derivative, step, *features = ctx.saved_tensors
        if grad is None:
            grad = mean.new_zeros(())
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            d_features = _differentiable_backward(ctx, features, derivative, step, grad, grad_mean)
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
        return None, None, *d_features


def _differentiable_backward(
    ctx: Any,
    features: Sequence[Tensor],
    derivative: Tensor,
    step: Tensor | None,
    grad: Tensor,
    grad_mean: Tensor | None,
) -> list[Tensor]:
    """The backward that is itself differentiated: the saved derivative plus its dependence on the covariance."""
    widths = [x[0].numel() for x in features]
    grad_means = [None] * len(features) if grad_mean is None else list(grad_mean.split(widths))
    saved = triangle.split(derivative, widths)
    slope = AVERAGES[ctx.average_kind].slope(ctx.options, step)
    results = []
    for x, width, packed, weight, g in zip(features, widths, saved, ctx.weight, grad_means, strict=True):
        cov, mean = covariance_op(x, ctx.correction, True, ctx.precision)
        full = triangle.unpack(packed, width) + 2 * weight * slope * slope * (cov - cov.detach())
        results.append(
            torch.ops.moment_ops.covariance_backward.default(
                grad * full, g, x, mean, ctx.correction, True, ctx.precision
            )
        )
    return results


def match_covariances(
    features: Sequence[Tensor], match: CovarianceMatch, correction: int, merge: Merge | None = None
) -> tuple[Tensor, Tensor]:
    """The weighted sum of squared Frobenius distances, and the packed means. Both are differentiable.

    Args:
        features: one (N, ...) Tensor per layer.
        match: targets, weights and average; the field `keep` is set here.
        merge: merges the means and covariances over several processes.
    """
    checks.check_tangents(match.target, "target")
    dtype = statistics_dtype(features[0].dtype)
    wants_target = wants_grad(*match.target) and torch.is_grad_enabled()
    if merge is None and not wants_target and all(t.dtype == dtype for t in match.target):
        keep = torch.is_grad_enabled() and wants_grad(*features)
        return _MatchCovariance.call(correction, match._replace(keep=keep), *features)

    if merge is None:
        results = [covariance_op(x, correction, True, match.precision) for x in features]
    else:
        results = [covariance_of_rank(x, match.precision) for x in features]
    mean = torch.cat([m for _, m in results])
    packed = triangle.pack_all([cov for cov, _ in results])
    if merge is not None:
        mean, packed = merge(mean, packed, features[0].shape[0])
    target = triangle.pack_all(match.target)
    widths = [columns_of(x) for x in features]
    weight = torch.cat([w * triangle.counts([width], target) for width, w in zip(widths, match.weight, strict=True)])
    entries = Match(
        target,
        None,
        mean_weight=weight,
        average_kind=match.average_kind,
        options=match.options,
        state=match.state,
        update=match.update,
    )
    return match_moments(packed, None, entries), mean
