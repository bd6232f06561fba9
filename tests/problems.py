"""A batch of small problems for the transforms of `torch.func`."""

import torch

import moment_ops as mo

PROBLEMS, ROWS, COLUMNS = 3, 6, 4
X = torch.randn(PROBLEMS, ROWS, COLUMNS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
OTHER = torch.randn(ROWS + 1, COLUMNS, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
MEAN, VAR = OTHER[0], OTHER[1].square()
COV = torch.cov(OTHER.mT)
TARGET = mo.Moments(MEAN, VAR, cov=COV)


def weighted(*tensors):
    """A scalar whose first and second derivatives differ between all entries."""
    return sum(
        (t * (1 + torch.arange(t.numel(), dtype=t.dtype).view(t.shape) / t.numel())).square().sum() for t in tensors
    )
