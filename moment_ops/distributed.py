"""Merging moments, or gathering rows, over the processes of a group. The result is the same on every process."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moment_ops.ops import plans, triangle
from moment_ops.ops.covariance import covariance
from moment_ops.ops.layout import as_rows, columns_of, per_column, statistics_dtype
from moment_ops.ops.moments import moments
from moment_ops.ops.nodes import Node

ProcessGroup = Any
"""A torch.distributed group. None is the default group if one is initialized; False is this process alone."""


def group_size(process_group: ProcessGroup) -> int:
    """The number of processes to merge over."""
    if process_group is False or not dist.is_available() or not dist.is_initialized():
        return 1
    return dist.get_world_size(process_group)


class _AllReduce(Node):
    """The sum over all processes of tensors that differ between them. Its gradient is the same kind of sum."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, process_group: ProcessGroup) -> Tensor:
        ctx.process_group = process_group
        total = tensor.clone()
        dist.all_reduce(total, group=process_group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllReduce.call(grad, ctx.process_group), None


class _SumOverRanks(_AllReduce):
    """An all-reduce whose gradient fits DistributedDataParallel, which averages gradients over the processes.

    Every process computes the same loss from the sum, so that the gradient of the sum is the same everywhere. The sum
    over the processes' gradients is therefore this gradient times the world size, and backward needs no collective. In
    a backward that is itself differentiated, the gradients differ between processes, and are summed by a collective.
    """

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _AllReduce.call(grad, ctx.process_group), None
        return grad * dist.get_world_size(ctx.process_group), None


def moments_of_rank(
    features: Sequence[Tensor], var: bool, signature: plans.Signature | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(mean, var, count) of this process, as `merge_ranks` takes them.

    The correction is 0, since a variance over N - 1 is NaN for a single row.
    """
    return moments(features, 0, 0, var, signature=signature)


def covariance_of_rank(x: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """(covariance, mean) of this process, as `merge_covariances` takes them; zeros without rows."""
    if x.shape[0]:
        return covariance(x, 0, True, precision)
    rows = as_rows(x).to(statistics_dtype(x.dtype))
    return rows.mT @ rows, rows.sum(0)


def merge_ranks(
    mean: Tensor,
    var: Tensor | None,
    count: Tensor,
    correction: int,
    *,
    sizes: Sequence[int],
    pivot: Tensor,
    new_correction: int,
    process_group: ProcessGroup,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Mean, variance and count over the rows of all processes, from the moments of each process.

    Args:
        mean, var, count, correction: packed moments of this process, (F,), (F,), (L,) and a number. Those of a layer
            without rows do not count and may be NaN.
        sizes: columns of every layer.
        pivot: (F,), the same on every process. It is subtracted from the means before they are summed in float64.
        new_correction: correction of the merged variance.

    Returns:
        (mean, var, count), the same on every process. Gradients follow the convention of DistributedDataParallel:
        parameters get the gradient of one process on the concatenated batch, also if batch sizes differ.
    """
    num_layers, columns = count.shape[0], mean.shape[0]
    rows = per_column(count.double(), sizes)
    shift = torch.where(rows > 0, mean.double() - pivot.double(), 0.0)
    parts = [count.double(), rows * shift]
    if var is not None:
        m2 = torch.where(rows > 1, var.double(), 0.0) * (rows - correction).clamp_min(0)
        parts.append(m2 + rows * shift.square())
    total = _SumOverRanks.call(torch.cat(parts), process_group)

    merged_count = total[:num_layers].detach().round().to(torch.int64)
    rows = per_column(merged_count.double(), sizes)
    shift = total[num_layers : num_layers + columns] / rows
    merged_mean = (pivot.double() + shift).to(mean.dtype)
    merged_var = None
    if var is not None:
        m2 = (total[num_layers + columns :] - rows * shift.square()).clamp_min(0)
        freedom = rows - new_correction
        merged_var = torch.where(freedom > 0, m2 / freedom, float("nan")).to(var.dtype)
    return merged_mean, merged_var, merged_count


def merge_covariances(
    mean: Tensor,
    covariance: Tensor,
    count: int,
    *,
    widths: Sequence[int],
    pivot: Tensor | None,
    correction: int,
    process_group: ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """Means and covariances over the rows of all processes, from those of each process, as `merge_ranks`.

    Args:
        mean: (F,) packed means of this process.
        covariance: packed triangles of this process, with correction 0.
        count: rows of this process, the same for every layer.
        widths: columns of every layer.
        pivot: (F,), the same on every process, as in `merge_ranks`. None is zero, which loses digits of float64 only.
        correction: correction of the merged covariance.

    Returns:
        (mean, covariance), packed, the same on every process.
    """
    shift = mean.double() if pivot is None else mean.double() - pivot.double()
    moments = covariance.double() + _packed_outer(shift, widths)
    packed = torch.cat([shift.new_ones(1), shift, moments]) * count
    total = _SumOverRanks.call(packed, process_group)
    rows = total[0].detach()
    shift, moments = (total[1:] / rows).split([len(mean), len(covariance)])
    merged_mean = shift if pivot is None else shift + pivot.double()
    freedom = rows - correction
    scale = torch.where(freedom > 0, rows / freedom, float("nan"))
    merged = scale * (moments - _packed_outer(shift, widths))
    return merged_mean.to(mean.dtype), merged.to(covariance.dtype)


def merged_moments(
    features: Sequence[Tensor], correction: int, var: bool, process_group: ProcessGroup
) -> tuple[Tensor, Tensor | None]:
    """Packed means and variances over the rows of all processes. Differentiable, as `merge_ranks`."""
    if group_size(process_group) == 1:
        return moments(features, 0, correction, var)[:2]
    mean, variance, count = moments_of_rank(features, var)
    return merge_ranks(
        mean,
        variance,
        count,
        0,
        sizes=[columns_of(x) for x in features],
        pivot=torch.zeros_like(mean),
        new_correction=correction,
        process_group=process_group,
    )[:2]


def merged_covariances(
    features: Sequence[Tensor], correction: int, precision: str, process_group: ProcessGroup
) -> tuple[list[Tensor], Tensor]:
    """Covariances over the rows of all processes, and packed means. Differentiable, as `merge_covariances`.

    The covariance of a layer is a (D, D) matrix on one process, and a packed triangle on several.
    """
    if group_size(process_group) == 1:
        results = [covariance(x, correction, True, precision) for x in features]
        return [cov for cov, _ in results], torch.cat([mean for _, mean in results])
    widths = [columns_of(x) for x in features]
    results = [covariance_of_rank(x, precision) for x in features]
    mean, packed = merge_covariances(
        torch.cat([mean for _, mean in results]),
        triangle.pack_all([cov for cov, _ in results]),
        features[0].shape[0],
        widths=widths,
        pivot=None,
        correction=correction,
        process_group=process_group,
    )
    return triangle.split(packed, widths), mean


def merged_covariance(x: Tensor, process_group: ProcessGroup) -> Tensor:
    """The unbiased (D, D) covariance of one layer over the rows of all processes."""
    if group_size(process_group) == 1:
        return covariance(x, 1, True, "ieee")[0]
    (packed,), mean = merged_covariances([x], 1, "ieee", process_group)
    return triangle.unpack(packed, len(mean))


def mean_over_ranks(values: Sequence[Tensor], process_group: ProcessGroup) -> list[Tensor]:
    """Means of vectors over the entries of all processes, which may have different numbers of entries.

    Gradients follow the convention of `merge_ranks`.
    """
    sums = torch.stack([value.sum() for value in values])
    counts = torch.cat([sums.new_full((1,), value.shape[0]) for value in values])
    total, count = _SumOverRanks.call(torch.cat([sums, counts]), process_group).chunk(2)
    return list((total / count.detach()).unbind())


def mean_of_sums(sums: Sequence[Tensor], rows: int, process_group: ProcessGroup) -> list[Tensor]:
    """Means over the rows of all processes, from the sums over the rows of each process, which may have none.

    Gradients follow the convention of `merge_ranks`.
    """
    packed = torch.cat([value.reshape(-1) for value in sums])
    packed = torch.cat([packed, packed.new_full((1,), rows)])
    total = _SumOverRanks.call(packed, process_group)
    means = (total[:-1] / total[-1].detach()).split([value.numel() for value in sums])
    return [mean.view(value.shape) for mean, value in zip(means, sums, strict=True)]


def _packed_outer(vector: Tensor, widths: Sequence[int]) -> Tensor:
    """Packed triangles of the outer product of each layer's part of the vector with itself."""
    return triangle.pack_all([torch.outer(part, part) for part in vector.split(list(widths))])


def _padded(x: Tensor, rows: int) -> Tensor:
    """`x` with rows of zeros appended, `rows` rows in all."""
    padded = x.new_zeros((rows, *x.shape[1:]))
    padded[: len(x)] = x
    return padded


class _AllGather(Node):
    """The rows of every process, (n_r, D) each. The gradient of a row is summed over all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], process_group: ProcessGroup) -> tuple[Tensor, ...]:
        ctx.sizes, ctx.process_group = sizes, process_group
        # Not every torch.distributed backend gathers tensors of different shapes, or without elements.
        gathered = [x.new_empty((max(sizes), *x.shape[1:])) for _ in sizes]
        if max(sizes):
            dist.all_gather(gathered, _padded(x, max(sizes)), group=process_group)
        return tuple(part[:size] for part, size in zip(gathered, sizes, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _SumOfOwnRows.call(ctx.sizes, ctx.process_group, *grads), None, None


class _SumOfOwnRows(Node):
    """The sum over all processes of the tensors that belong to the rows of this process."""

    @staticmethod
    def forward(ctx: Any, sizes: list[int], process_group: ProcessGroup, *parts: Tensor) -> Tensor:
        ctx.sizes, ctx.process_group = sizes, process_group
        rank = dist.get_rank(process_group)
        packed = torch.stack([_padded(part, max(sizes)) for part in parts])
        if max(sizes):
            dist.all_reduce(packed, group=process_group)
        return packed[rank, : sizes[rank]].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, None, *_AllGather.call(grad, ctx.sizes, ctx.process_group)


class _GatherRows(_AllGather):
    """`_AllGather` for a loss that every process computes alike: its own gradient times the world size is the sum."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _SumOfOwnRows.call(ctx.sizes, ctx.process_group, *grads), None, None
        return grads[dist.get_rank(ctx.process_group)] * len(ctx.sizes), None, None


def row_counts(rows: Sequence[int], like: Tensor, process_group: ProcessGroup) -> list[list[int]]:
    """Numbers of rows of every process, in the order of the ranks. On several processes the host waits for the device.

    Args:
        rows: numbers of rows of this process; every process passes equally many.
        like: a tensor on the device.
    """
    world = group_size(process_group)
    if world == 1:
        return [list(rows)]
    counts = torch.cat([like.new_full((1,), n, dtype=torch.int64) for n in rows])
    gathered = [torch.empty_like(counts) for _ in range(world)]
    dist.all_gather(gathered, counts, group=process_group)
    return [c.tolist() for c in gathered]


def total_rows(rows: int, like: Tensor, process_group: ProcessGroup) -> int:
    """The number of rows of all processes together, from `row_counts`."""
    return sum(count for (count,) in row_counts([rows], like, process_group))


def gather_rows(
    groups: Sequence[Sequence[Tensor]], process_group: ProcessGroup, counts: Sequence[Sequence[int]] | None = None
) -> list[list[Tensor]]:
    """The rows of all processes, for a loss that every process computes from all rows.

    Args:
        groups: lists of layers of this process, (n, D_l) each. n may differ between groups and processes, and may be 0.
        counts: numbers of rows of every process and group, as `row_counts` returns them, if they are known.

    Returns:
        The layers of every group of every process: first those of the first group, in the order of the ranks, then
        those of the second. The result is the same on every process. Gradients follow the convention of `merge_ranks`.

    Cost: one collective per layer, and one for the numbers of rows unless `counts` has them. The host waits for the
    latter, since shapes depend on it.
    """
    if group_size(process_group) == 1:
        return [list(features) for features in groups]
    if counts is None:
        counts = row_counts([features[0].shape[0] for features in groups], groups[0][0], process_group)
    gathered: list[list[Tensor]] = []
    for features, *sizes in zip(groups, *counts, strict=True):
        parts = [_GatherRows.call(x, sizes, process_group) for x in features]
        gathered += [list(ranked) for ranked in zip(*parts, strict=True)]
    return gathered
