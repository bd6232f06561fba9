"""`match_`: the average's step, the loss and its derivatives, from moments or as the epilogue of their reduction.

The device functions mirror csrc/device/averages.h.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moment_ops.kernels import _launch, _plan
from moment_ops.kernels._common import arrive, double, is_finite
from moment_ops.kernels._order import is_native
from moment_ops.kernels._reduce import reduce_columns
from moment_ops.kernels.moments import moments, reduction_arguments
from moment_ops.ops.averages import AVERAGES
from moment_ops.ops.records import Match

OPERATORS = {
    "match_": ("float32", "bfloat16", "float16", "float64"),
}

NONE = tl.constexpr(AVERAGES["none"].number)
MOVING = tl.constexpr(AVERAGES["moving"].number)
ADAM = tl.constexpr(AVERAGES["adam"].number)

# Vectors of state per quantity.
MOST_VECTORS = 3

_FOLD_LOSSES = 1024
_MATCH_TILE = {4: _plan.Tile(1, 512, 4), 8: _plan.Tile(1, 256, 4)}
# 1,024 threads, whose vectors are in flight together.
_MATCH_REGISTERS = 64


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
def match_none(value, target, weight, reduction):
    """(column's share of the loss, derivative)."""
    difference = value - target
    scaled = reduction * weight * difference
    return scaled * difference, 2.0 * scaled


@triton.jit
def match_moving(value, target, weight, reduction, decay, one_minus_decay, started, average):
    """(column's share of the loss, derivative, next average): the gradient flows through the current batch only."""
    estimate = tl.where(started, decay * average + one_minus_decay * value, value)
    difference = estimate - target
    scaled = reduction * weight * difference
    return scaled * difference, one_minus_decay * (2.0 * scaled), estimate


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
def load_state(vectors, packed, mask, WEIGHTED: tl.constexpr, AVERAGE: tl.constexpr, UPDATE: tl.constexpr):
    """(weight, average, exp_avg, exp_avg_sq) at positions `packed`; those that are not used may be anything."""
    _, weight, _, average, exp_avg, exp_avg_sq = vectors
    w = 1.0
    latest = 0.0
    first = 0.0
    second = 0.0
    if WEIGHTED:
        w = tl.load(weight + packed, mask=mask, other=0.0)
    if AVERAGE != NONE:
        latest = tl.load(average + packed, mask=mask, other=0.0)
    if AVERAGE == ADAM and UPDATE:
        first = tl.load(exp_avg + packed, mask=mask, other=0.0)
        second = tl.load(exp_avg_sq + packed, mask=mask, other=0.0)
    return w, latest, first, second


@triton.jit
def match_loaded(
    value,
    goal,
    state,
    finite,
    begun,
    packed,
    mask,
    vectors,
    scale,
    scalars,
    bias_correction1,
    bias_correction2,
    AVERAGE: tl.constexpr,
    UPDATE: tl.constexpr,
    KEEP: tl.constexpr,
):
    """`match_quantity`, of what `load_state` has loaded."""
    _, _, grad, average, exp_avg, exp_avg_sq = vectors
    w, old, first, second = state
    dtype = value.dtype
    w *= scale.to(dtype)
    if AVERAGE == NONE:
        terms, slope = match_none(value, goal, w, scalars[0].to(dtype))
    elif AVERAGE == MOVING:
        decay = scalars[1]
        terms, slope, new = match_moving(
            value, goal, w, scalars[0].to(dtype), decay.to(dtype), (1.0 - decay).to(dtype), begun, old
        )
        # Selecting values keeps the stores wide; a mask by column would not.
        if UPDATE:
            tl.store(average + packed, tl.where(finite, new, old), mask=mask)
    else:
        difference = goal - value
        latest = old
        if UPDATE:
            next_average, next_first, next_second = adam_step(
                difference,
                old,
                first,
                second,
                (1.0 - scalars[3]).to(dtype),
                scalars[4].to(dtype),
                (1.0 - scalars[4]).to(dtype),
                scalars[5].to(dtype),
                scalars[6].to(dtype),
                (scalars[2] / bias_correction1).to(dtype),
                tl.sqrt(bias_correction2).to(dtype),
            )
            latest = tl.where(finite, next_average, old)
            tl.store(average + packed, latest, mask=mask)
            tl.store(exp_avg + packed, tl.where(finite, next_first, first), mask=mask)
            tl.store(exp_avg_sq + packed, tl.where(finite, next_second, second), mask=mask)
        weighted = w * latest
        terms, slope = weighted * difference, -weighted
    if KEEP:
        tl.store(grad + packed, slope, mask=mask)
    return tl.sum(tl.where(mask, terms.to(tl.float64), 0.0))


@triton.jit
def match_quantity(
    value,
    goal,
    finite,
    begun,
    packed,
    mask,
    vectors,
    scale,
    scalars,
    bias_correction1,
    bias_correction2,
    WEIGHTED: tl.constexpr,
    AVERAGE: tl.constexpr,
    UPDATE: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Match values, at positions `packed`, with their goal; returns their share of the loss, float64.

    vectors: (target, weight, grad, average, exp_avg, exp_avg_sq), (F) each; those that are not used may be anything.
    KEEP: whether the derivative is stored.
    scalars: float64 (reduction, decay, lr, beta1, beta2, eps, gradient_scale).
    """
    state = load_state(vectors, packed, mask, WEIGHTED, AVERAGE, UPDATE)
    return match_loaded(
        value, goal, state, finite, begun, packed, mask, vectors, scale, scalars, bias_correction1, bias_correction2,
        AVERAGE, UPDATE, KEEP,
    )  # fmt: skip


@triton.jit
def bias_corrections(step, scalars, AVERAGE: tl.constexpr, UPDATE: tl.constexpr):
    """ADAM's, of the step that is about to be made; 1 for other averages."""
    first = tl.full((), 1.0, tl.float64)
    second = tl.full((), 1.0, tl.float64)
    if AVERAGE == ADAM and UPDATE:
        next_step = tl.load(step) + 1
        first = complement_of_power(scalars[3], next_step)
        second = complement_of_power(scalars[4], next_step)
    return first, second


@triton.jit
def match_columns(
    mean,
    var,
    packed,
    mask,
    mean_vectors,
    var_vectors,
    mean_scale,
    var_scale,
    scalars,
    started,
    step,
    MEAN_WEIGHT: tl.constexpr,
    VAR_WEIGHT: tl.constexpr,
    AVERAGE: tl.constexpr,
    UPDATE: tl.constexpr,
):
    """Match means, and variances where they have targets; returns the columns' share of the loss, float64."""
    # A column counts as finite where all of its moments that are matched are.
    finite = is_finite(mean)
    if var_vectors is not None:
        finite = finite & is_finite(var)
    begun = finite
    if AVERAGE == MOVING:
        begun = tl.load(started + packed, mask=mask, other=0) != 0
    # Loads first: biases are corrected while they are in flight.
    goal = tl.load(mean_vectors[0] + packed, mask=mask, other=0.0)
    state = load_state(mean_vectors, packed, mask, MEAN_WEIGHT, AVERAGE, UPDATE)
    bias_correction1, bias_correction2 = bias_corrections(step, scalars, AVERAGE, UPDATE)
    loss = match_loaded(
        mean, goal, state, finite, begun, packed, mask, mean_vectors, mean_scale, scalars, bias_correction1,
        bias_correction2, AVERAGE, UPDATE, True,
    )  # fmt: skip
    if var_vectors is not None:
        goal = tl.load(var_vectors[0] + packed, mask=mask, other=0.0)
        loss += match_quantity(
            var, goal, finite, begun, packed, mask, var_vectors, var_scale, scalars, bias_correction1,
            bias_correction2, VAR_WEIGHT, AVERAGE, UPDATE, True,
        )  # fmt: skip
    if AVERAGE == MOVING and UPDATE:
        tl.store(started + packed, (begun | finite).to(tl.uint8), mask=mask)
    return loss


@triton.jit
def finish_loss(share, index, loss, losses, ticket, arrivals, entries, step, UPDATE: tl.constexpr, FOLD: tl.constexpr):
    """Leave a share of the loss; the last program adds all of them up, in order, and counts the step."""
    tl.store(losses + index, share)
    if arrive(ticket, arrivals):
        lane = tl.arange(0, FOLD)
        total = tl.zeros([FOLD], tl.float64)
        for begin in range(0, entries, FOLD):
            total += tl.load(losses + begin + lane, mask=lane < entries - begin, other=0.0, cache_modifier=".cg")
        tl.store(loss, tl.sum(total, axis=0).to(loss.dtype.element_ty))
        if UPDATE:
            tl.store(step, tl.load(step) + 1)


COUNTS = ["arrivals", "entries", "first_entry"]
_ROWS = ["rows", "chunk_rows", "chunks", "correction"]
AVERAGE_SCALARS = ["decay", "lr", "beta1", "beta2", "eps", "gradient_scale"]
_SCALARS = ["mean_scale", "var_scale", "reduction", *AVERAGE_SCALARS]


@triton.jit(do_not_specialize=[*_SCALARS, *COUNTS])
def match_kernel(
    mean,  # (columns)
    var,  # (columns) or None
    columns,
    mean_vectors,  # (target, weight, grad, average, exp_avg, exp_avg_sq), (F) each
    var_vectors,  # likewise, or None
    mean_scale: tl.int64,  # bits of float64, as all scalars
    var_scale: tl.int64,
    reduction: tl.int64,
    decay: tl.int64,
    lr: tl.int64,
    beta1: tl.int64,
    beta2: tl.int64,
    eps: tl.int64,
    gradient_scale: tl.int64,
    started,  # (F) uint8, or None
    step,  # () int64, or None
    loss,  # ()
    losses,  # (entries) float64 zeros
    ticket,  # () int32 zero
    arrivals,
    entries,
    first_entry,
    MEAN_WEIGHT: tl.constexpr,
    VAR_WEIGHT: tl.constexpr,
    AVERAGE: tl.constexpr,
    UPDATE: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """The matching loss of given moments."""
    program = tl.program_id(0)
    packed = program.to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = packed < columns
    batch_mean = tl.load(mean + packed, mask=mask, other=0.0)
    batch_var = batch_mean
    if var_vectors is not None:
        batch_var = tl.load(var + packed, mask=mask, other=0.0)
    scalars = (double(reduction), double(decay), double(lr), double(beta1), double(beta2), double(eps),
               double(gradient_scale))  # fmt: skip
    share = match_columns(
        batch_mean, batch_var, packed, mask, mean_vectors, var_vectors, double(mean_scale), double(var_scale), scalars,
        started, step, MEAN_WEIGHT, VAR_WEIGHT, AVERAGE, UPDATE,
    )  # fmt: skip
    finish_loss(share, first_entry + program, loss, losses, ticket, arrivals, entries, step, UPDATE, FOLD)


@triton.jit(do_not_specialize=[*_ROWS, *_SCALARS, *COUNTS])
def match_features_kernel(
    inputs,  # LAYERS x (rows, columns)
    starts,
    columns,
    strides,
    offsets,
    inners,
    mean_out,  # (F)
    partials,  # (programs, 2, BLOCK_COLUMNS) float64, or None
    tickets,  # (programs) int32 zeros, or None
    rows,
    chunk_rows,
    chunks,
    correction,
    mean_vectors,  # (target, weight, grad, average, exp_avg, exp_avg_sq), (F) each
    var_vectors,  # likewise, or None
    mean_scale: tl.int64,  # bits of float64, as all scalars
    var_scale: tl.int64,
    reduction: tl.int64,
    decay: tl.int64,
    lr: tl.int64,
    beta1: tl.int64,
    beta2: tl.int64,
    eps: tl.int64,
    gradient_scale: tl.int64,
    started,  # (F) uint8, or None
    step,  # () int64, or None
    loss,  # ()
    losses,  # (entries) float64 zeros
    ticket,  # () int32 zero
    arrivals,
    entries,
    first_entry,
    MEAN_WEIGHT: tl.constexpr,
    VAR_WEIGHT: tl.constexpr,
    AVERAGE: tl.constexpr,
    UPDATE: tl.constexpr,
    FOLD: tl.constexpr,
    LAYERS: tl.constexpr,
    VECTOR: tl.constexpr,
    PERMUTED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """The matching loss of features: the program that completes a strip's moments matches them in registers."""
    complete, mean, var, packed, mask, first = reduce_columns(
        inputs, starts, columns, strides, offsets, inners, partials, tickets, rows, chunk_rows, chunks, correction,
        None, None, None, None, mean_out.dtype.element_ty, LAYERS, VECTOR, PERMUTED, BLOCK_ROWS, BLOCK_COLUMNS,
        BLOCK_CHUNKS,
    )  # fmt: skip
    if complete:
        tl.store(mean_out + packed, mean, mask=mask)
        scalars = (double(reduction), double(decay), double(lr), double(beta1), double(beta2), double(eps),
                   double(gradient_scale))  # fmt: skip
        share = match_columns(
            mean, var, packed, mask, mean_vectors, var_vectors, double(mean_scale), double(var_scale), scalars,
            started, step, MEAN_WEIGHT, VAR_WEIGHT, AVERAGE, UPDATE,
        )  # fmt: skip
        finish_loss(share, first_entry + first, loss, losses, ticket, arrivals, entries, step, UPDATE, FOLD)


def loss_arguments(entries: int, arrivals: int, loss: Tensor) -> dict[str, Any]:
    """The loss with its workspace: one share per program, and the count of the programs that have left theirs."""
    workspace = _launch.workspace(entries + 1, torch.float64, loss.device, zeroed=True)
    return {
        "loss": loss,
        "losses": workspace,
        "ticket": workspace[entries:].view(torch.int32),
        "arrivals": arrivals,
        "entries": entries,
        "FOLD": _FOLD_LOSSES,
    }


def average_arguments(average: str, options: Sequence[float], state: Sequence[Tensor], update: bool) -> dict[str, Any]:
    """The scalars of an average, as bits, and what it keeps besides vectors."""
    kind = AVERAGES[average]
    scalars = dict(zip(kind.options, options, strict=True))
    return {
        **{name: _plan.bits(scalars.get(name, 0.0)) for name in AVERAGE_SCALARS},
        # Triton's booleans are single bits; torch's are bytes.
        "started": state[-2].view(torch.uint8) if kind.has_started else None,
        "step": state[-1] if state else None,
        "AVERAGE": kind.number,
        "UPDATE": update and bool(state),
    }


def vectors_of(average: str, state: Sequence[Tensor], quantity: int, stand_in: Tensor) -> list[Tensor]:
    """(average, exp_avg, exp_avg_sq) of a quantity.

    Triton 3.6 does not pass on tuples with absent entries: another tensor stands in for them.
    """
    count = len(AVERAGES[average].vectors)
    return [*state[quantity * count : (quantity + 1) * count], *[stand_in] * (MOST_VECTORS - count)]


def match_arguments(match: Match, grad_mean: Tensor, grad_var: Tensor | None) -> dict[str, Any]:
    """What the kernels that match have in common."""
    vectors: list[tuple[Tensor, ...] | None] = [None, None]
    quantities = ((match.target_mean, match.mean_weight, grad_mean), (match.target_var, match.var_weight, grad_var))
    for i, (target, weight, grad) in enumerate(quantities):
        if target is not None:
            assert grad is not None
            averages = vectors_of(match.average, match.state, i, target)
            vectors[i] = (target, target if weight is None else weight, grad, *averages)
    return {
        "mean_vectors": vectors[0],
        "var_vectors": vectors[1],
        "mean_scale": _plan.bits(match.mean_scale),
        "var_scale": _plan.bits(match.var_scale),
        "reduction": _plan.bits(match.reduction),
        **average_arguments(match.average, match.options, match.state, match.update),
        "MEAN_WEIGHT": match.mean_weight is not None,
        "VAR_WEIGHT": match.var_weight is not None,
    }


def match_launches(
    mean: Tensor, var: Tensor | None, match: Match, loss: Tensor, grad_mean: Tensor, grad_var: Tensor | None
) -> list[_plan.Launch]:
    """The launch of `match_` from moments."""
    tile = _MATCH_TILE[mean.element_size()]
    programs = triton.cdiv(mean.numel(), tile.columns)
    arguments = {
        "mean": mean,
        "var": var,
        "columns": mean.numel(),
        "first_entry": 0,
        **loss_arguments(programs, programs, loss),
        **match_arguments(match, grad_mean, grad_var),
        "BLOCK_COLUMNS": tile.columns,
    }
    return [_plan.Launch(match_kernel, programs, arguments, tile.warps, _MATCH_REGISTERS)]


def match_features_launches(
    layers: Sequence[Tensor],
    correction: int,
    match: Match,
    loss: Tensor,
    mean: Tensor,
    grad_mean: Tensor,
    grad_var: Tensor | None,
) -> list[_plan.Launch]:
    """The launches of `match_` from features: those that come last complete the loss."""
    groups = _plan.groups("reduce", layers)
    shared = loss_arguments(sum(g.programs for g in groups), sum(g.strips for g in groups), loss)
    shared |= match_arguments(match, grad_mean, grad_var)
    launches, first = [], 0
    for group in groups:
        arguments = {
            "mean_out": mean,
            "first_entry": first,
            **reduction_arguments(group, layers, correction),
            **shared,
        }
        launch = _plan.Launch(match_features_kernel, group.programs, arguments, group.tile.warps, _plan.REGISTERS)
        launches.append(launch)
        first += group.programs
    return launches


def match_(
    mean: Tensor | None,
    var: Tensor | None,
    input: Sequence[Tensor],
    correction: int,
    match: Match,
    loss: Tensor,
    batch_mean: Tensor | None,
    grad_mean: Tensor,
    grad_var: Tensor | None,
) -> None:
    """Fill loss, derivatives and, from features, their mean; advance the state."""
    if mean is None and not all(map(is_native, input)):
        assert batch_mean is not None
        mean, var = batch_mean, None if grad_var is None else torch.empty_like(batch_mean)
        moments(input, 0, correction, mean, var)
    if mean is not None:
        _launch.run(match_launches, loss.device, mean, var, match, loss, grad_mean, grad_var)
    else:
        arguments = (input, correction, match, loss, batch_mean, grad_mean, grad_var)
        _launch.run(match_features_launches, loss.device, *arguments)
