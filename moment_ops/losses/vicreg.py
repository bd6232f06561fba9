"""The variance and covariance terms of VICReg, one view at a time."""

import torch
from torch import Tensor

from moment_ops.losses.gram_distance import gram_squared_norm
from moment_ops.ops import checks
from moment_ops.ops.covariance import covariance
from moment_ops.ops.layout import statistics_dtype
from moment_ops.statistics import moments


def vicreg_variance(x: Tensor, gamma: float = 1.0, eps: float = 1e-4) -> Tensor:
    """`mean(relu(gamma - sqrt(Var(x) + eps)))` over columns: the hinge that keeps embeddings from collapsing.

    A. Bardes, J. Ponce, Y. LeCun, VICReg (ICLR 2022), equations 1 and 2, for one view. The unbiased variance and eps
    under the root are those of the authors' code (facebookresearch/vicreg), which halves each view's term.

    Args:
        x: (N, D) embeddings of one view, float32, bfloat16, float16 or float64.
        gamma: the standard deviation below which a column is pushed up.
        eps: keeps the root's slope finite.

    Returns:
        Scalar, float32 (float64 for float64). Twice differentiable in eager mode.

    Raises:
        TypeError, ValueError: wrong type, dtype or shape, fewer than two rows.

    Cost: one read of x and one launch; backward one read, one write.
    """
    checks.embeddings(x, "x")
    var = moments(x).var
    assert var is not None
    return torch.relu(gamma - (var + eps).sqrt()).mean()


def vicreg_covariance(x: Tensor) -> Tensor:
    """`sum_{i != j} C_ij^2 / D` of the unbiased covariance: what decorrelates the columns of an embedding.

    A. Bardes, J. Ponce, Y. LeCun, VICReg (ICLR 2022), equations 3 and 4, for one view.

    Args:
        x: (N, D) embeddings of one view, float32, bfloat16, float16 or float64.

    Returns:
        Scalar, float32 (float64 for float64). Twice differentiable in eager mode.

    Raises:
        TypeError, ValueError: wrong type, dtype or shape, fewer than two rows.

    Cost: with N < D through N^2 D inner products, as `||C||_F^2 - sum_j Var_j^2` and without a (D, D) matrix; its
    error is then some epsilons of `||C||_F^2`. Else through the covariance, N D^2 products.
    """
    checks.embeddings(x, "x")
    rows, columns = x.shape
    if rows < columns:
        # Its two gradients are added before they are rounded to 16 bits.
        wide = x.to(statistics_dtype(x.dtype))
        variances = moments(wide).var
        assert variances is not None
        squares = gram_squared_norm(wide) - variances.double().square().sum()
    else:
        # Without its last entry and in rows of D + 1, a square matrix has its diagonal in the first column.
        shifted = covariance(x, 1, True, "ieee")[0].flatten()[:-1].view(columns - 1, columns + 1)
        squares = shifted[:, 1:].square().sum(dtype=torch.float64)
    return (squares / columns).to(statistics_dtype(x.dtype))
