"""The Frechet distance of rows to a Gaussian, and its gradient: an autograd node around the operators of `ops.polar`.

With (m, C) the mean and covariance of the generated rows, (t, T) those of the target, and any matrix R with R'R = C:

    distance = |m - t|^2 + tr C + tr T - 2 tr (T^1/2 C T^1/2)^1/2

The trace term is the sum of the singular values of M = R T^1/2. Its derivative with respect to R is P T^1/2, where P is
the polar factor of M: P = M S^-1/2 with S = M'M = T^1/2 C T^1/2, or P = K^-1/2 M with K = M M' = R T R'. Batches with
fewer rows than columns take K, and never form a (D, D) matrix. Others take S, which is linear in C: averages keep S
rather than C, so that no (D, D) product with T^1/2 is left in a step.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moment_ops.distributed import ProcessGroup, group_size
from moment_ops.ops import triangle
from moment_ops.ops.layout import statistics_dtype
from moment_ops.ops.nodes import Node
from moment_ops.ops.polar import inverse_root, polar, product, symmetric_product


class Gaussian(NamedTuple):
    """A mean (D,), a covariance as `T^1/2 C T^1/2` (D, D), and the trace of C, all float64.

    The covariance is that of rows with divisor N - c in averages, and N in queues.
    """

    mean: Tensor
    cov: Tensor
    trace: Tensor


class Target(NamedTuple):
    """A target: float64 mean t (D,), covariance T and its root T^1/2 (D, D), and the trace of T."""

    mean: Tensor
    cov: Tensor
    root: Tensor
    trace: Tensor


class Mixture(NamedTuple):
    """How a batch is added to a Gaussian; float64 scalars.

    Args:
        past, rows, between: weights of the covariance so far, of the sum of squares of the centred rows, and of the
            outer product of the difference of the means.
        share: weight of the batch in the mean.
        count: number of rows of the batch, over all processes.
    """

    past: Tensor
    rows: Tensor
    between: Tensor
    share: Tensor
    count: Tensor


class Options(NamedTuple):
    """How a distance is computed.

    Args:
        correction: c in the divisor N - c.
        method: "polynomial", "qdwh" or "eigh".
        precision: of the products of "polynomial".
        process_group: over which covariances are summed.
        keep: whether the gradient of the rows is computed.
    """

    correction: int
    method: str
    precision: str
    process_group: ProcessGroup
    keep: bool


class Rows(NamedTuple):
    """Sums over the rows of a batch: their number, mean, `T^1/2` times the sum of squares times `T^1/2`, and its trace.

    `centred` are the rows of this process less the mean, and `mapped` these times T^1/2, unless there are many.
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor
    trace: Tensor
    centred: Tensor
    mapped: Tensor | None


def _inverse_freedom(count: Tensor, correction: int) -> Tensor:
    """1 / (N - c), or NaN."""
    freedom = count - correction
    return torch.where(freedom > 0, 1 / freedom, torch.nan)


def squares(rows: Tensor) -> Tensor:
    """The sum of all squares, in one read."""
    flat = rows.flatten()
    return flat.dot(flat)


def scatter_of(centred: Tensor, root: Tensor) -> tuple[Tensor, Tensor | None]:
    """(`root centred' centred root`, `centred root`). Many rows are multiplied before the root is; the second is None.

    (N + D) D^2 products where N is large, and 1.5 N D^2 otherwise.
    """
    if 2 * len(centred) >= 3 * len(root):
        return symmetric_product(root @ symmetric_product(centred.mT, centred), root), None
    mapped = centred @ root
    return symmetric_product(mapped.mT, mapped), mapped


