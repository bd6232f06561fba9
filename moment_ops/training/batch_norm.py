"""BatchNorm over the rows of all processes, on every device. torch's SyncBatchNorm refuses tensors of the CPU."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

import moment_ops as mo


class MergedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm of inputs ``(N, C, ...)`` whose statistics are those of the rows of all processes.

    Outputs, gradients and running statistics are those of one process with the concatenated batch. Processes may have
    different numbers of rows, or none. The state dict is that of ``torch.nn.BatchNorm2d``. In evaluation mode, and on
    one process, it is torch's BatchNorm.

    Args:
        process_group: a torch.distributed group; None is the default group.

    Cost: one collective forward and one backward, of 2 C + 1 numbers each, in float64.
    """

    process_group: dist.ProcessGroup | None = None

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"input: got {input.dim()} dimensions, expected at least 2")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or dist.get_world_size(self.process_group) == 1:
            return super().forward(input)
        self._check_input_dim(input)
        mean, var, count = self.statistics(input)
        self.advance(mean.detach(), var.detach(), count)
        shape = (1, -1) + (1,) * (input.dim() - 2)
        scale = torch.rsqrt(var + self.eps)
        if self.weight is not None:
            scale = scale * self.weight.to(var.dtype)
        # The mean is subtracted first: x * scale - mean * scale loses digits where |mean| >> std.
        output = (input - mean.to(var.dtype).view(shape)) * scale.to(var.dtype).view(shape)
        if self.bias is not None:
            output = output + self.bias.to(var.dtype).view(shape)
        return output.to(input.dtype)

    def statistics(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and biased variance per channel (C,), and the number of values per channel, over all processes."""
        m = mo.moments(input, dim=(0, *range(2, input.dim())), correction=0)
        assert m.var is not None
        rows = torch.full((1,), input.numel() // input.shape[1], dtype=torch.float64, device=input.device)
        # Sums of squares around a point near the mean, which is the same on all processes, keep their digits.
        pivot = 0.0 if self.running_mean is None else self.running_mean.double()
        shift = torch.where(rows > 0, m.mean.double() - pivot, 0.0)
        squares = torch.where(rows > 0, m.var.double(), 0.0) + shift.square()
        # Every process goes on with outputs of its own, so that the gradient is a sum over processes too.
        total = all_reduce(
            torch.cat([rows, rows * shift, rows * squares]), group=self.process_group or dist.group.WORLD
        )
        count, shift, squares = total.split([1, self.num_features, self.num_features])
        count = count.detach()
        shift, squares = shift / count, squares / count
        var = (squares - shift.square()).clamp_min(0)
        return (shift + pivot).to(m.mean.dtype), var.to(m.mean.dtype), count

    def advance(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Advance the running statistics by one step."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = var * (count / (count - 1)).to(var.dtype)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)


def merge_batch_norm(network: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """Replace every BatchNorm in ``network``, in place, by one over all processes with the same parameters."""
    for name, module in network.named_children():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            merged = MergedBatchNorm(
                module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
            )
            merged.process_group = process_group
            merged.training = module.training
            merged._parameters, merged._buffers = module._parameters, module._buffers
            setattr(network, name, merged)
        else:
            merge_batch_norm(module, process_group)
    return network
