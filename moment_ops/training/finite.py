"""Steps whose gradients are non-finite are skipped on the device, without a wait for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm


def adam(parameters: Iterable[Tensor], lr: float, betas: tuple[float, float]) -> torch.optim.Adam:
    """Adam that ``step_if_finite`` can tell to skip a step, as a GradScaler does: only the fused form can."""
    return torch.optim.Adam(parameters, lr=lr, betas=betas, fused=True)


def step_if_finite(optimizer: torch.optim.Adam) -> Tensor:
    """Take a step unless a gradient is non-finite. Then weights and state of the optimizer stay as they are.

    Returns:
        1 if the step was skipped, else 0: a float32 scalar on the device.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    # The largest magnitude. A sum of squares would overflow for gradients that are finite.
    skipped = (~get_total_norm(gradients, math.inf).isfinite()).float()
    optimizer.found_inf = skipped  # type: ignore[attr-defined]
    optimizer.step()
    return skipped


@torch.no_grad()
def restore_if(skipped: Tensor, values: Sequence[Tensor], earlier: Sequence[Tensor]) -> None:
    """Set values back to what they were earlier, if the step was skipped."""
    for value, old in zip(values, earlier, strict=True):
        value.copy_(torch.where(skipped > 0, old, value))
