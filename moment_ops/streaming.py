"""Moments of a whole data set, batch by batch."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from moment_ops.statistics import Moments, moments


def dataset_moments(extractor: Callable[[Any], Any], batches: Iterable[Any], *, progress: bool = False) -> Moments:
    """Mean and variance of an extractor's features over all batches, merged in float64.

    Args:
        extractor: maps a batch of inputs to features (a Tensor or a sequence of Tensors) or to Moments. A module is put
            into `eval()` mode meanwhile.
        batches: batches of inputs, of any sizes; of a tuple or list, as data loaders give, the first item is taken.
            A batch on another device than a module's parameters is moved there.
        progress: show a progress bar (needs tqdm).

    Returns:
        Moments with correction 1, without gradients, in the dtype of a batch's moments.

    Raises:
        ValueError: no batches, or batches whose features differ in shape.

    Cost: one read of the features, one (F,) merge per batch; memory does not grow with the data set.
    """
    modules = list(extractor.modules()) if isinstance(extractor, torch.nn.Module) else []
    was_training = [module.training for module in modules]
    parameter = next((p for module in modules for p in module.parameters(recurse=False)), None)
    total: Moments | None = None
    dtype = None
    try:
        for module in modules[:1]:
            module.eval()
        with torch.no_grad():
            for batch in _with_progress(batches) if progress else batches:
                inputs = batch[0] if isinstance(batch, (list, tuple)) else batch
                if parameter is not None and isinstance(inputs, Tensor):
                    inputs = inputs.to(parameter.device)
                features = extractor(inputs)
                part = features if isinstance(features, Moments) else moments(features)
                dtype = part.mean.dtype
                # Between batches in float64: thousands of roundings to float32 would add up.
                part = _cast(part, torch.float64)
                total = part if total is None else Moments.merge(total, part)
    finally:
        for module, training in zip(modules, was_training, strict=True):
            module.training = training
    if total is None or dtype is None:
        raise ValueError("batches: got none, expected at least one")
    return _cast(total, dtype)


def _cast(m: Moments, dtype: torch.dtype) -> Moments:
    var = None if m.var is None else m.var.to(dtype)
    return Moments(m.mean.to(dtype), var, None, m.count, m.correction, m.shapes, names=m.names, validate=False)


def _with_progress(batches: Iterable[Any]) -> Iterable[Any]:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("progress=True needs tqdm: pip install 'moment-ops[train]'") from None
    return tqdm(batches, desc="moments", unit="batch", disable=None)
