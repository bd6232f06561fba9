"""The Frechet loss: the Frechet distance of features to target Gaussians, as a loss to train with."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moment_ops.averages import Average, MovingAverage
from moment_ops.distributed import ProcessGroup, gather_rows, group_size, row_counts
from moment_ops.losses import frechet_state
from moment_ops.losses.buffers import BufferedLoss
from moment_ops.losses.frechet_matching import (
    DistanceByColumns,
    DistanceOfRows,
    Gaussian,
    Options,
    Target,
    average_mixture,
    mixed,
    rows_of,
)
from moment_ops.losses.frechet_target import (
    Pool,
    auto_method,
    check_options,
    check_rows,
    check_target,
    pools_of,
    rows_of_layers,
    targets_of,
)
from moment_ops.losses.weights import LayerWeight, layer_weights, own_weight
from moment_ops.ops import checks
from moment_ops.ops.layout import statistics_dtype
from moment_ops.ops.nodes import below_transforms, wants_grad
from moment_ops.statistics import Moments


def frechet_loss(
    input: checks.Features,
    target: Moments,
    *,
    correction: int = 1,
    method: str = "auto",
    precision: str = "ieee",
    weight: LayerWeight = 1.0,
    pool: Pool = None,
    normalize: bool = False,
    eps: float = 0.0,
    process_group: ProcessGroup = False,
    even: bool = False,
) -> Tensor:
    """The Frechet distance of the features of a batch to target Gaussians, `sum_l weight_l distance_l` over layers l.

    `distance = |m - t|^2 + tr C + tr T - 2 tr (T^1/2 C T^1/2)^1/2`, where m and C are mean and covariance of the
    features, and t and T those of the target. Use `FrechetLoss` to train: it decomposes the target once, and has
    averages. `frechet_distance` is the distance between two `Moments`.

    Args:
        input: features, one (N, ...) Tensor per layer, N > correction, in float32, bfloat16, float16 or float64.
            Dimensions after the batch are flattened to D columns, unless `pool` is given. Layers are often those of
            several networks. If input and target both have names, they must be equal.
        target: Moments with covariances, which may be singular. They are constants.
        correction: c in the divisor N - c of C.
        method: how the trace term and its gradient are computed. "eigh" decomposes a float64 matrix of size min(N, D),
            and is exact; on a GPU the host waits for it. "qdwh" takes two rational steps with a Cholesky factorisation
            each, the first in float64, and then products in float32. "polynomial" takes products only, in the named
            precision; where a (D, D) covariance of several processes or batches is decomposed, it is "qdwh". The latter
            two never wait for the device. "auto" takes "eigh" on a CPU if min(N, D) <= 512, and otherwise "qdwh"; on
            other devices "polynomial".
        precision: of the products of "polynomial", as for `covariance`: "ieee", "bf16x3", "tf32" or "bf16". The
            CPU always uses "ieee".
        weight: a number, or one per layer; finite and non-negative.
        pool: a number p, or one or None per layer: (N, C, H, W) features are averaged to (N, C, p, p) first.
        normalize: whether each distance is divided by its own detached value plus eps, so that only gradients are
            scaled.
        eps: see `normalize`.
        process_group: the batch is that of all processes of this group. None is the default group if torch.distributed
            is initialized, False is this process alone. The loss is the same on every process, and parameters under
            DistributedDataParallel get the gradient of one process on the concatenated batch. Processes may have no
            rows; with too few rows in all, the loss is NaN.
        even: whether all processes have the same number of rows, so that the host need not wait for these numbers.

    Returns:
        Scalar, float32 (float64 for float64), differentiable once with respect to the input. Features that are not
        finite make it non-finite.

    Raises:
        TypeError, ValueError: wrong types, dtypes, devices, shapes, names, options or weights; too few rows; a target
            without covariances, or with an indefinite one. The message names the argument.
        NotImplementedError: a second derivative.

    Cost: an eigendecomposition of each target, for which the host waits. Besides, with N < D and "qdwh" or "eigh",
    2 N D^2 operations in float64 and those of the decomposition of an (N, N) matrix. Over several processes rows are
    gathered if they are fewer than D, and otherwise one (D, D) matrix is summed.

    Source: Dowson and Landau 1982 for the distance. The gradient is that of a nuclear norm, the polar factor.
    """
    check_options(correction, method, precision, normalize, eps, even)
    check_target(target).check_values()
    pools = pools_of(pool, len(target.shapes))
    weights = layer_weights(weight, "weight", len(target.shapes))
    alone = group_size(process_group) == 1
    layers = rows_of_layers(input, target.sizes, target.names, target.mean.device, pools, empty=not alone)
    if alone:
        check_rows(len(layers[0]), correction)
    with torch.no_grad():
        targets = targets_of(target)
    counts = _counts(layers[0], process_group, even)
    distances = [
        distance_of_batch(x, t, counts, correction, method, precision, process_group)
        for x, t in zip(layers, targets, strict=True)
    ]
    return total(distances, weights, normalize, eps, statistics_dtype(layers[0].dtype))


def total(
    distances: Sequence[Tensor], weights: Sequence[float], normalize: bool, eps: float, dtype: torch.dtype
) -> Tensor:
    """The weighted sum of the distances of all layers."""
    terms = [d / (d.detach() + eps) if normalize else d for d in distances]
    return torch.stack([w * term for w, term in zip(weights, terms, strict=True)]).sum().to(dtype)


def _counts(x: Tensor, process_group: ProcessGroup, even: bool) -> list[int]:
    """Numbers of rows of every process. The host waits for them, unless they are even."""
    if even:
        return [len(x)] * group_size(process_group)
    return [n for (n,) in row_counts([len(x)], x, process_group)]


def _keep(x: Tensor) -> bool:
    return torch.is_grad_enabled() and wants_grad(x)


def _nothing(x: Tensor) -> Tensor:
    """NaN for a batch without rows on any process, which takes part in backward."""
    return float("nan") * x.sum(dtype=torch.float64)


def _gathered(x: Tensor, counts: Sequence[int], process_group: ProcessGroup) -> Tensor:
    """The rows of all processes, in the order of the ranks."""
    if group_size(process_group) == 1:
        return x
    return torch.cat([part for (part,) in gather_rows([[x]], process_group, [[n] for n in counts])])


def distance_of_batch(
    x: Tensor,
    target: Target,
    counts: Sequence[int],
    correction: int,
    method: str,
    precision: str,
    process_group: ProcessGroup,
) -> Tensor:
    """The distance of the rows x, (N, D), of all processes, float64."""
    rows, columns = sum(counts), x.shape[1]
    if not rows:
        return _nothing(x)
    if method == "auto":
        method = auto_method(rows, columns, x.device, mixed=False)
    if rows >= columns and group_size(process_group) > 1:
        options = Options(correction, method, precision, process_group, _keep(x))
        return DistanceByColumns.call(x, target, None, None, False, options)[0]
    every = _gathered(x, counts, process_group)
    return DistanceOfRows.call(every, None, None, target, Options(correction, method, precision, False, _keep(every)))


class FrechetLoss(BufferedLoss):
    """The Frechet loss as a module, which decomposes its target once and keeps an average or a queue.

    Args:
        target, correction, method, precision, weight, pool, normalize, eps, even: as for `frechet_loss`. The target is
            copied. "auto" takes "qdwh" for averages and long queues on a GPU, and on a CPU for D > 512.
        average: None or MovingAverage. The loss is that of the moving average of the mixture of all batches: with
            weight b for the past and d the difference of the means, `C' = b C + (1 - b) C_batch + b (1 - b) d d'`,
            which is the average of `C + m m'`. Its gradient goes through the current batch only. In `train()` mode each
            call advances it by one step; in `eval()` mode the loss mixes the batch with the state, but leaves it as it
            is. `CovarianceLoss` averages centred covariances instead, without the term of d.
        queue: number of past rows to keep, of batches of any sizes; not together with an average. The loss is that of
            the batch and the rows in the queue together, mean and covariance, and its gradient goes through the batch.
            In `train()` mode each call adds its rows, which replace the oldest. With several processes the queue holds
            the rows of all of them on each.
        process_group: as for `frechet_loss`, but None by default.

    Call it with features, one (N, ...) Tensor per layer, or with a mapping that has the names of the target. The result
    is as that of `frechet_loss`. With `commit=False` the state advances only when `commit()` is called. `fill(batches)`
    starts the average or the queue from some batches, each of which is a step. `reset(target)` restarts them.

    Attributes:
        distances: (L,) float64 distances of the last call, detached and neither weighted nor normalized.

    A layer whose batch is not finite makes the loss non-finite, and leaves the state of this layer as it is. Buffers
    keep their dtype under `.to(torch.bfloat16)` and `.half()`. `state_dict()` holds the target, its root, and the
    state; a loss that loads it continues bit for bit.

    Raises:
        TypeError, ValueError: as `frechet_loss`; also an average together with a queue, and an AdamMovingAverage.

    Cost: as `frechet_loss`, without the decomposition of the target. An average takes 2 N D^2 operations for the rows
    times T^1/2, N D^2 for their products, both in float64, and the decomposition of a (D, D) matrix. It keeps one
    float64 (D, D) matrix, `T^1/2 C T^1/2`, from which it computes the trace term without a product of (D, D) matrices;
    the target keeps two, T and T^1/2. With several processes an average sums one (D, D) matrix, without a wait. A queue
    of at most D rows takes the cost of a batch of as many more rows; a longer one keeps the (D, D) matrix of an average
    besides its rows, and gathers the rows of all processes.
    """

    def __init__(
        self,
        target: Moments,
        average: Average | None = None,
        *,
        queue: int = 0,
        correction: int = 1,
        method: str = "auto",
        precision: str = "ieee",
        weight: LayerWeight = 1.0,
        pool: Pool = None,
        normalize: bool = False,
        eps: float = 0.0,
        process_group: ProcessGroup = None,
        even: bool = False,
    ) -> None:
        super().__init__()
        if average is not None and not isinstance(average, MovingAverage):
            raise TypeError(f"average: got {type(average).__name__}, expected MovingAverage or None")
        check_options(correction, method, precision, normalize, eps, even)
        if isinstance(queue, bool) or not isinstance(queue, int):
            raise TypeError(f"queue: got {queue!r}, expected an int")
        if queue < 0:
            raise ValueError(f"queue: got {queue}, expected a non-negative number of past rows")
        if queue and average is not None:
            raise ValueError(f"queue: got {queue} together with an average, expected only one of them")
        self.average, self.queue, self.correction = average, queue, correction
        self.method, self.precision, self.normalize, self.eps = method, precision, normalize, eps
        self.process_group, self.even = process_group, even
        self._given = {"weight": own_weight(weight), "pool": own_weight(pool)}
        self._target_names: tuple[str, ...] = ()
        self.distances: Tensor | None = None
        self.reset(target)

    def reset(self, target: Moments | None = None) -> None:
        """Empty the average or the queue, with a new target if one is given.

        Buffers whose shapes do not change keep their addresses.
        """
        if target is not None:
            self._set_target(target)
        state: dict[str, Tensor] = {}
        for i in range(len(self.sizes)):
            gaussian = dict(zip(frechet_state.GAUSSIAN, frechet_state.new_gaussian(self._target(i)), strict=True))
            of_layer = gaussian if self.average is not None or self._is_long(i) else {}
            if self.average is not None:
                of_layer["step"] = frechet_state.new_count(self._target(i))
            if self.queue:
                empty = self._target(i).mean.new_zeros((0, self.sizes[i]), dtype=torch.float32)
                of_layer |= {"queue": empty, "queue_count": frechet_state.new_count(self._target(i))}
            state |= {f"{name}_{i}": value for name, value in of_layer.items()}
        self._restart(state)

    def extra_repr(self) -> str:
        return f"columns={self.sizes}, average={self.average}, queue={self.queue}, method={self.method!r}"

    def _set_target(self, target: Moments) -> None:
        """Check everything before changing anything."""
        check_target(target).check_values()
        pools = pools_of(self._given["pool"], len(target.shapes))
        weights = layer_weights(self._given["weight"], "weight", len(target.shapes))
        targets = targets_of(target)
        self.sizes, self.names, self._pools, self._weights = target.sizes, target.names, pools, weights
        self._set_buffers(
            "_target_names",
            {
                f"target_{name}_{i}": value.detach().clone().reshape(value.shape or (1,))
                for i, layer in enumerate(targets)
                for name, value in zip(Target._fields, layer, strict=True)
            },
        )

    def _target(self, i: int) -> Target:
        mean, cov, root, trace = self._state(i, [f"target_{name}" for name in Target._fields])
        return Target(mean, cov, root, trace[0])

    def _state(self, i: int, names: Sequence[str]) -> list[Tensor]:
        return [self._buffers[f"{name}_{i}"] for name in names]

    def _is_long(self, i: int) -> bool:
        """Whether the queue is kept as a Gaussian, too."""
        return self.queue > self.sizes[i]

    def _layers(self, input: checks.Features) -> list[Tensor]:
        alone = group_size(self.process_group) == 1
        device = self._buffers["target_mean_0"].device
        layers = rows_of_layers(input, self.sizes, self.names, device, self._pools, empty=not alone)
        if alone and not self.queue:
            check_rows(len(layers[0]), self.correction)
        return layers

    def _loss(self, input: checks.Features, commit: bool) -> Tensor:
        layers = self._layers(input)
        counts = [] if self.average is not None else _counts(layers[0], self.process_group, self.even)
        distances: list[Tensor] = []
        pending: list[Tensor] = []
        for i, x in enumerate(layers):
            if self.average is not None:
                distance, update = self._averaged(i, x, self.average)
            elif self.queue:
                distance, update = self._with_queue(i, x, counts)
            else:
                update = []
                distance = distance_of_batch(
                    x, self._target(i), counts, self.correction, self.method, self.precision, self.process_group
                )
            distances.append(distance)
            pending += update
        below_transforms(self._keep_distances, torch.stack(distances))
        if pending and self.training:
            below_transforms(partial(self._advance, commit), *pending)
        return total(distances, self._weights, self.normalize, self.eps, statistics_dtype(layers[0].dtype))

    def _keep_distances(self, distances: Tensor) -> None:
        self.distances = distances.detach()

    def _options(self, x: Tensor, rows: int, mixed: bool, process_group: ProcessGroup) -> Options:
        method = self.method
        if method == "auto":
            method = auto_method(rows, x.shape[1], x.device, mixed=mixed)
        return Options(self.correction, method, self.precision, process_group, _keep(x))

    def _weight_of_past(self, i: int, average: MovingAverage) -> Tensor:
        return frechet_state.weight_of_past(self._buffers[f"step_{i}"], average.decay, average.bias_correction)

    def _averaged(self, i: int, x: Tensor, average: MovingAverage) -> tuple[Tensor, list[Tensor]]:
        """The distance of the mixture with the average, and the next state."""
        state = self._state(i, frechet_state.AVERAGE)
        options = self._options(x, len(x), True, self.process_group)
        distance, *now = DistanceByColumns.call(
            x, self._target(i), frechet_state.gaussian_of(state[:3]), self._weight_of_past(i, average), False, options
        )
        accept = distance.detach().isfinite()
        return distance, frechet_state.advanced_average(state, Gaussian(*[v.detach() for v in now]), accept)

    def _with_queue(self, i: int, x: Tensor, counts: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """The distance of the batch and the queue together, and the rows that enter the queue."""
        if not sum(counts):
            return _nothing(x), [x.detach()]
        every = _gathered(x, counts, self.process_group)
        queue, count = self._state(i, frechet_state.QUEUE)
        known = count.clamp_max(self.queue)
        if self._is_long(i):
            past = frechet_state.gaussian_of(self._state(i, frechet_state.GAUSSIAN))
            options = self._options(every, len(every), True, False)
            distance = DistanceByColumns.call(every, self._target(i), past, known.double(), True, options)[0]
        else:
            # A copy, as the queue is overwritten before backward.
            options = self._options(every, self.queue + len(every), False, False)
            others = queue if len(queue) else None
            distance = DistanceOfRows.call(every, others, known, self._target(i), options)
        return distance, [every[-self.queue :].detach()]

    def _fill_one(self, batch: Any) -> None:
        """A step without the loss."""
        self._pending = False
        layers = self._layers(batch)
        counts = _counts(layers[0], self.process_group, self.even) if self.queue else []
        for i, x in enumerate(layers):
            if self.average is None:
                self._enqueue(i, _gathered(x, counts, self.process_group)[-self.queue :])
                continue
            state = self._state(i, frechet_state.AVERAGE)
            rows = rows_of(x, self._target(i), self.process_group)
            weight = self._weight_of_past(i, self.average)
            past, mixture = frechet_state.gaussian_of(state[:3]), average_mixture(weight, rows.count, self.correction)
            now = mixed(rows, past, mixture, self._target(i))
            new = frechet_state.advanced_average(state, now, (now.trace + now.mean.sum()).isfinite())
            for buffer, value in zip(state, new, strict=True):
                buffer.copy_(value)

    def _update(self, *pending: Tensor) -> None:
        if self.average is not None:
            super()._update(*pending)
            return
        for i, rows in enumerate(pending):
            self._enqueue(i, rows)

    def _enqueue(self, i: int, rows: Tensor) -> None:
        if len(rows) and not len(self._buffers[f"queue_{i}"]):
            # A queue has the dtype of the first rows. A tensor made in inference mode could not change outside of it.
            with torch.inference_mode(False):
                self._set_buffer(f"queue_{i}", rows.new_zeros((self.queue, rows.shape[1])))
        queue, count = self._state(i, frechet_state.QUEUE)
        gaussian = self._state(i, frechet_state.GAUSSIAN) if self._is_long(i) else []
        frechet_state.enqueue(queue, count, rows, gaussian, self._target(i))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """The rows of a queue have the dtype of the batches, which a new loss has not seen."""
        for i in range(len(self.sizes) if self.queue else 0):
            name = f"queue_{i}"
            value = state_dict.get(prefix + name)
            if not isinstance(value, Tensor) or value.dim() != 2:
                continue
            if len(value) not in (0, self.queue):
                errors = rest[-1]
                errors.append(f"{prefix}queue: got a state of {len(value)} past rows, expected {self.queue}")
                return
            if not self._fits(name, value):
                self.register_buffer(name, torch.empty_like(value, device=self._buffers[name].device))
        super()._load_from_state_dict(state_dict, prefix, *rest)
