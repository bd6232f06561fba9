"""The running averages of `match_`: what each keeps, and its step in plain PyTorch, which defines the kernels'."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Quantity(NamedTuple):
    """Means or variances, and their target and weight, (F,) each."""

    value: Tensor
    target: Tensor
    weight: Tensor | float
    reduction: float


class Past(NamedTuple):
    """The state of an average for one quantity."""

    vectors: Sequence[Tensor]  # (F,) each
    started: Tensor | None  # (F,)
    finite: Tensor  # (F,) whether a column advances
    step: Tensor | None  # the number of the step that is made, or that would be made without `update`
    update: bool
    options: Sequence[float]


class Matched(NamedTuple):
    """The result of a step."""

    terms: Tensor  # (F,) the columns' shares of the loss
    grad: Tensor  # (F,) their derivatives by the value
    vectors: Sequence[Tensor]  # of the next state


class AverageKind(NamedTuple):
    """A running average, as the operators see it."""

    number: int  # as in csrc/device/averages.h and kernels/_averages.py
    vectors: tuple[str, ...]  # per quantity
    options: tuple[str, ...]
    has_started: bool  # keeps for every column whether it has had a finite value
    match: Callable[[Quantity, Past], Matched]
    # d(estimate) / d(value), from the options and the number of the step; 0 where the estimate is a constant.
    slope: Callable[[Sequence[float], Tensor | None], Tensor | float]
    counts: Callable[[Sequence[float]], bool]  # whether the slope depends on the step


def _squared(quantity: Quantity, estimate: Tensor, slope: Tensor | float, vectors: Sequence[Tensor]) -> Matched:
    """The weighted squared distance of an estimate from the target. `slope` is d(estimate) / d(value)."""
    difference = estimate - quantity.target
    # Weighted before it is squared, as the square alone may not fit.
    scaled = quantity.reduction * quantity.weight * difference
    return Matched(scaled * difference, slope * (2 * scaled), vectors)


def _match_none(quantity: Quantity, past: Past) -> Matched:
    return _squared(quantity, quantity.value, 1.0, ())


def moving_weights(options: Sequence[float], step: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
    """The weights of the past average and of the batch: numbers, or float64 scalars if they depend on the step.

    Args:
        options: of a moving average: decay, and whether its bias is corrected.
        step: the number of the step, from 1. It is read on its device.
    """
    decay, corrected = options
    if not corrected:
        return decay, 1 - decay
    assert step is not None
    # 1 - decay**step would lose digits.
    complement = -torch.expm1(step.to(torch.float64) * (math.log(decay) if decay else -math.inf))
    batch = (1 - decay) / complement
    return 1 - batch, batch


def _match_moving(quantity: Quantity, past: Past) -> Matched:
    """The gradient flows through the current batch only."""
    assert past.started is not None
    (average,) = past.vectors
    of_past, of_batch = moving_weights(past.options, past.step)
    estimate = torch.where(past.started, of_past * average + of_batch * quantity.value, quantity.value)
    return _squared(quantity, estimate, of_batch, _advanced(past, (estimate,)))


def _match_adam(quantity: Quantity, past: Past) -> Matched:
    """The average is a constant for the gradient."""
    difference = quantity.target - quantity.value
    vectors = _adam(difference, past) if past.update else past.vectors
    weighted = quantity.weight * vectors[0]
    return Matched(weighted * difference, -weighted, vectors)


def _adam(difference: Tensor, past: Past) -> Sequence[Tensor]:
    """One step of torch.optim.Adam on the mean squared error between the average and the difference."""
    lr, beta1, beta2, eps, gradient_scale = past.options
    average, exp_avg, exp_avg_sq = past.vectors
    grad = gradient_scale * (average - difference)
    exp_avg = exp_avg + (1 - beta1) * (grad - exp_avg)
    exp_avg_sq = exp_avg_sq * beta2 + (1 - beta2) * grad * grad
    assert past.step is not None
    step = past.step.to(torch.float64)
    step_size = (lr / (1 - beta1**step)).to(average.dtype)
    root_bias_correction2 = (1 - beta2**step).sqrt().to(average.dtype)
    average = average - step_size * (exp_avg / (exp_avg_sq.sqrt() / root_bias_correction2 + eps))
    return _advanced(past, (average, exp_avg, exp_avg_sq))


def _advanced(past: Past, vectors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The new vectors. Columns that are not finite keep the old ones."""
    return [torch.where(past.finite, new, old) for old, new in zip(past.vectors, vectors, strict=True)]


def step_for_slope(average_kind: str, options: Sequence[float], state: Sequence[Tensor], update: bool) -> Tensor | None:
    """A copy of the number of the step whose call has just advanced the state, if the slope depends on it."""
    return state[-1] + (0 if update else 1) if AVERAGES[average_kind].counts(options) else None


AVERAGES = {
    "none": AverageKind(
        number=0,
        vectors=(),
        options=(),
        has_started=False,
        match=_match_none,
        slope=lambda options, step: 1.0,
        counts=lambda options: False,
    ),
    "moving": AverageKind(
        number=1,
        vectors=("average",),
        options=("decay", "bias_correction"),
        has_started=True,
        match=_match_moving,
        slope=lambda options, step: moving_weights(options, step)[1],
        counts=lambda options: bool(options[1]),
    ),
    "adam": AverageKind(
        number=2,
        vectors=("average", "exp_avg", "exp_avg_sq"),
        options=("lr", "beta1", "beta2", "eps", "gradient_scale"),
        has_started=False,
        match=_match_adam,
        slope=lambda options, step: 0.0,
        counts=lambda options: False,
    ),
}