def rows_of(x: Tensor, target: Target, process_group: ProcessGroup = False) -> Rows:
    """The sums over the rows x, (N, D), of all processes, by one collective."""
    wide = x.double()
    count = wide.new_full((), len(x))
    mean = wide.sum(0) / max(len(x), 1)
    centred = wide - mean
    scatter, mapped = scatter_of(centred, target.root)
    trace = squares(centred)
    if group_size(process_group) == 1:
        return Rows(count, mean, scatter, trace, centred, mapped)

    # Sums of squares about the target's mean, which all processes know.
    shift = mean - target.mean
    image = shift @ target.root
    scatter.addcmul_(image[:, None] * count, image)
    width = len(mean)
    parts = [count.reshape(1), (trace + count * shift.square().sum()).reshape(1), count * shift]
    total = torch.cat([*parts, triangle.pack(scatter)])
    dist.all_reduce(total, group=process_group)
    count, trace = total[0], total[1]
    shift = total[2 : 2 + width] / count
    image = shift @ target.root
    scatter = triangle.unpack(total[2 + width :], width)
    scatter.addcmul_(image[:, None] * -count, image)
    change = mean - (target.mean + shift)
    centred.add_(change)
    if mapped is not None:
        mapped.add_(change @ target.root)
    return Rows(count, target.mean + shift, scatter, trace - count * shift.square().sum(), centred, mapped)


def mixed(rows: Rows, past: Gaussian | None, mixture: Mixture, target: Target) -> Gaussian:
    """The mixture of rows and the past. The scatter of the rows is overwritten."""
    cov, trace = rows.scatter.mul_(mixture.rows), rows.trace * mixture.rows
    if past is None:
        return Gaussian(rows.mean, cov, trace)
    difference = rows.mean - past.mean
    image = difference @ target.root
    cov.addcmul_(past.cov, mixture.past).addcmul_(image[:, None] * mixture.between, image)
    trace = trace + mixture.past * past.trace + mixture.between * difference.square().sum()
    return Gaussian(past.mean + mixture.share * difference, cov, trace)


def average_mixture(decay: Tensor, count: Tensor, correction: int) -> Mixture:
    """A step of the average of a mixture in which the past has the weight `decay`."""
    rest = 1 - decay
    return Mixture(decay, rest * _inverse_freedom(count, correction), decay * rest, rest, count)


def queue_mixture(past: Tensor, count: Tensor, correction: int) -> Mixture:
    """The union of `past` rows and a batch."""
    total = past + count
    inverse = _inverse_freedom(total, correction)
    return Mixture(past * inverse, inverse, past * count / total * inverse, count / total, count)


def batch_mixture(count: Tensor, correction: int) -> Mixture:
    """A batch alone."""
    zero = torch.zeros_like(count)
    return Mixture(zero, _inverse_freedom(count, correction), zero, zero + 1, count)


class _Scaled(Node):
    """The saved gradient times that of the loss. The rows are there for the error of second derivatives."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, derivative: Tensor, x: Tensor) -> Tensor:
        return (derivative * grad.to(derivative.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise NotImplementedError("frechet_loss: differentiable once, not twice")


def _backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
    x, derivative = ctx.saved_tensors
    return None if grad is None else _Scaled.call(grad, derivative, x)


def _save(ctx: Any, x: Tensor, derivative: Tensor | None) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, None if derivative is None else derivative.to(statistics_dtype(x.dtype)))


class DistanceByColumns(Node):
    """(distance, mean, covariance, trace): that of a batch mixed with the past, from the (D, D) matrix S.

    Args:
        x: (N, D) rows of this process.
        past: a Gaussian, or None.
        weight: what the mixture depends on: the weight of the past of an average, the rows of a queue, or None for a
            batch alone.
        is_queue: whether `weight` is the number of rows of a queue.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        target: Target,
        past: Gaussian | None,
        weight: Tensor | None,
        is_queue: bool,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = rows_of(x, target, options.process_group)
        if weight is None:
            mixture = batch_mixture(rows.count, options.correction)
        elif is_queue:
            mixture = queue_mixture(weight, rows.count, options.correction)
        else:
            mixture = average_mixture(weight, rows.count, options.correction)
        now = mixed(rows, past, mixture, target)
        difference = torch.zeros_like(rows.mean) if past is None else rows.mean - past.mean
        method = "eigh" if options.method == "eigh" else "qdwh"
        root = inverse_root(now.cov, method, x.dtype == torch.float64)
        shift = now.mean - target.mean
        distance = shift.square().sum() + now.trace + target.trace - 2 * root.trace
        derivative = None
        if options.keep:
            # Rows of P T^1/2 over their weights in R, of the batch and of the difference of the means.
            transported = root.between(rows.centred, rows.mapped, target.root)
            of_difference = root.between(difference[None], None, target.root)[0]
            common = mixture.share * shift + mixture.between * (difference - of_difference)
            own = rows.centred.sub_(transported).mul_(mixture.rows)
            derivative = own.add_(common / mixture.count).mul_(2 * group_size(options.process_group))
        _save(ctx, x, derivative)
        return distance.clamp_min(0), now.mean, now.cov, now.trace

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *of_state: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad), None, None, None, None, None


