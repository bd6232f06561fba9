"""The variance and covariance terms of VICReg, one view at a time."""

import torch
from torch import Tensor

from moment_ops.distributed import ProcessGroup, group_size, merged_covariance, merged_moments, total_rows
from moment_ops.losses.embeddings import check_embeddings
from moment_ops.losses.gram_distance import gram_squared_norm
from moment_ops.losses.squares import divided_squares
from moment_ops.ops.layout import columns_of, statistics_dtype


def _variance(x: Tensor, process_group: ProcessGroup) -> Tensor:
    """(D,) unbiased variances over the rows of all processes."""
    _, var = merged_moments([x], 1, True, process_group)
    assert var is not None
    return var


def vicreg_variance(x: Tensor, gamma: float = 1.0, eps: float = 1e-4, *, process_group: ProcessGroup = False) -> Tensor:
    """`mean(relu(gamma - sqrt(Var(x) + eps)))` over columns: the hinge that keeps embeddings from collapsing.

    A. Bardes, J. Ponce, Y. LeCun, VICReg (ICLR 2022), equations 1 and 2, for one view. The unbiased variance and eps
    under the root are those of the authors' code (facebookresearch/vicreg), which halves each view's term.

    Args:
        x: (N, ...) embeddings of one view, float32, bfloat16, float16 or float64; dimensions after the batch are
            flattened to D columns.
        gamma: the standard deviation below which a column is pushed up.
        eps: keeps the root's slope finite.
        process_group: rows are those of all processes of this group; None is the default group wherever
            torch.distributed is initialized, False this process alone. The loss is the same on every process, and
            parameters under DistributedDataParallel get the gradient of one process on the concatenated rows. A process
            without rows takes part; fewer than two rows of all give NaN.

    Returns:
        Scalar, float32 (float64 for float64). Twice differentiable in eager mode.

    Raises:
        TypeError, ValueError: wrong type, dtype or shape, fewer than two rows.

    Cost: one read of x and one launch; backward one read, one write.
    """
    check_embeddings(x, "x", alone=group_size(process_group) == 1)
    return torch.relu(gamma - (_variance(x, process_group) + eps).sqrt()).mean()


def vicreg_covariance(x: Tensor, *, process_group: ProcessGroup = False) -> Tensor:
    """`sum_{i != j} C_ij^2 / D` of the unbiased covariance: what decorrelates the columns of an embedding.

    A. Bardes, J. Ponce, Y. LeCun, VICReg (ICLR 2022), equations 3 and 4, for one view.

    Args:
        x: (N, ...) embeddings of one view, as of `vicreg_variance`.
        process_group: as of `vicreg_variance`.

    Returns:
        Scalar, float32 (float64 for float64). Twice differentiable in eager mode.

    Raises:
        TypeError, ValueError: wrong type, dtype or shape, fewer than two rows.

    Cost: with N < D through N^2 D inner products, as `||C||_F^2 - sum_j Var_j^2` and without a (D, D) matrix; its
    error is then some epsilons of `||C||_F^2`. Else through the covariance, N D^2 products. Over processes it waits for
    the device, for the numbers of rows.
    """
    check_embeddings(x, "x", alone=group_size(process_group) == 1)
    columns = columns_of(x)
    if total_rows(x.shape[0], x, process_group) < columns:
        # Its two gradients are added before they are rounded to 16 bits.
        wide = x.to(statistics_dtype(x.dtype))
        squares = gram_squared_norm(wide, process_group) - _variance(wide, process_group).double().square().sum()
        value = squares / columns
    else:
        # Without its last entry and in rows of D + 1, a square matrix has its diagonal in the first column.
        shifted = merged_covariance(x, process_group).flatten()[:-1].view(columns - 1, columns + 1)
        value = divided_squares(shifted[:, 1:], columns)
    return value.to(statistics_dtype(x.dtype))
