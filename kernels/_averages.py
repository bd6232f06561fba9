"""The running averages of the operators that match: their arguments and their steps, here and nowhere else in kernels.

An average is what `moment_ops/ops/averages.py` says it is: its number, its vectors and its options. The device
functions mirror csrc/device/averages.h.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moment_ops.kernels._common import bits, double
from moment_ops.ops.averages import AVERAGES

NONE = tl.constexpr(AVERAGES["none"].number)
MOVING = tl.constexpr(AVERAGES["moving"].number)
ADAM = tl.constexpr(AVERAGES["adam"].number)

# Parameters of a kernel, bits of float64: an average's options, in its order, and zeros.
OPTIONS = ("option0", "option1", "option2", "option3", "option4", "option5")


class Average(NamedTuple):
    """What an average keeps besides vectors, and what kernels are compiled for."""

    started: Any  # (F) uint8, or None
    step: Any  # () int64, or None
    KIND: Any
    UPDATE: Any  # whether the state advances


class Vectors(NamedTuple):
    """A quantity's, (F) each, packed; None where there is none, or it is not wanted."""

    target: Any
    weight: Any
    grad: Any
    averages: Any  # as many as the average has


class Entries(NamedTuple):
    """Entries of packed vectors that a program works on."""

    packed: Any  # positions
    mask: Any
    finite: Any  # whether their state advances
    started: Any  # whether they have had a finite value; anything where the average does not ask


class Numbers(NamedTuple):
    """float64 scalars of a step."""

    reduction: Any
    options: Any
    of_step: Any  # Adam's corrections of the bias; a moving average's weights of the past and of the batch


def option_arguments(average_kind: str, options: Sequence[float]) -> dict[str, int]:
    """An average's options, by the names of parameters."""
    assert len(options) == len(AVERAGES[average_kind].options)
    return {name: bits(options[i] if i < len(options) else 0.0) for i, name in enumerate(OPTIONS)}


def average_argument(average_kind: str, state: Sequence[Tensor], update: bool) -> Average:
    """What an average has once for all quantities."""
    kind = AVERAGES[average_kind]
    return Average(
        # Triton's booleans are single bits; torch's are bytes.
        started=state[-2].view(torch.uint8) if kind.has_started else None,
        step=state[-1] if state else None,
        KIND=tl.constexpr(kind.number),
        UPDATE=tl.constexpr(update and bool(state)),
    )


def vectors_of(average_kind: str, state: Sequence[Tensor], quantity: int) -> tuple[Tensor, ...]:
    """A quantity's vectors of the state."""
    count = len(AVERAGES[average_kind].vectors)
    return tuple(state[quantity * count : (quantity + 1) * count])


@triton.jit
def complement_of_power(beta, exponent):
    """1 - beta**exponent to a few units in the last place, without a loop; the power itself would cancel digits.

    It is 1 - exp(-z), here of z / 128 by its series, and then seven times 1 - q**2 = (1 - q) (2 - (1 - q)).
    """
    # exp(-38) is less than half a unit in the last place of 1.
    z = tl.minimum(-tl.log(tl.maximum(beta, 1e-300)) * exponent.to(tl.float64), 38.0) * (1.0 / 128)
    series = tl.full((), 1.0, tl.float64)
    for k in tl.static_range(8, 1, -1):
        series = 1.0 - z * (1.0 / k) * series
    result = z * series
    for _ in tl.static_range(7):
        result = result * (2.0 - result)
    return result


@triton.jit
def square_root(x):
    """Correctly rounded in both dtypes; `tl.sqrt` of float32 is approximate and flushes subnormals."""
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def loss_terms(terms, size):
    """Infinite where a size is, and a term is infinity less infinity, or nothing times infinity: it does not fit.

    By column: threads that have a column twice may see it before and after its step, and must not go different ways.
    """
    return tl.where((terms != terms) & (tl.abs(size) == float("inf")), float("inf"), terms)


@triton.jit
def match_none(value, target, weight, reduction):
    """(column's share of the loss, derivative)."""
    difference = value - target
    scaled = reduction * weight * difference
    return loss_terms(scaled * difference, tl.abs(value) + tl.abs(target)), 2.0 * scaled


@triton.jit
def match_moving(value, target, weight, reduction, of_past, of_batch, started, average):
    """(column's share of the loss, derivative, next average): the gradient flows through the current batch only."""
    estimate = tl.where(started, of_past * average + of_batch * value, value)
    difference = estimate - target
    scaled = reduction * weight * difference
    return scaled * difference, of_batch * (2.0 * scaled), estimate


