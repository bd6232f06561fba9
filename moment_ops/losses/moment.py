"""The moment matching loss: means and variances of many layers against a target, optionally with a running average."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moment_ops.averages import Average, averaging
from moment_ops.distributed import ProcessGroup, group_size, merge_ranks
from moment_ops.losses.buffers import BufferedLoss
from moment_ops.losses.matching import Layout, Merge, match_input
from moment_ops.losses.weights import Weight, column_weights, own_weight
from moment_ops.ops import checks
from moment_ops.ops.records import Match
from moment_ops.statistics import Moments


def _check_target(target: Any) -> Moments:
    if not isinstance(target, Moments):
        raise TypeError(f"target: got {type(target).__name__}, expected Moments")
    return target


def _merge_over(process_group: ProcessGroup, pivot: Tensor, sizes: Sequence[int], correction: int) -> Merge | None:
    """How moments are merged over several processes; None on one process."""
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

    `r * sum(mean_weight * (m - t)^2 + var_weight * (s - q)^2)` over the F columns of all layers, where m and s are
    means and variances of the features, and t and q those of the target. r is 1 / F for "mean" and 1 for "sum".

    Args:
        input: features, one (N, ...) Tensor per layer in float32, bfloat16, float16 or float64; or Moments. Shapes
            without N are those of the target. If input and target both have names, they must be equal.
        target: Moments. If it has no variances, only means are matched. Variances are compared with its correction.
        mean_weight, var_weight: a number, one per layer, or an (F,) Tensor; finite and non-negative. The values of a
            Tensor are checked on the CPU only, since on a GPU the host would wait for them.
        reduction: "mean" or "sum".
        process_group: moments are merged over this group before they are matched. None is the default group if
            torch.distributed is initialized, False is this process alone. The loss is the same on every process, and
            parameters under DistributedDataParallel get the gradient of one process on the concatenated batch.
            Processes may have no rows; without rows on any process, the loss is NaN. The target must be the same on
            every process.

    Returns:
        Scalar, float32 (float64 for float64). Differentiable with respect to input and target, twice in eager mode. A
        loss that its dtype cannot represent is infinite.

    Raises:
        TypeError, ValueError: wrong types, dtypes, devices, shapes, names, options or weights. The message names the
            argument.

    Cost: one launch and one read of the features. Backward takes one launch, one read and one write. Over several
    processes, and with a target that requires grad, matching is a second launch, which reads (F,) vectors.

    Source: dos Santos et al. 2019, section 3, where the loss is a sum without weights.
    """
    target = _check_target(target)
    checks.option(reduction, "reduction", ("mean", "sum"))
    sizes = target.sizes
    mean_scale, mean_vector = column_weights(mean_weight, "mean_weight", sizes, target.mean)
    var_scale, var_vector = column_weights(var_weight, "var_weight", sizes, target.mean)
    factor = 1 / target.mean.shape[0] if reduction == "mean" else 1.0
    match = Match(target.mean, target.var, mean_scale, var_scale, mean_vector, var_vector, factor)
    layout = Layout(target.shapes, target.names, target.correction)
    return match_input(input, match, layout, _merge_over(process_group, target.mean, sizes, target.correction))


class MomentLoss(BufferedLoss):
    """The moment loss as a module, which keeps its target, weights and running average.

    Args:
        target: Moments of the data, whose values must be finite. If it has no variances, only means are matched. It is
            detached and copied.
        average: None, MovingAverage or AdamMovingAverage. In `train()` mode each call advances its state by one step.
            In `eval()` mode the loss uses the state without changing it.
        mean_weight, var_weight: a number, one per layer, or an (F,) Tensor; finite and non-negative. They are copied.
        reduction: "mean" divides by F, the number of columns over all layers; "sum" does not. With AdamMovingAverage
            the loss is always a sum, and only the reduction of the average has an effect.
        process_group: as for `moment_loss`, but None by default: moments are merged over the default group if
            torch.distributed is initialized.

    Call it with features (one (N, ...) Tensor per layer, or a mapping that has the names of the target) or with
    Moments. The result is a scalar, float32 (float64 for float64), twice differentiable in eager mode. It has gradients
    with respect to the input only. If the optimizer may skip the step, pass `commit=False`, and call `commit()` when it
    was taken. `fill(batches)` starts the average.

    The average of a column does not change if its batch moments are non-finite; the loss is then non-finite. Buffers
    keep their dtype under `.to(torch.bfloat16)` and `.half()`. `state_dict()` holds target, average and step; a loss
    that loads it continues bit for bit.

    Raises:
        TypeError, ValueError: as `moment_loss`; also a target with non-finite values or negative variances.

    Cost: one launch, which reads the features and the (F,) state once. Backward takes one launch, one read and one
    write. Called with Moments, as taps return them, it reads (F,) vectors only.

    Source: dos Santos et al. 2019, section 3; see `AdamMovingAverage` for section 3.2.
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
        self.reset(_check_target(target))

    def reset(self, target: Moments | None = None) -> None:
        """Restart the average, with a new target if one is given.

        Buffers whose shapes do not change keep their addresses.
        """
        if target is not None:
            self._set_target(_check_target(target))
        state = {} if self.average is None else self.average.new_state(self.target_mean, self.target_var is not None)
        self._restart(state)

    def _loss(self, input: Moments | checks.Features, commit: bool) -> Tensor:
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
            self._next_state(commit),
            self.training and self.average is not None,
        )
        merge = _merge_over(self.process_group, match.target_mean, self._sizes, self.correction)
        return match_input(input, match, Layout(self.shapes, self.names, self.correction), merge)

    def extra_repr(self) -> str:
        columns = self.target_mean.shape[0]
        return f"columns={columns}, layers={len(self.shapes)}, average={self.average}, reduction={self.reduction!r}"

    def _set_target(self, target: Moments) -> None:
        """Check everything before changing anything."""
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