class DistanceOfRows(Node):
    """The distance of rows alone, from their own products. With fewer rows than columns, no (D, D) matrix is formed.

    Args:
        x: (N, D) rows.
        others: (Q, D) rows that are constants, of which the first `known` are there, or None.
        known: scalar, the number of rows of `others`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, others: Tensor | None, known: Tensor | None, target: Target, options: Options
    ) -> Tensor:
        centred, mean, count = _centred(x.double(), others, known)
        weight = _inverse_freedom(count, options.correction)
        shift = mean - target.mean
        if options.method == "polynomial":
            trace, transported = _by_polynomials(centred, weight, known, count, len(x), target, x.dtype, options)
        else:
            trace, transported = _by_inverse_root(centred, weight, len(x), target, x.dtype, options)
        distance = shift.square().sum() + weight * squares(centred) + target.trace - 2 * trace
        derivative = None
        if transported is not None:
            derivative = (centred[: len(x)] - transported).mul_(2 * weight).add_(2 * shift / count)
        _save(ctx, x, derivative)
        return distance.clamp_min(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad), None, None, None, None


def _centred(rows: Tensor, others: Tensor | None, known: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(all rows less their mean, the mean, the number of rows). Rows that are not there are 0."""
    if others is None or known is None:
        mean = rows.mean(0)
        return rows - mean, mean, rows.new_full((), len(rows))
    count = known.double() + len(rows)
    place = torch.arange(len(others), device=rows.device)[:, None] < known
    every = torch.cat([rows, torch.where(place, others, 0).double()])
    mean = every.sum(0) / count
    centred = every.sub_(mean)
    centred[len(rows) :].masked_fill_(~place, 0)
    return centred, mean, count


# Both return the trace term, and the first rows of P T^1/2 over the root of the weight, where they are wanted.


def _by_inverse_root(
    centred: Tensor, weight: Tensor, own: int, target: Target, dtype: torch.dtype, options: Options
) -> tuple[Tensor, Tensor | None]:
    """From K = R T R' or S = T^1/2 R'R T^1/2, on the smaller side."""
    wide = dtype == torch.float64
    if centred.shape[0] < centred.shape[1]:
        mapped = centred @ target.cov
        root = inverse_root(symmetric_product(mapped, centred.mT).mul_(weight), options.method, wide)
        return root.trace, root.times_columns(mapped, own) if options.keep else None
    scatter, mapped = scatter_of(centred, target.root)
    root = inverse_root(scatter.mul_(weight), options.method, wide)
    if not options.keep:
        return root.trace, None
    return root.trace, root.between(centred[:own], None if mapped is None else mapped[:own], target.root)


def _by_polynomials(
    centred: Tensor,
    weight: Tensor,
    known: Tensor | None,
    count: Tensor,
    own: int,
    target: Target,
    dtype: torch.dtype,
    options: Options,
) -> tuple[Tensor, Tensor | None]:
    """From the polar factor of M = R T^1/2, in the dtype of the statistics."""
    narrow = statistics_dtype(dtype)
    root = target.root.to(narrow)
    m = product((centred * weight.sqrt()).to(narrow), root, options.precision)
    p = polar(m, options.precision)
    # The rows of M sum to zero, and so do those of P, but for what the iteration makes of rounding. Rows that are not
    # there are zero in both.
    change = p.sum(0) / count.to(narrow)
    p = p - (change if known is None else change * (p != 0).any(1, keepdim=True))
    trace = (p * m).sum(dtype=torch.float64)
    if not options.keep:
        return trace, None
    return trace, product(p[:own], root, options.precision) / weight.sqrt().to(narrow)
