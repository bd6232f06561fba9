"""Taps: `relu_moments`, its backward, and the identity that collects moments on its way."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moment_ops.ops import backends, checks, plans, reference
from moment_ops.ops.layout import as_rows, columns_of, has_same_columns, statistics_dtype, with_dense_columns
from moment_ops.ops.library import define, define_native
from moment_ops.ops.moments import Plan, moments_backward, new_count, packed_moments, plan_moments
from moment_ops.ops.nodes import Node, is_transformed, register_derivative

define_native(
    "relu_moments.native(Tensor x, Tensor? bias, int correction, Tensor(a!) y, Tensor(b!) mean, Tensor(c!) var) -> ()"
)
define_native(
    "relu_moments_backward.native(Tensor? grad, Tensor? grad_mean, Tensor? grad_var, Tensor y, Tensor mean,"
    " int correction, Tensor(a!) out) -> ()"
)


class _Plan(NamedTuple):
    """The plan of a tap, whose arguments have passed the checks."""

    fill: Callable[..., None] | None  # the backend's kernel; None: the reference
    fill_backward: Callable[..., None] | None
    backend: str  # that was asked for
    direct: bool  # nothing has to be copied
    stride: tuple[int, ...]  # of y
    columns: int
    dtype: torch.dtype  # of the statistics


class _BackwardPlan(NamedTuple):
    """The plan of a tap's backward."""

    fill: Callable[..., None] | None
    direct: bool


_PLANS: plans.Plans[_Plan] = plans.Plans()
_BACKWARD_PLANS: plans.Plans[_BackwardPlan] = plans.Plans()


def _check(x: Any, bias: Any) -> None:
    checks.batch(checks.features(x, "x"), 0, "x", empty=None)
    if bias is not None:
        checks.channel_bias(bias, x)


