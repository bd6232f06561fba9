"""What the GPU tests share: tensors moved with their strides, and the losses of a training step."""

from collections.abc import Sequence
from typing import Any

import torch
from helpers import make_target
from torch import Tensor

import moment_ops as mo

# Aligned and unaligned layers, more than a launch takes, wide and narrow.
NETWORK = ((64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)) * 9 + ((1000,), (7,))
AVERAGES = {
    "none": None,
    "moving": mo.MovingAverage(0.9),
    "moving, corrected": mo.MovingAverage(0.9, bias_correction=True),
    "adam": mo.AdamMovingAverage(lr=0.01),
}


def moved(x: Tensor) -> Tensor:
    """A copy on the GPU with the strides of `x`, gaps and overlaps included."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    storage = x.detach().as_strided((span,), (1,)).cuda()
    return storage.as_strided(x.shape, x.stride())


def network_features(rows: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Features of a network, half of them channels-last, made on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)
    features = [torch.randn((rows, *shape), generator=generator, device="cuda").to(dtype) for shape in NETWORK]
    return [x.to(memory_format=torch.channels_last) if x.dim() == 4 and i % 2 else x for i, x in enumerate(features)]


def network_loss(average_kind: str) -> mo.MomentLoss:
    return mo.MomentLoss(make_target(NETWORK), AVERAGES[average_kind]).cuda()


def step(loss: mo.MomentLoss, features: Sequence[Tensor]) -> list[Tensor]:
    """Loss and gradients of one training step."""
    features = [x.detach().requires_grad_() for x in features]
    value = loss(features)
    return [value.detach(), *torch.autograd.grad(value, features)]


def state_of(loss: mo.MomentLoss) -> list[Tensor]:
    return [v.clone() for k, v in sorted(loss.state_dict().items()) if not k.startswith("target")]


def cpu(value: Any) -> Any:
    """Tensors in lists and tuples, on the CPU."""
    if isinstance(value, Tensor):
        return value.cpu()
    return [cpu(part) for part in value] if isinstance(value, (list, tuple)) else value
