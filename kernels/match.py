"""`match_`: the average's step, the loss and its derivatives, from moments or as the epilogue of their reduction.

The device functions mirror csrc/device/match.cuh.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moment_ops.kernels import _column_plan, _launch
from moment_ops.kernels._averages import (
    OPTIONS,
    Entries,
    Vectors,
    average_argument,
    load_averages,
    load_started,
    match_average,
    numbers_of,
    option_arguments,
    store_started,
    vectors_of,
)
from moment_ops.kernels._common import arrive, bits, double, is_finite
from moment_ops.kernels._launch import Launch
from moment_ops.kernels._order import is_native
from moment_ops.kernels._records import Rows
from moment_ops.kernels._reduce import reduce_columns
from moment_ops.kernels._tiles import MATCH_REGISTERS, MATCH_TILES, REDUCTION_REGISTERS
from moment_ops.kernels.moments import CUT, moments, reduction_arguments
from moment_ops.ops.records import Match

# Dtypes that the kernels take; a literal, which is read without importing Triton.
OPERATORS = {
    "match_": ("float32", "bfloat16", "float16", "float64"),
}

_FOLD_LOSSES = 1024


class Quantities(NamedTuple):
    """What is matched, `Vectors` each."""

    mean: Any
    var: Any  # without a target where variances are not matched


@triton.jit
def load_weight(vectors, packed, mask):
    """1 where there is none."""
    weight = 1.0
    if vectors.weight is not None:
        weight = tl.load(vectors.weight + packed, mask=mask, other=0.0)
    return weight


@triton.jit
def match_loaded(value, target, weight, latest, scale, vectors, entries, average, numbers):
    """Match values with what is loaded of their vectors; returns their share of the loss, float64."""
    weight *= scale.to(value.dtype)
    terms, slope = match_average(value, target, weight, latest, vectors, entries, average, numbers)
    if vectors.grad is not None:
        tl.store(vectors.grad + entries.packed, slope, mask=entries.mask)
    return tl.sum(tl.where(entries.mask, terms.to(tl.float64), 0.0))


@triton.jit
def match_quantity(value, target, scale, vectors, entries, average, numbers):
    """Match values with their target; returns their share of the loss, float64."""
    weight = load_weight(vectors, entries.packed, entries.mask)
    latest = load_averages(vectors, average, entries.packed, entries.mask)
    return match_loaded(value, target, weight, latest, scale, vectors, entries, average, numbers)


@triton.jit
def match_columns(mean, var, packed, mask, vectors, scales, average, options):
    """Match means, and variances where they have targets; returns the columns' share of the loss, float64."""
    # A column counts as finite where all of its moments that are matched are.
    finite = is_finite(mean)
    if vectors.var.target is not None:
        finite = finite & is_finite(var)
    entries = Entries(packed, mask, finite, load_started(average, packed, mask, finite))
    # Loads first: biases are corrected while they are in flight.
    target = tl.load(vectors.mean.target + packed, mask=mask, other=0.0)
    weight = load_weight(vectors.mean, packed, mask)
    latest = load_averages(vectors.mean, average, packed, mask)
    numbers = numbers_of(average, scales[2], options)
    loss = match_loaded(mean, target, weight, latest, double(scales[0]), vectors.mean, entries, average, numbers)
    if vectors.var.target is not None:
        target = tl.load(vectors.var.target + packed, mask=mask, other=0.0)
        loss += match_quantity(var, target, double(scales[1]), vectors.var, entries, average, numbers)
    store_started(average, entries)
    return loss


class Loss(NamedTuple):
    """The loss with its workspace, and how many shares are added at a time."""

    loss: Any  # ()
    losses: Any  # (entries) float64 zeros
    ticket: Any  # () int32 zero
    FOLD: Any


@triton.jit
def finish_loss(share, index, loss, arrivals, entries, average):
    """Leave a share of the loss; the last program adds all of them up, in order, and counts the step."""
    tl.store(loss.losses + index, share)
    if arrive(loss.ticket, arrivals):
        lane = tl.arange(0, loss.FOLD)
        total = tl.zeros([loss.FOLD], tl.float64)
        for begin in range(0, entries, loss.FOLD):
            mask = lane < entries - begin
            total += tl.load(loss.losses + begin + lane, mask=mask, other=0.0, cache_modifier=".cg")
        tl.store(loss.loss, tl.sum(total, axis=0).to(loss.loss.dtype.element_ty))
        if average.UPDATE:
            tl.store(average.step, tl.load(average.step) + 1)


# Integers whose values do not specialise a kernel.
COUNTS = ("arrivals", "entries", "first_entry")
_SCALES = ("mean_scale", "var_scale", "reduction")


