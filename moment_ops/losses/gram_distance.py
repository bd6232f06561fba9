"""Distances between covariances, computed from Gram matrices of rows and without (D, D) matrices."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moment_ops.distributed import ProcessGroup, gather_rows, group_size
from moment_ops.ops.gram import gram
from moment_ops.ops.layout import as_rows, is_channels_last, statistics_dtype
from moment_ops.ops.nodes import Node

ESTIMATORS = ("biased", "unbiased")


def fewest_rows(correction: int, estimator: str) -> int:
    """The smallest number of rows. The unbiased estimator multiplies four different rows."""
    return 4 if estimator == "unbiased" else correction + 1


def _in_rows(groups: Sequence[Sequence[Tensor]], alone: bool) -> list[list[Tensor]]:
    """(n, D_l) for every layer of every group. The order of the columns does not change a Gram matrix.

    Where the input is channels-last, columns have its order in all groups. Over several processes columns have the
    logical order, since layouts may differ between processes.
    """

    channels_last = [
        alone and is_channels_last(x) and not x.is_contiguous() and all(y.shape[1:] == x.shape[1:] for y in others)
        for x, *others in zip(*groups, strict=True)
    ]
    return [
        [as_rows(x.movedim(1, -1) if last else x) for x, last in zip(features, channels_last, strict=True)]
        for features in groups
    ]


def _centred(block: Tensor) -> Tensor:
    """`J K J`, (L, n, m): the inner products of the centred rows."""
    block = block - block.mean(-1, keepdim=True)
    return block - block.mean(-2, keepdim=True)


def _u_centred(block: Tensor) -> Tensor:
    """The U-centred block, (L, n, n), with zero row sums and a zero diagonal.

    The sum of its squares over n (n - 3) is HSIC_1 of Song et al. (JMLR 2012) for linear kernels, whose expectation is
    the squared norm of the true covariance. This form avoids the cancellation between the three terms of theirs.

    Source: Szekely and Rizzo, Annals of Statistics 2014.
    """
    n = block.shape[-1]
    diagonal = torch.eye(n, dtype=torch.bool, device=block.device)
    block = block.masked_fill(diagonal, 0)
    means = block.sum(-1, keepdim=True) / (n - 2)
    total = block.sum((-2, -1), keepdim=True) / ((n - 1) * (n - 2))
    return (block - means - means.mT + total).masked_fill(diagonal, 0)


class _Distances(Node):
    """(L,) squared distances from Gram matrices (L, n + m, n + m) of the rows of both sides.

    The value is the sum over blocks b of scale_b ||P_b K_b||^2, where the orthogonal projection P_b centres the block.
    The derivative is 2 scale_b P_b K_b. A backward that is itself differentiated computes P_b K_b again, from K.
    """

    @staticmethod
    def forward(ctx: Any, products: Tensor, n: int, correction: int, estimator: str) -> Tensor:
        ctx.n, ctx.estimator = n, estimator
        m = products.shape[-1] - n
        first, second = n - correction, m - correction
        ctx.scales = (1 / first**2, -2 / (first * second), 1 / second**2)
        if estimator == "unbiased":
            ctx.scales = (1 / (n * (n - 3)), ctx.scales[1], 1 / (m * (m - 3)))
        blocks = _projected(products, n, estimator)
        ctx.save_for_backward(products, *blocks)
        return sum(
            scale * torch.linalg.vector_norm(block, dim=(-2, -1)).square()
            for scale, block in zip(ctx.scales, blocks, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        products, *blocks = ctx.saved_tensors
        if torch.is_grad_enabled():
            blocks = _projected(products, ctx.n, ctx.estimator)
        xx, xy, yy = (
            (2 * scale) * grad[:, None, None] * block for scale, block in zip(ctx.scales, blocks, strict=True)
        )
        above, below = torch.cat([xx, xy], -1), torch.cat([torch.zeros_like(xy).mT, yy], -1)
        return torch.cat([above, below], -2), None, None, None


def _projected(products: Tensor, n: int, estimator: str) -> tuple[Tensor, Tensor, Tensor]:
    """The centred blocks: input with input, input with other, other with other."""
    centred = _u_centred if estimator == "unbiased" else _centred
    return centred(products[:, :n, :n]), _centred(products[:, :n, n:]), centred(products[:, n:, n:])


def _per_layer(weight: Sequence[float], like: Tensor) -> Tensor:
    """The weights as a tensor, filled on the device. A tensor made from a list would be copied there, with a sync."""
    if len(set(weight)) == 1:
        return like.new_full((1,), weight[0])
    return torch.cat([like.new_full((1,), w) for w in weight])


def gram_distance(
    input: Sequence[Tensor],
    other: Sequence[Tensor],
    *,
    weight: Sequence[float],
    correction: int = 1,
    joint: bool = False,
    estimator: str = "biased",
    queue: Sequence[Tensor] | None = None,
    process_group: ProcessGroup = False,
    gather_other: bool = True,
) -> Tensor:
    """`sum_l weight_l ||C_x - C_y||_F^2` of two sets of rows, through their (N + M)^2 inner products.

    Args:
        input: (N, ...) per layer. Channels-last layers are read in place if all sets are channels-last.
        other: (M, ...) per layer, with the same columns, dtype and device.
        weight: one per layer; only one if `joint`.
        correction: c in the divisors N - c and M - c of the biased estimator.
        joint: whether all layers form one feature vector.
        estimator: "biased" or "unbiased", as for `covariance_distance`. "unbiased" needs c = 1.
        queue: (Q, ...) per layer: rows of past batches, which are constants and belong to the input.
        process_group: rows of input, queue and other are gathered over this group; each process passes its own.
        gather_other: False if every process has the same other rows. Gathered, each would count several times, and the
            unbiased estimator would treat the copies as independent rows.

    Returns:
        Scalar, float32 (float64 for float64), computed in float64 from inner products summed in float64. NaN for too
        few rows. Differentiable with respect to input and other, twice in eager mode.

    Before rows are multiplied, the first row of each side is subtracted. Centring inner products of raw features would
    lose all digits if the mean is far from zero. The Gram matrices are then centred exactly, so that the subtracted row
    affects the result only by rounding.
    """
    ours = [input] if queue is None else [input, [x.detach() for x in queue]]
    *our_rows, their_rows = _in_rows([*ours, other], alone=group_size(process_group) == 1)
    x_rows = gather_rows(our_rows, process_group)
    y_rows = gather_rows([their_rows], process_group if gather_other else False)
    n, m = (sum(part[0].shape[0] for part in rows) for rows in (x_rows, y_rows))
    dtype = statistics_dtype(input[0].dtype)
    if min(n, m) < fewest_rows(correction, estimator):
        return (float("nan") * sum(x.sum(dtype=dtype) for part in [*x_rows, *y_rows] for x in part)).to(dtype)
    empty = [x for part in [*x_rows, *y_rows] if not part[0].shape[0] for x in part]
    x_rows, y_rows = ([part for part in rows if part[0].shape[0]] for rows in (x_rows, y_rows))
    # Each side has a shift of its own, since their means may be far apart.
    of_x, of_y = ([x[0] for x in rows[0]] for rows in (x_rows, y_rows))
    products = gram([*x_rows, *y_rows], [of_x] * len(x_rows) + [of_y] * len(y_rows))
    if joint:
        products = products.sum(0, keepdim=True)
    distances = _Distances.call(products, n, correction, estimator)
    total = (_per_layer(weight, distances) * distances).sum()
    # Zeros, through which parts without rows take part in backward.
    return sum((x.sum(dtype=total.dtype) for x in empty), start=total).to(dtype)


def gram_squared_norm(x: Tensor, process_group: ProcessGroup = False) -> Tensor:
    """`||C||_F^2` of the unbiased covariance of x, (N, ...), from its N^2 inner products; a float64 scalar."""
    gathered = gather_rows([[as_rows(x)]], process_group)
    rows = [part for part in gathered if part[0].shape[0]]
    n = sum(part[0].shape[0] for part in rows)
    if n < 2:
        return float("nan") * sum(part[0].sum(dtype=torch.float64) for part in gathered)
    products = gram(rows, [[rows[0][0][0]]] * len(rows))
    return (_centred(products) / (n - 1)).square().sum()
