"""The operator `match_` on packed covariances: entries of diagonal blocks count once, those beside them twice."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moment_ops.ops import backends, extension, reference, triangle
from moment_ops.ops.match import with_record
from moment_ops.ops.records import CovarianceMatch, Match
from moment_ops.ops.room import is_seen_finite


def match_packed(
    name: str, value: Tensor, target: Tensor, widths: Sequence[int], match: CovarianceMatch
) -> tuple[Tensor, Tensor]:
    """The loss of full matrices and its derivative, from packed triangles. The state advances in place.

    Args:
        name: the backend whose `match_` is used. "cpu" is the reference if the extension is not built.
        value, target: (F,) packed covariances.
        match: with packed targets.

    Returns:
        (loss, grad): the squared Frobenius norm of the full matrices, and its derivative with respect to their entries,
        packed.
    """
    if name == "cpu" and extension.missing("CPU", "match_") is not None:
        name = "reference"
    slices = list(triangle.parts(widths))
    weights = iter(match.weight)
    grad = torch.empty_like(value)
    loss = value.new_zeros((), dtype=torch.float64)
    layer_weight = 0.0
    for i, (part, count) in enumerate(slices):
        if count == 1:
            layer_weight = next(weights)
        state = [s if s.dim() == 0 else s[part] for s in match.state]
        if state and i + 1 < len(slices):
            # The step is advanced by the last part alone; all see the same one.
            state[-1] = state[-1].clone()
        matched = Match(
            target[part],
            None,
            mean_scale=layer_weight,
            average_kind=match.average_kind,
            options=match.options,
            state=state,
            update=match.update,
        )
        loss += count * _match(name, value[part], matched, grad[part])
    return without_indefinite(loss, value, target).to(value.dtype), grad


def without_indefinite(loss: Tensor, *covariances: Tensor) -> Tensor:
    """Replace a NaN loss of covariances without NaN by infinity: it is inf - inf or 0 * inf."""
    if is_seen_finite(loss):
        return loss
    known = torch.stack([cov.detach().min() for cov in covariances]).isnan().any().logical_not()
    return loss.masked_fill(loss.isnan() & known, float("inf"))


def _match(name: str, value: Tensor, match: Match, grad: Tensor) -> Tensor:
    if name == "reference":
        loss, derivative, _ = reference.match_(value, None, match)
        grad.copy_(derivative)
        return loss
    loss = value.new_empty(())
    fill = with_record(backends.implementation(name, "match_"))
    assert fill is not None
    fill(value, None, [], 0, match, loss, None, grad, None)
    return loss