@triton.jit(do_not_specialize=[*_SCALES, *OPTIONS, *COUNTS])
def match_kernel(
    mean,  # (columns)
    var,  # (columns) or None
    columns,
    vectors,
    mean_scale: tl.int64,  # bits of float64, as all scalars
    var_scale: tl.int64,
    reduction: tl.int64,
    option0: tl.int64,
    option1: tl.int64,
    option2: tl.int64,
    option3: tl.int64,
    option4: tl.int64,
    option5: tl.int64,
    average,
    loss,
    arrivals,
    entries,
    first_entry,
    COLUMNS: tl.constexpr,
):
    """The matching loss of given moments."""
    program = tl.program_id(0)
    packed = program.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = packed < columns
    batch_mean = tl.load(mean + packed, mask=mask, other=0.0)
    batch_var = batch_mean
    if vectors.var.target is not None:
        batch_var = tl.load(var + packed, mask=mask, other=0.0)
    scales, options = (mean_scale, var_scale, reduction), (option0, option1, option2, option3, option4, option5)
    share = match_columns(batch_mean, batch_var, packed, mask, vectors, scales, average, options)
    finish_loss(share, first_entry + program, loss, arrivals, entries, average)


@triton.jit(do_not_specialize=[*CUT, *_SCALES, *OPTIONS, *COUNTS])
def match_features_kernel(
    layers,
    mean_out,  # (F)
    partials,
    rows,
    chunk_rows,
    chunks,
    correction,
    vectors,
    mean_scale: tl.int64,  # bits of float64, as all scalars
    var_scale: tl.int64,
    reduction: tl.int64,
    option0: tl.int64,
    option1: tl.int64,
    option2: tl.int64,
    option3: tl.int64,
    option4: tl.int64,
    option5: tl.int64,
    average,
    loss,
    arrivals,
    entries,
    first_entry,
    strip,
):
    """The matching loss of features: the program that completes a strip's moments matches them in registers."""
    cut = Rows(rows, chunk_rows, chunks, correction)
    got = reduce_columns(layers, None, None, partials, cut, mean_out.dtype.element_ty, strip)
    if got.complete:
        tl.store(mean_out + got.packed, got.mean, mask=got.mask)
        scales, options = (mean_scale, var_scale, reduction), (option0, option1, option2, option3, option4, option5)
        share = match_columns(got.mean, got.var, got.packed, got.mask, vectors, scales, average, options)
        finish_loss(share, first_entry + got.first, loss, arrivals, entries, average)


def loss_arguments(entries: int, arrivals: int, loss: Tensor) -> dict[str, Any]:
    """The loss with its workspace: one share per program, and the count of the programs that have left theirs."""
    workspace = _launch.workspace(entries + 1, torch.float64, loss.device, zeroed=True)
    ticket = workspace[entries:].view(torch.int32)
    return {
        "loss": Loss(loss, workspace, ticket, tl.constexpr(_FOLD_LOSSES)),
        "arrivals": arrivals,
        "entries": entries,
    }


def match_arguments(match: Match, grad_mean: Tensor, grad_var: Tensor | None) -> dict[str, Any]:
    """What the kernels that match have in common."""
    mean_averages = vectors_of(match.average_kind, match.state, 0)
    var_averages = () if match.target_var is None else vectors_of(match.average_kind, match.state, 1)
    return {
        "vectors": Quantities(
            Vectors(match.target_mean, match.mean_weight, grad_mean, mean_averages),
            Vectors(match.target_var, match.var_weight, grad_var, var_averages),
        ),
        "mean_scale": bits(match.mean_scale),
        "var_scale": bits(match.var_scale),
        "reduction": bits(match.reduction),
        **option_arguments(match.average_kind, match.options),
        "average": average_argument(match.average_kind, match.state, match.update),
    }


def match_launches(
    mean: Tensor, var: Tensor | None, match: Match, loss: Tensor, grad_mean: Tensor, grad_var: Tensor | None
) -> list[Launch]:
    """The launch of `match_` from moments."""
    tile = MATCH_TILES[mean.element_size()]
    programs = triton.cdiv(mean.numel(), tile.columns)
    arguments = {
        "mean": mean,
        "var": var,
        "columns": mean.numel(),
        "first_entry": 0,
        **loss_arguments(programs, programs, loss),
        **match_arguments(match, grad_mean, grad_var),
        "COLUMNS": tile.columns,
    }
    return [Launch(match_kernel, programs, arguments, tile.warps, MATCH_REGISTERS)]


def match_features_launches(
    layers: Sequence[Tensor],
    correction: int,
    match: Match,
    loss: Tensor,
    mean: Tensor,
    grad_mean: Tensor,
    grad_var: Tensor | None,
) -> list[Launch]:
    """The launches of `match_` from features: those that come last complete the loss."""
    groups = _column_plan.groups("reduce", layers)
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
        launch = Launch(match_features_kernel, group.programs, arguments, group.tile.warps, REDUCTION_REGISTERS)
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
