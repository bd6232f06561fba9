"""The covariance operators on the CPU: panels of the upper triangle by the matrix products of PyTorch.

A panel is some block rows of the triangle: rows start ... stop and columns start ... D. Work is cut by shapes alone,
and matrices are padded with zeros where MKL, PyTorch's BLAS, would sum in an order that depends on the number of
threads.
Every named precision runs as "ieee": a precision bounds the error. Where a sum of products has no room in its dtype,
a layer is computed anew of scaled columns.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from moment_ops.ops import triangle
from moment_ops.ops.layout import statistics_dtype
from moment_ops.ops.packed_match import match_packed, without_indefinite
from moment_ops.ops.products_cpu import CHUNK, PROMOTED, add_product, column_sums, leading, padded_size, view_of
from moment_ops.ops.records import CovarianceMatch
from moment_ops.ops.room import all_finite, column_scale, keeps_digits, times_power_of_two

OPERATORS = {
    "covariance": ("float32", "bfloat16", "float16", "float64"),
    "covariance_match_": ("float32", "bfloat16", "float16", "float64"),
}
# Rows of a panel. Products of more rows are faster, and compute more below the diagonal.
_PANEL = 256
# The fewest rows of a product.
_FEWEST_ROWS = 256


class _Centered:
    """Rows of a layer less their mean, by chunks of rows.

    Args:
        x: (N, D), any strides.
        mean: (D,), filled.
        entries: the most to hold at once.

    The mean is known first, and is subtracted in two terms: rounded to float32, a mean of 1e4 standard deviations would
    leave 1e-3 of them in every column. A constant column is 0 throughout.
    """

    def __init__(self, x: Tensor, mean: Tensor, entries: int, centered: bool = True) -> None:
        self.x, self.centered = x, centered
        self.dtype = statistics_dtype(x.dtype)
        count, width = x.shape
        rows = min(count, PROMOTED, max(_FEWEST_ROWS, entries // width))
        self.chunks = [(first, min(first + rows, count)) for first in range(0, count, rows)]
        self.width = padded_size(width)
        self.buffer = x.new_empty(rows * self.width, dtype=self.dtype)
        # A single chunk stays in the buffer.
        self.whole: Tensor | None = None
        if len(self.chunks) == 1:
            self._center_whole(mean)
        else:
            self._find_mean(mean)

    def _center_whole(self, mean: Tensor) -> None:
        count, width = self.x.shape
        self.whole = self.buffer.view(count, self.width)
        filled = self._without_padding(self.whole, width)
        few = min(count, _FEWEST_ROWS)
        pivot = self._rough_mean(filled if few == count else filled[:few])
        rest = column_sums(torch.sub(self.x, pivot, out=filled)).div_(count)
        torch.add(pivot, rest, out=mean)
        if self.centered:
            filled -= rest
        else:
            filled.copy_(self.x)

    def _find_mean(self, mean: Tensor) -> None:
        count, width = self.x.shape
        few = min(self.chunks[0][1], _FEWEST_ROWS)
        self.pivot = self._rough_mean(self._buffer(few, 0)[:, :width])
        rest = torch.zeros(width, dtype=torch.float64)
        for first, last in self.chunks:
            rest += column_sums(self._shift(first, last, 0))
        rest /= count
        mean.copy_(self.pivot.double() + rest)
        self.rest = rest.to(self.dtype)

    def _rough_mean(self, memory: Tensor) -> Tensor:
        """Of the first rows, as many as there are in some memory."""
        count = memory.shape[0]
        first = self.x[0].to(self.dtype)
        rows = self.x if count == self.x.shape[0] else self.x[:count]
        return column_sums(torch.sub(rows, first, out=memory)).div_(count).add_(first)

    def _buffer(self, rows: int, start: int) -> Tensor:
        """Memory for `rows` rows from column `start` on, with zeros in the padding."""
        columns = self.width - start
        buffer = self.buffer[: rows * columns].view(rows, columns)
        self._without_padding(buffer, self.x.shape[1] - start)
        return buffer

    @staticmethod
    def _without_padding(buffer: Tensor, columns: int) -> Tensor:
        """The first columns of some memory, whose others become zero."""
        if columns == buffer.shape[1]:
            return buffer
        buffer[:, columns:].zero_()
        return buffer[:, :columns]

    def _shift(self, first: int, last: int, start: int) -> Tensor:
        """Rows less the pivot, without padding."""
        out = self._buffer(last - first, start)[:, : self.x.shape[1] - start]
        return torch.sub(self.x[first:last, start:], self.pivot[start:], out=out)

    def chunk(self, first: int, last: int, start: int) -> Tensor:
        """Rows first ... last and columns start ... D, padded, until the next call."""
        if self.whole is not None:
            return self.whole[:, start:] if start else self.whole
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
    promoted = count > PROMOTED and source.dtype == torch.float32
    sums = source.x.new_empty(height * source.width, dtype=torch.float64) if promoted else None
    for start in range(0, width, height):
        stop = min(start + height, width)
        shape = padded_size(stop - start), source.width - start
        padded = view_of(scratch, shape) if destination is None else destination(start, stop)
        panel = leading(padded, stop - start, width - start)
        if sums is None:
            beta = 0.0
            if subtrahend is not None:
                subtrahend(start, panel)
                beta = -1.0
            for first, last in source.chunks:
                rows = source.chunk(first, last, start)
                left = leading(rows, last - first, shape[0]) * slope
                add_product(padded, left.mT, rows, beta=beta)
                beta = 1.0
        else:
            total = _promoted_products(source, start, padded, view_of(sums, shape)).mul_(slope)
            if subtrahend is not None:
                subtrahend(start, panel)
                total[: stop - start, : width - start] -= panel
            padded.copy_(total)
        triangle.make_symmetric(leading(panel, stop - start, stop - start))
        if count <= correction:
            panel.fill_(float("nan"))
        yield start, stop, panel


def _promoted_products(source: _Centered, start: int, panel: Tensor, total: Tensor) -> Tensor:
    """Fill `total` with the sums of products over all chunks; `panel` holds those over a few of them."""
    total.zero_()
    beta, held = 0.0, 0
    for first, last in source.chunks:
        if held + last - first > PROMOTED:
            total += panel
            beta, held = 0.0, 0
        rows = source.chunk(first, last, start)
        add_product(panel, rows[:, : panel.shape[0]].mT, rows, beta=beta)
        beta, held = 1.0, held + last - first
    return total.add_(panel)


def _divisor(count: int, correction: int) -> int:
    return max(count - correction, 1)


def _has_room(panel: Tensor, divisor: int) -> bool:
    """Whether no sum behind a panel has overflowed: none is larger than those of the diagonal, up to rounding."""
    return float(panel.trace()) < torch.finfo(panel.dtype).max / 4 / divisor


def _with_room(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rows whose columns are multiplied by a scale; None where no column wants one."""
    rows = x.to(statistics_dtype(x.dtype))
    scale = column_scale(rows)
    return (rows, None) if bool((scale == 1).all()) else (rows * scale, scale)


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
    source = _Centered(x, mean, CHUNK, centered)
    width = x.shape[1]

    def upper(start: int, stop: int) -> Tensor:
        return cov if stop - start == width else cov[start:stop, start:]

    direct = source.width == width
    for start, stop, panel in _panels(source, correction, upper if direct else None):
        if not direct:
            upper(start, stop).copy_(panel)
        if stop < width:
            cov[stop:, start:stop] = panel[:, stop - start :].mT


