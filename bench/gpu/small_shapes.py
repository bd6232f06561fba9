"""Every CUDA kernel once on shapes that hit each of its branches, small enough for compute-sanitizer."""

import itertools

import torch
from torch import Tensor

import moment_ops as mo

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# One row, one column, tails of a vector and of a tile, rows split over blocks, more layers than one launch takes.
SHAPES = ((1, 1), (1, 7), (2, 64), (9, 33), (64, 130), (700, 3), (5000, 5), (64, 3, 5, 5))
AVERAGES = (None, mo.MovingAverage(0.9), mo.AdamMovingAverage(lr=0.1))


def _layouts(x: Tensor) -> list[Tensor]:
    """As it is, unaligned, channels-last."""
    unaligned = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    last = [x.to(memory_format=torch.channels_last)] if x.dim() == 4 else []
    return [x, unaligned, *last]


def _columns(layers: list[Tensor]) -> None:
    wanted = [x.detach().requires_grad_() for x in layers]
    m = mo.moments(wanted)
    torch.autograd.grad(m.mean.sum() + m.var.nan_to_num().sum(), wanted)
    target = mo.Moments(m.mean.detach(), m.var.detach().nan_to_num(), shapes=m.shapes)
    for average in AVERAGES:
        loss = mo.MomentLoss(target, average, process_group=False)
        torch.autograd.grad(loss(wanted), wanted)
        loss(m)


def _tap(x: Tensor) -> None:
    x = x.detach().requires_grad_()
    for bias in (None, x.new_ones(x.shape[1])):
        y, mean, var = mo.ops.relu_moments.relu_moments(x, bias)
        torch.autograd.grad(y.sum() + mean.sum() + var.nan_to_num().sum(), x)


def main() -> None:
    torch.manual_seed(0)
    calls = 0
    with mo.backend("cuda"):
        for dtype, shape in itertools.product(DTYPES, SHAPES):
            for x in _layouts(torch.randn(shape, device="cuda").to(dtype)):
                _columns([x])
                _tap(x)
                calls += 1
        _columns([torch.randn(64, 5 + i, device="cuda") for i in range(70)])
    torch.cuda.synchronize()
    print(f"{calls} tensors went through every operator")


if __name__ == "__main__":
    main()
