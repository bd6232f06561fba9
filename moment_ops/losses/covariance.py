"""The covariance matching loss: full covariances of many layers against target covariances."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from moment_ops.averages import AdamMovingAverage, Average, averaging
from moment_ops.covariances import check_covariance, check_memory
from moment_ops.distributed import ProcessGroup, group_size
from moment_ops.losses.buffers import BufferedLoss
from moment_ops.losses.covariance_arguments import (
    check_device,
    check_options,
    check_rows,
    check_widths,
    joined,
    means,
    merge_over,
    names_of,
    scales,
)
from moment_ops.losses.covariance_matching import match_covariances
from moment_ops.losses.matching import check_names
from moment_ops.losses.moment import MomentLoss, moment_loss
from moment_ops.losses.weights import LayerWeight, is_zero, layer_weights, own_weight
from moment_ops.ops import checks, triangle
from moment_ops.ops.nodes import under_vmap
from moment_ops.ops.records import CovarianceMatch
from moment_ops.statistics import Moments

CovarianceTarget: TypeAlias = Moments | checks.Features


def _matrices_of(target: Any, joint: bool) -> list[Tensor]:
    """The covariances of a target, one (D, D) matrix per layer. Checks shapes and types."""
    if isinstance(target, Moments):
        if target.cov is None:
            raise ValueError("target: got Moments without covariances, expected one per layer")
        matrices = list(target.cov)
    else:
        matrices = checks.features(target, "target")
        for i, matrix in enumerate(matrices):
            if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or matrix.numel() == 0:
                label = checks.label_of("target", i, matrices, names_of(target))
                raise ValueError(f"{label}: got shape {tuple(matrix.shape)}, expected a square matrix (D, D)")
    if joint and len(matrices) != 1:
        raise ValueError(f"target: got {len(matrices)} covariances with joint=True, expected one of all columns")
    return matrices


def _correction_of(target: CovarianceTarget, correction: int) -> int:
    """The correction of the target, if it is Moments; otherwise the given one."""
    if not isinstance(target, Moments):
        return correction
    if correction not in (1, target.correction):
        raise ValueError(f"correction: got {correction}, expected {target.correction} as in target")
    return target.correction


def _mean_of(target: CovarianceTarget, mean_weight: LayerWeight) -> Tensor | None:
    """The means of the target, or None if they are not matched."""
    if is_zero(mean_weight):
        return None
    if not isinstance(target, Moments):
        raise ValueError(
            f"mean_weight: got {mean_weight!r}, expected 0 with matrices as target; to match means, pass Moments"
        )
    return target.mean


def _check_values(target: CovarianceTarget, matrices: Sequence[Tensor]) -> None:
    """Finite values, symmetric matrices, no negative variances. Reads from the device; under `vmap` nothing is read."""
    if isinstance(target, Moments):
        target.check_values()
        return
    if torch.compiler.is_compiling() or under_vmap():
        return
    for i, matrix in enumerate(matrices):
        check_covariance(matrix.detach(), checks.label_of("target", i, matrices, names_of(target)))


def covariance_loss(
    input: checks.Features,
    target: CovarianceTarget,
    *,
    mean_weight: LayerWeight = 0.0,
    cov_weight: LayerWeight = 1.0,
    correction: int = 1,
    reduction: str = "sum",
    precision: str = "ieee",
    joint: bool = False,
    process_group: ProcessGroup = False,
) -> Tensor:
    """Squared Frobenius distance between the covariances of features and target covariances.

    `sum_l cov_weight_l ||C_l - T_l||_F^2 + mean_weight_l |m_l - t_l|^2` over layers l, where C_l and m_l are covariance
    and mean of the features, and T_l and t_l those of the target. `covariance_distance` compares features with other
    features.

    Args:
        input: features, one (N, ...) Tensor per layer, N >= 2, in float32, bfloat16, float16 or float64. Dimensions
            after the batch are flattened to D columns. If input and target both have names, they must be equal.
        target: one symmetric (D, D) Tensor per layer, whose upper triangle is read; or Moments with covariances.
        mean_weight, cov_weight: a number, or one per layer; finite and non-negative. With a mean_weight other than 0
            the target must be Moments.
        correction: c in the divisor N - c. If the target is Moments, its correction is used, and this one must be 1 or
            equal to it.
        reduction: "sum" leaves the squared norms as they are. "mean" divides them by the number of entries over all
            layers: the sum of D^2 for covariances, the sum of D for means.
        precision: how operands are multiplied, as for `covariance`.
        joint: whether all layers form one feature vector, so that covariances between layers are matched too. The
            target is then one matrix over all columns, and each weight is one number.
        process_group: covariances are merged over this group before they are matched. None is the default group if
            torch.distributed is initialized, False is this process alone. The loss is the same on every process, and
            parameters under DistributedDataParallel get the gradient of one process on the concatenated batch.
            Processes may have no rows; with too few rows in all, the loss is NaN. The target must be the same on every
            process.

    Returns:
        Scalar, float32 (float64 for float64). Differentiable with respect to input and target, twice in eager mode.

    Raises:
        TypeError, ValueError: wrong types, dtypes, devices, shapes, names, options or weights; too few rows; a matrix
            that does not fit into memory. The message names the argument.

    Cost: N D^2 products, since only the upper triangle is computed, and two reads of the features, for the means and
    for the products. Backward takes 2 N D^2 products, one read and one write. On one process and with a target that
    requires no grad, forward forms no (D, D) matrix; if the input requires grad, it saves one packed triangle.

    Source: the covariance matching loss of dos Santos et al. 2019, section 3. Their code matches the diagonal only.
    """
    check_options(reduction, precision, correction, joint)
    matrices = _matrices_of(target, joint)
    correction = _correction_of(target, correction)
    widths = [len(matrix) for matrix in matrices]
    weights = layer_weights(cov_weight, "cov_weight", len(widths))
    layer_weights(mean_weight, "mean_weight", len(widths))
    target_mean = _mean_of(target, mean_weight)
    merge = merge_over(process_group, widths, None if target_mean is None else target_mean.detach(), correction)
    features, *_, names = checks.batch_of(input, empty=merge is not None)
    check_names(names, names_of(target))
    if merge is None:
        check_rows(features[0].shape[0], correction)
    features = joined(features, joint)
    names = None if joint else names
    check_widths(features, widths, "target", names)
    check_device(features, matrices, "target")
    check_memory(features, names=names)
    match = CovarianceMatch(matrices, scales(weights, widths, reduction), precision=precision)
    value, mean = match_covariances(features, match, correction, merge)
    if target_mean is None:
        return value
    matched = means(target_mean, widths)
    return value + moment_loss(means(mean, widths), matched, mean_weight=mean_weight, reduction=reduction)


class CovarianceLoss(BufferedLoss):
    """The covariance loss as a module, which keeps its target, weights and running average.

    To match the covariances of a data set, use `dataset_moments(extractor, batches, cov=True)` as the target.

    Args:
        target, mean_weight, cov_weight, correction, reduction, precision, joint: as for `covariance_loss`. The values
            of the target must be finite and symmetric. The target is detached and copied.
        average: None, MovingAverage or AdamMovingAverage. It averages the centred covariances, and the means if they
            are matched. In `train()` mode each call advances its state by one step. In `eval()` mode the loss uses the
            state without changing it. AdamMovingAverage requires `reduction="sum"`.
        process_group: as for `covariance_loss`, but None by default: covariances are merged over the default group if
            torch.distributed is initialized.

    Call it with features, one (N, ...) Tensor per layer, or with a mapping that has the names of the target. The result
    is a scalar, float32 (float64 for float64), twice differentiable in eager mode. It has gradients with respect to the
    features only. If the optimizer may skip the step, pass `commit=False`, and call `commit()` when it was taken.
    `fill(batches)` starts the average.

    Entries of the average do not change where the batch's covariance is non-finite; the loss is then non-finite.
    Buffers keep their dtype under `.to(torch.bfloat16)` and `.half()`. `state_dict()` holds target, average and step; a
    loss that loads it continues bit for bit. Symmetric matrices are kept as packed triangles.

    Raises:
        TypeError, ValueError: as `covariance_loss`; also a target with non-finite or asymmetric values.

    Cost: as `covariance_loss`. The state is one packed triangle for the target, one more for a MovingAverage, and three
    more for an AdamMovingAverage.
    """

    def __init__(
        self,
        target: CovarianceTarget,
        average: Average | None = None,
        *,
        mean_weight: LayerWeight = 0.0,
        cov_weight: LayerWeight = 1.0,
        correction: int = 1,
        reduction: str = "sum",
        precision: str = "ieee",
        joint: bool = False,
        process_group: ProcessGroup = None,
    ) -> None:
        super().__init__()
        if average is not None and not isinstance(average, Average):
            raise TypeError(f"average: got {type(average).__name__}, expected MovingAverage or AdamMovingAverage")
        check_options(reduction, precision, correction, joint)
        if isinstance(average, AdamMovingAverage) and reduction != "sum":
            raise ValueError(f"reduction: got {reduction!r}, expected 'sum' with AdamMovingAverage")
        self.average, self.reduction, self.precision = average, reduction, precision
        self.joint, self.process_group = joint, process_group
        self._given_correction = correction
        self._weights = {"mean": own_weight(mean_weight), "cov": own_weight(cov_weight)}
        self.mean_loss: MomentLoss | None = None
        self._set_target(target)
        self.reset()

    def reset(self, target: CovarianceTarget | None = None) -> None:
        """Restart the average, with a new target if one is given.

        Buffers whose shapes do not change keep their addresses.
        """
        if target is not None:
            self._set_target(target)
        elif self.mean_loss is not None:
            self.mean_loss.reset()
        self._restart({} if self.average is None else self._new_state(self.average))

    def _loss(self, input: checks.Features, commit: bool) -> Tensor:
        alone = group_size(self.process_group) == 1
        features, *_, names = checks.batch_of(input, empty=not alone)
        check_names(names, self.names)
        if alone:
            check_rows(features[0].shape[0], self.correction)
        features = joined(features, self.joint)
        check_widths(features, self.widths, "target", None if self.joint else names)
        check_device(features, [self.target_cov], "target")
        return self.match(features, commit)

    def match(self, features: Sequence[Tensor], commit: bool = True) -> Tensor:
        """The loss of layers that are already checked and joined."""
        match = CovarianceMatch(
            triangle.split(self.target_cov, self.widths),
            self._scales,
            *self._averaging,
            self._next_state(commit),
            self.training and self.average is not None,
            precision=self.precision,
        )
        pivot = None if self.mean_loss is None else self.mean_loss.target_mean
        merge = merge_over(self.process_group, self.widths, pivot, self.correction)
        value, mean = match_covariances(features, match, self.correction, merge)
        if self.mean_loss is not None:
            value = value + self.mean_loss(means(mean, self.widths), commit=commit)
        return value

    def extra_repr(self) -> str:
        return f"widths={self.widths}, average={self.average}, reduction={self.reduction!r}"

    def _set_target(self, target: CovarianceTarget) -> None:
        """Check everything before changing anything."""
        matrices = _matrices_of(target, self.joint)
        correction = _correction_of(target, self._given_correction)
        widths = [len(matrix) for matrix in matrices]
        weights = layer_weights(self._weights["cov"], "cov_weight", len(widths))
        layer_weights(self._weights["mean"], "mean_weight", len(widths))
        target_mean = _mean_of(target, self._weights["mean"])
        _check_values(target, matrices)
        dtype = torch.float64 if matrices[0].dtype == torch.float64 else torch.float32
        packed = triangle.pack_all([matrix.detach().to(dtype) for matrix in matrices])
        if target_mean is not None:
            self._set_mean_loss(means(target_mean.detach(), widths))
        self.widths, self.correction, self.names = widths, correction, names_of(target)
        self._scales = scales(weights, widths, self.reduction)
        # Averages count the entries of full matrices.
        self._averaging: tuple[str, Sequence[float]] = averaging(self.average, sum(width * width for width in widths))
        self._set_buffer("target_cov", packed)

    def _set_mean_loss(self, target: Moments) -> None:
        if self.mean_loss is not None:
            self.mean_loss.reset(target)
            return
        # Its input is already merged over the processes.
        self.mean_loss = MomentLoss(
            target, self.average, mean_weight=self._weights["mean"], reduction=self.reduction, process_group=False
        ).train(self.training)

    def _new_state(self, average: Average) -> dict[str, Tensor]:
        """The state of the average of packed covariances, by name, in the order of the operator."""
        state = average.new_state(self.target_cov, False)
        state = {name.replace("mean_", "cov_") if name != "step" else name: value for name, value in state.items()}
        if isinstance(average, AdamMovingAverage) and average.init == "uniform":
            # Drawn for the number of packed entries: rescale to the entries of full matrices, and make those symmetric.
            entries = sum(width * width for width in self.widths)
            value = state["cov_average"].mul_((self.target_cov.numel() / entries) ** 0.5)
            for width, packed in zip(self.widths, triangle.split(value, self.widths), strict=True):
                for block in range(triangle.blocks(width)):
                    triangle.make_symmetric(triangle.diagonal(packed, width, block))
        return state
