"""The backwards of the covariance operators on the CPU, by the matrix products of PyTorch.

As in `covariance_cpu`, work is cut by shapes alone, and every named precision runs as "ieee". Where a number on the way
does not fit, a layer is computed anew in float64.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from moment_ops.ops import triangle
from moment_ops.ops.layout import statistics_dtype
from moment_ops.ops.products_cpu import (
    CHUNK,
    PADDING,
    PROMOTED,
    add_product,
    column_sums,
    leading,
    padded_size,
    view_of,
)
from moment_ops.ops.room import all_finite, excess, keeps_digits, times_power_of_two

OPERATORS = {
    "covariance_backward": ("float32", "bfloat16", "float16", "float64"),
    "covariance_match_backward": ("float32", "bfloat16", "float16", "float64"),
}
# Columns of a gradient computed at once, multiples of the triangle's blocks: all of them up to a few megabytes of G.
_STRIP, _WHOLE = 512, 1024

# Fills its second argument with the product of its first and a matrix.
_Multiply: TypeAlias = Callable[[Tensor, Tensor], None]


def _backward(
    x: Tensor,
    mean: Tensor | None,
    slope: float,
    grad_mean: Tensor | None,
    out: Tensor,
    multiply: _Multiply,
) -> bool:
    """Fill `out` with `grad_mean / N + slope * (X - mean) G`, by chunks of rows; whether that is finite.

    Args:
        multiply: fills its second argument with the product of its first and G.
    """
    count, width = x.shape
    dtype = statistics_dtype(x.dtype)
    finite = True
    # G is put together for every chunk anew, so that chunks are large.
    step = max(1024, CHUNK // width)
    rounded = mean is not None and dtype != torch.float64
    single = count <= min(step, PROMOTED)
    rest = None if mean is None or single or not rounded else _rest_of_mean(x, mean)
    for first in range(0, count, step):
        given, rows = (x, out) if count <= step else (x[first : first + step], out[first : first + step])
        height = given.shape[0]
        padded = max(height, PADDING)
        shifted = x.new_zeros(padded, width, dtype=dtype) if padded > height else torch.empty_like(given, dtype=dtype)
        centred = leading(shifted, height, width)
        if mean is None:
            centred.copy_(given)
        else:
            torch.sub(given, mean, out=centred)
            if rounded:
                centred -= column_sums(centred).div_(count) if rest is None else rest
        shifted *= slope
        product = rows if out.dtype == dtype and padded == height else torch.empty_like(shifted)
        multiply(shifted, product)
        if grad_mean is not None:
            product += grad_mean / count
        finite = finite and math.isfinite(float(product.sum()))
        if product is not rows:
            rows.copy_(leading(product, height, width))
    return finite


def _gradient(
    x: Tensor,
    mean: Tensor | None,
    slope: float,
    grad_mean: Tensor | None,
    out: Tensor,
    matrix: Tensor | None,
    product: Callable[[Tensor, int], _Multiply],
) -> None:
    """As `_backward`, also where a number on the way does not fit.

    Args:
        matrix: from which `product` makes the multiplication by G, linearly.
    """
    count, width = x.shape
    if matrix is None:
        out.zero_() if grad_mean is None else out.copy_(grad_mean / count)
        return
    finite = _backward(x, mean, slope, grad_mean, out, product(matrix, width))
    if finite and keeps_digits(slope, statistics_dtype(x.dtype)):
        return
    if not (math.isfinite(slope) and all_finite(x, mean, matrix, grad_mean)):
        return
    rows, wide_matrix = x.double(), matrix.double()
    down, matrix_down = excess(rows), excess(wide_matrix)
    rows = times_power_of_two(rows, -down)
    wide_mean = None if mean is None else times_power_of_two(mean.double(), -down)
    if wide_mean is not None and mean is not None and mean.dtype != torch.float64:
        wide_mean = wide_mean + _rest_of_mean(rows, wide_mean)
    result = torch.empty_like(rows)
    _backward(rows, wide_mean, 1.0, None, result, product(times_power_of_two(wide_matrix, -matrix_down), width))
    mantissa, exponent = math.frexp(slope)
    # Half of it, as the sum with the mean's gradient may fit where its terms do not.
    half = times_power_of_two(mantissa * result, exponent + down + matrix_down - 1)
    if grad_mean is not None:
        half += grad_mean.double() / count / 2
    out.copy_(2 * half)


def _rest_of_mean(x: Tensor, mean: Tensor) -> Tensor:
    """What rounding to float32 left out of the mean: 1e-3 of a column whose mean is 1e4 standard deviations."""
    total = torch.zeros(len(mean), dtype=torch.float64)
    for rows in x.split(PROMOTED):
        total += column_sums(torch.sub(rows, mean))
    return total.div_(len(x)).to(mean.dtype)


def _strip_columns(width: int) -> int:
    return width if width <= _WHOLE else _STRIP


def _strips(width: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, padded size) of the pieces in which columns of a gradient are computed."""
    strip = _strip_columns(width)
    for start in range(0, width, strip):
        stop = min(start + strip, width)
        yield start, stop, padded_size(stop - start)


