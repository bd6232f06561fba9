"""Where tiles of a symmetric matrix lie: among programs, and in the packed triangle of moment_ops/ops/triangle.py."""

import triton
import triton.language as tl

BLOCK = tl.constexpr(128)


@triton.jit
def block_pair(index, blocks):
    """(row, column), row <= column, of a block of the upper triangle; blocks of a row are neighbours.

    Row p and the row that completes it to `blocks` (an odd number) or `blocks` + 1 blocks form one line of a rectangle.
    """
    odd = blocks % 2
    line = index // (blocks + 1 - odd)
    place = index % (blocks + 1 - odd)
    behind = place - (blocks - line)
    row = tl.where(behind < 0, line, blocks - line - 1 + odd)
    column = tl.where(behind < 0, line + place, row + behind)
    return row, column


@triton.jit
def packed_block(width, row, column):
    """(offset, stride) of a block of the upper triangle, row <= column, int64: the distance of rows is `stride`."""
    wide = width.to(tl.int64)
    last = tl.cdiv(wide, BLOCK) - 1
    rest = wide - last * BLOCK
    diagonal_size = last * (BLOCK * BLOCK) + rest * rest
    panel = diagonal_size + BLOCK * (row * wide - BLOCK * (row.to(tl.int64) * (row + 1) // 2))
    on_diagonal = row == column
    offset = tl.where(on_diagonal, row.to(tl.int64) * (BLOCK * BLOCK), panel + (column - row - 1).to(tl.int64) * BLOCK)
    stride = tl.where(on_diagonal, tl.where(row == last, rest, BLOCK), wide - (row + 1).to(tl.int64) * BLOCK)
    return offset, stride