def covariance_match_(
    x: Sequence[Tensor], correction: int, match: CovarianceMatch, loss: Tensor, mean: Tensor, grad: Tensor | None
) -> None:
    """Fill the loss, the packed means and, where it is given, the packed derivative; advance the state."""
    widths = [rows.shape[1] for rows in x]
    means = mean.split(widths)
    if match.average_kind == "none":
        grads = [None] * len(x) if grad is None else triangle.split(grad, widths)
        total = 0.0
        for rows, target, w, m, g in zip(x, match.target, match.weight, means, grads, strict=True):
            total += _weighted_distance(rows, correction, target, w, m, g)
        # A tensor of it: `fill_` raises where the number does not fit.
        loss.copy_(torch.scalar_tensor(total, dtype=torch.float64))
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
    source = _Centered(rows, mean, CHUNK)
    if scale is not None:
        mean /= scale
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
) -> float:
    """`weight * |C - T|^2` in float64; fills the mean, and the packed derivative where it is wanted."""
    total = _squared_distance(rows, correction, target, 2 * weight, mean, grad)
    if math.isfinite(total) and keeps_digits(2 * weight, mean.dtype):
        return weight * total
    scaled, scale = _with_room(rows)
    if scale is None and not all_finite(scaled, target):
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
) -> float:
    """As `_weighted_distance`, of rows whose columns are scaled, in float64 throughout."""
    source = _Centered(rows, mean, CHUNK)
    up = torch.ones(rows.shape[1], dtype=torch.float64) if scale is None else 1 / scale.double()
    mean *= up
    if weight == 0:
        if grad is not None:
            grad.zero_()
        return 0.0
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
    if len(rows) > correction and all_finite(rows):
        total = without_indefinite(total, target)
    return float(times_power_of_two(mantissa * total, exponent - 2 * down))


def _target_panel(target: Tensor, start: int, panel: Tensor) -> Tensor:
    """Fill a panel that begins at row `start` from a target, full or packed."""
    if target.dim() == 1:
        return triangle.load(target, start, panel)
    return panel.copy_(target[start : start + panel.shape[0], start:])


def _squared_distance(
    rows: Tensor, correction: int, target: Tensor, slope: float, mean: Tensor, grad: Tensor | None
) -> float:
    """|C - T|^2 in float64, panel by panel; fills the mean, and the packed `slope * (C - T)` where it is wanted."""
    # For the value alone, panels and rows stay well below the size of the matrix.
    source = _Centered(rows, mean, rows.shape[1] ** 2 // 4 if grad is None else CHUNK)

    def subtrahend(start: int, panel: Tensor) -> object:
        return _target_panel(target, start, panel)

    total = 0.0
    height = triangle.BLOCK if grad is None and rows.shape[1] < 4 * _PANEL else _PANEL
    for start, stop, panel in _panels(source, correction, subtrahend=subtrahend, height=height):
        if grad is not None:
            triangle.store(panel, grad, start, slope)
        panel.square_()
        squares = _sum(leading(panel, stop - start, stop - start))
        # Entries right of the leading square count twice.
        if stop - start < panel.shape[1]:
            squares += 2 * _sum(panel[:, stop - start :])
        total += squares
    return total


def _sum(matrix: Tensor) -> float:
    """In float64, of sums of rows in the matrix's dtype."""
    return float(matrix.sum(1).sum(dtype=torch.float64))
