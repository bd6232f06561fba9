"""The packed triangle of a symmetric matrix: whole diagonal blocks, then the panels to their right, without padding.

A D x D matrix is cut into block rows of BLOCK rows, the last one shorter. First come the diagonal blocks, each
contiguous, one after another; then, for every block row, the contiguous panel of all columns right of its diagonal
block. A panel always has BLOCK rows, for the last block row has none:

    D = 320     A = [0:128, 0:128]  [128:256, 128:256]  [256:320, 256:320]
                B = [0:128, 128:320]  [128:256, 256:320]

An entry of A stands for itself, one of B for two of the matrix. Several matrices follow one another, A and B of one
before those of the next.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moment_ops.ops.nodes import Node

BLOCK = 128


def blocks(width: int) -> int:
    """Number of block rows of a `width` x `width` matrix."""
    return -(-width // BLOCK)


def diagonal_size(width: int) -> int:
    """Number of entries of part A, the diagonal blocks."""
    whole = blocks(width) - 1
    rest = width - whole * BLOCK
    return whole * BLOCK * BLOCK + rest * rest


def diagonal_offset(block: int) -> int:
    """The offset of the diagonal block of a block row."""
    return block * BLOCK * BLOCK


def panel_width(width: int, block: int) -> int:
    """The number of columns to the right of the diagonal block. It is 0 for the last block row."""
    return max(0, width - (block + 1) * BLOCK)


def panel_offset(width: int, block: int) -> int:
    """The offset of the panel of a block row."""
    return diagonal_size(width) + BLOCK * (block * width - BLOCK * (block * (block + 1) // 2))


def size(width: int) -> int:
    """Number of packed entries of a `width` x `width` matrix."""
    return panel_offset(width, blocks(width) - 1)


def total_size(widths: Sequence[int]) -> int:
    """Number of packed entries of several matrices."""
    return sum(size(width) for width in widths)


def diagonal(packed: Tensor, width: int, block: int) -> Tensor:
    """The diagonal block of a block row, a view."""
    rows = min(BLOCK, width - block * BLOCK)
    start = diagonal_offset(block)
    return packed[start : start + rows * rows].view(rows, rows)


def panel(packed: Tensor, width: int, block: int) -> Tensor:
    """The panel of a block row, (BLOCK, columns), as a view. The last block row has none."""
    columns = panel_width(width, block)
    start = panel_offset(width, block)
    return packed[start : start + BLOCK * columns].view(BLOCK, columns)


def split(packed: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """The packed matrices, one view each."""
    return list(packed.split([size(width) for width in widths]))


def parts(widths: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """For parts A and B of every matrix, in order: the slice, and how often an entry occurs in the full matrix."""
    start = 0
    for width in widths:
        middle, stop = start + diagonal_size(width), start + size(width)
        yield slice(start, middle), 1
        if stop > middle:
            yield slice(middle, stop), 2
        start = stop


def counts(widths: Sequence[int], like: Tensor) -> Tensor:
    """(F,) in the dtype of `like`: 1 for entries of A, 2 for those of B."""
    return torch.cat([like.new_full((part.stop - part.start,), float(count)) for part, count in parts(widths)])


def store(strip: Tensor, packed: Tensor, start: int, factor: float = 1.0) -> None:
    """Write block rows, times a factor, into a packed matrix.

    Args:
        strip: rows start ... start + S and columns start ... width; `start` and, but for the last, S are multiples of
            BLOCK.
    """
    height, columns = strip.shape
    width = start + columns
    for row in range(0, height, BLOCK):
        block = (start + row) // BLOCK
        middle = min(row + BLOCK, height)
        torch.mul(strip[row:middle, row:middle], factor, out=diagonal(packed, width, block))
        if middle < columns:
            torch.mul(strip[row:middle, middle:], factor, out=panel(packed, width, block))


def load(packed: Tensor, start: int, out: Tensor) -> Tensor:
    """Fill `out`, a `strip` as of `store`, from a packed matrix. The square at its start becomes symmetric."""
    height, columns = out.shape
    width = start + columns
    for row in range(0, height, BLOCK):
        block = (start + row) // BLOCK
        rows = min(BLOCK, height - row)
        out[row : row + rows, row : row + rows] = diagonal(packed, width, block)
        if row + rows < columns:
            right = panel(packed, width, block)
            out[row : row + rows, row + rows :] = right
            out[row + rows :, row : row + rows] = right[:, : height - row - rows].mT
    return out


def load_above(packed: Tensor, width: int, start: int, out: Tensor) -> Tensor:
    """Fill `out`, rows 0 ... start and columns start ... start + S, from a packed matrix."""
    columns = out.shape[1]
    for block in range(start // BLOCK):
        row = block * BLOCK
        first = start - row - BLOCK
        out[row : row + BLOCK] = panel(packed, width, block)[:, first : first + columns]
    return out


def make_symmetric(square: Tensor) -> None:
    """Copy the upper triangle onto the lower one, in place."""
    above = square.triu(1)
    square.triu_().add_(above.mT)


def _pack(full: Tensor) -> Tensor:
    packed = full.new_empty(size(full.shape[0]))
    for start in range(0, full.shape[0], BLOCK):
        store(full[start : start + BLOCK, start:], packed, start)
    return packed


class _Pack(Node):
    """The packed upper triangle. The gradient is that of the upper triangle; whoever made the matrix symmetrizes it."""

    @staticmethod
    def forward(ctx: Any, full: Tensor) -> Tensor:
        ctx.width = full.shape[0]
        return _pack(full)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _PackBackward.call(grad, ctx.width)


class _PackBackward(Node):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, width: int) -> Tensor:
        full = grad.new_zeros(width, width)
        for block in range(blocks(width)):
            start = block * BLOCK
            full[start : start + BLOCK, start : start + BLOCK] = diagonal(grad, width, block)
            if panel_width(width, block):
                full[start : start + BLOCK, start + BLOCK :] = panel(grad, width, block)
        return full

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Pack.call(grad), None


def pack(full: Tensor) -> Tensor:
    """A symmetric (D, D) matrix as a packed vector. Differentiable. Part B is read from the upper triangle."""
    return _Pack.call(full)


def pack_all(matrices: Sequence[Tensor]) -> Tensor:
    """Symmetric (D_l, D_l) matrices, or packed ones, as one packed vector. Differentiable."""
    packed = [matrix if matrix.dim() == 1 else pack(matrix) for matrix in matrices]
    return packed[0] if len(packed) == 1 else torch.cat(packed)


def unpack(packed: Tensor, width: int) -> Tensor:
    """The full (D, D) matrix. Parts B are mirrored exactly."""
    full = packed.new_empty(width, width)
    for block in range(blocks(width)):
        start = block * BLOCK
        stop = start + BLOCK
        full[start:stop, start:stop] = diagonal(packed, width, block)
        if panel_width(width, block):
            right = panel(packed, width, block)
            full[start:stop, stop:] = right
            full[stop:, start:stop] = right.mT
    return full
