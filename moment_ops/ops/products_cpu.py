"""What the CPU's covariance operators share: sizes of products whose bits do not depend on the number of threads."""

import torch
from torch import Tensor

# Rows whose products are summed in float32; sums over more are in float64.
PROMOTED = 4096
# Entries of rows held at once, where nothing asks for less.
CHUNK = 1 << 22
# MKL cuts products among threads by columns and rows of the result; what its kernels do at the edges of a piece differs
# in the last bit, but for pieces of whole vectors. Measured with 2024.2, AVX-512, float32: results of multiples of 16
# columns and at least 12 rows are the same for one to eight threads, others are not.
PADDING = 16
# On Intel processors MKL also cuts long sums among threads, and rounds a factor of the result where a thread begins.
# Measured with 2024.2, AVX-512, one to three threads: without a factor, sums of up to 384 float32 or 192 float64
# products are the same.
DEPTH = {torch.float32: 384, torch.float64: 192}


def padded_size(size: int) -> int:
    """A size with the columns of zeros that products need."""
    return -(-size // PADDING) * PADDING


def add_product(out: Tensor, a: Tensor, b: Tensor, *, beta: float = 0.0) -> None:
    """`out = beta * out + a @ b`, with the same bits for any number of threads."""
    pieces = -(-a.shape[1] // DEPTH[out.dtype])
    for left, right in zip(a.tensor_split(pieces, 1), b.tensor_split(pieces), strict=True):
        torch.addmm(out, left, right, beta=beta, out=out)
        beta = 1.0


def column_sums(rows: Tensor) -> Tensor:
    """Sums of columns in the dtype of `rows`. PyTorch's cascade of sums is exact enough for some thousand rows."""
    return rows.sum(0)


def view_of(memory: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """The first entries of a vector, viewed as a matrix."""
    assert memory is not None
    return memory[: shape[0] * shape[1]].view(shape)


def leading(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """The first rows and columns of a matrix: itself where it has no others."""
    if matrix.shape[0] == rows:
        return matrix if matrix.shape[1] == columns else matrix[:, :columns]
    return matrix[:rows, :columns]
