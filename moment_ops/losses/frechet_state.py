"""The state of the Frechet loss: an average of the mixture of all batches, or a queue of past rows.

Everything is decided on the device. Each function takes the buffers of one judge, and returns new values or writes to
the buffers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moment_ops.losses.frechet_matching import Gaussian, Rows, Target, rows_of, scatter_of, squares

AVERAGE = ("mean", "cov", "trace", "step")
QUEUE = ("queue", "queue_count")
# What a queue of more rows than columns also keeps.
GAUSSIAN = ("mean", "cov", "trace")


def new_gaussian(target: Target) -> list[Tensor]:
    """The buffers of a Gaussian before the first row, in the order of GAUSSIAN.

    The trace has one entry: dynamo takes a scalar float64 tensor on the CPU for a constant.
    """
    return [torch.zeros_like(target.mean), torch.zeros_like(target.cov), torch.zeros_like(target.mean[:1])]


def gaussian_of(buffers: Sequence[Tensor]) -> Gaussian:
    """The Gaussian in buffers, in the order of GAUSSIAN."""
    mean, cov, trace = buffers
    return Gaussian(mean, cov, trace[0])


def new_count(target: Target) -> Tensor:
    """A counter on the device."""
    return torch.zeros((), dtype=torch.int64, device=target.mean.device)


def weight_of_past(step: Tensor, decay: float, bias_correction: bool) -> Tensor:
    """The weight of the average so far in a step, float64, after `step` steps. It is 0 in the first."""
    steps = step.double()
    if not bias_correction:
        return torch.where(step > 0, decay, 0.0).double()
    return decay * (1 - decay**steps) / (1 - decay ** (steps + 1))


def advanced_average(state: Sequence[Tensor], now: Gaussian, accept: Tensor) -> list[Tensor]:
    """The state after a step, or as it is where the step is not accepted."""
    *old, step = state
    new = [torch.where(accept, value, before) for value, before in zip(now, old, strict=True)]
    return [*new, step + accept]


def enqueue(rows: Tensor, count: Tensor, x: Tensor, gaussian: Sequence[Tensor], target: Target) -> None:
    """Overwrite the oldest rows of a queue by x, which has no more rows than the queue, unless x is not finite.

    Args:
        rows: (Q, D) buffer.
        count: rows so far.
        gaussian: the mean, covariance and trace of the rows in the queue, or nothing.
    """
    if not len(x):
        return
    accept = x.isfinite().all()
    place = (count + torch.arange(len(x), device=x.device)) % len(rows)
    old = rows[place]
    if gaussian:
        held = count.clamp_max(len(rows)).double()
        leaving = (place < count).double()
        after = _exchanged(gaussian_of(gaussian), held, rows_of(x, target), _leaving_rows(old, leaving, target), target)
        for buffer, value in zip(gaussian, after, strict=True):
            buffer.copy_(torch.where(accept, value, buffer))
    rows.index_copy_(0, place, torch.where(accept, x.to(rows.dtype), old))
    count.add_(accept * len(x))


def _leaving_rows(old: Tensor, leaving: Tensor, target: Target) -> Rows:
    """The sums over those rows that are overwritten, (n, D), with a mask (n,)."""
    wide = old.double()
    count = leaving.sum()
    mean = leaving @ wide / count.clamp_min(1)
    centred = (wide - mean) * leaving[:, None]
    scatter, mapped = scatter_of(centred, target.root)
    return Rows(count, mean, scatter, squares(centred), centred, mapped)


def _exchanged(past: Gaussian, held: Tensor, entering: Rows, leaving: Rows, target: Target) -> Gaussian:
    """The Gaussian of `held` rows after some have entered and others have left."""
    sums = [past.cov * held, past.trace * held]
    mean, count = past.mean, held
    for rows, sign in ((entering, 1), (leaving, -1)):
        total = count + sign * rows.count
        difference = rows.mean - mean
        mean = mean + sign * rows.count / total * difference
        between = sign * count * rows.count / total
        image = difference @ target.root
        sums[0] = sums[0] + sign * rows.scatter + between * torch.outer(image, image)
        sums[1] = sums[1] + sign * rows.trace + between * difference.square().sum()
        count = total
    return Gaussian(mean, sums[0] / count, sums[1] / count)
