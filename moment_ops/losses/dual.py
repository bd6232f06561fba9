"""Distances between covariances through Gram matrices of the rows: no (D, D) matrix, whatever the width."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moment_ops.distributed import ProcessGroup, gather_rows
from moment_ops.ops import checks
from moment_ops.ops.gram import gram
from moment_ops.ops.layout import is_channels_last, statistics_dtype
from moment_ops.ops.nodes import Node

ESTIMATORS = ("biased", "unbiased")
# The unbiased square of a covariance needs four different rows.
_FEWEST_ROWS = 4


def _in_rows(groups: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """(n, D_l) for every layer of every group; a Gram matrix does not mind in which order the columns are.

    A channels-last input keeps its order, and the other groups follow.
    """
    channels_last = [is_channels_last(x) and not x.is_contiguous() for x in groups[0]]
    return [
        [(x.movedim(1, -1) if last else x).flatten(1) for x, last in zip(layers, channels_last, strict=True)]
        for layers in groups
    ]


def _centred(block: Tensor) -> Tensor:
    """`J K J`, (L, n, m): the inner products of rows less their mean."""
    block = block - block.mean(-1, keepdim=True)
    return block - block.mean(-2, keepdim=True)


def _u_centred(block: Tensor) -> Tensor:
    """(L, n, n) with zero row sums and a zero diagonal: Szekely and Rizzo, Annals of Statistics 2014.

    The sum of its squares over n (n - 3) is HSIC_1 of Song et al. (JMLR 2012) for linear kernels, whose mean is the
    squared norm of the true covariance; here without the cancellation of its three terms.
    """
    n = block.shape[-1]
    diagonal = torch.eye(n, dtype=torch.bool, device=block.device)
    block = block.masked_fill(diagonal, 0)
    means = block.sum(-1, keepdim=True) / (n - 2)
    total = block.sum((-2, -1), keepdim=True) / ((n - 1) * (n - 2))
    return (block - means - means.mT + total).masked_fill(diagonal, 0)


class _Distances(Node):
    """(L,) squared distances from Gram matrices (L, n + m, n + m) of the rows of both sides.

    The sum over blocks b of scale_b ||P_b K_b||^2 with orthogonal projections P, which centre: the derivative is
    2 scale_b P_b K_b, whose own derivative comes from a projection of K that is differentiable again.
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
    """The blocks of the input's rows, of both, and of the samples' rows, centred."""
    centred = _u_centred if estimator == "unbiased" else _centred
    return centred(products[:, :n, :n]), _centred(products[:, :n, n:]), centred(products[:, n:, n:])


def _check_like(layers: Sequence[Tensor], input: Sequence[Tensor], name: str) -> None:
    """As many layers as the input, of its shapes but for the batch, its dtype and device."""
    checks.batch(layers, 0, name)
    if len(layers) != len(input):
        raise ValueError(f"{name}: got {len(layers)} layers, expected {len(input)} as in input")
    for i, (got, expected) in enumerate(zip(layers, input, strict=True)):
        label = name if len(layers) == 1 else f"{name}[{i}]"
        if got.shape[1:] != expected.shape[1:]:
            shape = tuple(expected.shape[1:])
            raise ValueError(f"{label}: got features of shape {tuple(got.shape[1:])}, expected {shape} as in input")
        if got.dtype != expected.dtype:
            raise TypeError(f"{label}: got dtype {got.dtype}, expected {expected.dtype} as in input")
        if got.device != expected.device:
            raise ValueError(f"{label}: got device {got.device}, expected {expected.device} as in input")


def _check_mean(mean: Any, input: Sequence[Tensor]) -> list[Tensor]:
    layers = checks.features(mean, "mean")
    if len(layers) != len(input):
        raise ValueError(f"mean: got {len(layers)} layers, expected {len(input)} as in input")
    for i, (got, x) in enumerate(zip(layers, input, strict=True)):
        if got.shape != x.shape[1:]:
            raise ValueError(f"mean[{i}]: got shape {tuple(got.shape)}, expected {tuple(x.shape[1:])} as in input")
        if got.device != x.device:
            raise ValueError(f"mean[{i}]: got device {got.device}, expected {x.device} as in input")
    return layers


def _check_rows(count: int, name: str, correction: int, estimator: str) -> None:
    fewest = _FEWEST_ROWS if estimator == "unbiased" else correction + 1
    if count < fewest:
        kind = "the unbiased estimator" if estimator == "unbiased" else f"correction {correction}"
        raise ValueError(f"{name}: got {count} rows, expected at least {fewest} for {kind}")


def _check_weight(weight: Sequence[float], layers: int, joint: bool) -> list[float]:
    if not isinstance(weight, Sequence) or not all(isinstance(w, (int, float)) for w in weight):
        raise TypeError(f"weight: got {type(weight).__name__}, expected a sequence of floats")
    expected = 1 if joint else layers
    if len(weight) != expected:
        kind = "one for all layers together" if joint else f"one per layer, {layers}"
        raise ValueError(f"weight: got {len(weight)} weights, expected {kind}")
    return [float(w) for w in weight]


def _per_layer(weight: Sequence[float], like: Tensor) -> Tensor:
    """The weights as a tensor, filled on the device: one made from a list would be copied over with a host sync."""
    if len(set(weight)) == 1:
        return like.new_full((1,), weight[0])
    return torch.cat([like.new_full((1,), w) for w in weight])


