"""The matching loss as autograd nodes over the operator `match_`: from features, fused, or from moments."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from moment_ops.averages import Average
from moment_ops.ops import checks, plans
from moment_ops.ops.layout import per_column, statistics_dtype
from moment_ops.ops.match import match_, match_features
from moment_ops.ops.moments import moments as moments_op
from moment_ops.ops.moments import moments_backward
from moment_ops.ops.nodes import Node, wants_grad
from moment_ops.statistics import Moments

Weight: TypeAlias = float | Sequence[float] | Tensor


class _MatchMoments(Node):
    """loss(mean, var): the operator `match_` on moments, with targets that may want gradients too."""

    @staticmethod
    def forward(
        ctx: Any,
        mean: Tensor,
        var: Tensor | None,
        target_mean: Tensor,
        target_var: Tensor | None,
        mean_weight: Tensor | None,
        var_weight: Tensor | None,
        scalars: tuple[float, float, float],
        average: tuple[str, list[float], float],
        update: bool,
        *state: Tensor,
    ) -> Tensor:
        kind, options, curvature = average
        mean_scale, var_scale, reduction = scalars
        loss, grad_mean, grad_var = match_(
            mean,
            var,
            target_mean,
            target_var,
            mean_scale,
            var_scale,
            mean_weight,
            var_weight,
            reduction,
            kind,
            options,
            list(state),
            update,
        )
        ctx.scalars, ctx.curvature, ctx.has_var = scalars, curvature, target_var is not None
        ctx.save_for_backward(mean, var, target_mean, target_var, mean_weight, var_weight, grad_mean, grad_var)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mean, var, target_mean, target_var, mean_weight, var_weight, grad_mean, grad_var = ctx.saved_tensors
        mean_scale, var_scale, reduction = ctx.scalars
        bend = 2 * reduction * ctx.curvature
        if torch.is_grad_enabled():
            grad_mean = _rebuilt(grad_mean, mean - target_mean, bend * mean_scale, mean_weight)
            if ctx.has_var:
                grad_var = _rebuilt(grad_var, var - target_var, bend * var_scale, var_weight)
        d_mean = grad * grad_mean
        d_var = grad * grad_var if ctx.has_var else None
        wants_target = ctx.needs_input_grad[2], ctx.needs_input_grad[3]
        d_target_mean = -d_mean if wants_target[0] else None
        d_target_var = -d_var if wants_target[1] and d_var is not None else None
        return d_mean, d_var, d_target_mean, d_target_var, *([None] * (len(ctx.needs_input_grad) - 4))


class _MatchFeatures(Node):
    """loss(features): the operator `match_` fused with the reduction; backward reads the features once more."""

    @staticmethod
    def forward(
        ctx: Any,
        correction: int,
        target_mean: Tensor,
        target_var: Tensor | None,
        mean_weight: Tensor | None,
        var_weight: Tensor | None,
        scalars: tuple[float, float, float],
        average: tuple[str, list[float], float],
        update: bool,
        signature: plans.Signature | None,
        layers: int,
        *tensors: Tensor,
    ) -> Tensor:
        kind, options, curvature = average
        features, state = tensors[:layers], tensors[layers:]
        mean_scale, var_scale, reduction = scalars
        loss, mean, grad_mean, grad_var = match_features(
            features,
            correction,
            target_mean,
            target_var,
            mean_scale,
            var_scale,
            mean_weight,
            var_weight,
            reduction,
            kind,
            options,
            list(state),
            update,
            signature=signature,
        )
        ctx.correction, ctx.scalars, ctx.curvature = correction, scalars, curvature
        ctx.has_var, ctx.layers = target_var is not None, layers
        ctx.save_for_backward(mean, grad_mean, grad_var, mean_weight, var_weight, *features)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mean, grad_mean, grad_var, mean_weight, var_weight, *features = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            mean_scale, var_scale, reduction = ctx.scalars
            bend = 2 * reduction * ctx.curvature
            mean, var, count = moments_op(features, 0, ctx.correction, ctx.has_var)
            grad_mean = grad * _rebuilt(grad_mean, mean, bend * mean_scale, mean_weight)
            grad_var = grad * _rebuilt(grad_var, var, bend * var_scale, var_weight) if ctx.has_var else None
            scale = None
        else:
            count = mean.new_full((ctx.layers,), features[0].shape[0], dtype=torch.int64)
            grad_var = grad_var if ctx.has_var else None
            scale = grad
        d_features = moments_backward(
            features, mean, count, grad_mean, grad_var, correction=ctx.correction, scale=scale
        )
        others = len(ctx.needs_input_grad) - 10 - ctx.layers
        return *([None] * 10), *d_features, *([None] * others)


def _rebuilt(saved: Tensor, moving: Tensor, bend: float, weight: Tensor | None) -> Tensor:
    """The saved derivative with its dependence on the moments put back, for a backward that is differentiated.

    Its value stays; taken as a constant it would silently drop d(derivative)/d(moments).
    """
    step = bend * (moving - moving.detach())
    return saved + (step if weight is None else step * weight)


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


def _with_correction(input: Moments, correction: int) -> Tensor:
    """The variances of `input` for another correction."""
    assert input.var is not None
    if input.count is None:
        raise ValueError(
            f"input: got correction {input.correction}, expected {correction} as in target; without its count it cannot"
            " be converted"
        )
    rows = per_column(input.count.to(input.var.dtype), input.sizes)
    return input.var * ((rows - input.correction) / (rows - correction))


def _check_shapes(shapes: Sequence[Sequence[int]], target: Sequence[Sequence[int]]) -> None:
    if shapes == target:
        return
    if len(shapes) != len(target):
        raise ValueError(f"input: got {len(shapes)} layers, expected {len(target)} as in target")
    for i, (got, expected) in enumerate(zip(shapes, target, strict=True)):
        if tuple(got) != tuple(expected):
            raise ValueError(f"input[{i}]: got features of shape {tuple(got)}, expected {tuple(expected)} as in target")


def check_names(names: Sequence[str] | None, target: Sequence[str] | None, of: str = "target") -> None:
    """Layers of equal shapes may still be other layers."""
    if names is None or target is None or tuple(names) == tuple(target):
        return
    for i, (got, expected) in enumerate(zip(names, target, strict=False)):
        if got != expected:
            raise ValueError(f"input: got layer {got!r} at position {i}, expected {expected!r} as in {of}")
    raise ValueError(f"input: got {len(names)} layers, expected {len(target)} as in {of}")


class Matcher:
    """One evaluation of the loss: the paths from features and from moments meet here."""

    def __init__(
        self,
        target: tuple[Tensor, Tensor | None],
        shapes: Sequence[tuple[int, ...]],
        correction: int,
        weights: tuple[tuple[float, Tensor | None], tuple[float, Tensor | None]],
        reduction: str,
        average: Average | None = None,
        state: Sequence[Tensor] = (),
        update: bool = False,
        merge: Callable[..., tuple[Tensor, Tensor | None, Tensor]] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.mean, self.var = target
        self.shapes, self.names, self.correction = shapes, names, correction
        (mean_scale, self.mean_weight), (var_scale, self.var_weight) = weights
        self.scalars = (mean_scale, var_scale, 1 / self.mean.shape[0] if reduction == "mean" else 1.0)
        self.average: tuple[str, list[float], float] = ("none", [], 1.0)
        if average is not None:
            self.average = (average.kind, average.options(self.mean.shape[0]), average.curvature)
        self.state, self.update, self.merge = state, update, merge

    def __call__(self, input: Moments | checks.Features) -> Tensor:
        if isinstance(input, Moments):
            return self._from_input_moments(input)
        layers, signature, shapes, requires_grad, names = checks.batch_of(input)
        _check_shapes(shapes, self.shapes)
        check_names(names, self.names)
        self._check_device(layers[0].device)
        same_dtype = self.mean.dtype == statistics_dtype(layers[0].dtype)
        fused = self.merge is None and same_dtype and not self._target_requires_grad()
        if fused and signature is not None and not (requires_grad and torch.is_grad_enabled()):
            return self._of_constants(layers, signature)
        if fused:
            return _MatchFeatures.call(
                self.correction,
                self.mean,
                self.var,
                self.mean_weight,
                self.var_weight,
                self.scalars,
                self.average,
                self.update,
                signature,
                len(layers),
                *layers,
                *self.state,
            )
        # Merging takes variances over N: those over N - c do not exist for a single row.
        correction = self.correction if self.merge is None else 0
        mean, var, count = moments_op(layers, 0, correction, self.var is not None, signature=signature)
        return self.from_moments(mean, var, count, correction)

    def _of_constants(self, layers: Sequence[Tensor], signature: plans.Signature) -> Tensor:
        """The loss of features that want no gradients."""
        mean_scale, var_scale, reduction = self.scalars
        kind, options, _ = self.average
        return match_features(
            layers,
            self.correction,
            self.mean,
            self.var,
            mean_scale,
            var_scale,
            self.mean_weight,
            self.var_weight,
            reduction,
            kind,
            options,
            list(self.state),
            self.update,
            signature=signature,
        )[0]

    def _from_input_moments(self, input: Moments) -> Tensor:
        _check_shapes(input.shapes, self.shapes)
        check_names(input.names, self.names)
        self._check_device(input.mean.device)
        if self.var is not None and input.var is None:
            raise ValueError("input: got moments without variances, but target has variances")
        var, correction = input.var, input.correction
        if self.var is not None and var is not None and self.merge is None and correction != self.correction:
            var = _with_correction(input, self.correction)
        return self.from_moments(input.mean, var, input.count, correction)

    def from_moments(self, mean: Tensor, var: Tensor | None, count: Tensor | None, correction: int) -> Tensor:
        var = var if self.var is not None else None
        if self.merge is not None:
            if count is None:
                raise ValueError("input: its count is not known, so it cannot be merged over processes")
            mean, var, _ = self.merge(mean, var, count, correction)
        # In the wider of the two dtypes, in float32 at least; a narrower state is widened for the step.
        dtype = torch.promote_types(torch.promote_types(mean.dtype, self.mean.dtype), torch.float32)

        def cast(vector: Tensor | None) -> Tensor | None:
            return None if vector is None else vector.to(dtype)

        # Within a transform `to` gives another tensor even where nothing changes.
        state = [s.to(dtype) if s.is_floating_point() and s.dtype != dtype else s for s in self.state]
        loss = _MatchMoments.call(
            cast(mean),
            cast(var),
            cast(self.mean),
            cast(self.var),
            cast(self.mean_weight),
            cast(self.var_weight),
            self.scalars,
            self.average,
            self.update,
            *state,
        )
        for narrow, wide in zip(self.state, state, strict=True):
            if narrow is not wide:
                narrow.copy_(wide)
        return loss

    def _target_requires_grad(self) -> bool:
        return wants_grad(self.mean, self.var)

    def _check_device(self, device: torch.device) -> None:
        if device != self.mean.device:
            raise ValueError(f"input: got device {device}, expected {self.mean.device} as target")
