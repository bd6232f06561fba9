"""Exact results in float64, and how far a contestant is from them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.baselines import BETAS, EPS, LR


def tolerance(dtype: torch.dtype) -> float:
    """Largest accepted relative error: sums over a batch in float32, then a rounding to `dtype`."""
    return max(1e-4, torch.finfo(dtype).eps / 2)


def exact_moments(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Packed mean and unbiased variance in float64, in two passes."""
    means, variances = [], []
    for x in features:
        rows = x.detach().flatten(1).double()
        mean = rows.mean(0)
        means.append(mean)
        variances.append(rows.sub_(mean).square_().sum(0).div_(len(rows) - 1))
    return torch.cat(means), torch.cat(variances)


def exact_gradients(features: Sequence[Tensor], mean: Tensor, grad_mean: Tensor, grad_var: Tensor) -> list[Tensor]:
    """Gradients of every layer from those of its mean and variance: computed in float64, kept in float32."""
    gradients = []
    offset = 0
    for x in features:
        rows = x.detach().flatten(1).double()
        count, size = rows.shape
        columns = slice(offset, offset + size)
        offset += size
        slope = 2 * grad_var[columns] / (count - 1)
        gradient = rows.sub_(mean[columns]).mul_(slope).add_(grad_mean[columns] / count)
        gradients.append(gradient.float().view(x.shape))
    return gradients


def exact_averages(differences: Sequence[Tensor], steps: int) -> list[Tensor]:
    """ADAM moving averages in float64 after some steps on constant differences, by `torch.optim.Adam`."""
    averages = [torch.zeros_like(difference, dtype=torch.float64, requires_grad=True) for difference in differences]
    optimizers = [torch.optim.Adam([average], lr=LR, betas=BETAS, eps=EPS) for average in averages]
    for _ in range(steps):
        for average, difference, optimizer in zip(averages, differences, optimizers, strict=True):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(average, difference.double()).backward()
            optimizer.step()
    return [average.detach() for average in averages]


def relative_error(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Distance over norm, of all tensors together; NaN where anything is not finite."""
    distance = norm = 0.0
    for a, e in zip(actual, exact, strict=True):
        distance += (a.detach() - e).square_().sum(dtype=torch.float64).item()
        norm += e.square().sum(dtype=torch.float64).item()
    return math.sqrt(distance / norm)
