"""Powers of two that leave room for sums of squares: what is computed of scaled columns has the same digits."""

import math

import torch
from torch import Tensor

from moment_ops.ops.nodes import is_transformed

# The longest step by a power of two, which is itself a number in float64.
_STEP = 1000


def is_readable(x: Tensor) -> bool:
    """Whether x has values on the CPU, which can be read without waiting."""
    plain = type(x) is Tensor and x.device.type == "cpu"
    return plain and not (torch.compiler.is_compiling() or is_transformed())


def is_seen_finite(value: Tensor) -> bool:
    """Whether a scalar can be read without waiting, and is finite."""
    return is_readable(value) and math.isfinite(value.detach())


def column_scale(rows: Tensor) -> Tensor:
    """(D,): 1, or a small power of two for columns of (N, D) whose sums of squares may overflow.

    Values that underflow in a scaled column are negligible next to its largest value. Non-finite columns are not
    scaled.
    """
    if not rows.numel():
        return rows.new_ones(rows.shape[1])
    largest = rows.detach().abs().amax(0)
    exponent = math.log2(torch.finfo(rows.dtype).max)
    wants_room = (largest > 2.0 ** (0.4 * exponent)) & (largest < math.inf)
    return torch.ones_like(largest).masked_fill(wants_room, 2.0 ** -round(0.6 * exponent))


def times_power_of_two(x: Tensor, exponent: int) -> Tensor:
    """`x`, float64, times `2 ** exponent`, which is infinite only if the result does not fit."""
    while exponent:
        step = max(-_STEP, min(_STEP, exponent))
        x = x * 2.0**step
        exponent -= step
    return x


def all_finite(*tensors: Tensor | None) -> bool:
    """Whether all entries of these tensors are finite. Reads from the device."""
    return all(bool(t.isfinite().all()) for t in tensors if t is not None)


def keeps_digits(value: float, dtype: torch.dtype) -> bool:
    """Whether a factor is 0 or a normal number of a dtype, so that it keeps its digits."""
    limits = torch.finfo(dtype)
    return value == 0 or limits.tiny <= abs(value) <= limits.max


def excess(x: Tensor) -> int:
    """The exponent of the power of two by which float64 numbers are too large for sums of their products, or 0."""
    return max(0, math.frexp(float(x.abs().max()))[1] - _STEP // 2)
