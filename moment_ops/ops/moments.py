"""`moments` and `moments_backward`: schemas, kernels, shape functions and derivatives."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moment_ops.ops import backends, plans, reference
from moment_ops.ops.layout import as_rows, feature_shape, has_same_columns, statistics_dtype, with_dense_columns
from moment_ops.ops.library import define, define_native
from moment_ops.ops.nodes import register_derivative

define_native("moments.native(Tensor[] input, int dim, int correction, Tensor(a!) mean, Tensor(b!)? var) -> ()")
define_native(
    "moments_backward.native(Tensor[] grad, Tensor? grad_mean, Tensor? grad_var, Tensor[] input, Tensor mean,"
    " Tensor count, int dim, int correction, Tensor? scale, Tensor(a!)[] out) -> ()"
)


def new_count(rows: Sequence[int], like: Tensor) -> Tensor:
    """Rows per layer, filled on the device. A tensor made from a list would be copied there, with a host sync."""
    if all(n == rows[0] for n in rows):
        return like.new_full((len(rows),), rows[0], dtype=torch.int64)
    return torch.cat([like.new_full((1,), n, dtype=torch.int64) for n in rows])


def _columns(input: Sequence[Tensor], dim: int) -> int:
    return sum(math.prod(feature_shape(x, dim)) for x in input)


class Plan(NamedTuple):
    """The plan of a call of `moments`."""

    fill: Callable[..., None] | None  # the backend's kernel; None: the reference
    dense: bool  # layers are read as they are
    rows: tuple[int, ...]
    columns: int
    dtype: torch.dtype  # of the statistics
    requires_grad: bool  # of any layer


_PLANS: plans.Plans[Plan] = plans.Plans()


def plan_moments(input: Sequence[Tensor], dim: int, signature: plans.Signature | None) -> Plan:
    """The plan for layers of a signature."""
    return _PLANS.find(signature, (dim, backends.requested()), _plan, input, dim)


def _plan(input: Sequence[Tensor], dim: int) -> Plan:
    x = input[0]
    return Plan(
        # Without rows, the reference gives NaN.
        backends.fill("moments", x) if all(layer.shape[dim] for layer in input) else None,
        all(with_dense_columns(layer, dim) is layer for layer in input),
        tuple(layer.shape[dim] for layer in input),
        _columns(input, dim),
        statistics_dtype(x.dtype),
        any(layer.requires_grad for layer in input),
    )


def packed_moments(
    input: Sequence[Tensor], dim: int, correction: int, var: bool, plan: Plan
) -> tuple[Tensor, Tensor | None]:
    """(mean, var) by a plan, without gradients."""
    if plan.fill is None:
        return reference.moments(input, dim, correction, var)
    mean = input[0].new_empty(plan.columns, dtype=plan.dtype)
    variance = mean.new_empty(plan.columns) if var else None
    native = input if plan.dense else [with_dense_columns(x, dim) for x in input]
    plan.fill(native, dim, correction, mean, variance)
    return mean, variance


def _moments(
    input: Sequence[Tensor], dim: int, correction: int, var: bool, plan: Plan | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    plan = plan or plan_moments(input, dim, plans.signature(input))
    mean, variance = packed_moments(input, dim, correction, var, plan)
    return mean, mean.new_empty(0) if variance is None else variance, new_count(plan.rows, mean)


def _moments_fake(input: list[Tensor], dim: int, correction: int, var: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = statistics_dtype(input[0].dtype)
    columns = _columns(input, dim)
    mean = input[0].new_empty(columns, dtype=dtype)
    variance = input[0].new_empty(columns if var else 0, dtype=dtype)
    return mean, variance, input[0].new_empty(len(input), dtype=torch.int64)


def _moments_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, ctx.dim, ctx.correction, ctx.var = inputs
    mean, _, count = output
    ctx.save_for_backward(mean, count, *input)
    ctx.set_materialize_grads(False)


def _moments_derivative(
    ctx: Any, grad_mean: Tensor | None, grad_var: Tensor | None, grad_count: None
) -> tuple[list[Tensor | None], None, None, None]:
    mean, count, *input = ctx.saved_tensors
    grad_var = grad_var if ctx.var else None
    grads: list[Tensor | None] = [None] * len(input)
    if grad_mean is not None or grad_var is not None:
        grads = moments_backward(input, mean, count, grad_mean, grad_var, dim=ctx.dim, correction=ctx.correction)
    return grads, None, None, None


class _Moments(torch.autograd.Function):
    """An autograd node of its own: the dispatcher's way to the same derivative takes several times as long."""

    @staticmethod
    def forward(
        ctx: Any, dim: int, correction: int, var: bool, plan: Plan, *input: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        output = _moments(input, dim, correction, var, plan)
        _moments_setup(ctx, (input, dim, correction, var), output)
        ctx.mark_non_differentiable(output[2])
        return output

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor | None, grad_var: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        return None, None, None, None, *_moments_derivative(ctx, grad_mean, grad_var, None)[0]


def _moments_backward(
    grad: list[Tensor],
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    input: list[Tensor],
    mean: Tensor,
    count: Tensor,
    dim: int,
    correction: int,
    scale: Tensor | None,
    signature: plans.Signature | None = None,
) -> list[Tensor]:
    # Strides as the shape function promises: those of the input where it is dense.
    out = [torch.empty_like(x) for x in input]
    signature = signature or plans.signature((*input, *grad))
    options = len(input), dim, backends.requested()
    plan = _BACKWARD_PLANS.find(signature, options, _backward_plan, grad, input, out, dim)
    if plan.fill is None:
        grads = reference.moments_backward(grad, grad_mean, grad_var, input, mean, count, dim, correction, scale)
        return [y.copy_(g) for y, g in zip(out, grads, strict=True)]
    native, written, added = input, out, grad
    if not plan.direct:
        native, written, added = _in_one_order(grad, input, out, dim)

    def dense(vector: Tensor | None) -> Tensor | None:
        return None if vector is None else vector.contiguous()

    vectors = dense(grad_mean), dense(grad_var)
    plan.fill(added, *vectors, native, mean.contiguous(), count, dim, correction, scale, written)
    return out if plan.direct else [y if y is w else y.copy_(w) for y, w in zip(out, written, strict=True)]


class _BackwardPlan(NamedTuple):
    """The plan of a call of `moments_backward`. If `direct`, nothing has to be copied."""

    fill: Callable[..., None] | None
    direct: bool


_BACKWARD_PLANS: plans.Plans[_BackwardPlan] = plans.Plans()


def _backward_plan(grad: list[Tensor], input: list[Tensor], out: list[Tensor], dim: int) -> _BackwardPlan:
    native, written, added = _in_one_order(grad, input, out, dim)
    pairs = (*zip(native, input, strict=True), *zip(written, out, strict=True), *zip(added, grad, strict=True))
    fill = backends.fill("moments_backward", input[0]) if input[0].numel() else None
    return _BackwardPlan(fill, all(a is b for a, b in pairs))


def _in_one_order(
    grad: list[Tensor], input: list[Tensor], out: list[Tensor], dim: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(input, out, grad) for a kernel, which reads, writes and adds columns in the same order."""
    native = [with_dense_columns(x, dim) for x in input]
    written = [y if has_same_columns(y, x, dim) else torch.empty_like(x) for y, x in zip(out, native, strict=True)]
    added = [g if g.stride() == y.stride() else y.copy_(g) for g, y in zip(grad, written, strict=False)]
    return native, written, added


def _moments_backward_fake(
    grad: list[Tensor],
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    input: list[Tensor],
    mean: Tensor,
    count: Tensor,
    dim: int,
    correction: int,
    scale: Tensor | None,
) -> list[Tensor]:
    return [torch.empty_like(x) for x in input]


def _moments_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grad, grad_mean, grad_var, input, mean, count, ctx.dim, ctx.correction, scale = inputs
    if scale is not None and scale.requires_grad:
        raise NotImplementedError("moments_backward: scale has no derivative; multiply the gradients by it instead")
    ctx.added = len(grad)
    ctx.has_mean, ctx.has_var, ctx.has_scale = grad_mean is not None, grad_var is not None, scale is not None
    optional = [t for t in (grad_mean, grad_var, scale) if t is not None]
    ctx.save_for_backward(mean, count, *optional, *input)


def _moments_backward_derivative(ctx: Any, grad_out: list[Tensor]) -> tuple[Any, ...]:
    """Derivative of `dx = grad + a + b (x - mean)`, by operators of PyTorch, and thus differentiable."""
    mean, count, *rest = ctx.saved_tensors
    if ctx.has_mean:
        rest.pop(0)
    grad_var = rest.pop(0) if ctx.has_var else None
    scale = rest.pop(0) if ctx.has_scale else None
    dim, correction = ctx.dim, ctx.correction
    d_mean, d_grad_mean, d_grad_var, d_input = [], [], [], []
    offset = 0
    for i, (x, h) in enumerate(zip(rest, grad_out, strict=True)):
        columns = math.prod(feature_shape(x, dim))
        packed = slice(offset, offset + columns)
        offset += columns
        dtype = mean.dtype
        h_rows = as_rows(h.movedim(dim, 0)).to(dtype)
        x_rows = as_rows(x.movedim(dim, 0)).to(dtype)
        h_sum = h_rows.sum(0)
        factor = torch.ones((), dtype=dtype, device=x.device) if scale is None else scale
        if ctx.has_mean:
            d_grad_mean.append(h_sum * factor / count[i])
        b = torch.zeros_like(h_sum)
        if grad_var is not None:
            freedom = count[i] - correction
            slope = torch.where(freedom > 0, 2 * factor / freedom, torch.zeros_like(factor))
            d_grad_var.append(slope * (h_rows * (x_rows - mean[packed])).sum(0))
            b = slope * grad_var[packed]
        d_mean.append(-b * h_sum)
        d_input.append((b * h_rows).reshape(x.movedim(dim, 0).shape).movedim(0, dim).to(x.dtype))
    return (
        list(grad_out) if ctx.added else [],
        torch.cat(d_grad_mean) if d_grad_mean else None,
        torch.cat(d_grad_var) if d_grad_var else None,
        d_input,
        torch.cat(d_mean),
        None,
        None,
        None,
        None,
    )


define(
    "moments(Tensor[] input, int dim, int correction, bool var) -> (Tensor mean, Tensor var, Tensor count)",
    _moments,
    _moments_fake,
)
define(
    "moments_backward(Tensor[] grad, Tensor? grad_mean, Tensor? grad_var, Tensor[] input, Tensor mean,"
    " Tensor count, int dim, int correction, Tensor? scale) -> Tensor[]",
    _moments_backward,
    _moments_backward_fake,
)
register_derivative("moments", _moments_derivative, _moments_setup)
register_derivative("moments_backward", _moments_backward_derivative, _moments_backward_setup)


def moments(
    input: Sequence[Tensor],
    dim: int = 0,
    correction: int = 1,
    var: bool = True,
    *,
    signature: plans.Signature | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Packed mean and variance over `dim` of every layer, and rows per layer; differentiable, twice in eager mode.

    Args:
        signature: of the layers, where it is known.

    Cost: one read of the features forward; one read and one write backward; one launch each.
    """
    signature = signature or plans.signature(input)
    if signature is None:
        mean, variance, count = torch.ops.moment_ops.moments.default(list(input), dim, correction, var)
    else:
        plan = plan_moments(input, dim, signature)
        if plan.requires_grad and torch.is_grad_enabled():
            mean, variance, count = _Moments.apply(dim, correction, var, plan, *input)
        else:
            mean, variance, count = _moments(input, dim, correction, var, plan)
    return mean, variance if var else None, count


def moments_backward(
    input: Sequence[Tensor],
    mean: Tensor,
    count: Tensor,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    *,
    grad: Sequence[Tensor] = (),
    dim: int = 0,
    correction: int = 1,
    scale: Tensor | None = None,
) -> list[Tensor]:
    """`[grad +] scale * (grad_mean / N + 2 grad_var / (N - correction) * (x - mean))` for every layer.

    Args:
        grad_mean, grad_var: (F,) derivatives of the loss with respect to mean and variance.
        count: (L,) int64, the N of the statistic per layer: over all ranks, where ranks were merged.
        grad: gradients that arrive from elsewhere, one per layer, added in the same pass.
        scale: scalar tensor.
    """
    arguments = list(grad), grad_mean, grad_var, list(input), mean, count, dim, correction, scale
    # A backward that is itself differentiated has its derivative from the registered operator.
    signature = None if torch.is_grad_enabled() else plans.signature((*input, *grad))
    if signature is not None:
        return _moments_backward(*arguments, signature)
    return torch.ops.moment_ops.moments_backward.default(*arguments)
