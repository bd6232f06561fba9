"""The moment matching loss: means and variances of many layers against targets, with or without a running average."""

from typing import Any

import torch
from torch import Tensor

from moment_ops.averages import Average
from moment_ops.distributed import ProcessGroup, group_size, merge_ranks
from moment_ops.losses.buffers import BufferedLoss
from moment_ops.losses.matching import Matcher, Weight, unpack_weight
from moment_ops.ops import checks
from moment_ops.statistics import Moments


def _check_target(target: Any) -> Moments:
    if not isinstance(target, Moments):
        raise TypeError(f"target: got {type(target).__name__}, expected Moments")
    return target


def moment_loss(
    input: Moments | checks.Features,
    target: Moments,
    *,
    mean_weight: Weight = 1.0,
    var_weight: Weight = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Squared distance between the moments of features and target moments.

    `r * sum(mean_weight * (m - t)^2 + var_weight * (s - q)^2)` with r = 1/F for "mean", F columns over all layers.

    Args:
        input: features, one (N, ...) Tensor per layer as in the target, or Moments. The names of a mapping are those of
            the target, where that has names.
        target: Moments; means alone are matched where it has no variances. It gets gradients where it wants them.
        mean_weight, var_weight: a float, one float per layer, or an (F,) Tensor.
        reduction: "mean" or "sum".

    Returns:
        Scalar, float32 (float64 for float64); twice differentiable in eager mode. Of this process alone: MomentLoss
        merges over processes.

    Raises:
        TypeError, ValueError: wrong types, dtypes, devices, shapes or names, with the argument's name.

    Cost: one read of the features and one launch; backward one read, one write, one launch.
    """
    target = _check_target(target)
    checks.option(reduction, "reduction", ("mean", "sum"))
    weights = (
        unpack_weight(mean_weight, "mean_weight", target.sizes, target.mean),
        unpack_weight(var_weight, "var_weight", target.sizes, target.mean),
    )
    matcher = Matcher(
        (target.mean, target.var), target.shapes, target.correction, weights, reduction, names=target.names
    )
    return matcher(input)


class MomentLoss(BufferedLoss):
    """Moment matching with targets, running average and weights kept as module state.

    Args:
        target: Moments of the data; means alone are matched where it has no variances.
        average: None, MovingAverage or AdamMovingAverage. Its state advances in `train()` mode, once per call; in
            `eval()` mode the loss is computed with the state as it is.
        mean_weight, var_weight: a float, one float per layer, or an (F,) Tensor.
        reduction: "mean" divides by F, the columns over all layers; "sum" does not. An AdamMovingAverage has its own,
            and its loss is a sum.
        process_group: moments are merged over this group before matching. None is the default group wherever
            torch.distributed is initialized; False is this process alone. The loss is the same on every process, and
            parameters under DistributedDataParallel get the gradient of one process on the concatenated batch.

    Call it with features (one (N, ...) Tensor per layer, as in the target; a mapping with its names) or with Moments.
    Returns a scalar, float32 (float64 for float64), differentiable twice in eager mode.

    Averages stay untouched in columns whose batch moments are not finite; the loss shows them. Buffers keep their dtype
    under `.to(torch.bfloat16)` and `.half()`; `state_dict()` holds targets, average and step, and resumes bit for bit.

    Cost: one launch that reads the features once and the (F,) state once; backward one launch, one read, one write.
    """

    def __init__(
        self,
        target: Moments,
        average: Average | None = None,
        *,
        mean_weight: Weight = 1.0,
        var_weight: Weight = 1.0,
        reduction: str = "mean",
        process_group: ProcessGroup = None,
    ) -> None:
        super().__init__()
        if average is not None and not isinstance(average, Average):
            raise TypeError(f"average: got {type(average).__name__}, expected MovingAverage or AdamMovingAverage")
        self.average = average
        self.reduction = checks.option(reduction, "reduction", ("mean", "sum"))
        self.process_group = process_group
        self._weights = {"mean": mean_weight, "var": var_weight}
        self._state_names: tuple[str, ...] = ()
        self.reset(_check_target(target))

    def reset(self, target: Moments | None = None) -> None:
        """Restart the average, with a new target if one is given. Buffers of unchanged shape keep their addresses."""
        if target is not None:
            self._set_target(_check_target(target))
        state = {} if self.average is None else self.average.new_state(self.target_mean, self.target_var is not None)
        self._set_buffers("_state_names", state)

    def forward(self, input: Moments | checks.Features) -> Tensor:
        """The loss of one batch."""
        # Attributes of modules that are buffers take ten times as long to look up.
        buffers = self._buffers
        matcher = Matcher(
            (buffers["target_mean"], buffers["target_var"]),
            self.shapes,
            self.correction,
            ((self._mean_scale, buffers["mean_weight"]), (self._var_scale, buffers["var_weight"])),
            self.reduction,
            self.average,
            [buffers[name] for name in self._state_names],
            self.training and self.average is not None,
            self._merge if group_size(self.process_group) > 1 else None,
            self.names,
        )
        return matcher(input)

    def extra_repr(self) -> str:
        columns = self.target_mean.shape[0]
        return f"columns={columns}, layers={len(self.shapes)}, average={self.average}, reduction={self.reduction!r}"

    def _merge(
        self, mean: Tensor, var: Tensor | None, count: Tensor, correction: int
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        return merge_ranks(
            mean,
            var,
            count,
            correction,
            sizes=self._sizes,
            pivot=self.target_mean,
            new_correction=self.correction,
            process_group=self.process_group,
        )

    def _set_target(self, target: Moments) -> None:
        """Everything is checked before anything is changed."""
        target.check_values()
        dtype = torch.float64 if target.mean.dtype == torch.float64 else torch.float32
        mean = target.mean.detach().to(dtype, copy=True).contiguous()
        var = None if target.var is None else target.var.detach().to(dtype, copy=True).contiguous()
        mean_scale, mean_weight = unpack_weight(self._weights["mean"], "mean_weight", target.sizes, mean)
        var_scale, var_weight = unpack_weight(self._weights["var"], "var_weight", target.sizes, mean)
        self.shapes, self.names, self.correction = target.shapes, target.names, target.correction
        self._sizes = target.sizes
        self._mean_scale, self._var_scale = mean_scale, var_scale
        self._set_buffer("target_mean", mean)
        self._set_buffer("target_var", var)
        self._set_buffer("mean_weight", mean_weight, persistent=False)
        self._set_buffer("var_weight", var_weight, persistent=False)
