"""`covariance`, `covariance_match_` and their backwards: schemas, kernels, shape functions and derivatives.

Backends fill the outputs they are given, from rows (N, D_l) of any strides:

    covariance(x, correction, centered, precision, cov, mean)
    covariance_backward(grad, grad_mean, x, mean, correction, centered, precision, out)
    covariance_match_(x, correction, match, loss, mean, grad)
    covariance_match_backward(grad, grad_mean, x, mean, scale, correction, precision, out)

`match` is the record `CovarianceMatch`; `grad` of `covariance_match_` is None where it is not kept. Columns have to be
centred before they are multiplied: a shift off by one standard deviation in every column costs sqrt(D) in digits, so
that the first row alone will not do.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from moment_ops.ops import backends, reference_covariance, triangle
from moment_ops.ops.layout import columns_of, statistics_dtype
from moment_ops.ops.library import define
from moment_ops.ops.match import advance
from moment_ops.ops.nodes import register_derivative
from moment_ops.ops.records import CovarianceMatch, parameters
from moment_ops.ops.room import column_scale


def _flat(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1)


def _columns(x: Sequence[Tensor]) -> int:
    return sum(columns_of(layer) for layer in x)


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _full_precision(x: Tensor) -> Any:
    """Kernels call operators of PyTorch that autocast would turn to 16 bits."""
    device = x.device.type
    # The context takes longer to make than a small product.
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _covariance(x: Tensor, correction: int, centered: bool, precision: str) -> tuple[Tensor, Tensor]:
    name = backends.select("covariance", x)
    with _full_precision(x):
        if name == "reference":
            return reference_covariance.covariance(x, correction, centered, precision)
        cov, mean = _covariance_fake(x, correction, centered, precision)
        backends.implementation(name, "covariance")(_flat(x), correction, centered, precision, cov, mean)
    return cov, mean


def _covariance_fake(x: Tensor, correction: int, centered: bool, precision: str) -> tuple[Tensor, Tensor]:
    width, dtype = columns_of(x), statistics_dtype(x.dtype)
    return x.new_empty((width, width), dtype=dtype), x.new_empty(width, dtype=dtype)


def _covariance_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.correction, ctx.centered, ctx.precision = inputs
    ctx.save_for_backward(x, output[1])
    ctx.set_materialize_grads(False)


def _covariance_derivative(
    ctx: Any, grad: Tensor | None, grad_mean: Tensor | None
) -> tuple[Tensor | None, None, None, None]:
    x, mean = ctx.saved_tensors
    d_x = None
    if grad is not None or grad_mean is not None:
        d_x = torch.ops.moment_ops.covariance_backward.default(
            grad, grad_mean, x, mean, ctx.correction, ctx.centered, ctx.precision
        )
    return d_x, None, None, None


def _written(out: Tensor) -> Tensor:
    """(N, D) to be filled: a view of `out` if its strides allow it, else a new tensor that is copied."""
    flat = out.reshape(out.shape[0], -1)
    return flat if flat.data_ptr() == out.data_ptr() else torch.empty_like(flat)


def _finish(out: Tensor, written: Tensor) -> Tensor:
    return out if written.data_ptr() == out.data_ptr() else out.copy_(written.view(out.shape))


def _covariance_backward(
    grad: Tensor | None,
    grad_mean: Tensor | None,
    x: Tensor,
    mean: Tensor,
    correction: int,
    centered: bool,
    precision: str,
) -> Tensor:
    name = backends.select("covariance_backward", x)
    # Strides as the shape function promises: those of the input where it is dense.
    out = torch.empty_like(x)
    with _full_precision(x):
        if name == "reference":
            return out.copy_(
                reference_covariance.covariance_backward(grad, grad_mean, x, mean, correction, centered, precision)
            )
        written = _written(out)
        backends.implementation(name, "covariance_backward")(
            _dense(grad), _dense(grad_mean), _flat(x), mean.contiguous(), correction, centered, precision, written
        )
    return _finish(out, written)


def _covariance_backward_fake(
    grad: Tensor | None,
    grad_mean: Tensor | None,
    x: Tensor,
    mean: Tensor,
    correction: int,
    centered: bool,
    precision: str,
) -> Tensor:
    return torch.empty_like(x)


def _covariance_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, grad_mean, x, mean, ctx.correction, ctx.centered, _ = inputs
    ctx.has_mean = grad_mean is not None
    ctx.save_for_backward(grad, x, mean)


def _scaled_product(slope: float, a: Tensor, b: Tensor) -> Tensor:
    """`slope * a @ b`, which is infinite only if the result does not fit."""
    rows, columns = column_scale(a.mT)[:, None], column_scale(b)
    return slope * ((a * rows) @ (b * columns)) / rows / columns


def _covariance_backward_derivative(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:
    """Derivative of `dx = grad_mean / N + slope * Xc (grad + grad')` by operators of PyTorch, thus differentiable."""
    grad, x, mean = ctx.saved_tensors
    rows = len(x)
    d_grad = d_grad_mean = d_x = d_mean = None
    with _full_precision(x):
        tangent = _flat(h).to(mean.dtype)
        if ctx.has_mean:
            d_grad_mean = tangent.sum(0) / rows
        if grad is not None:
            shifted = _flat(x).to(mean.dtype)
            scale = column_scale(shifted)
            shifted = shifted * scale
            if ctx.centered:
                shifted = shifted - mean * scale
            slope = 1 / (rows - ctx.correction) if rows > ctx.correction else float("nan")
            product = _scaled_product(slope, shifted.mT, tangent) / scale[:, None]
            d_grad = product + product.mT
            d_rows = _scaled_product(slope, tangent, grad + grad.mT)
            d_x = d_rows.reshape(x.shape).to(x.dtype)
            if ctx.centered:
                d_mean = -d_rows.sum(0)
    return d_grad, d_grad_mean, d_x, d_mean, None, None, None


def _covariance_match(x: list[Tensor], correction: int, *fields: Any) -> tuple[Tensor, Tensor, Tensor]:
    match = CovarianceMatch(*fields)
    advance(match.state, match.update)
    name = backends.select("covariance_match_", x[0])
    with _full_precision(x[0]):
        if name == "reference":
            return reference_covariance.covariance_match_(x, correction, match)
        loss, mean, grad = _covariance_match_fake(x, correction, *match)
        backends.implementation(name, "covariance_match_")(
            [_flat(layer) for layer in x], correction, match, loss, mean, grad if match.keep else None
        )
    return loss, mean, grad


def _covariance_match_fake(x: list[Tensor], correction: int, *fields: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = statistics_dtype(x[0].dtype)
    packed = triangle.total_size([columns_of(layer) for layer in x]) if CovarianceMatch(*fields).keep else 0
    return (
        x[0].new_empty((), dtype=dtype),
        x[0].new_empty(_columns(x), dtype=dtype),
        x[0].new_empty(packed, dtype=dtype),
    )


def _covariance_match_backward(
    grad: Tensor,
    grad_mean: Tensor | None,
    x: list[Tensor],
    mean: Tensor,
    scale: Tensor | None,
    correction: int,
    precision: str,
) -> list[Tensor]:
    name = backends.select("covariance_match_backward", x[0])
    out = [torch.empty_like(layer) for layer in x]
    with _full_precision(x[0]):
        if name == "reference":
            grads = reference_covariance.covariance_match_backward(
                grad, grad_mean, x, mean, scale, correction, precision
            )
            return [y.copy_(g) for y, g in zip(out, grads, strict=True)]
        written = [_written(y) for y in out]
        backends.implementation(name, "covariance_match_backward")(
            grad.contiguous(),
            _dense(grad_mean),
            [_flat(layer) for layer in x],
            mean.contiguous(),
            scale,
            correction,
            precision,
            written,
        )
    return [_finish(y, w) for y, w in zip(out, written, strict=True)]


def _covariance_match_backward_fake(
    grad: Tensor,
    grad_mean: Tensor | None,
    x: list[Tensor],
    mean: Tensor,
    scale: Tensor | None,
    correction: int,
    precision: str,
) -> list[Tensor]:
    return [torch.empty_like(layer) for layer in x]


def _no_derivative(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError("covariance_match_backward has no derivative; differentiate the operator covariance")


define(
    "covariance(Tensor x, int correction, bool centered, str precision) -> (Tensor cov, Tensor mean)",
    _covariance,
    _covariance_fake,
)
define(
    "covariance_backward(Tensor? grad, Tensor? grad_mean, Tensor x, Tensor mean, int correction, bool centered,"
    " str precision) -> Tensor",
    _covariance_backward,
    _covariance_backward_fake,
)
define(
    f"covariance_match_(Tensor[] x, int correction, {parameters(CovarianceMatch)})"
    " -> (Tensor loss, Tensor mean, Tensor grad)",
    _covariance_match,
    _covariance_match_fake,
)
define(
    "covariance_match_backward(Tensor grad, Tensor? grad_mean, Tensor[] x, Tensor mean, Tensor? scale, int correction,"
    " str precision) -> Tensor[]",
    _covariance_match_backward,
    _covariance_match_backward_fake,
)
register_derivative("covariance", _covariance_derivative, _covariance_setup)
register_derivative("covariance_backward", _covariance_backward_derivative, _covariance_backward_setup)
register_derivative("covariance_match_backward", _no_derivative)


def covariance(x: Tensor, correction: int, centered: bool, precision: str) -> tuple[Tensor, Tensor]:
    """(D, D) covariance and (D,) mean of the rows of `x`; differentiable, twice in eager mode."""
    return torch.ops.moment_ops.covariance.default(x, correction, centered, precision)


def covariance_match_backward(
    x: Sequence[Tensor],
    mean: Tensor,
    grad: Tensor,
    grad_mean: Tensor | None,
    *,
    scale: Tensor | None,
    correction: int,
    precision: str,
) -> list[Tensor]:
    """`grad_mean / N + scale * 2 / (N - correction) (X - mean) G` for every layer, in its dtype and strides.

    Args:
        grad: packed G, the symmetric derivative of the loss with respect to the covariances.
        grad_mean: (F,) derivative with respect to the means; it is not scaled.
        scale: scalar tensor.
    """
    return torch.ops.moment_ops.covariance_match_backward.default(
        grad, grad_mean, list(x), mean, scale, correction, precision
    )
