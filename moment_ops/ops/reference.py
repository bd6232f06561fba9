"""Every operator in plain PyTorch: any dtype, device and layout. The definition that kernels are tested against."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moment_ops.ops.averages import AVERAGES, Past, Quantity
from moment_ops.ops.layout import as_rows, feature_shape, statistics_dtype
from moment_ops.ops.records import Match
from moment_ops.ops.room import column_scale


def _rows(x: Tensor, dim: int) -> Tensor:
    """(N, D) in the dtype of the statistics, with columns in logical order."""
    return as_rows(x.movedim(dim, 0)).to(statistics_dtype(x.dtype))


def moments(input: Sequence[Tensor], dim: int, correction: int, var: bool) -> tuple[Tensor, Tensor | None]:
    """Packed mean and variance, (F,) each.

    The first row is subtracted before sums are taken in float64. A constant column then has a variance of exactly 0,
    and neither a mean far from zero nor an outlier costs digits. A result that its dtype can represent does not
    overflow in an intermediate sum. Without rows, both are NaN.
    """
    means, variances = [], []
    for x in input:
        rows = _rows(x, dim)
        if not len(rows):
            means.append(rows.mean(0))
            variances.append(means[-1])
            continue
        wide, scale = _with_room(rows)
        pivot = wide[0].detach()
        shifted = wide - pivot
        shifted_mean = shifted.mean(0)
        means.append(((pivot + shifted_mean) / scale).to(rows.dtype))
        if var:
            m2 = (shifted - shifted_mean).square().sum(0)
            freedom = rows.shape[0] - correction
            variance = m2 / freedom / scale / scale if freedom > 0 else torch.full_like(m2, float("nan"))
            variances.append(variance.to(rows.dtype))
    return torch.cat(means), torch.cat(variances) if var else None


def _with_room(rows: Tensor) -> tuple[Tensor, Tensor | float]:
    """(rows, scale): rows in float64 if the device supports it, multiplied by `scale`, a power of two per column.

    The scale is 1 unless the sum of squares of a column may overflow. Values that then underflow are negligible.
    """
    wide = _wide(rows)
    if wide.dtype != rows.dtype:
        return wide, 1.0
    scale = column_scale(wide)
    return wide * scale, scale


def _wide(x: Tensor) -> Tensor:
    """float64 if the device supports it, else the dtype of the tensor."""
    return x if x.device.type == "mps" else x.double()


def coefficients(
    grad_mean: Tensor | None, grad_var: Tensor | None, count: Tensor, correction: int, scale: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """(a, b) with `dx = a + b * (x - mean)`, for one layer of `count` rows."""
    a = b = None
    if grad_mean is not None:
        a = grad_mean / count
    if grad_var is not None:
        # A variance that the loss does not use sends no gradient, also where it has no degrees of freedom.
        b = torch.where(grad_var == 0, grad_var, 2 * (grad_var / (count - correction)))
    if scale is not None:
        a = None if a is None else a * scale
        b = None if b is None else b * scale
    return a, b


def moments_backward(
    grad: Sequence[Tensor],
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    input: Sequence[Tensor],
    mean: Tensor,
    count: Tensor,
    dim: int,
    correction: int,
    scale: Tensor | None,
) -> list[Tensor]:
    """`[grad +] a + b * (x - mean)` for every layer, in its dtype."""
    outputs = []
    offset = 0
    for i, x in enumerate(input):
        columns = math.prod(feature_shape(x, dim))
        packed = slice(offset, offset + columns)
        offset += columns
        rows = _rows(x, dim)
        a, b = coefficients(
            None if grad_mean is None else grad_mean[packed],
            None if grad_var is None else grad_var[packed],
            count[i],
            correction,
            scale,
        )
        dx = torch.zeros_like(rows) if a is None else a.expand_as(rows)
        if b is not None:
            # Halves, as the difference of two numbers that are may not be one.
            dx = dx + 2 * (b * (rows / 2 - mean[packed] / 2))
        moved = x.movedim(dim, 0).shape
        dx = dx.reshape(moved).movedim(0, dim)
        if grad:
            dx = dx + grad[i]
        outputs.append(dx.to(x.dtype))
    return outputs


def relu_moments(x: Tensor, bias: Tensor | None, correction: int) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.relu(x + bias)`, with bias (C,) on dimension 1, and the packed moments of the rounded result."""
    if bias is not None:
        x = x + bias.view(-1, *[1] * (x.dim() - 2))
    y = torch.relu(x)
    mean, var = moments([y], 0, correction, True)
    assert var is not None
    return y, mean, var


def relu_moments_backward(
    grad: Tensor | None,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    y: Tensor,
    mean: Tensor,
    correction: int,
) -> Tensor:
    """`(grad + a + b * (y - mean)) * mask` with the mask of torch's ReLU, which passes NaN."""
    count = torch.full((1,), y.shape[0], device=y.device)
    rows = [] if grad is None else [_rows(grad, 0).reshape(grad.shape)]
    wide = _rows(y, 0).reshape(y.shape)
    (dx,) = moments_backward(rows, grad_mean, grad_var, [wide], mean, count, 0, correction, None)
    return torch.where(y <= 0, 0, dx).to(y.dtype)


def _finite(mean: Tensor, var: Tensor | None) -> Tensor:
    return mean.isfinite() if var is None else mean.isfinite() & var.isfinite()


def _loss_terms(terms: Tensor, value: Tensor, target: Tensor) -> Tensor:
    """Infinite where a term is infinity less infinity, or nothing times infinity: it does not fit."""
    infinite = value.abs() + target.abs() == float("inf")
    return terms.masked_fill(terms.isnan() & infinite, float("inf"))


def match_(mean: Tensor, var: Tensor | None, match: Match) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss and its derivatives with respect to mean and var. With `update`, the state advances in place."""
    kind = AVERAGES[match.average_kind]
    started = match.state[-2] if kind.has_started else None
    update = match.update and bool(match.state)
    step = (match.state[-1].add_(1) if update else match.state[-1] + 1) if match.state else None
    finite = _finite(mean, None if match.target_var is None else var)

    quantities = [(mean, match.target_mean, match.mean_scale, match.mean_weight)]
    if match.target_var is not None:
        assert var is not None
        quantities.append((var, match.target_var, match.var_scale, match.var_weight))
    loss = torch.zeros((), dtype=torch.float64, device=mean.device)
    grads: list[Tensor] = []
    for i, (value, target, scale, column_weight) in enumerate(quantities):
        weight = scale if column_weight is None else scale * column_weight
        vectors = match.state[i * len(kind.vectors) : (i + 1) * len(kind.vectors)]
        past = Past(vectors, started, finite, step, update, match.options)
        matched = kind.match(Quantity(value, target, weight, match.reduction), past)
        if update:
            for old, new in zip(vectors, matched.vectors, strict=True):
                old.copy_(new)
        loss = loss + _loss_terms(matched.terms, value, target).sum(dtype=torch.float64)
        grads.append(matched.grad.expand_as(value).clone())
    if update and started is not None:
        started.logical_or_(finite)
    return loss.to(mean.dtype), grads[0], grads[1] if len(grads) > 1 else None
