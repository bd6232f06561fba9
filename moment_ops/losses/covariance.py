"""The covariance matching loss: full covariances of many layers against targets, explicit or through inner products."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moment_ops.averages import AdamMovingAverage, Average, QueueAverage
from moment_ops.covariances import check_memory
from moment_ops.distributed import ProcessGroup, group_size, merge_covariances
from moment_ops.losses.buffers import BufferedLoss
from moment_ops.losses.covariance_arguments import (
    CovarianceTarget,
    LayerWeight,
    check_device,
    check_layers,
    check_mean_weight,
    check_not_dual,
    check_one_of,
    check_options,
    check_rows,
    check_values,
    choose_method,
    is_zero,
    joined,
    layer_weights,
    matrices_of,
    names_of,
    same_dtype,
    scales,
)
from moment_ops.losses.covariance_matching import match_covariances
from moment_ops.losses.dual import dual_covariance_loss
from moment_ops.losses.matching import check_names
from moment_ops.losses.moment import MomentLoss, moment_loss
from moment_ops.ops import checks, triangle
from moment_ops.ops.covariance import covariance as covariance_op
from moment_ops.ops.layout import columns_of, is_channels_last
from moment_ops.ops.match import advance
from moment_ops.ops.nodes import below_transforms
from moment_ops.statistics import Moments, moments


def _dual(
    layers: Sequence[Tensor],
    samples: Sequence[Tensor],
    cov_weight: LayerWeight,
    reduction: str,
    correction: int,
    estimator: str,
    joint: bool,
    queue: Sequence[Tensor] | None,
    process_group: ProcessGroup,
) -> Tensor:
    widths = [sum(columns_of(x) for x in layers)] if joint else [columns_of(x) for x in layers]
    layers, samples = same_dtype(layers, samples)
    return dual_covariance_loss(
        layers,
        samples,
        correction=correction,
        joint=joint,
        estimator=estimator,
        weight=scales(layer_weights(cov_weight, "cov_weight", len(widths)), widths, reduction),
        queue=None if queue is None else [q.to(layers[0].dtype) for q in queue],
        process_group=process_group,
        gather_samples=False,
    )


def _means(packed: Tensor, widths: Sequence[int]) -> Moments:
    return Moments(packed, shapes=tuple((width,) for width in widths), validate=False)


def covariance_loss(
    input: checks.Features,
    *,
    target: CovarianceTarget | None = None,
    samples: checks.Features | None = None,
    method: str = "auto",
    mean_weight: LayerWeight = 0.0,
    cov_weight: LayerWeight = 1.0,
    correction: int = 1,
    reduction: str = "sum",
    precision: str = "ieee",
    estimator: str = "biased",
    joint: bool = False,
) -> Tensor:
    """Squared Frobenius distance between the covariances of features and target covariances, or those of samples.

    `sum_l cov_weight_l ||C_l - T_l||_F^2 + mean_weight_l |m_l - t_l|^2`

    Args:
        input: features, one (N, ...) Tensor per layer, N >= 2; dimensions after the batch are flattened to D columns.
            The names of a mapping are those of the target or the samples, where these have names.
        target: per layer a symmetric (D, D) Tensor, of which the upper side is read; or Moments with covariances, whose
            correction is used.
        samples: (M, ...) features to compare with, one Tensor per layer. Exactly one of target and samples.
        method: "primal" forms (D, D) covariances, "dual" the inner products of all rows: cheaper for D >> N + M, and
            possible where a (D, D) matrix is not; for samples alone. "auto" takes the dual where it needs fewer
            products, forward and backward, `(N + M)^2 D + 2 N (N + M) D` against `(N + M) D^2 + 2 N D^2`, summed over
            layers, or where a (D, D) matrix of more than 1 GiB exceeds the free memory.
        mean_weight, cov_weight: a float, or one float per layer. A mean term needs means: of Moments or samples.
        correction: c in the divisor N - c; that of Moments where they are the target.
        reduction: "sum" is the squared norm; "mean" divides by the number of entries over all layers: the sum of D^2
            for the covariances, of D for the means.
        precision: bound on the error of the products of the primal, as of `covariance`.
        estimator: of the dual; "unbiased" drops the products of a row with itself, which make the plain distance of
            small batches too large.
        joint: all layers are one feature vector, with the covariances between layers; weights are then single floats.

    Returns:
        Scalar, float32 (float64 for float64). Gradients to input, target and samples, where they want them; twice
        differentiable in eager mode. Of this process alone: CovarianceLoss merges over processes.

    Raises:
        TypeError, ValueError: wrong types, dtypes, devices, shapes or options, with the argument's name; too few rows;
        a matrix beyond the free memory.

    Cost: primal, with a target that wants no gradient, `N D^2` products, the upper triangle alone, and panels of it in
    memory; where the input wants gradients, also the packed triangle of the derivative, and `2 N D^2` in backward.

    Source: the covariance matching loss of dos Santos et al. 2019, section 3, whose code stops at the diagonal.
    """
    check_one_of(target, samples)
    check_options(method, reduction, precision, estimator, correction, joint)
    layers, *_, names = checks.batch_of(input)
    check_mean_weight(target, mean_weight)
    mean_target: Moments | None = None
    if samples is not None:
        others, *_, other_names = checks.batch_of(samples, "samples")
        check_names(names, other_names, "samples")
        check_layers(layers, [columns_of(y) for y in others], "samples")
        check_rows(layers, correction)
        check_rows(others, correction, "samples")
        method = choose_method(method, others, layers[0].shape[0], kept=False, estimator=estimator, joint=joint)
        if method == "dual":
            value = _dual(layers, others, cov_weight, reduction, correction, estimator, joint, None, False)
            return value + _mean_term(layers, others, mean_weight, reduction, joint)
        others = joined(others, joint)
        check_memory(others, "samples")
        results = [covariance_op(y, correction, True, precision) for y in others]
        matrices = [cov for cov, _ in results]
        if not is_zero(mean_weight):
            mean_target = _means(torch.cat([mean for _, mean in results]), [len(mean) for _, mean in results])
    else:
        assert target is not None
        check_not_dual(method)
        if estimator == "unbiased":
            raise ValueError("estimator: got 'unbiased' with a target matrix, expected samples")
        matrices = matrices_of(target)
        check_names(names, names_of(target))
        if isinstance(target, Moments):
            correction = target.correction
            if not is_zero(mean_weight):
                mean_target = _means(target.mean, [len(matrix) for matrix in matrices])
    layers = joined(layers, joint)
    widths = [len(matrix) for matrix in matrices]
    check_layers(layers, widths, "target" if samples is None else "samples")
    check_device(layers, matrices)
    check_rows(layers, correction)
    check_memory(layers)
    weights = layer_weights(cov_weight, "cov_weight", len(layers))
    value, mean = match_covariances(
        layers, matrices, correction=correction, weight=scales(weights, widths, reduction), precision=precision
    )
    if mean_target is not None:
        value = value + moment_loss(_means(mean, widths), mean_target, mean_weight=mean_weight, reduction=reduction)
    return value


def _mean_term(
    layers: Sequence[Tensor], samples: Sequence[Tensor], mean_weight: LayerWeight, reduction: str, joint: bool
) -> Tensor | float:
    """Distance of the means, where it is wanted."""
    if is_zero(mean_weight):
        return 0.0
    layers, samples = (joined([x.flatten(1) for x in group], joint) for group in (layers, samples))
    return moment_loss(layers, moments(samples, var=False), mean_weight=mean_weight, reduction=reduction)


class CovarianceLoss(BufferedLoss):
    """Covariance matching with targets, running average and weights kept as module state.

    Args:
        target, samples, mean_weight, cov_weight, correction, reduction, precision, estimator, joint: as of
            `covariance_loss`. Values of a target are checked here: finite and symmetric.
        average: None; MovingAverage or AdamMovingAverage, of the centred covariances, and of the means where they are
            matched (primal); QueueAverage (dual). Its state advances in `train()` mode, once per call; in `eval()` mode
            the loss is computed with the state as it is. With AdamMovingAverage the loss is a sum.
        method: as of `covariance_loss`. "auto" follows an average that only one method has; else it takes batches to
            have as many rows as the samples, whose covariance is computed once and costs the primal nothing.
        process_group: covariances, or rows, are merged over this group before matching. None is the default group
            wherever torch.distributed is initialized; False is this process alone. The loss is the same on every
            process, and parameters under DistributedDataParallel get the gradient of one process on the concatenated
            batch. Samples must be the same on every process.

    Call it with features, one (N, ...) Tensor per layer; a mapping with the names of the target, or of the samples,
    where these have names. Returns a scalar, float32 (float64 for float64),
    differentiable twice in eager mode.

    Entries of averages stay untouched where the batch's covariance is not finite; the loss shows them. Buffers keep
    their dtype under `.to(torch.bfloat16)` and `.half()`; `state_dict()` holds targets, average and step, and resumes
    bit for bit. Symmetric matrices are kept as packed triangles.

    Cost: as `covariance_loss`; a moving average keeps one packed triangle more, AdamMovingAverage three.
    """

    def __init__(
        self,
        target: CovarianceTarget | None = None,
        samples: checks.Features | None = None,
        average: Average | QueueAverage | None = None,
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
    ) -> None:
        super().__init__()
        if average is not None and not isinstance(average, (Average, QueueAverage)):
            raise TypeError(
                f"average: got {type(average).__name__}, expected MovingAverage, AdamMovingAverage or QueueAverage"
            )
        check_options(method, reduction, precision, estimator, correction, joint)
        self.average, self.reduction, self.precision = average, reduction, precision
        self.estimator, self.joint, self.process_group = estimator, joint, process_group
        self.mean_weight, self.cov_weight = mean_weight, cov_weight
        self.correction = self._given_correction = correction
        self.method = self._given_method = method
        self.mean_loss: MomentLoss | None = None
        self._state_names: tuple[str, ...] = ()
        self._sample_names: tuple[str, ...] = ()
        self._queue_names: tuple[str, ...] = ()
        check_one_of(target, samples)
        self.reset(target, samples)

    def reset(self, target: CovarianceTarget | None = None, samples: checks.Features | None = None) -> None:
        """Restart the average, with a new target, or new samples, if given. Unchanged shapes keep their addresses."""
        if target is not None or samples is not None:
            check_one_of(target, samples)
            check_mean_weight(target, self.mean_weight)
            if samples is not None:
                self._set_samples(samples)
            else:
                assert target is not None
                self._set_target(target)
            self.names = names_of(target if samples is None else samples)
        elif self.mean_loss is not None:
            self.mean_loss.reset()
        state = {}
        if isinstance(self.average, Average):
            state = self._new_state(self.average)
        self._set_buffers("_state_names", state)
        queue: dict[str, Tensor] = {}
        if isinstance(self.average, QueueAverage):
            queue = {f"queue_{i}": getattr(self, name)[:0].clone() for i, name in enumerate(self._sample_names)}
            queue["queue_step"] = torch.zeros((), dtype=torch.int64, device=queue["queue_0"].device)
        self._set_buffers("_queue_names", queue)
        self._filled = 0

    def forward(self, input: checks.Features) -> Tensor:
        """The loss of one batch."""
        layers, *_, names = checks.batch_of(input)
        check_names(names, self.names, "samples" if self._sample_names else "target")
        alone = group_size(self.process_group) == 1
        if alone:
            check_rows(layers, self.correction)
        if self.method == "dual":
            return self._dual_loss(layers)
        layers = joined(layers, self.joint)
        check_layers(layers, self.widths, "target")
        check_device(layers, [self.target_cov])
        weights = layer_weights(self.cov_weight, "cov_weight", len(layers))
        average = self.average if isinstance(self.average, Average) else None
        adam = isinstance(average, AdamMovingAverage)
        value, mean = match_covariances(
            layers,
            triangle.split(self.target_cov, self.widths),
            correction=self.correction,
            weight=weights if adam else scales(weights, self.widths, self.reduction),
            precision=self.precision,
            average=average,
            state=[getattr(self, name) for name in self._state_names],
            update=self.training and average is not None,
            merge=None if alone else self._merge,
        )
        if self.mean_loss is not None:
            value = value + self.mean_loss(_means(mean, self.widths))
        return value

    def extra_repr(self) -> str:
        return f"widths={self.widths}, method={self.method!r}, average={self.average}, reduction={self.reduction!r}"

    def _merge(self, mean: Tensor, covariance: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return merge_covariances(
            mean,
            covariance,
            count,
            widths=self.widths,
            pivot=None if self.mean_loss is None else self.mean_loss.target_mean,
            correction=self.correction,
            process_group=self.process_group,
        )

    def _dual_loss(self, layers: Sequence[Tensor]) -> Tensor:
        samples = [getattr(self, name) for name in self._sample_names]
        check_layers(layers, [columns_of(y) for y in samples], "samples")
        queue = self._queue(layers)
        value = _dual(
            layers,
            samples,
            self.cov_weight,
            self.reduction,
            self.correction,
            self.estimator,
            self.joint,
            queue,
            self.process_group,
        )
        if self.mean_loss is not None:
            value = value + self.mean_loss(joined([x.flatten(1) for x in layers], self.joint))
        if self._queue_names and self.training:
            below_transforms(self._enqueue, *layers)
        return value

    def _queue(self, layers: Sequence[Tensor]) -> list[Tensor] | None:
        """The rows of past batches; copies, for the queue moves on before backward reads them."""
        if self._filled == 0:
            return None
        rows = self._filled * len(layers[0])
        queue = [getattr(self, name) for name in self._queue_names[:-1]]
        assert isinstance(self.average, QueueAverage)
        if len(queue[0]) != self.average.batches * len(layers[0]):
            expected = len(queue[0]) // self.average.batches
            raise ValueError(f"input: got a batch of {len(layers[0])} rows, expected {expected} as in the queue")
        return [q[:rows].clone() for q in queue]

    @torch.no_grad()
    def _enqueue(self, *layers: Tensor) -> None:
        """Write the batch over the oldest one. The position is on the device: nothing waits, graphs can be captured."""
        assert isinstance(self.average, QueueAverage)
        rows, batches = len(layers[0]), self.average.batches
        advance([self.queue_step], True)
        if self._filled == 0:
            for name, x in zip(self._queue_names[:-1], layers, strict=True):
                memory_format = torch.channels_last if is_channels_last(x) and x.dim() == 4 else torch.contiguous_format
                shape = (batches * rows, *x.shape[1:])
                empty = torch.zeros(shape, dtype=x.dtype, device=x.device)
                self._set_buffer(name, empty.to(memory_format=memory_format))
        index = (self.queue_step % batches) * rows + torch.arange(rows, device=layers[0].device)
        for name, x in zip(self._queue_names[:-1], layers, strict=True):
            queue = getattr(self, name)
            queue.index_copy_(0, index, x.detach().to(queue.dtype))
        self.queue_step += 1
        self._filled = min(self._filled + 1, batches)

    def _set_target(self, target: CovarianceTarget) -> None:
        """Everything is checked before anything is changed."""
        check_not_dual(self._given_method)
        if self.estimator == "unbiased":
            raise ValueError("estimator: got 'unbiased' with a target matrix, expected samples")
        if isinstance(self.average, QueueAverage):
            raise ValueError("average: got QueueAverage with a target matrix, expected samples and method 'dual'")
        matrices = matrices_of(target)
        if isinstance(target, Moments):
            target.check_values()
        else:
            check_values(matrices)
        mean = target.mean if isinstance(target, Moments) else None
        correction = target.correction if isinstance(target, Moments) else self._given_correction
        self._set_matrices(matrices, mean, correction)

    def _set_samples(self, samples: checks.Features) -> None:
        layers = [y.detach() for y in checks.batch_of(samples, "samples").layers]
        check_rows(layers, self._given_correction, "samples")
        method = self._given_method
        if method == "auto" and self.average is not None:
            method = "dual" if isinstance(self.average, QueueAverage) else "primal"
        method = choose_method(
            method, layers, layers[0].shape[0], kept=True, estimator=self.estimator, joint=self.joint
        )
        if method == "primal":
            if isinstance(self.average, QueueAverage):
                raise ValueError("average: got QueueAverage with method 'primal', expected method 'dual'")
            layers = joined(layers, self.joint)
            check_memory(layers, "samples")
            results = [covariance_op(y, self._given_correction, True, self.precision) for y in layers]
            self._set_matrices([cov for cov, _ in results], torch.cat([m for _, m in results]), self._given_correction)
            return
        if isinstance(self.average, Average):
            raise ValueError(f"average: got {self.average} with method 'dual', expected QueueAverage or None")
        widths = [sum(columns_of(y) for y in layers)] if self.joint else [columns_of(y) for y in layers]
        layer_weights(self.cov_weight, "cov_weight", len(widths))
        self.widths, self.method, self.correction = widths, method, self._given_correction
        if not is_zero(self.mean_weight):
            flat = joined([y.flatten(1) for y in layers], self.joint)
            means = _means(moments(flat, var=False).mean, widths)
            self._set_mean_loss(means, None, self.process_group)
        self._set_buffer("target_cov", None)
        self._set_buffers("_sample_names", {f"samples_{i}": y.clone() for i, y in enumerate(layers)})

    def _set_matrices(self, matrices: Sequence[Tensor], mean: Tensor | None, correction: int) -> None:
        widths = [len(matrix) for matrix in matrices]
        layer_weights(self.cov_weight, "cov_weight", len(widths))
        dtype = torch.float64 if matrices[0].dtype == torch.float64 else torch.float32
        packed = torch.cat([triangle.pack(matrix.detach().to(dtype)) for matrix in matrices])
        if mean is not None and not is_zero(self.mean_weight):
            average = self.average if isinstance(self.average, Average) else None
            # What is merged over processes is merged before it comes there.
            self._set_mean_loss(_means(mean.detach(), widths), average, False)
        self.widths, self.method, self.correction = widths, "primal", correction
        self._set_buffers("_sample_names", {})
        self._set_buffer("target_cov", packed)

    def _set_mean_loss(self, target: Moments, average: Average | None, process_group: ProcessGroup) -> None:
        if self.mean_loss is not None and self.mean_loss.process_group is process_group:
            self.mean_loss.reset(target)
            return
        self.mean_loss = MomentLoss(
            target,
            average,
            mean_weight=self.mean_weight,
            reduction=self.reduction,
            process_group=process_group,
        ).train(self.training)

    def _new_state(self, average: Average) -> dict[str, Tensor]:
        """The state of the average of packed covariances, by name, in the order of the operator."""
        state = average.new_state(self.target_cov, False)
        state = {name.replace("mean_", "cov_") if name != "step" else name: value for name, value in state.items()}
        if isinstance(average, AdamMovingAverage) and average.init == "uniform":
            # Drawn for the number of packed entries: make it that of full matrices, and those symmetric.
            entries = sum(width * width for width in self.widths)
            value = state["cov_average"].mul_((self.target_cov.numel() / entries) ** 0.5)
            for width, packed in zip(self.widths, triangle.split(value, self.widths), strict=True):
                for block in range(triangle.blocks(width)):
                    triangle.make_symmetric(triangle.diagonal(packed, width, block))
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """The queue has the size of the batches that were kept, which a new loss does not know."""
        for name in self._queue_names:
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and value.shape != self._buffers[name].shape:
                self.register_buffer(name, torch.empty_like(value, device=self._buffers[name].device))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if isinstance(self.average, QueueAverage):
            self._filled = min(int(self.queue_step), self.average.batches)
