"""The distance between the covariances of two sets of features, explicit or through inner products of rows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moment_ops.covariances import check_memory, missing_memory
from moment_ops.distributed import ProcessGroup, group_size, merged_covariances, merged_moments, row_counts
from moment_ops.losses.buffers import BufferedLoss
from moment_ops.losses.covariance import CovarianceLoss
from moment_ops.losses.covariance_arguments import (
    check_device,
    check_layers,
    check_options,
    check_rows,
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
from moment_ops.ops.match import advance
from moment_ops.ops.nodes import below_transforms
from moment_ops.ops.records import CovarianceMatch
from moment_ops.statistics import Moments, moments

METHODS = ("auto", "covariance", "gram")


def _check_method(method: Any, precision: str, estimator: Any, correction: int, queue: int = 0) -> str:
    """The methods that the other options leave: "auto" where both are possible."""
    checks.option(method, "method", METHODS)
    checks.option(estimator, "estimator", ESTIMATORS)
    if estimator == "unbiased" and correction != 1:
        raise ValueError(f"correction: got {correction}, expected 1 with the unbiased estimator")
    if method == "covariance" and estimator == "unbiased":
        raise ValueError("estimator: got 'unbiased' with method 'covariance', expected method 'gram'")
    if method == "covariance" and queue:
        raise ValueError(f"queue: got {queue} with method 'covariance', expected method 'gram'")
    if estimator == "unbiased" or queue:
        method = "gram"
    if precision == "ieee":
        return method
    if method == "gram":
        raise ValueError(f"precision: got {precision!r}, expected 'ieee' with inner products of rows, method 'gram'")
    return "covariance"


def cheaper_method(rows: int, other_rows: int, widths: Sequence[int], *, kept: bool = False) -> str:
    """The method with fewer products, forward and backward.

    Args:
        rows, other_rows: N and M.
        widths: columns of every covariance.
        kept: the covariance of the other rows is computed once and kept, so that its products do not count.
    """
    both = rows + other_rows
    of_covariances = sum(((rows if kept else both) + 2 * rows) * width**2 for width in widths)
    of_rows = sum((both**2 + 2 * rows * both) * width for width in widths)
    return "gram" if of_rows < of_covariances else "covariance"


def _missing_memory(layers: Sequence[Tensor], widths: Sequence[int]) -> bool:
    return any(missing_memory(width, layers[0].dtype, layers[0].device) for width in widths)


def _check_unbiased(rows: int, estimator: str, name: str = "input") -> None:
    if estimator == "unbiased" and rows < fewest_rows(1, estimator):
        raise ValueError(
            f"{name}: got {rows} rows, expected at least {fewest_rows(1, estimator)} for the unbiased estimator"
        )


def _in_one_dtype(*groups: Sequence[Tensor]) -> list[list[Tensor]]:
    """All in the wider of the dtypes of the first two."""
    dtype = torch.promote_types(groups[0][0].dtype, groups[1][0].dtype)
    return [[x.to(dtype) for x in layers] for layers in groups]


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

    `sum_l cov_weight_l ||C(x_l) - C(y_l)||_F^2 + mean_weight_l |m(x_l) - m(y_l)|^2`

    Args:
        input: features x, one (N, ...) Tensor per layer, N >= 2; dimensions after the batch are flattened to D columns.
        other: features y, one (M, ...) Tensor per layer, M >= 2, of as many columns. M may differ from N. Mappings
            have the same names.
        method: "covariance" forms (D, D) covariances, "gram" the inner products of all rows: cheaper for D >> N + M,
            and possible where a (D, D) matrix is not. "auto" takes "gram" for the unbiased estimator, "covariance" for
            a precision other than "ieee", and else the one with fewer products, forward and backward,
            `(N + M)^2 D + 2 N (N + M) D` against `(N + M) D^2 + 2 N D^2`, summed over layers; on one process also
            "gram" where a (D, D) matrix of more than 1 GiB exceeds the free memory.
        mean_weight, cov_weight: a number, or one per layer, finite and not negative.
        correction: c in the divisors N - c and M - c.
        reduction: "sum" is the squared norm; "mean" divides by the number of entries over all layers: the sum of D^2
            for the covariances, of D for the means.
        precision: bound on the error of the products of "covariance", as of `covariance`. "gram" has "ieee" alone.
        estimator: "biased" is the plain distance of the two covariances. With covariance S of normal features it is too
            large by (tr(S)^2 + ||S||_F^2) / (N - 1) in the mean, and likewise for M: as a training loss it shrinks what
            a generator draws. "unbiased", of "gram", drops the products of a row with itself: its mean is the squared
            distance of the true covariances for any distribution, and it may be negative. It needs N, M >= 4 and c = 1.
        joint: all layers are one feature vector, with the covariances between layers; weights are then single numbers.
        process_group: rows of both sets are those of all processes of this group, each giving its own; None is the
            default group wherever torch.distributed is initialized, False this process alone. The loss is the same on
            every process, and parameters under DistributedDataParallel get the gradient of one process on the
            concatenated rows. A process without rows takes part; too few rows of all give NaN.

    Returns:
        Scalar, float32 (float64 for float64). Gradients to input and other; twice differentiable in eager mode. Through
        "gram" its error is some epsilons of the sets' `||C||_F^2`, absolutely: near zero the value may come out
        slightly negative.

        Value and gradient of few rows are noisy: N rows stand against the effective rank tr(S)^2 / ||S||_F^2. To train
        a generator on small batches, a running average of explicit covariances of pooled layers does better:
        `CovarianceLoss(dataset_moments(extractor, batches, cov=True), average)`.

    Raises:
        TypeError, ValueError: wrong types, dtypes, devices, shapes, options or weights, with the argument's name; too
        few rows; a matrix beyond the free memory.

    Cost: "covariance" as `covariance_loss`, M D^2 products more, and other's covariance in memory. "gram" one read of
    all rows and (N + M)^2 D products; backward one read, one write, N (N + M) D products. Beyond the gradients it needs
    L (N + M)^2 float64 and, on the CPU, two panels of a few megabytes. Over processes every one of them holds the rows
    of all, and their gradients; "gram" and "auto" then wait for the device, for the numbers of rows.
    """
    check_options(reduction, precision, correction, joint)
    method = _check_method(method, precision, estimator, correction)
    alone = group_size(process_group) == 1
    layers, *_, names = checks.batch_of(input, empty=not alone)
    others, *_, other_names = checks.batch_of(other, "other", empty=not alone)
    check_names(names, other_names, "other")
    check_layers(layers, widths_of(others, False), "other")
    check_device(layers, others, "other")
    widths = widths_of(others, joint)
    weight = scales(layer_weights(cov_weight, "cov_weight", len(widths)), widths, reduction)
    layer_weights(mean_weight, "mean_weight", len(widths))
    rows, other_rows = layers[0].shape[0], others[0].shape[0]
    if alone:
        check_rows(rows, correction)
        check_rows(other_rows, correction, "other")
        _check_unbiased(rows, estimator)
        _check_unbiased(other_rows, estimator, "other")
    if method == "auto":
        # Memory may be free on one process and not on another.
        missing = alone and _missing_memory(others, widths)
        counts = row_counts([rows, other_rows], layers[0], process_group)
        n, m = (sum(count) for count in zip(*counts, strict=True))
        method = "gram" if missing else cheaper_method(n, m, widths)

    if method == "gram":
        x, y = _in_one_dtype(layers, others)
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
        packed = [merged_moments(joined(z, joint), 1, False, process_group)[0] for z in (layers, others)]
    else:
        layers, others = joined(layers, joint), joined(others, joint)
        check_memory(others, "other")
        matrices, other_mean = merged_covariances(others, correction, precision, process_group)
        merge = merge_over(process_group, widths, other_mean.detach(), correction)
        match = CovarianceMatch(matrices, weight, precision=precision)
        value, mean = match_covariances(layers, match, correction, merge)
        packed = [mean, other_mean]
        if is_zero(mean_weight):
            return value
    x_mean, y_mean = (means(mean, widths) for mean in packed)
    return value + moment_loss(x_mean, y_mean, mean_weight=mean_weight, reduction=reduction)


