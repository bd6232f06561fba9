"""`gram` and `gram_backward` on the CPU: column panels through the BLAS that PyTorch ships.

Every panel is a batch of at least two products, over pieces of the columns that depend on the shapes alone: BLAS then
computes each product in one thread. A single product may be cut along the summed dimension, differently for every
number of threads, and a batch that is written in place with strides may be cut at other columns.

A layer whose products have no room in float32 is computed anew in float64.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

OPERATORS = {
    "gram": ("float32", "bfloat16", "float16", "float64"),
    "gram_backward": ("float32", "bfloat16", "float16", "float64"),
}
# Columns of one product: float32 sums of this length at most are folded into float64.
_WIDTH = 1024
# A panel should stay in the cache of one core.
_PANEL_ELEMENTS = 1 << 19
_MOST_PRODUCTS = 16
# Rows per block of the upper triangle; smaller blocks compute less and run slower.
_BLOCK = 64


class _Panel(NamedTuple):
    """Columns [start, stop) as `batch` matrices of `width` columns. The last one may be padded with zeros."""

    start: int
    stop: int
    batch: int
    width: int

    @property
    def padding(self) -> int:
        return self.batch * self.width - (self.stop - self.start)


def _panels(rows: int, columns: int) -> Iterator[_Panel]:
    most = max(2, min(_MOST_PRODUCTS, _PANEL_ELEMENTS // (rows * _WIDTH)))
    for start in range(0, columns, most * _WIDTH):
        size = min(most * _WIDTH, columns - start)
        batch = max(2, -(-size // _WIDTH))
        yield _Panel(start, start + size, batch, -(-size // batch))


@contextmanager
def ieee_products() -> Iterator[None]:
    """Run float32 products in float32, also if `torch.set_float32_matmul_precision` allows less."""
    setting = torch.backends.mkldnn.matmul
    previous = setting.fp32_precision
    if previous in ("none", "ieee"):
        yield
        return
    setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = previous


def _fill(panel: _Panel, buffer: Tensor, rows: Sequence[Tensor], shift: Sequence[Tensor]) -> Tensor:
    """(batch, R, width) of the rows less their shifts, in a part of `buffer`."""
    total = sum(x.shape[0] for x in rows)
    filled = buffer[: panel.batch * total * panel.width].view(panel.batch, total, panel.width)
    pieces = (panel.batch, panel.width)
    offset = 0
    for x, less in zip(rows, shift, strict=True):
        part_of_shift = less[panel.start : panel.stop]
        # (n, batch, width), in the order of the columns.
        target = filled[:, offset : offset + x.shape[0]].transpose(0, 1)
        offset += x.shape[0]
        part = x[:, panel.start : panel.stop]
        if panel.padding:
            target.copy_(F.pad(part.to(less.dtype) - part_of_shift, (0, panel.padding)).unflatten(1, pieces))
        elif x.dtype == less.dtype:
            torch.sub(part.unflatten(1, pieces), part_of_shift.unflatten(0, pieces), out=target)
        else:
            target.copy_(part.unflatten(1, pieces)).sub_(part_of_shift.unflatten(0, pieces))
    return filled


def _new_buffer(counts: int, shift: Sequence[Tensor]) -> Tensor:
    """A buffer for the largest panel of `counts` rows."""
    size = max(p.batch * counts * p.width for s in shift for p in _panels(counts, s.shape[0]))
    return shift[0].new_empty(size)


def gram(rows: Sequence[Tensor], shift: Sequence[Tensor], num_layers: int, out: Tensor) -> None:
    """Fill `out`, (L, R, R) float64. Products are in the dtype of the shift, in sums of at most 1,024 columns."""
    buffer = _new_buffer(out.shape[1], shift)
    with torch.autocast("cpu", enabled=False), ieee_products():
        for layer in range(num_layers):
            group, less = rows[layer::num_layers], shift[layer::num_layers]
            _multiply(group, less, buffer, out[layer])
            # No sum is larger than those of the diagonal.
            if buffer.dtype != torch.float64 and not math.isfinite(float(out[layer].trace())):
                less = [s.double() for s in less]
                _multiply(group, less, _new_buffer(out.shape[1], less), out[layer])


def _multiply(rows: Sequence[Tensor], shift: Sequence[Tensor], buffer: Tensor, out: Tensor) -> None:
    """Fill `out`, (R, R), with the products of the rows of one layer."""
    total = len(out)
    out.zero_()
    for panel in _panels(total, shift[0].shape[0]):
        filled = _fill(panel, buffer, rows, shift)
        for i in range(0, total, _BLOCK):
            products = torch.bmm(filled[:, i : i + _BLOCK], filled[:, i:].mT)
            out[i : i + _BLOCK, i:] += products.sum(0, dtype=torch.float64)
    upper = out.triu()
    torch.add(upper, upper.triu(1).mT, out=out)


# Factors of this size, times rows whose products have room, have room as well, and keep their digits.
_LEAST, _MOST = 2.0**-100, 2.0**50


def _has_digits(factors: Tensor) -> bool:
    """Whether float64 factors keep their digits, and their products with rows fit, in float32."""
    largest = float(factors.abs().max()) if factors.numel() else 0.0
    return largest == 0 or _LEAST <= largest <= _MOST


def gram_backward(
    grad: Tensor, rows: Sequence[Tensor], shift: Sequence[Tensor], wanted: Sequence[bool], out: Sequence[Tensor]
) -> None:
    """Fill `out`, one tensor per entry of `rows` that requires a gradient."""
    num_layers = grad.shape[0]
    buffer = _new_buffer(grad.shape[1], shift)
    result = torch.empty_like(buffer)
    written = iter(out)
    destinations = [next(written) if want else None for want in wanted]
    with torch.autocast("cpu", enabled=False), ieee_products():
        for layer in range(num_layers):
            group, less, written_to = rows[layer::num_layers], shift[layer::num_layers], destinations[layer::num_layers]
            factors = grad[layer] + grad[layer].mT
            if buffer.dtype == torch.float64 or _has_digits(factors):
                _multiply_factors(factors.to(buffer.dtype), group, less, buffer, result, written_to)
            else:
                less = [s.double() for s in less]
                wide = _new_buffer(len(factors), less)
                _multiply_factors(factors, group, less, wide, torch.empty_like(wide), written_to)


def _multiply_factors(
    factors: Tensor,
    rows: Sequence[Tensor],
    shift: Sequence[Tensor],
    buffer: Tensor,
    result: Tensor,
    out: Sequence[Tensor | None],
) -> None:
    """Fill the outputs of one layer, panel by panel through two buffers."""
    parts = factors.split([x.shape[0] for x in rows])
    for panel in _panels(len(factors), shift[0].shape[0]):
        filled = _fill(panel, buffer, rows, shift)
        pieces = (panel.batch, panel.width)
        for factor, destination in zip(parts, out, strict=True):
            if destination is None:
                continue
            n = factor.shape[0]
            product = result[: panel.batch * n * panel.width].view(panel.batch, n, panel.width)
            torch.bmm(factor.expand(panel.batch, -1, -1), filled, out=product)
            columns = destination[:, panel.start : panel.stop]
            in_order = product.transpose(0, 1)
            if panel.padding:
                columns.copy_(in_order.flatten(1)[:, : panel.stop - panel.start])
            else:
                columns.unflatten(1, pieces).copy_(in_order)
