"""The covariance operators in plain PyTorch: any dtype, device and layout; the definition of every precision."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moment_ops.ops import triangle
from moment_ops.ops.layout import statistics_dtype
from moment_ops.ops.packed_match import match_packed
from moment_ops.ops.records import CovarianceMatch
from moment_ops.ops.room import column_scale

PRECISIONS = ("ieee", "bf16x3", "tf32", "bf16")


def _wide(x: Tensor) -> Tensor:
    """float64 if the device supports it, else the dtype of the tensor."""
    return x if x.device.type == "mps" else x.double()


def _to_tf32(x: Tensor) -> Tensor:
    """float32 rounded to nearest even with 10 explicit bits of mantissa."""
    bits = x.view(torch.int32)
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF
    return torch.where(x.isfinite(), rounded.view(torch.float32), x)


def _to_bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype)


def product(a: Tensor, b: Tensor, precision: str) -> Tensor:
    """`a @ b` in float64, with operands rounded as tensor cores round them. float64 operands are not rounded.

    "bf16x3" splits every operand into two bfloat16 terms, and leaves out the product of the two small terms.
    """
    if precision == "ieee" or a.dtype == torch.float64:
        return _wide(a) @ _wide(b)
    if precision == "tf32":
        return _wide(_to_tf32(a)) @ _wide(_to_tf32(b))
    a_high, b_high = _to_bf16(a), _to_bf16(b)
    if precision == "bf16":
        return _wide(a_high) @ _wide(b_high)
    a_low, b_low = _to_bf16(a - a_high), _to_bf16(b - b_high)
    a_high, b_high, a_low, b_low = (_wide(part) for part in (a_high, b_high, a_low, b_low))
    return a_high @ b_high + a_high @ b_low + a_low @ b_high


def _mean(rows: Tensor) -> Tensor:
    """(D,) of wide rows. The first row is subtracted before rows are summed, so that a constant column has an exact
    mean.
    """
    return rows[0] + (rows - rows[0]).mean(0)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1).to(statistics_dtype(x.dtype))


def covariance(x: Tensor, correction: int, centered: bool, precision: str) -> tuple[Tensor, Tensor]:
    """`Xc' Xc / (N - correction)`, (D, D) and exactly symmetric, and the mean, (D,).

    A result that its dtype can represent does not overflow in an intermediate sum or product.
    """
    rows = _rows(x)
    scale = _wide(column_scale(rows))
    wide = _wide(rows) * scale
    mean = _mean(wide)
    shifted = wide - mean if centered else wide
    if precision != "ieee":
        shifted = shifted.to(rows.dtype)
    cov = product(shifted.mT, shifted, precision)
    freedom = rows.shape[0] - correction
    cov = cov / freedom if freedom > 0 else torch.full_like(cov, float("nan"))
    triangle.make_symmetric(cov)
    return (cov / scale / scale[:, None]).to(rows.dtype), (mean / scale).to(rows.dtype)


def covariance_backward(
    grad: Tensor | None,
    grad_mean: Tensor | None,
    x: Tensor,
    mean: Tensor,
    correction: int,
    centered: bool,
    precision: str,
) -> Tensor:
    """`grad_mean / N + (X - mean) (grad + grad') / (N - correction)`, in the shape and dtype of x."""
    rows = _rows(x)
    # Halves, as sums and differences of two numbers that are may not be one.
    half = torch.zeros_like(rows)
    if grad is not None:
        shifted = _wide(rows) / 2
        if centered:
            shifted = shifted - _wide(mean) / 2
            if rows.dtype != torch.float64:
                # What rounding to float32 left out of the mean.
                shifted = shifted - shifted.mean(0)
        # Rows and columns have a scale of their own, as in the covariance.
        symmetric = grad / 2 + grad.mT / 2
        row_scale, scale = column_scale(shifted.to(rows.dtype).mT)[:, None], column_scale(symmetric)
        quarter = product((shifted * row_scale).to(rows.dtype), symmetric * scale, precision) / (len(rows) - correction)
        half = (2 * (quarter / _wide(row_scale) / _wide(scale))).to(rows.dtype)
    if grad_mean is not None:
        half = half + grad_mean / len(rows) / 2
    dx = 2 * half
    return dx.reshape(x.shape).to(x.dtype)


def covariance_match_(x: Sequence[Tensor], correction: int, match: CovarianceMatch) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the packed means and, where it is kept, the packed derivative with respect to the covariances."""
    results = [covariance(layer, correction, True, match.precision) for layer in x]
    widths = [len(mean) for _, mean in results]
    packed = triangle.pack_all([cov for cov, _ in results])
    loss, grad = match_packed("reference", packed, triangle.pack_all(match.target), widths, match)
    return loss, torch.cat([mean for _, mean in results]), grad if match.keep else grad.new_empty(0)


def covariance_match_backward(
    grad: Tensor,
    grad_mean: Tensor | None,
    x: Sequence[Tensor],
    mean: Tensor,
    scale: Tensor | None,
    correction: int,
    precision: str,
) -> list[Tensor]:
    """`grad_mean / N + scale * 2 / (N - correction) (X - mean) G` for every layer, G from its packed triangle."""
    widths = [layer[0].numel() for layer in x]
    outputs = []
    means = mean.split(widths)
    grad_means = [None] * len(widths) if grad_mean is None else list(grad_mean.split(widths))
    for layer, packed, m, g in zip(x, triangle.split(grad, widths), means, grad_means, strict=True):
        full = triangle.unpack(packed, len(m))
        full = full if scale is None else full * scale
        outputs.append(covariance_backward(full, g, layer, m, correction, True, precision))
    return outputs
