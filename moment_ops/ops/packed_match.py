"""The operator `match_` on packed covariances: entries of diagonal blocks count once, those beside them twice."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moment_ops.ops import backends, extension, reference, triangle
from moment_ops.ops.match import AVERAGES


def match_packed(
    name: str,
    value: Tensor,
    target: Tensor,
    widths: Sequence[int],
    weight: Sequence[float],
    average: str,
    options: Sequence[float],
    state: Sequence[Tensor],
    update: bool,
) -> tuple[Tensor, Tensor]:
    """Loss and derivative of the full matrices, from packed triangles; `state` advances in place.

    Args:
        name: the backend whose `match_` does it; "cpu" is the reference where the extension is not built.
        value, target: (F,) packed covariances.
        weight: of every layer.
        average, options, state, update: as of the operator `match_` on the packed entries.

    Returns:
        (loss, grad): the squared Frobenius norm of the full matrices, and its derivative by the entries of the full
        matrices, packed.
    """
    if name == "cpu" and extension.missing("CPU", "match_") is not None:
        name = "reference"
    slices = list(triangle.parts(widths))
    weights = iter(weight)
    grad = torch.empty_like(value)
    loss = value.new_zeros((), dtype=torch.float64)
    layer_weight = 0.0
    for i, (part, count) in enumerate(slices):
        if count == 1:
            layer_weight = next(weights)
        views = [s if s.dim() == 0 else s[part] for s in state]
        if state and i + 1 < len(slices):
            # The step is advanced by the last part alone; all see the same one.
            views[-1] = views[-1].clone()
        part_loss = _match(name, value[part], target[part], layer_weight, average, options, views, update, grad[part])
        loss += count * part_loss
    return loss.to(value.dtype), grad


def _match(
    name: str,
    value: Tensor,
    target: Tensor,
    weight: float,
    average: str,
    options: Sequence[float],
    state: Sequence[Tensor],
    update: bool,
    grad: Tensor,
) -> Tensor:
    if name == "reference":
        loss, derivative, _ = reference.match_(
            value, None, target, None, weight, 0.0, None, None, 1.0, average, options, state, update
        )
        grad.copy_(derivative)
        return loss
    loss = value.new_empty(())
    backends.implementation(name, "match_")(
        value,
        None,
        [],
        0,
        target,
        None,
        weight,
        0.0,
        None,
        None,
        1.0,
        AVERAGES[average],
        list(options),
        list(state),
        update,
        loss,
        None,
        grad,
        None,
    )
    return loss
