"""`match_`: the running average's step in place, the loss, and its derivatives with respect to mean and variance."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moment_ops.ops import backends, plans, reference
from moment_ops.ops.layout import with_dense_columns
from moment_ops.ops.library import define, define_native
from moment_ops.ops.nodes import under_vmap

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
    if under_vmap():
        raise RuntimeError(
            "the average was asked to advance under vmap: it has one state, not one per problem. Call the loss in"
            " eval() mode, or outside of vmap."
        )
    # Kernels do not bump version counters, and a saved state tensor would then give wrong gradients silently.
    torch.autograd.graph.increment_version([tensor for tensor in state if not tensor.is_inference()])


class _Plan(NamedTuple):
    """Of `match_` from features."""

    fill: Callable[..., None] | None  # the backend's kernel; None: the reference
    dense: bool  # layers are read as they are


_PLANS: plans.Plans[_Plan] = plans.Plans()


def _plan(input: Sequence[Tensor]) -> _Plan:
    return _Plan(backends.fill("match_", input[0]), all(with_dense_columns(x, 0) is x for x in input))


def _fill(
    fill: Callable[..., None],
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
    fill(
        dense(mean),
        dense(var),
        input,
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
    fill = backends.fill("match_", mean)
    if fill is None:
        loss, grad_mean, grad_var = reference.match_(mean, var, *arguments)
    else:
        loss, grad_mean, grad_var = _fill(fill, mean, var, (), 0, None, *arguments)
    return loss, grad_mean, mean.new_empty(0) if grad_var is None else grad_var


def _match_fake(mean: Tensor, var: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    target_mean, target_var = arguments[:2]
    grad_var = mean.new_empty(0) if target_var is None else torch.empty_like(target_mean)
    return mean.new_empty(()), torch.empty_like(target_mean), grad_var


def _match_features(
    input: Sequence[Tensor], correction: int, *arguments: Any, signature: plans.Signature | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    advance(*arguments[-2:])
    target_mean, target_var = arguments[:2]
    fill, dense = _PLANS.find(signature or plans.signature(input), backends.requested(), _plan, input)
    if fill is None:
        mean, var = reference.moments(input, 0, correction, target_var is not None)
        loss, grad_mean, grad_var = reference.match_(mean, var, *arguments)
    else:
        mean = target_mean.new_empty(target_mean.shape)
        layers = input if dense else [with_dense_columns(x, 0) for x in input]
        loss, grad_mean, grad_var = _fill(fill, None, None, layers, correction, mean, *arguments)
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


def match_(mean: Tensor, var: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, grad_mean, grad_var) of moments; the state advances. `arguments` are those of the operator."""
    if plans.signature((mean, var)) is None:
        return torch.ops.moment_ops.match_.default(mean, var, *arguments)
    return _match(mean, var, *arguments)


def match_features(
    input: Sequence[Tensor], correction: int, *arguments: Any, signature: plans.Signature | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, mean, grad_mean, grad_var) of features; the state advances. `arguments` are those of the operator.

    Args:
        signature: of the features.
    """
    if signature is None:
        return torch.ops.moment_ops.match_.features(list(input), correction, *arguments)
    return _match_features(input, correction, *arguments, signature=signature)