@triton.jit
def adam_step(difference, average, exp_avg, exp_avg_sq, beta1_complement, beta2, beta2_complement, eps, gradient_scale,
              step_size, root_bias_correction2):  # fmt: skip
    """(average, exp_avg, exp_avg_sq) after one step towards `difference`, in torch.optim.Adam's order of operations."""
    step = gradient_scale * (average - difference)
    exp_avg = exp_avg + beta1_complement * (step - exp_avg)
    exp_avg_sq = exp_avg_sq * beta2 + beta2_complement * step * step
    denominator = square_root(exp_avg_sq) / root_bias_correction2 + eps
    return average - step_size * (exp_avg / denominator), exp_avg, exp_avg_sq


@triton.jit
def load_started(average, packed, mask, finite):
    """Whether entries have started; anything where the average does not ask."""
    started = finite
    if average.started is not None:
        started = tl.load(average.started + packed, mask=mask, other=0) != 0
    return started


@triton.jit
def store_started(average, entries):
    """What has had a finite value has started."""
    if average.started is not None and average.UPDATE:
        started = (entries.started | entries.finite).to(tl.uint8)
        tl.store(average.started + entries.packed, started, mask=entries.mask)


@triton.jit
def load_averages(vectors, average, packed, mask):
    """An average's vectors, as far as its step reads them; others are anything."""
    latest = 0.0
    first = 0.0
    second = 0.0
    if average.KIND != NONE:
        latest = tl.load(vectors.averages[0] + packed, mask=mask, other=0.0)
    if average.KIND == ADAM and average.UPDATE:
        first = tl.load(vectors.averages[1] + packed, mask=mask, other=0.0)
        second = tl.load(vectors.averages[2] + packed, mask=mask, other=0.0)
    return latest, first, second


@triton.jit
def numbers_of(average, reduction, options):
    """The scalars of the step that is about to be made, from their bits.

    options: as many as there are OPTIONS.
    """
    options = (double(options[0]), double(options[1]), double(options[2]), double(options[3]), double(options[4]),
               double(options[5]))  # fmt: skip
    first = tl.full((), 1.0, tl.float64)
    second = tl.full((), 1.0, tl.float64)
    if average.KIND == ADAM and average.UPDATE:
        next_step = tl.load(average.step) + 1
        first = complement_of_power(options[1], next_step)
        second = complement_of_power(options[2], next_step)
    if average.KIND == MOVING:
        first = options[0]
        second = 1.0 - options[0]
        # All threads of all programs go the same way.
        if options[1] != 0.0:
            second = second / complement_of_power(options[0], tl.load(average.step) + 1)
            first = 1.0 - second
    return Numbers(double(reduction), options, (first, second))


@triton.jit
def match_average(value, target, weight, latest, vectors, entries, average, numbers):
    """(columns' shares of the loss, derivatives) of values; the average's vectors advance.

    latest: what `load_averages` has loaded.
    """
    dtype = value.dtype
    old, first, second = latest
    packed, mask, finite, started = entries
    options = numbers.options
    if average.KIND == NONE:
        terms, slope = match_none(value, target, weight, numbers.reduction.to(dtype))
    elif average.KIND == MOVING:
        of_past, of_batch = numbers.of_step[0].to(dtype), numbers.of_step[1].to(dtype)
        terms, slope, new = match_moving(
            value, target, weight, numbers.reduction.to(dtype), of_past, of_batch, started, old
        )
        # Selecting values keeps the stores wide; a mask by column would not.
        if average.UPDATE:
            tl.store(vectors.averages[0] + packed, tl.where(finite, new, old), mask=mask)
    else:
        # The average is a constant for the gradient.
        lr, beta1, beta2, eps, gradient_scale, _ = options
        difference = target - value
        estimate = old
        if average.UPDATE:
            next_average, next_first, next_second = adam_step(
                difference,
                old,
                first,
                second,
                (1.0 - beta1).to(dtype),
                beta2.to(dtype),
                (1.0 - beta2).to(dtype),
                eps.to(dtype),
                gradient_scale.to(dtype),
                (lr / numbers.of_step[0]).to(dtype),
                tl.sqrt(numbers.of_step[1]).to(dtype),
            )
            estimate = tl.where(finite, next_average, old)
            tl.store(vectors.averages[0] + packed, estimate, mask=mask)
            tl.store(vectors.averages[1] + packed, tl.where(finite, next_first, first), mask=mask)
            tl.store(vectors.averages[2] + packed, tl.where(finite, next_second, second), mask=mask)
        weighted = weight * estimate
        terms, slope = weighted * difference, -weighted
        terms = loss_terms(terms, difference)
    return terms, slope
