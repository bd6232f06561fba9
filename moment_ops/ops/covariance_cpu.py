"""The covariance operators on the CPU: panels of the upper triangle by the matrix products of PyTorch.

A panel is some block rows of the triangle: rows start ... stop and columns start ... D. Work is cut by shapes alone,
and matrices are padded with zeros where MKL, PyTorch's BLAS, would sum in an order that depends on the number of
threads.
Every named precision runs as "ieee": a precision bounds the error. Where a sum of products has no room in its dtype,
a layer is computed anew of scaled columns.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

from moment_ops.ops import triangle
from moment_ops.ops.layout import statistics_dtype
from moment_ops.ops.packed_match import match_packed
from moment_ops.ops.records import CovarianceMatch
from moment_ops.ops.room import column_scale, excess, times_power_of_two

OPERATORS = {
    "covariance": ("float32", "bfloat16", "float16", "float64"),
    "covariance_backward": ("float32", "bfloat16", "float16", "float64"),
    "covariance_match_": ("float32", "bfloat16", "float16", "float64"),
    "covariance_match_backward": ("float32", "bfloat16", "float16", "float64"),
}
# Rows of a panel. Products of more rows are faster, and compute more below the diagonal.
_PANEL = 256
# Rows whose products are summed in float32; sums over more are in float64.
_PROMOTED = 4096
# Entries of centred rows held at once, where nothing asks for less, and the fewest rows of a product.
_CHUNK = 1 << 22
_FEWEST_ROWS = 256
# MKL cuts products among threads by columns and rows of the result; what its kernels do at the edges of a piece differs
# in the last bit, but for pieces of whole vectors. Measured with 2024.2, AVX-512, float32: results of multiples of 16
# columns and at least 12 rows are the same for one to eight threads, others are not.
_PADDING = 16
# Columns of a gradient computed at once, multiples of the triangle's blocks: all of them up to a few megabytes of G.
_STRIP, _WHOLE = 512, 1024


def _padded(size: int) -> int:
    return -(-size // _PADDING) * _PADDING


def _column_sums(rows: Tensor) -> Tensor:
    """In the dtype of `rows`; PyTorch sums in a cascade, which is exact enough for some thousand rows."""
    return rows.sum(0)


class _Centered:
    """Rows of a layer less their mean, by chunks of rows.

    Args:
        x: (N, D), any strides.
        entries: the most to hold at once.

    The mean is known first, and is subtracted in two terms: rounded to float32, a mean of 1e4 standard deviations would
    leave 1e-3 of them in every column. A constant column is 0 throughout.
    """

    def __init__(self, x: Tensor, entries: int, centered: bool = True) -> None:
        self.x, self.centered = x, centered
        self.dtype = statistics_dtype(x.dtype)
        count, width = x.shape
        rows = min(count, _PROMOTED, max(_FEWEST_ROWS, entries // width))
        self.chunks = [(first, min(first + rows, count)) for first in range(0, count, rows)]
        self.width = _padded(width)
        self.buffer = x.new_empty(rows * self.width, dtype=self.dtype)
        self.pivot = self._rough_mean(min(rows, _FEWEST_ROWS))
        rest = torch.zeros(width, dtype=torch.float64)
        for first, last in self.chunks:
            rest += _column_sums(self._shift(first, last, 0))
        rest /= count
        self.mean = (self.pivot.double() + rest).to(self.dtype)
        self.rest = rest.to(self.dtype)
        # A single chunk stays in the buffer.
        self.whole: Tensor | None = None
        if len(self.chunks) == 1:
            self.whole = self._buffer(count, 0)
            if centered:
                self.whole[:, :width] -= self.rest
            else:
                self.whole[:, :width] = x

    def _rough_mean(self, rows: int) -> Tensor:
        first = self.x[0].to(self.dtype)
        shifted = torch.sub(self.x[:rows], first, out=self._buffer(rows, 0)[:, : len(first)])
        return first + _column_sums(shifted) / rows

    def _buffer(self, rows: int, start: int) -> Tensor:
        """Memory for `rows` rows from column `start` on, with zeros in the padding."""
        columns = self.width - start
        buffer = self.buffer[: rows * columns].view(rows, columns)
        buffer[:, self.x.shape[1] - start :] = 0
        return buffer

    def _shift(self, first: int, last: int, start: int) -> Tensor:
        """Rows less the pivot, without padding."""
        out = self._buffer(last - first, start)[:, : self.x.shape[1] - start]
        return torch.sub(self.x[first:last, start:], self.pivot[start:], out=out)

    def chunk(self, first: int, last: int, start: int) -> Tensor:
        """Rows first ... last and columns start ... D, padded, until the next call."""
        if self.whole is not None:
            return self.whole[:, start:]
        if self.centered:
            self._shift(first, last, start).sub_(self.rest[start:])
            return self.buffer[: (last - first) * (self.width - start)].view(last - first, -1)
        rows = self._buffer(last - first, start)
        rows[:, : self.x.shape[1] - start] = self.x[first:last, start:]
        return rows


def _panels(
    source: _Centered,
    correction: int,
    destination: Callable[[int, int], Tensor] | None = None,
    subtrahend: Callable[[int, Tensor], object] | None = None,
    height: int = _PANEL,
) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, panel) of the covariance, one after another, the leading square of every panel symmetric.

    Args:
        destination: where the panel (start, stop) goes, for a width without padding; by default into memory that the
            next one takes over.
        subtrahend: fills a panel that begins at row `start` with what is subtracted from the covariance.
        height: rows of a panel, a multiple of the triangle's blocks.
    """
    count, width = source.x.shape
    height = min(height, source.width)
    # MKL's products do not propagate a factor that is NaN.
    slope = 1 / _divisor(count, correction)
    scratch = source.x.new_empty(height * source.width, dtype=source.dtype) if destination is None else None
    promoted = count > _PROMOTED and source.dtype == torch.float32
    sums = source.x.new_empty(height * source.width, dtype=torch.float64) if promoted else None
    for start in range(0, width, height):
        stop = min(start + height, width)
        shape = _padded(stop - start), source.width - start
        padded = _view(scratch, shape) if destination is None else destination(start, stop)
        panel = padded[: stop - start, : width - start]
        if sums is None:
            beta = 0.0
            if subtrahend is not None:
                subtrahend(start, panel)
                beta = -1.0
            for first, last in source.chunks:
                rows = source.chunk(first, last, start)
                torch.addmm(padded, rows[:, : shape[0]].mT, rows, beta=beta, alpha=slope, out=padded)
                beta = 1.0
        else:
            total = _promoted_products(source, start, padded, _view(sums, shape)).mul_(slope)
            if subtrahend is not None:
                subtrahend(start, panel)
                total[: stop - start, : width - start] -= panel
            padded.copy_(total)
        triangle.make_symmetric(panel[:, : stop - start])
        if count <= correction:
            panel.fill_(float("nan"))
        yield start, stop, panel