def _columns(product: Tensor, start: int, stop: int, padded: int) -> Tensor:
    """Memory for columns start ... stop, theirs or, with padding, of its own; `_store` takes them from there."""
    if padded > stop - start:
        return product.new_empty(product.shape[0], padded)
    return product if stop - start == product.shape[1] else product[:, start:stop]


def _store(columns: Tensor, product: Tensor, start: int, stop: int) -> None:
    """Columns start ... stop, from where they were filled."""
    if columns.shape[1] > stop - start:
        product[:, start:stop] = columns[:, : stop - start]


def covariance_backward(
    grad: Tensor | None,
    grad_mean: Tensor | None,
    x: Tensor,
    mean: Tensor,
    correction: int,
    centered: bool,
    precision: str,
    out: Tensor,
) -> None:
    """Fill `out` with `grad_mean / N + (X - mean) (grad + grad') / (N - correction)`."""
    slope = 1 / (len(x) - correction) if len(x) > correction else float("nan")
    _gradient(x, mean if centered else None, slope, grad_mean, out, grad, _full_product)


def _full_product(matrix: Tensor, width: int) -> _Multiply:
    """Multiplication by a matrix and its transpose."""

    def multiply(rows: Tensor, product: Tensor) -> None:
        for start, stop, height in _strips(width):
            below, right = (matrix, matrix) if stop - start == width else (matrix[start:stop], matrix[:, start:stop])
            if height == stop - start:
                strip = below + right.mT
            else:
                strip = matrix.new_zeros(height, width)
                torch.add(below, right.mT, out=strip[: stop - start])
            columns = _columns(product, start, stop, height)
            add_product(columns, rows, strip.mT)
            _store(columns, product, start, stop)

    return multiply


def covariance_match_backward(
    grad: Tensor,
    grad_mean: Tensor | None,
    x: Sequence[Tensor],
    mean: Tensor,
    scale: Tensor | None,
    correction: int,
    precision: str,
    out: Sequence[Tensor],
) -> None:
    """Fill `out` with `grad_mean / N + scale * 2 / (N - correction) (X - mean) G`, G put together strip by strip."""
    widths = [rows.shape[1] for rows in x]
    grad_means = [None] * len(x) if grad_mean is None else list(grad_mean.split(widths))
    count = len(x[0])
    slope = 2 / (count - correction) if count > correction else float("nan")
    # A tensor on the CPU: reading it waits for nothing.
    slope *= 1.0 if scale is None else float(scale)
    for rows, m, g, packed, dx in zip(
        x, mean.split(widths), grad_means, triangle.split(grad, widths), out, strict=True
    ):
        _gradient(rows, m, slope, g, dx, packed, _symmetric_product)


def _symmetric_product(packed: Tensor, width: int) -> _Multiply:
    """Multiplication by a packed symmetric matrix."""
    memory = packed.new_empty(padded_size(_strip_columns(width)) * width)

    def multiply(rows: Tensor, product: Tensor) -> None:
        for start, stop, height in _strips(width):
            right = view_of(memory, (height, width - start))
            triangle.load(packed, start, leading(right, stop - start, width - start))
            if height > stop - start:
                right[stop - start :] = 0
            columns = _columns(product, start, stop, height)
            add_product(columns, rows[:, start:] if start else rows, right.mT)
            if start:
                above = view_of(memory, (start, height))
                triangle.load_above(packed, width, start, above[:, : stop - start])
                above[:, stop - start :] = 0
                add_product(columns, rows[:, :start], above, beta=1.0)
            _store(columns, product, start, stop)

    return multiply