class CovarianceDistance(BufferedLoss):
    """The distance of the covariances of features to those of other features, which are kept as module state.

    Args:
        other, method, mean_weight, cov_weight, correction, reduction, precision, estimator, joint: as of
            `covariance_distance`; the other features are constants, and have to be finite. "auto" takes batches to have
            as many rows as they have. "covariance" computes their covariance once, which then costs a batch nothing,
            and keeps it alone; "gram" keeps the features.
        queue: how many past batches are kept, whose rows count among the batch's for the covariance, as constants; the
            means are those of the batch. Past batches want "gram", which "auto" then takes. All batches of a process
            must have the same number of rows. Before the queue is full, those that it has count. It advances in
            `train()` mode, once per call.
        process_group: the batch's rows, and those of the queue, are those of all processes of this group. None is the
            default group wherever torch.distributed is initialized; False is this process alone. The loss is the same
            on every process, and parameters under DistributedDataParallel get the gradient of one process on the
            concatenated batch. A process whose batch has no rows takes part; too few rows of all give NaN. The other
            features must be the same on every process; past batches are each process's
            own, in the buffers and in `state_dict()`.

    A running average against samples is
    `CovarianceLoss(dataset_moments(extractor, batches, cov=True), average)`.

    Call it with features, one (N, ...) Tensor per layer. Returns a scalar, float32 (float64 for float64),
    differentiable twice in eager mode.

    `state_dict()` holds what is kept, and resumes bit for bit; a queue of another size is refused.

    Cost: as `covariance_distance`. A queue keeps `queue` batches of features, and takes twice that during a step.
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
            raise ValueError(f"queue: got {queue}, expected a number of past batches, 0 or more")
        self._given_method = self.method = _check_method(method, precision, estimator, correction, queue)
        self.correction, self.reduction, self.precision = correction, reduction, precision
        self.estimator, self.joint, self.process_group, self.queue = estimator, joint, process_group, queue
        self._weights = {"mean": own_weight(mean_weight), "cov": own_weight(cov_weight)}
        self.covariance_loss: CovarianceLoss | None = None
        self.mean_loss: MomentLoss | None = None
        self._other_names: tuple[str, ...] = ()
        self._queue_names: tuple[str, ...] = ()
        self._set_other(other)
        self.reset()

    def reset(self, other: checks.Features | None = None) -> None:
        """Empty the queue, and take new other features if given. Buffers of unchanged shape keep their addresses."""
        if other is not None:
            self._set_other(other)
        queue: dict[str, Tensor] = {}
        if self.queue:
            queue = {f"queue_{i}": getattr(self, name)[:0].clone() for i, name in enumerate(self._other_names)}
            device = queue["queue_0"].device
            queue["queue_rows"] = torch.zeros(self.queue, dtype=torch.int64, device=device)
            queue["queue_step"] = torch.zeros((), dtype=torch.int64, device=device)
        self._set_buffers("_queue_names", queue)
        self._read_queue()

    def forward(self, input: checks.Features) -> Tensor:
        """The loss of one batch."""
        alone = group_size(self.process_group) == 1
        layers, *_, names = checks.batch_of(input, empty=not alone)
        check_names(names, self.names, "other")
        check_layers(layers, self._columns, "other")
        check_device(layers, [self._kept()[0]], "other")
        rows = layers[0].shape[0]
        if alone:
            check_rows(rows, self.correction)
            _check_unbiased(rows + sum(self._slots), self.estimator)
        if self.covariance_loss is not None:
            return self.covariance_loss.match(joined(layers, self.joint))
        queue = self._past_rows(rows)
        x, y, *past = _in_one_dtype(layers, self._kept(), *([] if queue is None else [queue]))
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
            value = value + self.mean_loss(joined([as_rows(x) for x in layers], self.joint))
        if self.queue and self.training:
            below_transforms(self._enqueue, *layers)
        return value

    def extra_repr(self) -> str:
        return f"widths={self.widths}, method={self.method!r}, queue={self.queue}, reduction={self.reduction!r}"

    def _kept(self) -> list[Tensor]:
        """The other features, or what stands for them."""
        if self.covariance_loss is not None:
            return [self.covariance_loss.target_cov]
        return [getattr(self, name) for name in self._other_names]

    def _set_other(self, other: checks.Features) -> None:
        """Everything is checked before anything is changed."""
        layers = [y.detach() for y in checks.batch_of(other, "other").layers]
        rows, widths = layers[0].shape[0], widths_of(layers, self.joint)
        check_rows(rows, self.correction, "other")
        _check_unbiased(rows, self.estimator, "other")
        weights = layer_weights(self._weights["cov"], "cov_weight", len(widths))
        layer_weights(self._weights["mean"], "mean_weight", len(widths))
        if not all(bool(y.isfinite().all()) for y in layers):
            raise ValueError("other: got values that are not finite")
        method = self._given_method
        if method == "auto":
            missing = group_size(self.process_group) == 1 and _missing_memory(layers, widths)
            method = "gram" if missing else cheaper_method(rows, rows, widths, kept=True)
        if method == "covariance":
            self._set_covariances(joined(layers, self.joint), widths)
        else:
            self._set_rows(layers, widths)
        self.widths, self.method = widths, method
        self._columns, self.names = widths_of(layers, False), checks.names_of(other)
        self._scales = scales(weights, widths, self.reduction)

    def _set_covariances(self, layers: list[Tensor], widths: list[int]) -> None:
        check_memory(layers, "other")
        results = [covariance(y, self.correction, True, self.precision) for y in layers]
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

    def _set_rows(self, layers: list[Tensor], widths: list[int]) -> None:
        if not is_zero(self._weights["mean"]):
            target = means(moments(joined([as_rows(y) for y in layers], self.joint), var=False).mean, widths)
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
        self._set_buffers("_other_names", {f"other_{i}": y.clone() for i, y in enumerate(layers)})

    def _read_queue(self) -> None:
        """What the host knows of the queue: batches so far, rows in every slot, rows of a batch."""
        self._past = int(self.queue_step) if self.queue else 0
        self._slots = self.queue_rows.tolist() if self.queue else []
        self._batch = len(self.queue_0) // self.queue if self.queue else 0

    def _past_rows(self, rows: int) -> list[Tensor] | None:
        """The rows of past batches; copies, for the queue moves on before backward reads them."""
        if not self.queue:
            return None
        # Every process raises, or none.
        for rank, (got, expected) in enumerate(row_counts([rows, self._batch], self.queue_0, self.process_group)):
            if got and expected and got != expected:
                where = "" if group_size(self.process_group) == 1 else f" on rank {rank}"
                raise ValueError(f"input: got a batch of {got} rows{where}, expected {expected} as in the queue")
        return [
            torch.cat([queue[self._batch * slot :][:count] for slot, count in enumerate(self._slots)])
            for queue in self._queues()
        ]

    def _queues(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._queue_names[:-2]]

    @torch.no_grad()
    def _enqueue(self, *layers: Tensor) -> None:
        """Write the batch over the oldest one. The position is on the device: nothing waits, graphs can be captured."""
        advance([self.queue_step, self.queue_rows], True)
        rows = layers[0].shape[0]
        if rows and not self._batch:
            for name, x in zip(self._queue_names[:-2], layers, strict=True):
                memory_format = torch.channels_last if is_channels_last(x) and x.dim() == 4 else torch.contiguous_format
                empty = torch.zeros((self.queue * rows, *x.shape[1:]), dtype=x.dtype, device=x.device)
                self._set_buffer(name, empty.to(memory_format=memory_format))
            self._batch = rows
        slot = self.queue_step % self.queue
        self.queue_rows.index_fill_(0, slot.reshape(1), rows)
        index = slot * rows + torch.arange(rows, device=layers[0].device)
        for queue, x in zip(self._queues(), layers, strict=True):
            queue.index_copy_(0, index, x.detach().to(queue.dtype))
        self.queue_step += 1
        self._slots[self._past % self.queue] = rows
        self._past += 1

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Rows that were kept have the size of their batches, which a new loss does not know."""
        errors = rest[-1]
        saved = state_dict.get(prefix + "queue_rows")
        if isinstance(saved, Tensor) and self.queue and len(saved) != self.queue:
            errors.append(f"{prefix}queue: got a state of {len(saved)} past batches, expected {self.queue}")
            return
        for name in self._queue_names[:-2]:
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and value.shape != self._buffers[name].shape:
                self.register_buffer(name, torch.empty_like(value, device=self._buffers[name].device))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._read_queue()