def _is_direct(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a kernel can read x in place, and other tensors of its shape in the same order of columns."""
    return with_dense_columns(x, 0) is x and all(y is None or has_same_columns(y, x, 0) for y in others)


def _plan(x: Tensor, bias: Tensor | None) -> _Plan:
    _check(x, bias)
    y = torch.empty_like(x)
    fill = fill_backward = None
    if len(x):
        # Without rows, the reference gives NaN.
        fill, fill_backward = backends.fill("relu_moments", x), backends.fill("relu_moments_backward", x)
    direct = _is_direct(x, y)
    return _Plan(
        fill, fill_backward, backends.requested(), direct, y.stride(), columns_of(x), statistics_dtype(x.dtype)
    )


def _backward_plan(y: Tensor, out: Tensor, grad: Tensor | None) -> _BackwardPlan:
    return _BackwardPlan(backends.fill("relu_moments_backward", y) if len(y) else None, _is_direct(y, out, grad))


def _relu_moments(
    x: Tensor, bias: Tensor | None, correction: int, plan: _Plan | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    plan = plan or _PLANS.find(plans.signature((x, bias)), backends.requested(), _plan, x, bias)
    # Strides as the shape function promises: those of the input where it is dense.
    y = torch.empty_like(x)
    if plan.fill is None:
        result, mean, var = reference.relu_moments(x, bias, correction)
        return y.copy_(result), mean, var
    mean = x.new_empty(plan.columns) if plan.dtype is x.dtype else x.new_empty(plan.columns, dtype=plan.dtype)
    var = mean.new_empty(plan.columns)
    dense_bias = None if bias is None else bias.contiguous()
    if plan.direct:
        plan.fill(x, dense_bias, correction, y, mean, var)
        return y, mean, var
    native = with_dense_columns(x, 0)
    # The kernel writes columns in the order in which it reads them.
    written = y if has_same_columns(y, native, 0) else torch.empty_like(native)
    plan.fill(native, dense_bias, correction, written, mean, var)
    return y if y is written else y.copy_(written), mean, var


def _relu_moments_fake(x: Tensor, bias: Tensor | None, correction: int) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(columns_of(x), dtype=statistics_dtype(x.dtype))
    return torch.empty_like(x), mean, torch.empty_like(mean)


def _relu_moments_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, _, ctx.correction = inputs
    y, mean, _ = output
    # The next layer saves y too: what is kept besides is the mean.
    ctx.save_for_backward(y, mean)
    ctx.set_materialize_grads(False)


def _relu_moments_derivative(
    ctx: Any, grad: Tensor | None, grad_mean: Tensor | None, grad_var: Tensor | None
) -> tuple[Tensor | None, Tensor | None, None]:
    y, mean = ctx.saved_tensors
    if grad_mean is not None or grad_var is not None:
        dx = _backward(grad, grad_mean, grad_var, y, mean, ctx.correction)
    elif grad is not None:
        dx = torch.ops.aten.threshold_backward(grad, y, 0)
    else:
        return None, None, None
    d_bias = dx.sum([d for d in range(dx.dim()) if d != 1]) if ctx.needs_input_grad[1] else None
    return dx, d_bias, None


def _relu_moments_backward(
    grad: Tensor | None,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    y: Tensor,
    mean: Tensor,
    correction: int,
    signature: plans.Signature | None = None,
) -> Tensor:
    out = torch.empty_like(y)
    signature = signature or plans.signature((y, grad))
    plan = _BACKWARD_PLANS.find(signature, backends.requested(), _backward_plan, y, out, grad)
    if plan.fill is None:
        return out.copy_(reference.relu_moments_backward(grad, grad_mean, grad_var, y, mean, correction))
    native = written = y
    if plan.direct:
        written = out
    else:
        native = with_dense_columns(y, 0)
        written = out if has_same_columns(out, native, 0) else torch.empty_like(native)
        if grad is not None and not has_same_columns(grad, native, 0):
            grad = torch.empty_like(native).copy_(grad)

    def dense(vector: Tensor | None) -> Tensor | None:
        return None if vector is None else vector.contiguous()

    plan.fill(grad, dense(grad_mean), dense(grad_var), native, mean.contiguous(), correction, written)
    return out if out is written else out.copy_(written)


def _backward(
    grad: Tensor | None,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    y: Tensor,
    mean: Tensor,
    correction: int,
) -> Tensor:
    # A backward that is itself differentiated has its derivative from the registered operator.
    signature = None if torch.is_grad_enabled() else plans.signature((y, grad))
    if signature is not None:
        return _relu_moments_backward(grad, grad_mean, grad_var, y, mean, correction, signature)
    return torch.ops.moment_ops.relu_moments_backward.default(grad, grad_mean, grad_var, y, mean, correction)


def _relu_moments_backward_fake(
    grad: Tensor | None,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    y: Tensor,
    mean: Tensor,
    correction: int,
) -> Tensor:
    return torch.empty_like(y)


def _relu_moments_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, grad_mean, grad_var, y, mean, ctx.correction = inputs
    ctx.has_grad, ctx.has_mean = grad is not None, grad_mean is not None
    ctx.save_for_backward(y, mean, grad_var)


def _relu_moments_backward_derivative(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:
    """Derivative of `dx = (grad + a + b (y - mean)) * mask`, by operators of PyTorch, and thus differentiable."""
    y, mean, grad_var = ctx.saved_tensors
    h = torch.where(y <= 0, 0, h)
    h_rows = as_rows(h).to(mean.dtype)
    h_sum = h_rows.sum(0)
    d_grad_mean = h_sum / y.shape[0] if ctx.has_mean else None
    d_grad_var = d_y = d_mean = None
    freedom = y.shape[0] - ctx.correction
    if grad_var is not None:
        slope = 2 / freedom if freedom > 0 else 0.0
        y_rows = as_rows(y).to(mean.dtype)
        d_grad_var = slope * (h_rows * (y_rows - mean)).sum(0)
        b = slope * grad_var
        d_y = (b * h_rows).reshape(y.shape).to(y.dtype)
        d_mean = -b * h_sum
    return h if ctx.has_grad else None, d_grad_mean, d_grad_var, d_y, d_mean, None


define(
    "relu_moments(Tensor x, Tensor? bias, int correction) -> (Tensor y, Tensor mean, Tensor var)",
    _relu_moments,
    _relu_moments_fake,
)
define(
    "relu_moments_backward(Tensor? grad, Tensor? grad_mean, Tensor? grad_var, Tensor y, Tensor mean, int correction)"
    " -> Tensor",
    _relu_moments_backward,
    _relu_moments_backward_fake,
)
register_derivative("relu_moments", _relu_moments_derivative, _relu_moments_setup)
register_derivative("relu_moments_backward", _relu_moments_backward_derivative, _relu_moments_backward_setup)


def relu_moments(x: Tensor, bias: Tensor | None = None, *, correction: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """`y = relu(x + bias)`, and the mean and variance of y over the batch, as one autograd node.

    Args:
        x: (N, ...), float32, bfloat16, float16 or float64. Contiguous, channels-last and row-sliced tensors are read in
            place, others are copied once.
        bias: (C,) for the channels on dimension 1, in the dtype of x.
        correction: c in the variance, sum of squares / (N - c). If N <= c, variances are NaN.

    Returns:
        (y, mean, var). y is `torch.relu(x + bias)` bit for bit, in the strides of x. mean and var are (F,), in the
        row-major order of a row, in float32 (float64 for float64). Differentiable, twice in eager mode. The
        gradients of y, mean and var are added in one pass.

    Raises:
        TypeError, ValueError: wrong dtype, rank, bias or batch.

    Cost: one launch, which reads x and writes y. Backward takes one launch, which reads the gradient and y and writes
    one gradient, as the backward of the ReLU alone. It saves the mean in addition to y.
    """
    correction = checks.correction(correction)
    signature = plans.signature((x, bias))
    if signature is None or x is None:
        _check(x, bias)
        return torch.ops.moment_ops.relu_moments.default(x, bias, correction)
    plan = _PLANS.find(signature, backends.requested(), _plan, x, bias)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _ReluMoments.apply(x, bias, correction, plan)
    return _relu_moments(x, bias, correction, plan)


class _ReluMoments(torch.autograd.Function):
    """An autograd node of its own: the dispatcher's way to the same derivative takes several times as long."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, correction: int, plan: _Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        output = _relu_moments(x, bias, correction, plan)
        _relu_moments_setup(ctx, (x, bias, correction), output)
        ctx.plan = plan
        return output

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_mean: Tensor | None, grad_var: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        y, mean = ctx.saved_tensors
        plan: _Plan = ctx.plan
        # The usual case in half the time: gradients in the strides of y, of which the forward's plan holds.
        if (
            plan.direct
            and plan.fill_backward is not None
            and grad_mean is not None
            and grad_var is not None
            and grad is not None
            and type(grad) is Tensor
            and grad.stride() == plan.stride == y.stride()
            and plan.backend == backends.requested()
            and not ctx.needs_input_grad[1]
            and not torch.is_grad_enabled()
            and not torch._C._len_torch_dispatch_stack()
            and not is_transformed()
        ):
            out = torch.empty_like(y)
            plan.fill_backward(grad, grad_mean.contiguous(), grad_var.contiguous(), y, mean, ctx.correction, out)
            return out, None, None, None
        return *_relu_moments_derivative(ctx, grad, grad_mean, grad_var), None


class _IdentityMoments(Node):
    """An autograd node around two operators, since an operator may not return its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, correction: int, plan: Plan | None) -> tuple[Tensor, Tensor, Tensor | None]:
        if plan is None:
            mean, var, _ = torch.ops.moment_ops.moments.default([x], 0, correction, True)
        else:
            mean, var = packed_moments([x], 0, correction, True, plan)
        ctx.correction = correction
        ctx.save_for_backward(x, mean)
        ctx.set_materialize_grads(False)
        return x.view_as(x), mean, var

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_mean: Tensor | None, grad_var: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        x, mean = ctx.saved_tensors
        if grad_mean is None and grad_var is None:
            return grad, None, None
        added = [] if grad is None else [grad]
        count = new_count(x.shape[:1], mean)
        (dx,) = moments_backward([x], mean, count, grad_mean, grad_var, grad=added, correction=ctx.correction)
        return dx, None, None


def identity_moments(x: Tensor, *, correction: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """x itself, and its mean and variance over the batch, as one autograd node.

    Arguments and results are those of `relu_moments`, with x as y.

    Cost: one launch and one read. Backward takes one launch, which reads x and the gradient and writes one gradient.
    """
    correction = checks.correction(correction)
    signature = plans.signature((x,))
    if signature is None:
        _check(x, None)
        return _IdentityMoments.call(x, correction, None)
    plan = _IDENTITY_PLANS.find(signature, backends.requested(), _identity_plan, x)
    if torch.is_grad_enabled() and x.requires_grad:
        return _IdentityMoments.call(x, correction, plan)
    mean, var = packed_moments([x], 0, correction, True, plan)
    return x, mean, var


_IDENTITY_PLANS: plans.Plans[Plan] = plans.Plans()


def _identity_plan(x: Tensor) -> Plan:
    _check(x, None)
    return plan_moments([x], 0, None)
