"""Merging the moments of the processes of a group: one packed collective, the same result on every process."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ProcessGroup = Any
"""A torch.distributed group; None for the default group where one is initialized; False for this process alone."""


def group_size(process_group: ProcessGroup) -> int:
    """Number of processes to merge over."""
    if process_group is False or not dist.is_available() or not dist.is_initialized():
        return 1
    return dist.get_world_size(process_group)


class _AllReduce(torch.autograd.Function):
    """The sum over all processes of tensors that differ between them; its gradient is such a sum, too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, process_group: ProcessGroup) -> Tensor:
        ctx.process_group = process_group
        total = tensor.clone()
        dist.all_reduce(total, group=process_group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllReduce.apply(grad, ctx.process_group), None


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient suits DistributedDataParallel, which averages gradients over the processes.

    Every process computes the same loss from the sum, so the gradient with respect to the sum is the same everywhere,
    and the sum of all processes' gradients is `world size` times this one: no collective in backward. A backward that
    is itself differentiated holds terms of one process alone, and sums in earnest.
    """

    @staticmethod
    def forward(ctx: Any, packed: Tensor, process_group: ProcessGroup) -> Tensor:
        ctx.process_group = process_group
        total = packed.clone()
        dist.all_reduce(total, group=process_group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _AllReduce.apply(grad, ctx.process_group), None
        return grad * dist.get_world_size(ctx.process_group), None


def merge_ranks(
    mean: Tensor,
    var: Tensor | None,
    count: Tensor,
    correction: int,
    *,
    sizes: Tensor,
    pivot: Tensor,
    new_correction: int,
    process_group: ProcessGroup,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Mean, variance and count over the rows of all processes, from those of each.

    Args:
        mean, var, count, correction: this process's packed moments, (F,), (F,), (L,).
        sizes: (L,) int64 columns per layer.
        pivot: (F,) a mean known to all processes; the sums are shifted by it, in float64.
        new_correction: of the merged variance.

    Returns:
        (mean, var, count), the same on every process. Gradients are those that DistributedDataParallel expects:
        parameters get the gradient of one process on the concatenated batch, uneven batches included.
    """
    layers, columns = count.shape[0], mean.shape[0]

    def per_column(values: Tensor) -> Tensor:
        return values.repeat_interleave(sizes, output_size=columns)

    rows = per_column(count.double())
    shift = mean.double() - pivot.double()
    parts = [count.double(), rows * shift]
    if var is not None:
        m2 = torch.where(rows == 1, 0.0, var.double()) * (rows - correction).clamp_min(0)
        parts.append(m2 + rows * shift.square())
    total = _SumOverRanks.apply(torch.cat(parts), process_group)

    merged_count = total[:layers].detach().round().to(torch.int64)
    rows = per_column(merged_count.double())
    shift = total[layers : layers + columns] / rows
    merged_mean = (pivot.double() + shift).to(mean.dtype)
    merged_var = None
    if var is not None:
        m2 = (total[layers + columns :] - rows * shift.square()).clamp_min(0)
        freedom = rows - new_correction
        merged_var = torch.where(freedom > 0, m2 / freedom, float("nan")).to(var.dtype)
    return merged_mean, merged_var, merged_count