def _view(memory: Tensor | None, shape: tuple[int, int]) -> Tensor:
    assert memory is not None
    return memory[: shape[0] * shape[1]].view(shape)


def _promoted_products(source: _Centered, start: int, panel: Tensor, total: Tensor) -> Tensor:
    """Fill `total` with the sums of products over all chunks; `panel` holds those over a few of them."""
    total.zero_()
    beta, held = 0.0, 0
    for first, last in source.chunks:
        if held + last - first > _PROMOTED:
            total += panel
            beta, held = 0.0, 0
        rows = source.chunk(first, last, start)
        torch.addmm(panel, rows[:, : panel.shape[0]].mT, rows, beta=beta, out=panel)
        beta, held = 1.0, held + last - first
    return total.add_(panel)


def _divisor(count: int, correction: int) -> int:
    return max(count - correction, 1)


def _has_room(panel: Tensor, divisor: int) -> bool:
    """Whether no sum behind a panel has overflowed: none is larger than those of the diagonal, up to rounding."""
    return float(panel.diagonal().amax()) < torch.finfo(panel.dtype).max / 4 / divisor


def _with_room(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rows whose columns are multiplied by a scale; None where no column wants one."""
    rows = x.to(statistics_dtype(x.dtype))
    scale = column_scale(rows)
    return (rows, None) if bool((scale == 1).all()) else (rows * scale, scale)


def _finite(*tensors: Tensor | None) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors if t is not None)


def _is_factor(value: float, dtype: torch.dtype) -> bool:
    """Whether a factor keeps its digits in a dtype."""
    limits = torch.finfo(dtype)
    return value == 0 or limits.tiny <= abs(value) <= limits.max


def covariance(x: Tensor, correction: int, centered: bool, precision: str, cov: Tensor, mean: Tensor) -> None:
    """Fill `cov` (D, D) and `mean` (D,) from `x` (N, D)."""
    _fill(x, correction, centered, cov, mean)
    if _has_room(cov, _divisor(len(x), correction)):
        return
    rows, scale = _with_room(x)
    if scale is not None:
        _fill(rows, correction, centered, cov, mean)
        mean /= scale
        cov /= scale
        cov /= scale[:, None]


def _fill(x: Tensor, correction: int, centered: bool, cov: Tensor, mean: Tensor) -> None:
    source = _Centered(x, _CHUNK, centered)
    mean.copy_(source.mean)
    direct = source.width == len(cov)
    for start, stop, panel in _panels(source, correction, (lambda i, j: cov[i:j, i:]) if direct else None):
        if not direct:
            cov[start:stop, start:] = panel
        cov[stop:, start:stop] = panel[:, stop - start :].mT


def covariance_match_(
    x: Sequence[Tensor], correction: int, match: CovarianceMatch, loss: Tensor, mean: Tensor, grad: Tensor | None
) -> None:
    """Fill the loss, the packed means and, where it is given, the packed derivative; advance the state."""
    widths = [rows.shape[1] for rows in x]
    means = mean.split(widths)
    if match.average == "none":
        grads = [None] * len(x) if grad is None else triangle.split(grad, widths)
        total = torch.zeros((), dtype=torch.float64)
        for rows, target, w, m, g in zip(x, match.target, match.weight, means, grads, strict=True):
            total += _weighted_distance(rows, correction, target, w, m, g)
        loss.copy_(total)
        return
    packed = torch.empty(triangle.total_size(widths), dtype=mean.dtype)
    for rows, m, p in zip(x, means, triangle.split(packed, widths), strict=True):
        if not _pack(rows, correction, m, p, None):
            scaled, scale = _with_room(rows)
            if scale is not None:
                _pack(scaled, correction, m, p, scale)
    value, derivative = match_packed("cpu", packed, triangle.pack_all(match.target), widths, match)
    loss.copy_(value)
    if grad is not None:
        grad.copy_(derivative)


def _pack(rows: Tensor, correction: int, mean: Tensor, packed: Tensor, scale: Tensor | None) -> bool:
    """Fill the mean and the packed covariance of rows, whose columns' scale is taken out; whether they had room."""
    source = _Centered(rows, _CHUNK)
    mean.copy_(source.mean if scale is None else source.mean / scale)
    has_room = True
    for start, stop, panel in _panels(source, correction):
        has_room = has_room and _has_room(panel, _divisor(len(rows), correction))
        if scale is not None:
            panel /= scale[start:]
            panel /= scale[start:stop, None]
        triangle.store(panel, packed, start)
    return has_room


def _weighted_distance(
    rows: Tensor, correction: int, target: Tensor, weight: float, mean: Tensor, grad: Tensor | None
) -> Tensor:
    """`weight * |C - T|^2` in float64; fills the mean, and the packed derivative where it is wanted."""
    total = _squared_distance(rows, correction, target, 2 * weight, mean, grad)
    if math.isfinite(float(total)) and _is_factor(2 * weight, mean.dtype):
        return weight * total
    scaled, scale = _with_room(rows)
    if scale is None and not _finite(scaled, target):
        return weight * total
    return _distance_with_room(scaled, scale, correction, target, weight, mean, grad)


# Squares of numbers up to the largest, times a power of two with this exponent, fit into float64.
_DOWN = -540


def _distance_with_room(
    rows: Tensor,
    scale: Tensor | None,
    correction: int,
    target: Tensor,
    weight: float,
    mean: Tensor,
    grad: Tensor | None,
) -> Tensor:
    """As `_weighted_distance`, of rows whose columns are scaled, in float64 throughout."""
    source = _Centered(rows, _CHUNK)
    up = torch.ones(rows.shape[1], dtype=torch.float64) if scale is None else 1 / scale.double()
    mean.copy_(source.mean * up)
    if weight == 0:
        if grad is not None:
            grad.zero_()
        return torch.zeros((), dtype=torch.float64)
    mantissa, exponent = math.frexp(weight)
    total = torch.zeros((), dtype=torch.float64)
    for down in (0, _DOWN):
        total.zero_()
        for start, stop, panel in _panels(source, correction):
            difference = times_power_of_two(panel.double(), down) * up[start:] * up[start:stop, None]
            difference -= times_power_of_two(_target_panel(target, start, torch.empty_like(panel)).double(), down)
            if grad is not None:
                slope = times_power_of_two(2 * mantissa * difference, exponent - down)
                triangle.store(slope.to(grad.dtype), grad, start)
            squares = difference.square_()
            total += squares[:, : stop - start].sum() + 2 * squares[:, stop - start :].sum()
        if math.isfinite(float(total)):
            break
    return times_power_of_two(mantissa * total, exponent - 2 * down)


def _target_panel(target: Tensor, start: int, panel: Tensor) -> Tensor:
    """Fill a panel that begins at row `start` from a target, full or packed."""
    if target.dim() == 1:
        return triangle.load(target, start, panel)
    return panel.copy_(target[start : start + panel.shape[0], start:])


def _squared_distance(
    rows: Tensor, correction: int, target: Tensor, slope: float, mean: Tensor, grad: Tensor | None
) -> Tensor:
    """|C - T|^2 in float64, panel by panel; fills the mean, and the packed `slope * (C - T)` where it is wanted."""
    # For the value alone, panels and rows stay well below the size of the matrix.
    source = _Centered(rows, rows.shape[1] ** 2 // 4 if grad is None else _CHUNK)
    mean.copy_(source.mean)

    def subtrahend(start: int, panel: Tensor) -> object:
        return _target_panel(target, start, panel)

    total = torch.zeros((), dtype=torch.float64)
    height = triangle.BLOCK if grad is None and rows.shape[1] < 4 * _PANEL else _PANEL
    for start, stop, panel in _panels(source, correction, subtrahend=subtrahend, height=height):
        if grad is not None:
            triangle.store(panel, grad, start, slope)
        # Entries right of the leading square count twice.
        panel.square_()
        total += panel[:, : stop - start].sum(1).double().sum() + 2 * panel[:, stop - start :].sum(1).double().sum()
    return total


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
    step = max(1024, _CHUNK // width)
    rounded = mean is not None and dtype != torch.float64
    single = count <= min(step, _PROMOTED)
    rest = None if mean is None or single or not rounded else _rest_of_mean(x, mean)
    for first in range(0, count, step):
        given, rows = x[first : first + step], out[first : first + step]
        padded = max(len(given), _PADDING)
        shifted = (
            x.new_zeros(padded, width, dtype=dtype) if padded > len(given) else torch.empty_like(given, dtype=dtype)
        )
        centred = shifted[: len(given)]
        if mean is None:
            centred.copy_(given)
        else:
            torch.sub(given, mean, out=centred)
            if rounded:
                centred -= _column_sums(centred) / count if rest is None else rest
        shifted *= slope
        product = rows if out.dtype == dtype and padded == len(given) else torch.empty_like(shifted)
        multiply(shifted, product)
        if grad_mean is not None:
            product += grad_mean / count
        finite = finite and math.isfinite(float(product.sum()))
        if product is not rows:
            rows.copy_(product[: len(given)])
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
    if finite and _is_factor(slope, statistics_dtype(x.dtype)):
        return
    if not (math.isfinite(slope) and _finite(x, mean, matrix, grad_mean)):
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
    for rows in x.split(_PROMOTED):
        total += _column_sums(torch.sub(rows, mean))
    return total.div_(len(x)).to(mean.dtype)


def _strip_columns(width: int) -> int:
    return width if width <= _WHOLE else _STRIP


def _strips(width: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, padded size) of the pieces in which columns of a gradient are computed."""
    strip = _strip_columns(width)
    for start in range(0, width, strip):
        stop = min(start + strip, width)
        yield start, stop, _padded(stop - start)


@contextmanager
def _columns(product: Tensor, start: int, stop: int, padded: int) -> Iterator[Tensor]:
    """Columns start ... stop to be filled, followed by padding that is thrown away."""
    if padded == stop - start:
        yield product[:, start:stop]
        return
    columns = product.new_empty(len(product), padded)
    yield columns
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
            strip = matrix.new_zeros(height, width)
            torch.add(matrix[start:stop], matrix[:, start:stop].mT, out=strip[: stop - start])
            with _columns(product, start, stop, height) as columns:
                torch.mm(rows, strip.mT, out=columns)

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
    memory = packed.new_empty(_padded(_strip_columns(width)) * width)

    def multiply(rows: Tensor, product: Tensor) -> None:
        for start, stop, height in _strips(width):
            right = _view(memory, (height, width - start))
            triangle.load(packed, start, right[: stop - start])
            right[stop - start :] = 0
            with _columns(product, start, stop, height) as columns:
                torch.mm(rows[:, start:], right.mT, out=columns)
                if start:
                    above = _view(memory, (start, height))
                    triangle.load_above(packed, width, start, above[:, : stop - start])
                    above[:, stop - start :] = 0
                    columns.addmm_(rows[:, :start], above)

    return multiply
