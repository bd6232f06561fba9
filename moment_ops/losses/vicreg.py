"""The variance and covariance terms of VICReg, for one view."""

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
    """The variance term of VICReg for one view, `mean(relu(gamma - sqrt(Var(x) + eps)))` over columns.

    Args:
        x: (N, ...) embeddings of one view, N >= 2, in float32, bfloat16, float16 or float64. Dimensions after the batch
            are flattened to D columns.
        gamma: the standard deviation below which a column contributes to the loss.
        eps: added to the variance, which keeps the derivative of the square root finite.
        process_group: variances are merged over this group. None is the default group if torch.distributed is
            initialized, False is this process alone. The loss is the same on every process, and parameters under
            DistributedDataParallel get the gradient of one process on the concatenated rows. Processes may have no
            rows; with fewer than two rows in all, the loss is NaN.

    Returns:
        Scalar, float32 (float64 for float64). Twice differentiable in eager mode.

    Raises:
        TypeError, ValueError: wrong type, dtype or shape; fewer than two rows.

    Cost: the variances take one launch and one read of x. Backward takes one launch, one read and one write.

    Source: A. Bardes, J. Ponce, Y. LeCun, VICReg (ICLR 2022), equations 1 and 2. The unbiased variance, and eps inside
    the square root, are those of the authors' code (facebookresearch/vicreg), which halves the term of each view.
    """
    check_embeddings(x, "x", alone=group_size(process_group) == 1)
    return torch.relu(gamma - (_variance(x, process_group) + eps).sqrt()).mean()


def vicreg_covariance(x: Tensor, *, process_group: ProcessGroup = False) -> Tensor:
    """The covariance term of VICReg for one view, `sum_{i != j} C_ij^2 / D` with the unbiased covariance C.

    Args:
        x: (N, ...) embeddings of one view, as for `vicreg_variance`.
        process_group: rows are gathered, or covariances merged, over this group, as for `vicreg_variance`.

    Returns:
        Scalar, float32 (float64 for float64). Twice differentiable in eager mode.

    Raises:
        TypeError, ValueError: wrong type, dtype or shape; fewer than two rows.

    Cost: if N < D, N^2 D products and no (D, D) matrix: the term is then `(||C||_F^2 - sum_j Var_j^2) / D`, and its
    absolute error is a few machine epsilons times `||C||_F^2 / D`. Otherwise N D^2 products and one (D, D) matrix. Over
    several processes the host waits for the numbers of rows.

    Source: A. Bardes, J. Ponce, Y. LeCun, VICReg (ICLR 2022), equations 3 and 4.
    """
    check_embeddings(x, "x", alone=group_size(process_group) == 1)
    columns = columns_of(x)
    if total_rows(x.shape[0], x, process_group) < columns:
        # In the wider dtype, so that the two gradients are added before they are rounded to 16 bits.
        wide = x.to(statistics_dtype(x.dtype))
        squares = gram_squared_norm(wide, process_group) - _variance(wide, process_group).double().square().sum()
        # A variance that does not fit leaves a loss that does not.
        value = torch.where(squares == -torch.inf, torch.inf, squares) / columns
    else:
        # Flattened, without its last entry and in rows of D + 1, the matrix has its diagonal in the first column.
        shifted = merged_covariance(x, process_group).flatten()[:-1].view(columns - 1, columns + 1)
        value = divided_squares(shifted[:, 1:], columns)
    return value.to(statistics_dtype(x.dtype))
