"""The running averages of `match_`: what each keeps, and its step in plain PyTorch, which defines the kernels'."""

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
    step: Tensor | None  # the one that is made; None where no column does
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
    # Of the loss by the value, over 2 * reduction * weight, from the options.
    second_derivative: Callable[[Sequence[float]], float]


def _squared(quantity: Quantity, estimate: Tensor, slope: float, vectors: Sequence[Tensor]) -> Matched:
    """The weighted squared distance of an estimate from the target. `slope` is d(estimate) / d(value)."""
    difference = estimate - quantity.target
    # Weighted before it is squared, as the square alone may not fit.
    scaled = quantity.reduction * quantity.weight * difference
    return Matched(scaled * difference, slope * (2 * scaled), vectors)


def _match_none(quantity: Quantity, past: Past) -> Matched:
    return _squared(quantity, quantity.value, 1.0, ())


def _match_moving(quantity: Quantity, past: Past) -> Matched:
    """The gradient flows through the current batch only."""
    assert past.started is not None
    (decay,), (average,) = past.options, past.vectors
    estimate = torch.where(past.started, decay * average + (1 - decay) * quantity.value, quantity.value)
    return _squared(quantity, estimate, 1 - decay, _advanced(past, (estimate,)))


def _match_adam(quantity: Quantity, past: Past) -> Matched:
    """The average is a constant for the gradient."""
    difference = quantity.target - quantity.value
    vectors = past.vectors if past.step is None else _adam(difference, past, past.step)
    weighted = quantity.weight * vectors[0]
    return Matched(weighted * difference, -weighted, vectors)


def _adam(difference: Tensor, past: Past, step: Tensor) -> Sequence[Tensor]:
    """One step of torch.optim.Adam on the mean squared error between the average and the difference."""
    lr, beta1, beta2, eps, gradient_scale = past.options
    average, exp_avg, exp_avg_sq = past.vectors
    grad = gradient_scale * (average - difference)
    exp_avg = exp_avg + (1 - beta1) * (grad - exp_avg)
    exp_avg_sq = exp_avg_sq * beta2 + (1 - beta2) * grad * grad
    step = step.to(torch.float64)
    step_size = (lr / (1 - beta1**step)).to(average.dtype)
    root_bias_correction2 = (1 - beta2**step).sqrt().to(average.dtype)
    average = average - step_size * (exp_avg / (exp_avg_sq.sqrt() / root_bias_correction2 + eps))
    return _advanced(past, (average, exp_avg, exp_avg_sq))


def _advanced(past: Past, vectors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The new vectors. Columns that are not finite keep the old ones."""
    return [torch.where(past.finite, new, old) for old, new in zip(past.vectors, vectors, strict=True)]


AVERAGES = {
    "none": AverageKind(
        number=0,
        vectors=(),
        options=(),
        has_started=False,
        match=_match_none,
        second_derivative=lambda options: 1.0,
    ),
    "moving": AverageKind(
        number=1,
        vectors=("average",),
        options=("decay",),
        has_started=True,
        match=_match_moving,
        second_derivative=lambda options: (1 - options[0]) ** 2,
    ),
    "adam": AverageKind(
        number=2,
        vectors=("average", "exp_avg", "exp_avg_sq"),
        options=("lr", "beta1", "beta2", "eps", "gradient_scale"),
        has_started=False,
        match=_match_adam,
        second_derivative=lambda options: 0.0,
    ),
}