def dual_covariance_loss(
    input: Sequence[Tensor],
    samples: Sequence[Tensor],
    *,
    correction: int = 1,
    joint: bool = False,
    estimator: str = "biased",
    weight: Sequence[float],
    queue: Sequence[Tensor] | None = None,
    mean: Sequence[Tensor] | None = None,
    process_group: ProcessGroup = False,
    gather_samples: bool = True,
) -> Tensor:
    """`sum_l weight_l ||C_x - C_y||_F^2` of two sets of rows, through their (N + M)^2 inner products.

    Args:
        input: (N, ...) per layer, float32, bfloat16, float16 or float64. Channels-last layers are read as they are
            where the samples are channels-last too.
        samples: (M, ...) per layer, of the same shapes but for the batch, dtype and device.
        correction: c in the divisors N - c and M - c of the biased estimator.
        joint: all layers are one feature vector, with covariances between layers; the weight is then a single one.
        estimator: "biased" is the plain distance of the two covariances. With covariance S of normal features it is too
            large by (tr(S)^2 + ||S||_F^2) / (N - 1) in the mean, and likewise for M: as a training loss it shrinks what
            a generator draws. "unbiased" drops the products of a row with itself: its mean is the squared distance
            of the true covariances for any distribution, and it may be negative. It needs N, M >= 4 and c = 1.
        weight: one float per layer.
        queue: (Q, ...) per layer: rows of past batches, constants, that count among the input's.
        mean: features' shape per layer: a known mean of the samples, subtracted while they are loaded, as is the first
            row of the input from the input. By default the first row of the samples. The result depends on them by
            rounding alone: products are centred exactly on the small side. Centring inner products of raw features
            instead would lose all digits where the mean is far from zero.
        process_group: rows of input, samples and queue are gathered over this group, each process giving its own;
            batches may be uneven. None is the default group wherever torch.distributed is initialized; False is this
            process alone. The loss is the same on every process, and parameters under DistributedDataParallel get the
            gradient of one process on the concatenated rows.
        gather_samples: False where every process has the same samples already: joined, they would count several times,
            and the unbiased estimator would take the copies for independent rows.

    Returns:
        Scalar, float32 (float64 for float64), computed in float64 from inner products that are folded into float64.
        Its error is some epsilons of the batches' `||C||_F^2`, absolutely: near zero the value may come out slightly
        negative.
        Gradients to input and samples; twice differentiable in eager mode.

        The value and gradient of few rows are noisy: N rows stand against the effective rank tr(S)^2 / ||S||_F^2. To
        train a generator on small batches, a running average of explicit covariances of pooled layers does better.

    Raises:
        TypeError, ValueError: wrong types, dtypes, devices, shapes, options or weights, too few rows.

    Cost: one read of all rows and (N + M)^2 D products; backward one read, one write, N (N + M) D products. Beyond the
    gradients it needs L (N + M + Q)^2 float64 and, on the CPU, two panels of a few megabytes. Over processes every one
    of them holds the rows of all, and their gradients.
    """
    input = checks.features(input)
    checks.batch(input, 0)
    samples = checks.features(samples, "samples")
    _check_like(samples, input, "samples")
    checks.correction(correction)
    checks.option(estimator, "estimator", ESTIMATORS)
    if estimator == "unbiased" and correction != 1:
        raise ValueError(f"correction: got {correction}, expected 1 with the unbiased estimator")
    weight = _check_weight(weight, len(input), joint)
    groups = [input, samples]
    if queue is not None:
        queue = checks.features(queue, "queue")
        _check_like(queue, input, "queue")
        groups.insert(1, [x.detach() for x in queue])
    if mean is not None:
        groups.append([x.unsqueeze(0) for x in _check_mean(mean, input)])
    rows = _in_rows(groups)
    known = rows.pop() if mean is not None else None

    *ours, theirs = rows
    x_rows = [part for layers in ours for part in gather_rows(layers, process_group)]
    y_rows = gather_rows(theirs, process_group if gather_samples else False)
    # Sides that are centred apart have a shift each: theirs may be far from the mean of ours.
    of_x, of_y = ([x[0] for x in side[0]] for side in (x_rows, y_rows if known is None else [known]))
    shift = [of_x] * len(x_rows) + [of_y] * len(y_rows)
    n = sum(part[0].shape[0] for part in x_rows)
    m = sum(part[0].shape[0] for part in y_rows)
    _check_rows(n, "input", correction, estimator)
    _check_rows(m, "samples", correction, estimator)

    products = gram([*x_rows, *y_rows], shift)
    if joint:
        products = products.sum(0, keepdim=True)
    distances = _Distances.call(products, n, correction, estimator)
    total = (_per_layer(weight, distances) * distances).sum()
    return total.to(statistics_dtype(input[0].dtype))


def dual_covariance_squared_norm(x: Tensor, correction: int = 1) -> Tensor:
    """Scalar float64 `||C||_F^2` of the covariance of x, (N, D), through its N^2 inner products."""
    products = gram([[x]], [[x[0]]])
    return (_centred(products) / (x.shape[0] - correction)).square().sum()
