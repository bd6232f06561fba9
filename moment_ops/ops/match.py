"""`match_`: the running average's step in place, the loss, and its derivatives with respect to mean and variance."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moment_ops.ops import backends, plans, reference
from moment_ops.ops.averages import AVERAGES
from moment_ops.ops.layout import with_dense_columns
from moment_ops.ops.library import define, define_native
from moment_ops.ops.nodes import under_vmap
from moment_ops.ops.records import Match, parameters

_AVERAGE = Match._fields.index("average_kind")

define_native(
    f"match_.native(Tensor? mean, Tensor? var, Tensor[] input, int correction, {parameters(Match, average_kind='int')},"
    " Tensor(b!) loss, Tensor(c!)? batch_mean, Tensor(d!) grad_mean, Tensor(e!)? grad_var) -> ()"
)


def advance(state: Sequence[Tensor], update: bool) -> None:
    """Check that the state may advance, and increment its version counters, for every backend."""
    if not update:
        return
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "the average cannot advance during backward: activation checkpointing computes the loss again, and the"
            " average would advance twice. Call the loss outside of the checkpointed region."
        )
    if under_vmap():
        raise RuntimeError(
            "the average cannot advance under vmap: it has one state for all problems of the batch. Call the loss in"
            " eval() mode, or outside of vmap."
        )
    # Kernels do not bump version counters, and a saved state tensor would then give wrong gradients silently.
    torch.autograd.graph.increment_version([tensor for tensor in state if not tensor.is_inference()])


@functools.cache
def with_record(fill: Callable[..., None] | None) -> Callable[..., None] | None:
    """The kernel of a backend as a function of a `Match`. The overload of the extension takes the fields instead."""
    if not isinstance(fill, torch._ops.OpOverload):
        return fill

    def native(
        mean: Tensor | None, var: Tensor | None, input: Sequence[Tensor], correction: int, match: Match, *out: Any
    ) -> None:
        number = AVERAGES[match.average_kind].number
        fill(mean, var, input, correction, *match[:_AVERAGE], number, *match[_AVERAGE + 1 :], *out)

    return native


class _Plan(NamedTuple):
    """The plan of a call of `match_` with features."""

    fill: Callable[..., None] | None  # the backend's kernel; None: the reference
    dense: bool  # layers are read as they are


_PLANS: plans.Plans[_Plan] = plans.Plans()


def _plan(input: Sequence[Tensor]) -> _Plan:
    fill = with_record(backends.fill("match_", input[0]))
    return _Plan(fill, all(with_dense_columns(x, 0) is x for x in input))


def _dense(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value


def _fill(
    fill: Callable[..., None],
    mean: Tensor | None,
    var: Tensor | None,
    input: Sequence[Tensor],
    correction: int,
    match: Match,
    batch_mean: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss, grad_mean, grad_var) by a kernel, which takes dense vectors."""
    match = Match(*map(_dense, match))
    loss = match.target_mean.new_empty(())
    grad_mean = match.target_mean.new_empty(match.target_mean.shape)
    grad_var = None if match.target_var is None else torch.empty_like(grad_mean)
    fill(mean, var, input, correction, match, loss, batch_mean, grad_mean, grad_var)
    return loss, grad_mean, grad_var


def _match(mean: Tensor, var: Tensor | None, *fields: Any) -> tuple[Tensor, Tensor, Tensor]:
    match = Match(*fields)
    advance(match.state, match.update)
    fill = with_record(backends.fill("match_", mean))
    if fill is None:
        loss, grad_mean, grad_var = reference.match_(mean, var, match)
    else:
        loss, grad_mean, grad_var = _fill(fill, _dense(mean), _dense(var), (), 0, match, None)
    return loss, grad_mean, mean.new_empty(0) if grad_var is None else grad_var


def _match_fake(mean: Tensor, var: Tensor | None, *fields: Any) -> tuple[Tensor, Tensor, Tensor]:
    match = Match(*fields)
    grad_var = mean.new_empty(0) if match.target_var is None else torch.empty_like(match.target_mean)
    return mean.new_empty(()), torch.empty_like(match.target_mean), grad_var


def _match_features(
    input: Sequence[Tensor], correction: int, *fields: Any, signature: plans.Signature | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    match = Match(*fields)
    advance(match.state, match.update)
    fill, dense = _PLANS.find(signature or plans.signature(input), backends.requested(), _plan, input)
    if fill is None:
        mean, var = reference.moments(input, 0, correction, match.target_var is not None)
        loss, grad_mean, grad_var = reference.match_(mean, var, match)
    else:
        mean = match.target_mean.new_empty(match.target_mean.shape)
        native = input if dense else [with_dense_columns(x, 0) for x in input]
        loss, grad_mean, grad_var = _fill(fill, None, None, native, correction, match, mean)
    return loss, mean, grad_mean, mean.new_empty(0) if grad_var is None else grad_var


def _match_features_fake(input: list[Tensor], correction: int, *fields: Any) -> tuple[Tensor, ...]:
    match = Match(*fields)
    loss, grad_mean, grad_var = _match_fake(match.target_mean, None, *match)
    return loss, torch.empty_like(match.target_mean), grad_mean, grad_var


define(
    f"match_(Tensor mean, Tensor? var, {parameters(Match)}) -> (Tensor loss, Tensor grad_mean, Tensor grad_var)",
    _match,
    _match_fake,
)
define(
    f"match_.features(Tensor[] input, int correction, {parameters(Match)})"
    " -> (Tensor loss, Tensor mean, Tensor grad_mean, Tensor grad_var)",
    _match_features,
    _match_features_fake,
)


def match_(mean: Tensor, var: Tensor | None, match: Match) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, grad_mean, grad_var) of moments; the state advances."""
    if plans.signature((mean, var)) is None:
        return torch.ops.moment_ops.match_.default(mean, var, *match)
    return _match(mean, var, *match)


def match_features(
    input: Sequence[Tensor], correction: int, match: Match, *, signature: plans.Signature | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, mean, grad_mean, grad_var) of features; the state advances.

    Args:
        signature: of the features.
    """
    if signature is None:
        return torch.ops.moment_ops.match_.features(list(input), correction, *match)
    return _match_features(input, correction, *match, signature=signature)
