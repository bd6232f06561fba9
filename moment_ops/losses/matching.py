"""Matching moments: autograd nodes around the operator `match_`, on features or on moments."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moment_ops.distributed import moments_of_rank
from moment_ops.ops import checks, plans
from moment_ops.ops.averages import AVERAGES, step_for_slope
from moment_ops.ops.layout import per_column, statistics_dtype
from moment_ops.ops.match import match_, match_features
from moment_ops.ops.moments import moments as moments_op
from moment_ops.ops.moments import moments_backward
from moment_ops.ops.nodes import Node, wants_grad
from moment_ops.ops.records import Match
from moment_ops.statistics import Moments

# From mean, variance, counts and correction of this process to (mean, variance, counts) over all processes.
Merge = Callable[[Tensor, Tensor | None, Tensor, int], tuple[Tensor, Tensor | None, Tensor]]


class _MatchMoments(Node):
    """loss(mean, var) by the operator `match_`. Targets may require grad, too."""

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, var: Tensor | None, target_mean: Tensor, target_var: Tensor | None, match: Match
    ) -> Tensor:
        # A narrower state is widened for the step: here, below transforms, where it may be written to.
        state = [s.to(mean.dtype) if s.is_floating_point() else s for s in match.state]
        wide = match._replace(target_mean=target_mean, target_var=target_var, state=state)
        loss, grad_mean, grad_var = match_(mean, var, wide)
        for narrow, advanced in zip(match.state, state, strict=True):
            if narrow is not advanced:
                narrow.copy_(advanced)
        ctx.has_var = target_var is not None
        _save(ctx, match, mean, var, target_mean, target_var, grad_mean, grad_var)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mean, var, target_mean, target_var, grad_mean, grad_var, *weights, step = ctx.saved_tensors
        if torch.is_grad_enabled():
            of_mean, of_var = _second_derivatives(ctx, step)
            grad_mean = _rebuilt(grad_mean, mean - target_mean, of_mean, weights[0])
            if ctx.has_var:
                grad_var = _rebuilt(grad_var, var - target_var, of_var, weights[1])
        d_mean = grad * grad_mean
        d_var = grad * grad_var if ctx.has_var else None
        wants_target = ctx.needs_input_grad[2], ctx.needs_input_grad[3]
        d_target_mean = -d_mean if wants_target[0] else None
        d_target_var = -d_var if wants_target[1] and d_var is not None else None
        return d_mean, d_var, d_target_mean, d_target_var, None


class _MatchFeatures(Node):
    """loss(features) by the operator `match_`, fused with the reduction. Backward reads the features once more."""

    @staticmethod
    def forward(
        ctx: Any, correction: int, match: Match, signature: plans.Signature | None, *features: Tensor
    ) -> Tensor:
        loss, mean, grad_mean, grad_var = match_features(features, correction, match, signature=signature)
        ctx.correction, ctx.has_var, ctx.num_layers = correction, match.target_var is not None, len(features)
        _save(ctx, match, mean, grad_mean, grad_var, *features)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mean, grad_mean, grad_var, *features, mean_weight, var_weight, step = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            of_mean, of_var = _second_derivatives(ctx, step)
            mean, var, count = moments_op(features, 0, ctx.correction, ctx.has_var)
            grad_mean = grad * _rebuilt(grad_mean, mean, of_mean, mean_weight)
            grad_var = grad * _rebuilt(grad_var, var, of_var, var_weight) if ctx.has_var else None
            scale = None
        else:
            count = mean.new_full((ctx.num_layers,), features[0].shape[0], dtype=torch.int64)
            grad_var = grad_var if ctx.has_var else None
            scale = grad
        d_features = moments_backward(
            features, mean, count, grad_mean, grad_var, correction=ctx.correction, scale=scale
        )
        return None, None, None, *d_features


def _save(ctx: Any, match: Match, *tensors: Tensor | None) -> None:
    """Save tensors for backward, and after them what a backward that is itself differentiated needs of the record."""
    ctx.average_kind, ctx.options = match.average_kind, match.options
    ctx.scales = 2 * match.reduction * match.mean_scale, 2 * match.reduction * match.var_scale
    step = step_for_slope(match.average_kind, match.options, match.state, match.update)
    ctx.save_for_backward(*tensors, match.mean_weight, match.var_weight, step)


def _second_derivatives(ctx: Any, step: Tensor | None) -> list[Tensor | float]:
    """Of the loss by means and by variances, without their weights."""
    slope = AVERAGES[ctx.average_kind].slope(ctx.options, step)
    return [scale * slope * slope for scale in ctx.scales]


def _rebuilt(saved: Tensor, moments: Tensor, second_derivative: Tensor | float, weight: Tensor | None) -> Tensor:
    """The saved derivative plus its dependence on the moments, for a backward that is itself differentiated.

    The value does not change. Without this term d(derivative)/d(moments) would be missing, without an error.
    """
    change = second_derivative * (moments - moments.detach())
    return saved + (change if weight is None else change * weight)


def _with_correction(input: Moments, correction: int) -> Tensor:
    """The variances of `input`, converted to another correction."""
    assert input.var is not None
    if input.count is None:
        raise ValueError(
            f"input: got correction {input.correction}, expected {correction} as in target; it cannot be converted"
            " without count"
        )
    rows = per_column(input.count.to(input.var.dtype), input.sizes)
    return input.var * ((rows - input.correction) / (rows - correction))


class Layout(NamedTuple):
    """How the layers of a target are packed."""

    shapes: Sequence[tuple[int, ...]]
    names: Sequence[str] | None
    correction: int

    def check_shapes(self, shapes: Sequence[Sequence[int]], names: Sequence[str] | None) -> None:
        """The input, whose layers may have names, has the shapes of the target."""
        if shapes == self.shapes:
            return
        if len(shapes) != len(self.shapes):
            raise ValueError(f"input: got {len(shapes)} layers, expected {len(self.shapes)} as in target")
        for i, (got, expected) in enumerate(zip(shapes, self.shapes, strict=True)):
            if tuple(got) != tuple(expected):
                raise ValueError(
                    f"{checks.label_of('input', i, shapes, names)}: got features of shape {tuple(got)}, expected"
                    f" {tuple(expected)} as in target"
                )


def check_names(names: Sequence[str] | None, target: Sequence[str] | None, of: str = "target") -> None:
    """The layers have the names of the target, if both have names: layers of equal shapes may still differ."""
    if names is None or target is None or tuple(names) == tuple(target):
        return
    for i, (got, expected) in enumerate(zip(names, target, strict=False)):
        if got != expected:
            raise ValueError(f"input: got layer {got!r} at position {i}, expected {expected!r} as in {of}")
    raise ValueError(f"input: got {len(names)} layers, expected {len(target)} as in {of}")


def _check_device(device: torch.device, match: Match) -> None:
    if device != match.target_mean.device:
        raise ValueError(f"input: got device {device}, expected {match.target_mean.device} as in target")


def match_input(input: Moments | checks.Features, match: Match, target: Layout, merge: Merge | None = None) -> Tensor:
    """The loss of features or of moments. For features on one process, it is fused with their reduction."""
    checks.check_tangents((match.target_mean, match.target_var), "target")
    if isinstance(input, Moments):
        return _match_given(input, match, target, merge)
    features, signature, shapes, requires_grad, names = checks.batch_of(input, empty=merge is not None)
    target.check_shapes(shapes, names)
    check_names(names, target.names)
    _check_device(features[0].device, match)
    same_dtype = match.target_mean.dtype == statistics_dtype(features[0].dtype)
    wants_target = wants_grad(match.target_mean, match.target_var)
    if merge is None and same_dtype and not wants_target:
        if signature is not None and not (requires_grad and torch.is_grad_enabled()):
            return match_features(features, target.correction, match, signature=signature)[0]
        return _MatchFeatures.call(target.correction, match, signature, *features)
    has_var = match.target_var is not None
    if merge is not None:
        return _match_moments(*moments_of_rank(features, has_var, signature), 0, match, merge)
    mean, var, _ = moments_op(features, 0, target.correction, has_var, signature=signature)
    return match_moments(mean, var, match)


def _match_given(input: Moments, match: Match, target: Layout, merge: Merge | None) -> Tensor:
    target.check_shapes(input.shapes, input.names)
    check_names(input.names, target.names)
    _check_device(input.mean.device, match)
    var = None
    if match.target_var is not None:
        if input.var is None:
            raise ValueError("input: got Moments without variances, expected variances as in target")
        convert = merge is None and input.correction != target.correction
        var = _with_correction(input, target.correction) if convert else input.var
    return _match_moments(input.mean, var, input.count, input.correction, match, merge)


def _match_moments(
    mean: Tensor, var: Tensor | None, count: Tensor | None, correction: int, match: Match, merge: Merge | None
) -> Tensor:
    if merge is not None:
        if count is None:
            raise ValueError("input: got Moments without count, which cannot be merged over processes")
        mean, var, _ = merge(mean, var, count, correction)
    return match_moments(mean, var, match)


def match_moments(mean: Tensor, var: Tensor | None, match: Match) -> Tensor:
    """The loss of packed moments, computed in the wider of the two dtypes, and at least in float32."""
    dtype = torch.promote_types(torch.promote_types(mean.dtype, match.target_mean.dtype), torch.float32)

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) else value

    wide = Match(*map(cast, match))
    return _MatchMoments.call(cast(mean), cast(var), wide.target_mean, wide.target_var, wide)
