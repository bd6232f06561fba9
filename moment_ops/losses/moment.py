"""The moment matching loss: means and variances of many layers against targets, with or without a running average."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moment_ops.averages import Average, averaging
from moment_ops.distributed import ProcessGroup, group_size, merge_ranks
from moment_ops.losses.buffers import BufferedLoss
from moment_ops.losses.matching import Layers, Merge, match_input
from moment_ops.losses.weights import Weight, column_weights, own_weight
from moment_ops.ops import checks
from moment_ops.ops.records import Match
from moment_ops.statistics import Moments


def _check_target(target: Any) -> Moments:
    if not isinstance(target, Moments):
        raise TypeError(f"target: got {type(target).__name__}, expected Moments")
    return target


def _merge_over(process_group: ProcessGroup, pivot: Tensor, sizes: Sequence[int], correction: int) -> Merge | None:
    """What merges moments over processes; None for one alone."""
    if group_size(process_group) == 1:
        return None
    return partial(
        merge_ranks, sizes=sizes, pivot=pivot.detach(), new_correction=correction, process_group=process_group
    )


def moment_loss(
    input: Moments | checks.Features,
    target: Moments,
    *,
    mean_weight: Weight = 1.0,
    var_weight: Weight = 1.0,
    reduction: str = "mean",
    process_group: ProcessGroup = False,
) -> Tensor:
    """Squared distance between the moments of features and target moments.

    `r * sum(mean_weight * (m - t)^2 + var_weight * (s - q)^2)` with r = 1/F for "mean", F columns over all layers.

    Args:
        input: features, one (N, ...) Tensor per layer as in the target, or Moments. The names of a mapping are those of
            the target, where that has names.
        target: Moments; means alone are matched where it has no variances. It gets gradients where it wants them.
        mean_weight, var_weight: a number, one per layer, or an (F,) Tensor, finite and not negative. The values of a
            Tensor are checked on the CPU alone: elsewhere the host would wait for them.
        reduction: "mean" or "sum".
        process_group: moments are merged over this group before matching; None is the default group wherever
            torch.distributed is initialized, False this process alone. The loss is the same on every process, and
            parameters under DistributedDataParallel get the gradient of one process on the concatenated batch. A
            process whose batch has no rows takes part. The target must be the same on every process.

    Returns:
        Scalar, float32 (float64 for float64); twice differentiable in eager mode.

    Raises:
        TypeError, ValueError: wrong types, dtypes, devices, shapes or names, with the argument's name.

    Cost: one read of the features and one launch; backward one read, one write, one launch.
    """
    target = _check_target(target)
    checks.option(reduction, "reduction", ("mean", "sum"))
    sizes = target.sizes
    mean_scale, mean_vector = column_weights(mean_weight, "mean_weight", sizes, target.mean)
    var_scale, var_vector = column_weights(var_weight, "var_weight", sizes, target.mean)
    factor = 1 / target.mean.shape[0] if reduction == "mean" else 1.0
    match = Match(target.mean, target.var, mean_scale, var_scale, mean_vector, var_vector, factor)
    layers = Layers(target.shapes, target.names, target.correction)
    return match_input(input, match, layers, _merge_over(process_group, target.mean, sizes, target.correction))


class MomentLoss(BufferedLoss):
    """Moment matching with targets, running average and weights kept as module state.

    Args:
        target: Moments of the data; means alone are matched where it has no variances.
        average: None, MovingAverage or AdamMovingAverage. Its state advances in `train()` mode, once per call; in
            `eval()` mode the loss is computed with the state as it is.
        mean_weight, var_weight: a number, one per layer, or an (F,) Tensor, finite and not negative; copies are kept.
        reduction: "mean" divides by F, the columns over all layers; "sum" does not. An AdamMovingAverage has its own,
            and its loss is a sum.
        process_group: moments are merged over this group before matching. None is the default group wherever
            torch.distributed is initialized; False is this process alone. The loss is the same on every process, and
            parameters under DistributedDataParallel get the gradient of one process on the concatenated batch. A
            process whose batch has no rows takes part; where no process has rows the loss is NaN.

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
        self._weights = {"mean": own_weight(mean_weight), "var": own_weight(var_weight)}
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
        match = Match(
            buffers["target_mean"],
            buffers["target_var"],
            self._mean_scale,
            self._var_scale,
            buffers["mean_weight"],
            buffers["var_weight"],
            self._factor,
            *self._averaging,
            [buffers[name] for name in self._state_names],
            self.training and self.average is not None,
        )
        merge = _merge_over(self.process_group, match.target_mean, self._sizes, self.correction)
        return match_input(input, match, Layers(self.shapes, self.names, self.correction), merge)

    def extra_repr(self) -> str:
        columns = self.target_mean.shape[0]
        return f"columns={columns}, layers={len(self.shapes)}, average={self.average}, reduction={self.reduction!r}"

    def _set_target(self, target: Moments) -> None:
        """Everything is checked before anything is changed."""
        target.check_values()
        dtype = torch.float64 if target.mean.dtype == torch.float64 else torch.float32
        mean = target.mean.detach().to(dtype, copy=True).contiguous()
        var = None if target.var is None else target.var.detach().to(dtype, copy=True).contiguous()
        mean_scale, mean_weight = column_weights(self._weights["mean"], "mean_weight", target.sizes, mean, kept=True)
        var_scale, var_weight = column_weights(self._weights["var"], "var_weight", target.sizes, mean, kept=True)
        self.shapes, self.names, self.correction = target.shapes, target.names, target.correction
        self._sizes = target.sizes
        self._mean_scale, self._var_scale = mean_scale, var_scale
        self._factor = 1 / mean.shape[0] if self.reduction == "mean" else 1.0
        self._averaging: tuple[str, Sequence[float]] = averaging(self.average, mean.shape[0])
        self._set_buffer("target_mean", mean)
        self._set_buffer("target_var", var)
        self._set_buffer("mean_weight", mean_weight, persistent=False)
        self._set_buffer("var_weight", var_weight, persistent=False)
