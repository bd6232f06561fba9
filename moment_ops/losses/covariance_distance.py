"""The distance between the covariances of two sets of features, from the covariances or from inner products of rows."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moment_ops.covariances import check_memory, missing_memory
from moment_ops.distributed import ProcessGroup, group_size, merged_covariances, merged_moments, row_counts
from moment_ops.losses.buffers import BufferedLoss
from moment_ops.losses.covariance import CovarianceLoss
from moment_ops.losses.covariance_arguments import (
    check_device,
    check_options,
    check_rows,
    check_widths,
    joined,
    means,
    merge_over,
    scales,
    widths_of,
)
from moment_ops.losses.covariance_matching import match_covariances
from moment_ops.losses.gram_distance import ESTIMATORS, fewest_rows, gram_distance
from moment_ops.losses.matching import check_names
from moment_ops.losses.moment import MomentLoss, moment_loss
from moment_ops.losses.weights import LayerWeight, is_zero, layer_weights, own_weight
from moment_ops.ops import checks
from moment_ops.ops.covariance import covariance
from moment_ops.ops.layout import as_rows, is_channels_last
from moment_ops.ops.nodes import below_transforms
from moment_ops.ops.records import CovarianceMatch
from moment_ops.statistics import Moments, moments

METHODS = ("auto", "covariance", "gram")


def _check_method(method: Any, precision: str, estimator: Any, correction: int, queue: int = 0) -> str:
    """The method that the other options permit; "auto" if they permit both."""
    checks.option(method, "method", METHODS)
    checks.option(estimator, "estimator", ESTIMATORS)
    if estimator == "unbiased" and correction != 1:
        raise ValueError(f"correction: got {correction}, expected 1 with estimator 'unbiased'")
    if method == "covariance" and estimator == "unbiased":
        raise ValueError("estimator: got 'unbiased' with method 'covariance', expected method 'gram'")
    if method == "covariance" and queue:
        raise ValueError(f"queue: got {queue} with method 'covariance', expected method 'gram'")
    if estimator == "unbiased" or queue:
        method = "gram"
    if precision == "ieee":
        return method
    if method == "gram":
        raise ValueError(f"precision: got {precision!r}, expected 'ieee' with method 'gram'")
    return "covariance"


def cheaper_method(rows: int, other_rows: int, widths: Sequence[int], *, kept: bool = False) -> str:
    """The method with fewer products in forward and backward together.

    Args:
        rows, other_rows: N and M.
        widths: columns of every covariance.
        kept: whether the covariance of the other rows is kept, so that its products do not count.
    """
    both = rows + other_rows
    of_covariances = sum(((rows if kept else both) + 2 * rows) * width**2 for width in widths)
    of_rows = sum((both**2 + 2 * rows * both) * width for width in widths)
    return "gram" if of_rows < of_covariances else "covariance"


def _missing_memory(features: Sequence[Tensor], widths: Sequence[int]) -> bool:
    return any(missing_memory(width, features[0].dtype, features[0].device) for width in widths)


def _check_unbiased(rows: int, estimator: str, name: str = "input") -> None:
    if estimator == "unbiased" and rows < fewest_rows(1, estimator):
        raise ValueError(
            f"{name}: got {rows} rows, expected at least {fewest_rows(1, estimator)} with estimator 'unbiased'"
        )


def _in_one_dtype(*groups: Sequence[Tensor]) -> list[list[Tensor]]:
    """All groups in the wider of the dtypes of the first two."""
    dtype = torch.promote_types(groups[0][0].dtype, groups[1][0].dtype)
    return [[x.to(dtype) for x in features] for features in groups]


def covariance_distance(
    input: checks.Features,
    other: checks.Features,
    *,
    method: str = "auto",
    mean_weight: LayerWeight = 0.0,
    cov_weight: LayerWeight = 1.0,
    correction: int = 1,
    reduction: str = "sum",
    precision: str = "ieee",
    estimator: str = "biased",
    joint: bool = False,
    process_group: ProcessGroup = False,
) -> Tensor:
    """Squared Frobenius distance between the covariances of two sets of features.

    `sum_l cov_weight_l ||C(x_l) - C(y_l)||_F^2 + mean_weight_l |m(x_l) - m(y_l)|^2` over layers l

    Args:
        input: features x, one (N, ...) Tensor per layer, N >= 2, in float32, bfloat16, float16 or float64. Dimensions
            after the batch are flattened to D columns.
        other: features y, one (M, ...) Tensor per layer, M >= 2, with the same D. If input and other are mappings,
            their keys must be equal.
        method: "covariance" computes the (D, D) covariances. "gram" computes the inner products of all rows instead. It
            is cheaper if D is much larger than N + M, and needs no (D, D) matrix. "auto" takes "gram" for the unbiased
            estimator and "covariance" for a precision other than "ieee". Otherwise it takes the method with fewer
            products in forward and backward together, `(N + M)^2 D + 2 N (N + M) D` for "gram" and
            `(N + M) D^2 + 2 N D^2` for "covariance", summed over layers. On one process it also takes "gram" if a
            (D, D) matrix is larger than 1 GiB and does not fit into the free memory.
        mean_weight, cov_weight: a number, or one per layer; finite and non-negative.
        correction: c in the divisors N - c and M - c.
        reduction: "sum" leaves the squared norms as they are. "mean" divides them by the number of entries over all
            layers: the sum of D^2 for covariances, the sum of D for means.
        precision: how operands are multiplied with method "covariance", as for `covariance`. Method "gram" takes only
            "ieee".
        estimator: "biased" is the distance between the two sample covariances. For normal features with covariance S
            its expectation is too large by (tr(S)^2 + ||S||_F^2) / (N - 1), plus the same term with M. As a training
            loss it therefore makes a generator produce features with too small a covariance. "unbiased" leaves out the
            products of a row with itself, so that its expectation is the squared distance of the true covariances, for
            any distribution. It may be negative. It needs method "gram", N, M >= 4 and c = 1.
        joint: whether all layers form one feature vector, so that covariances between layers are compared too. Each
            weight is then one number.
        process_group: rows of both sets are gathered over this group; each process passes its own. None is the default
            group if torch.distributed is initialized, False is this process alone. The loss is the same on every
            process, and parameters under DistributedDataParallel get the gradient of one process on the concatenated
            rows. Processes may have no rows; with too few rows in all, the loss is NaN.

    Returns:
        Scalar, float32 (float64 for float64). Differentiable with respect to input and other, twice in eager mode. With
        method "gram" the absolute error is a few machine epsilons times `||C(x)||_F^2 + ||C(y)||_F^2`, so that a value
        near zero may be slightly negative.

        With few rows, value and gradient are noisy; how noisy depends on N relative to the effective rank of the
        covariance, tr(S)^2 / ||S||_F^2. To train a generator with small batches, match a running average of the
        covariances of pooled layers instead: `CovarianceLoss(dataset_moments(extractor, batches, cov=True), average)`.

    Raises:
        TypeError, ValueError: wrong types, dtypes, devices, shapes, names, options or weights; too few rows; a matrix
            that does not fit into memory. The message names the argument.

    Cost: with method "covariance", that of `covariance_loss`, M D^2 more products, and one (D, D) matrix. With method
    "gram", one read of all rows and (N + M)^2 D products; backward takes one read, one write and N (N + M) D products.
    Besides the gradients it needs (N + M)^2 float64 numbers per layer and, on the CPU, two buffers of a few megabytes.
    Over several processes each one holds the rows of all processes and their gradients; with "gram" and "auto" the host
    then waits for the numbers of rows.
    """
    check_options(reduction, precision, correction, joint)
    method = _check_method(method, precision, estimator, correction)
    alone = group_size(process_group) == 1
    features, *_, names = checks.batch_of(input, empty=not alone)
    others, *_, other_names = checks.batch_of(other, "other", empty=not alone)
    check_names(names, other_names, "other")
    check_widths(features, widths_of(others, False), "other", names)
    check_device(features, others, "other")
    widths = widths_of(others, joint)
    weight = scales(layer_weights(cov_weight, "cov_weight", len(widths)), widths, reduction)
    layer_weights(mean_weight, "mean_weight", len(widths))
    rows, other_rows = features[0].shape[0], others[0].shape[0]
    if alone:
        check_rows(rows, correction)
        check_rows(other_rows, correction, "other")
        _check_unbiased(rows, estimator)
        _check_unbiased(other_rows, estimator, "other")
    if method == "auto":
        # Memory may be free on one process and not on another.
        missing = alone and _missing_memory(others, widths)
        counts = row_counts([rows, other_rows], features[0], process_group)
        n, m = (sum(count) for count in zip(*counts, strict=True))
        method = "gram" if missing else cheaper_method(n, m, widths)

    if method == "gram":
        x, y = _in_one_dtype(features, others)
        value = gram_distance(
            x,
            y,
            weight=weight,
            correction=correction,
            joint=joint,
            estimator=estimator,
            process_group=process_group,
        )
        if is_zero(mean_weight):
            return value
        packed = [merged_moments(joined(z, joint), 1, False, process_group)[0] for z in (features, others)]
    else:
        features, others = joined(features, joint), joined(others, joint)
        check_memory(others, "other", None if joint else other_names)
        matrices, other_mean = merged_covariances(others, correction, precision, process_group)
        merge = merge_over(process_group, widths, other_mean.detach(), correction)
        match = CovarianceMatch(matrices, weight, precision=precision)
        value, mean = match_covariances(features, match, correction, merge)
        packed = [mean, other_mean]
        if is_zero(mean_weight):
            return value
    x_mean, y_mean = (means(mean, widths) for mean in packed)
    return value + moment_loss(x_mean, y_mean, mean_weight=mean_weight, reduction=reduction)


class CovarianceDistance(BufferedLoss):
    """The covariance distance to other features, which are kept as module state.

    For a running average of covariances, use
    `CovarianceLoss(dataset_moments(extractor, batches, cov=True), average)`.

    Args:
        other, method, mean_weight, cov_weight, correction, reduction, precision, estimator, joint: as for
            `covariance_distance`. The other features are constants and must be finite. Method "covariance" computes
            their covariance once and keeps it instead of the features. Method "gram" keeps the features. "auto" assumes
            that batches have as many rows as the other features.
        queue: number of past rows to keep, of batches of any sizes. The covariance is that of the batch and the past
            rows, which are constants; the mean is that of the batch alone. A queue requires method "gram", which "auto"
            then takes. Until the queue is full, the rows that it holds are used. In `train()` mode each call adds its
            rows, which replace the oldest.
        process_group: rows of the batch and of the queue are gathered over this group. None is the default group if
            torch.distributed is initialized, False is this process alone. The loss is the same on every process, and
            parameters under DistributedDataParallel get the gradient of one process on the concatenated batch.
            Processes may have no rows; with too few rows in all, the loss is NaN. The other features must be the same
            on every process. Each process keeps `queue` of its own past rows.

    Call it with features, one (N, ...) Tensor per layer, or with a mapping that has the names of the other features.
    The result is a scalar, float32 (float64 for float64), twice differentiable in eager mode. It has gradients with
    respect to the features only. If the optimizer may skip the step, pass `commit=False`, and call `commit()` when it
    was taken. `fill(batches)` adds rows to the queue, and computes no loss.

    `state_dict()` holds the other features, or their covariance, and the queue. A loss that loads it continues bit for
    bit; rows of a queue of another size are an error.

    Raises:
        TypeError, ValueError: as `covariance_distance`; also non-finite other features.

    Cost: as `covariance_distance`. With method "covariance", batches do not pay for the covariance of the other
    features. A queue keeps `queue` rows, and takes twice their memory during a step. While it fills, the host knows the
    number of rows, so that CUDA graphs and compiled steps need a full queue.
    """

    def __init__(
        self,
        other: checks.Features,
        *,
        method: str = "auto",
        mean_weight: LayerWeight = 0.0,
        cov_weight: LayerWeight = 1.0,
        correction: int = 1,
        reduction: str = "sum",
        precision: str = "ieee",
        estimator: str = "biased",
        joint: bool = False,
        process_group: ProcessGroup = None,
        queue: int = 0,
    ) -> None:
        super().__init__()
        check_options(reduction, precision, correction, joint)
        if isinstance(queue, bool) or not isinstance(queue, int):
            raise TypeError(f"queue: got {queue!r}, expected an int")
        if queue < 0:
            raise ValueError(f"queue: got {queue}, expected a non-negative number of past rows")
        self._given_method = self.method = _check_method(method, precision, estimator, correction, queue)
        self.correction, self.reduction, self.precision = correction, reduction, precision
        self.estimator, self.joint, self.process_group, self.queue = estimator, joint, process_group, queue
        self._weights = {"mean": own_weight(mean_weight), "cov": own_weight(cov_weight)}
        self.covariance_loss: CovarianceLoss | None = None
        self.mean_loss: MomentLoss | None = None
        self._other_names: tuple[str, ...] = ()
        self._set_other(other)
        self.reset()

    def reset(self, other: checks.Features | None = None) -> None:
        """Empty the queue, and replace the other features if new ones are given.

        Buffers whose shapes do not change keep their addresses.
        """
        if other is not None:
            self._set_other(other)
        queue: dict[str, Tensor] = {}
        if self.queue:
            queue = {f"queue_{i}": getattr(self, name)[:0].clone() for i, name in enumerate(self._other_names)}
            queue["queue_count"] = torch.zeros((), dtype=torch.int64, device=queue["queue_0"].device)
        self._restart(queue)
        self._read_queue()

    def _loss(self, input: checks.Features, commit: bool) -> Tensor:
        features = self._checked(input)
        if group_size(self.process_group) == 1:
            rows = features[0].shape[0] + self._past
            check_rows(rows, self.correction)
            _check_unbiased(rows, self.estimator)
        if self.covariance_loss is not None:
            return self.covariance_loss.match(joined(features, self.joint))
        # Copies, as the queue is overwritten before backward reads them.
        queue = [past[: self._past].clone() for past in self._queues()]
        x, y, *past = _in_one_dtype(features, self._kept(), *([queue] if queue else []))
        value = gram_distance(
            x,
            y,
            weight=self._scales,
            correction=self.correction,
            joint=self.joint,
            estimator=self.estimator,
            queue=past[0] if past else None,
            process_group=self.process_group,
            gather_other=False,
        )
        if self.mean_loss is not None:
            value = value + self.mean_loss(joined([as_rows(x) for x in features], self.joint), commit=commit)
        if self.training:
            self._enqueue(features, commit)
        return value

    def _fill_one(self, batch: checks.Features) -> None:
        self._pending = False
        self._enqueue(self._checked(batch), True)

    def _checked(self, input: checks.Features) -> Sequence[Tensor]:
        """The layers of a batch."""
        features, *_, names = checks.batch_of(input, empty=group_size(self.process_group) > 1)
        check_names(names, self.names, "other")
        check_widths(features, self._columns, "other", names)
        check_device(features, [self._kept()[0]], "other")
        return features

    def extra_repr(self) -> str:
        return f"widths={self.widths}, method={self.method!r}, queue={self.queue}, reduction={self.reduction!r}"

    def _kept(self) -> list[Tensor]:
        """The other features, or their packed covariances."""
        if self.covariance_loss is not None:
            return [self.covariance_loss.target_cov]
        return [getattr(self, name) for name in self._other_names]

    def _set_other(self, other: checks.Features) -> None:
        """Check everything before changing anything."""
        given, *_, names = checks.batch_of(other, "other")
        features = [y.detach() for y in given]
        rows, widths = features[0].shape[0], widths_of(features, self.joint)
        check_rows(rows, self.correction, "other")
        _check_unbiased(rows, self.estimator, "other")
        weights = layer_weights(self._weights["cov"], "cov_weight", len(widths))
        layer_weights(self._weights["mean"], "mean_weight", len(widths))
        for i, y in enumerate(features):
            if not bool(y.isfinite().all()):
                label = checks.label_of("other", i, features, names)
                raise ValueError(f"{label}: got non-finite values, expected finite ones")
        method = self._given_method
        if method == "auto":
            missing = group_size(self.process_group) == 1 and _missing_memory(features, widths)
            method = "gram" if missing else cheaper_method(rows, rows, widths, kept=True)
        if method == "covariance":
            joined_features = joined(features, self.joint)
            check_memory(joined_features, "other", None if self.joint else names)
            self._set_covariances(joined_features, widths)
        else:
            self._set_rows(features, widths)
        self.widths, self.method = widths, method
        self._columns, self.names = widths_of(features, False), names
        self._scales = scales(weights, widths, self.reduction)

    def _set_covariances(self, features: list[Tensor], widths: list[int]) -> None:
        results = [covariance(y, self.correction, True, self.precision) for y in features]
        target = Moments(
            torch.cat([mean for _, mean in results]),
            cov=tuple(cov for cov, _ in results),
            correction=self.correction,
            shapes=tuple((width,) for width in widths),
            validate=False,
        )
        if self.covariance_loss is None:
            self.covariance_loss = CovarianceLoss(
                target,
                mean_weight=self._weights["mean"],
                cov_weight=self._weights["cov"],
                correction=self.correction,
                reduction=self.reduction,
                precision=self.precision,
                process_group=self.process_group,
            )
        else:
            self.covariance_loss.reset(target)
        self.mean_loss = None
        self._set_buffers("_other_names", {})

    def _set_rows(self, features: list[Tensor], widths: list[int]) -> None:
        if not is_zero(self._weights["mean"]):
            target = means(moments(joined([as_rows(y) for y in features], self.joint), var=False).mean, widths)
            if self.mean_loss is None:
                self.mean_loss = MomentLoss(
                    target,
                    mean_weight=self._weights["mean"],
                    reduction=self.reduction,
                    process_group=self.process_group,
                )
            else:
                self.mean_loss.reset(target)
        self.covariance_loss = None
        self._set_buffers("_other_names", {f"other_{i}": y.clone() for i, y in enumerate(features)})

    def _queues(self) -> list[Tensor]:
        return [self._buffers[name] for name in self._state_names[:-1]]

    def _read_queue(self) -> None:
        """Copy the number of past rows to the host."""
        self._past = min(int(self.queue_count), self.queue) if self.queue else 0

    def _enqueue(self, features: Sequence[Tensor], commit: bool) -> None:
        if self.queue:
            below_transforms(partial(self._advance, commit), *[x[-self.queue :] for x in features])

    def _update(self, *rows: Tensor) -> None:
        """Overwrite the oldest rows by these. Their position is on the device: the host does not wait."""
        count = len(rows[0]) if rows else 0
        if not count:
            return
        if not len(self.queue_0):
            self._allocate(rows)
        index = (self.queue_count + torch.arange(count, device=rows[0].device)) % self.queue
        for queue, x in zip(self._queues(), rows, strict=True):
            queue.index_copy_(0, index, x.detach().to(queue.dtype))
        self.queue_count += count
        self._past = min(self._past + count, self.queue)

    def _allocate(self, rows: Sequence[Tensor]) -> None:
        """A queue has the dtype and the layout of the first rows."""
        # A tensor made in inference mode could not change outside of it.
        with torch.inference_mode(False):
            for name, x in zip(self._state_names[:-1], rows, strict=True):
                memory_format = torch.channels_last if is_channels_last(x) and x.dim() == 4 else torch.contiguous_format
                empty = torch.zeros((self.queue, *x.shape[1:]), dtype=x.dtype, device=x.device)
                self._set_buffer(name, empty.to(memory_format=memory_format))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """The shapes of kept rows depend on the batches, which a new loss has not seen."""
        saved = {name: state_dict.get(prefix + name) for name in self._state_names[:-1]}
        for value in saved.values():
            if isinstance(value, Tensor) and value.dim() and len(value) not in (0, self.queue):
                errors = rest[-1]
                errors.append(f"{prefix}queue: got a state of {len(value)} past rows, expected {self.queue}")
                return
        for name, value in saved.items():
            if isinstance(value, Tensor) and not self._fits(name, value):
                self.register_buffer(name, torch.empty_like(value, device=self._buffers[name].device))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._read_queue()
