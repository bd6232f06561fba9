"""Moments of a whole data set, computed batch by batch."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moment_ops.covariances import check_memory
from moment_ops.ops import checks
from moment_ops.ops.covariance import covariance as covariance_op
from moment_ops.statistics import Moments, moments


def dataset_moments(
    extractor: Callable[[Any], Any], batches: Iterable[Any], *, cov: bool = False, progress: bool = False
) -> Moments:
    """Means and variances of an extractor's features over all batches, merged in float64; optionally covariances.

    Args:
        extractor: maps a batch of inputs to features (a Tensor, or a sequence or mapping of Tensors) or to Moments. A
            module runs in `eval()` mode and gets its mode back afterwards.
        batches: iterable of batches of inputs, of any sizes. Of a batch that is a tuple or a list, as data loaders
            return them, the first item is used. Inputs are moved to the device of a module's parameters.
        cov: whether the (D, D) covariance of every layer is computed too. This needs an extractor that returns features
            or Moments with covariances. Of a `MomentExtractor`, `features` is called.
        progress: whether a progress bar is shown, which needs tqdm.

    Returns:
        Moments with correction 1, without gradients, in the dtype of the moments of one batch: float32 (float64 for
        float64 features). Their names are the keys of mappings, or the names of a `MomentExtractor`.

    Raises:
        TypeError, ValueError: no batches; batches whose features differ in shape or name; `cov=True` with Moments that
            have no covariances; a covariance that does not fit into memory.
        ImportError: `progress=True` without tqdm.

    Cost: per batch one read of the features and one merge of (F,) vectors. Memory does not grow with the data set.
    With `cov=True`, each batch of N rows takes N D^2 products per layer. The sums take 12 D^2 bytes per layer, and a
    copy of the features of one layer is made.
    """
    modules = list(extractor.modules()) if isinstance(extractor, torch.nn.Module) else []
    was_training = [module.training for module in modules]
    parameter = next((p for module in modules for p in module.parameters(recurse=False)), None)
    # Other networks also have an attribute `features`, which is only a part of them.
    of_features = getattr(extractor, "features", extractor) if hasattr(extractor, "moments_and_features") else extractor
    total: Moments | None = None
    scatter = _Scatter()
    dtype = torch.float32
    try:
        for module in modules[:1]:
            module.eval()
        with torch.no_grad():
            for batch in _with_progress(batches) if progress else batches:
                inputs = batch[0] if isinstance(batch, (list, tuple)) else batch
                if parameter is not None and isinstance(inputs, Tensor):
                    inputs = inputs.to(parameter.device)
                result = of_features(inputs) if cov else extractor(inputs)
                if cov and not isinstance(result, Moments):
                    scatter.add(result)
                    continue
                part = _batch_moments(result, cov)
                dtype = part.mean.dtype
                # Merged in float64: the roundings of thousands of batches to float32 would add up.
                part = _cast(part, torch.float64)
                total = part if total is None else Moments.merge(total, part)
    finally:
        for module, training in zip(modules, was_training, strict=True):
            module.training = training
    if scatter.rows:
        return scatter.moments(scatter.names or getattr(extractor, "names", None))
    if total is None:
        raise ValueError("batches: got none, expected at least one")
    return _cast(total, dtype)


def _batch_moments(result: Any, cov: bool) -> Moments:
    if not isinstance(result, Moments):
        return moments(result)
    if cov and result.cov is None:
        raise TypeError("extractor: got Moments without covariances, expected features with cov=True")
    return result if cov else replace(result, cov=None, validate=False)


class _Scatter:
    """Sums of outer products of deviations from the mean: one (D, D) float64 matrix per layer, updated in place."""

    def __init__(self) -> None:
        self.rows = 0
        self.names: tuple[str, ...] | None = None
        self._shapes: tuple[tuple[int, ...], ...] = ()
        # The mean of the first batch, which is subtracted from all features: the remaining means are small, and lose no
        # digits in float32.
        self._pivots: list[Tensor] = []
        # (D,) float64 means of the features less the pivots.
        self._means: list[Tensor] = []
        self._sums: list[Tensor] = []

    def add(self, batch: checks.Features) -> None:
        """Add the rows of a batch of features."""
        features, _, shapes, _, names = checks.batch_of(batch)
        check_memory(features, "features", names)
        if self.rows == 0:
            self._start(features, shapes)
            self.names = names
        if names != self.names:
            raise ValueError(f"batches: got features named {names}, expected {self.names} as in the first batch")
        if shapes != self._shapes:
            raise ValueError(f"batches: got features of shapes {shapes}, expected {self._shapes} as in the first batch")
        rows = features[0].shape[0]
        share = rows / (self.rows + rows)
        for x, pivot, mean, total in zip(features, self._pivots, self._means, self._sums, strict=True):
            # Over N, not N - c, which would be NaN for a single row.
            matrix, batch_mean = covariance_op(x.flatten(1).to(pivot.dtype) - pivot, 0, True, "ieee")
            delta = batch_mean.double() - mean
            # Both factors are scaled, which keeps the sum exactly symmetric.
            shift = delta * math.sqrt(share * self.rows)
            total.add_(matrix, alpha=rows).addr_(shift, shift)
            mean.add_(delta, alpha=share)
        self.rows += rows

    def _start(self, features: Sequence[Tensor], shapes: tuple[tuple[int, ...], ...]) -> None:
        first = moments(features, var=False)
        self._shapes, self._pivots = shapes, list(first.mean.split(first.sizes))
        self._means = [torch.zeros_like(pivot, dtype=torch.float64) for pivot in self._pivots]
        self._sums = [mean.new_zeros(len(mean), len(mean)) for mean in self._means]

    def moments(self, names: tuple[str, ...] | None, correction: int = 1) -> Moments:
        """The moments of all rows."""
        freedom = self.rows - correction
        factor = 1 / freedom if freedom > 0 else math.nan
        dtype = self._pivots[0].dtype
        cov = tuple(total.mul_(factor).to(dtype) for total in self._sums)
        mean = torch.cat([m + pivot for m, pivot in zip(self._means, self._pivots, strict=True)]).to(dtype)
        var = torch.cat([matrix.diagonal() for matrix in cov])
        count = torch.full((len(cov),), self.rows, device=mean.device)
        return Moments(mean, var, cov, count, correction, self._shapes, names, validate=False)


def _cast(m: Moments, dtype: torch.dtype) -> Moments:
    var = None if m.var is None else m.var.to(dtype)
    cov = None if m.cov is None else tuple(matrix.to(dtype) for matrix in m.cov)
    return Moments(m.mean.to(dtype), var, cov, m.count, m.correction, m.shapes, names=m.names, validate=False)


def _with_progress(batches: Iterable[Any]) -> Iterable[Any]:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("progress=True needs tqdm: pip install 'moment-ops[train]'") from None
    return tqdm(batches, desc="moments", unit="batch", disable=None)
