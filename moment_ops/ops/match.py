"""`match_`: the running average's step in place, the loss, and its derivatives with respect to mean and variance."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moment_ops.ops import backends, reference
from moment_ops.ops.layout import with_dense_columns
from moment_ops.ops.library import define, define_native

# As `Average` in csrc/device/match.h.
AVERAGES = {"none": 0, "moving": 1, "adam": 2}

_PARAMETERS = (
    "Tensor target_mean, Tensor? target_var, float mean_scale, float var_scale, Tensor? mean_weight,"
    " Tensor? var_weight, float reduction, {kind} average, float[] options, Tensor(a!)[] state, bool update"
)

define_native(
    "match_.native(Tensor? mean, Tensor? var, Tensor[] input, int correction, "
    + _PARAMETERS.format(kind="int")
    + ", Tensor(b!) loss, Tensor(c!)? batch_mean, Tensor(d!) grad_mean, Tensor(e!)? grad_var) -> ()"
)


def advance(state: Sequence[Tensor], update: bool) -> None:
    """What every step does to the state's bookkeeping, whatever the backend."""
    if not update:
        return
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "the moving average was asked to advance during backward: under activation checkpointing the loss would be"
            " recomputed and its state would advance twice. Keep the loss outside the checkpointed region."
        )
    # Kernels do not bump version counters, and a saved state tensor would then give wrong gradients silently.
    for tensor in state:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def _fill(
    name: str,
    mean: Tensor | None,
    var: Tensor | None,
    input: Sequence[Tensor],
    correction: int,
    batch_mean: Tensor | None,
    target_mean: Tensor,
    target_var: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:
    mean_scale, var_scale, mean_weight, var_weight, reduction, average, options, state, update = rest

    def dense(vector: Tensor | None) -> Tensor | None:
        return None if vector is None else vector.contiguous()

    loss = target_mean.new_empty(())
    grad_mean = target_mean.new_empty(target_mean.shape)
    grad_var = None if target_var is None else torch.empty_like(grad_mean)
    backends.implementation(name, "match_")(
        dense(mean),
        dense(var),
        [with_dense_columns(x, 0) for x in input],
        correction,
        dense(target_mean),
        dense(target_var),
        mean_scale,
        var_scale,
        dense(mean_weight),
        dense(var_weight),
        reduction,
        AVERAGES[average],
        options,
        state,
        update,
        loss,
        batch_mean,
        grad_mean,
        grad_var,
    )
    return loss, grad_mean, grad_var


# `arguments` are those of `_PARAMETERS`, in its order.
def _match(mean: Tensor, var: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    advance(*arguments[-2:])
    name = backends.select("match_", mean)
    if name == "reference":
        loss, grad_mean, grad_var = reference.match_(mean, var, *arguments)
    else:
        loss, grad_mean, grad_var = _fill(name, mean, var, (), 0, None, *arguments)
    return loss, grad_mean, mean.new_empty(0) if grad_var is None else grad_var


def _match_fake(mean: Tensor, var: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    target_mean, target_var = arguments[:2]
    grad_var = mean.new_empty(0) if target_var is None else torch.empty_like(target_mean)
    return mean.new_empty(()), torch.empty_like(target_mean), grad_var


def _match_features(input: list[Tensor], correction: int, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    advance(*arguments[-2:])
    target_mean, target_var = arguments[:2]
    name = backends.select("match_", input[0])
    if name == "reference":
        mean, var = reference.moments(input, 0, correction, target_var is not None)
        loss, grad_mean, grad_var = reference.match_(mean, var, *arguments)
    else:
        mean = target_mean.new_empty(target_mean.shape)
        loss, grad_mean, grad_var = _fill(name, None, None, input, correction, mean, *arguments)
    return loss, mean, grad_mean, mean.new_empty(0) if grad_var is None else grad_var


def _match_features_fake(input: list[Tensor], correction: int, *arguments: Any) -> tuple[Tensor, ...]:
    target_mean, target_var = arguments[:2]
    loss, grad_mean, grad_var = _match_fake(target_mean, None, target_mean, target_var)
    return loss, torch.empty_like(target_mean), grad_mean, grad_var


define(
    f"match_(Tensor mean, Tensor? var, {_PARAMETERS.format(kind='str')})"
    " -> (Tensor loss, Tensor grad_mean, Tensor grad_var)",
    _match,
    _match_fake,
)
define(
    f"match_.features(Tensor[] input, int correction, {_PARAMETERS.format(kind='str')})"
    " -> (Tensor loss, Tensor mean, Tensor grad_mean, Tensor grad_var)",
    _match_features,
    _match_features_fake,
)
