"""Exact gradients of a loss of statistics of a large batch, of which one part at a time is in memory."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import get_device_states, set_device_states

from moment_ops.statistics import Moments


def backward_in_parts(forward: Callable[[Any], Any], parts: Iterable[Any], loss_fn: Callable[[Any], Tensor]) -> Tensor:
    """`loss_fn(forward(batch)).backward()` for a batch that does not fit into memory, computed part by part.

    Value, gradients and the state of the loss are those of the whole batch, but for rounding. Gradients are added to
    `grad`, as by `backward()`.

    Args:
        forward: maps a part to Moments with counts (as a `MomentExtractor` does), to features (Tensors whose first
            dimension is the batch), or to a tuple, list or dict of these. It is called twice per part, the second time
            with the random numbers of the first. Rows must be independent: BatchNorm in training mode is an error.
        parts: the parts of the batch, of any sizes; what `forward` takes.
        loss_fn: maps what `forward` would return for the whole batch to a scalar loss. It is called once.

    Returns:
        The loss, detached.

    Raises:
        TypeError, ValueError: no parts, parts that do not agree, other results of `forward`, or BatchNorm that
            normalizes with the statistics of a part.
        RuntimeError: nothing requires grad.

    Example:

        loss = mo.backward_in_parts(lambda z: extractor(generator(z)), latents.split(64), loss_fn)

    Cost: two forward passes and one backward pass per part. Besides one part, memory holds the moments, or the
    features, of all of them: prefer Moments, whose size does not depend on the rows.
    """
    parts = list(parts)
    if not parts:
        raise ValueError("parts: got none, expected at least one")
    states, results = [], []
    with torch.no_grad(), _independent_rows():
        for part in parts:
            states.append(_random_state(part))
            results.append(pytree.tree_map(_leaf, forward(part)))
    with torch.enable_grad():
        loss = loss_fn(_joined(results))
    leaves = [[x for x in pytree.tree_leaves(result) if _takes_gradient(x)] for result in results]
    gradients = iter(torch.autograd.grad(loss, [x for part in leaves for x in part], allow_unused=True))
    reached = False
    for part, state, of_part in zip(parts, states, leaves, strict=True):
        given = [next(gradients) for _ in of_part]
        _restore_random_state(state)
        with torch.enable_grad():
            again = [x for x in pytree.tree_leaves(forward(part)) if _takes_gradient(x)]
        pairs = [(x, grad) for x, grad in zip(again, given, strict=True) if x.requires_grad and grad is not None]
        if pairs:
            reached = True
            torch.autograd.backward(*zip(*pairs, strict=True))
    if not reached:
        raise RuntimeError("forward: got results that do not require grad, expected some that do")
    return loss.detach()


def _takes_gradient(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _leaf(x: Any) -> Any:
    return x.detach().requires_grad_() if _takes_gradient(x) else x


def _joined(results: Sequence[Any]) -> Any:
    """What `forward` would return for all parts together."""
    first, structure = pytree.tree_flatten(results[0], is_leaf=_is_moments)
    columns = [first]
    for i, result in enumerate(results[1:], 1):
        values, other = pytree.tree_flatten(result, is_leaf=_is_moments)
        if other != structure:
            raise ValueError(f"parts[{i}]: got another structure of results than for parts[0]")
        columns.append(values)
    return pytree.tree_unflatten([_join(values) for values in zip(*columns, strict=True)], structure)


def _is_moments(x: Any) -> bool:
    return isinstance(x, Moments)


def _join(values: Sequence[Any]) -> Any:
    if isinstance(values[0], Moments):
        return values[0] if len(values) == 1 else Moments.merge(*values)
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    raise TypeError(f"forward: got {type(values[0]).__name__}, expected Moments or Tensors")


@contextmanager
def _independent_rows() -> Iterator[None]:
    """Raise an error when a module is called that normalizes with the statistics of a part."""

    def check(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"forward: got {type(module).__name__} in training mode, which normalizes a part with its own"
                " statistics, expected rows that are independent; compute what is before it for the whole batch"
            )

    handle = nn.modules.module.register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()


def _random_state(part: Any) -> tuple[Tensor, list[int], list[Tensor]]:
    return torch.get_rng_state(), *get_device_states(*pytree.tree_leaves(part))


def _restore_random_state(state: tuple[Tensor, list[int], list[Tensor]]) -> None:
    on_cpu, devices, on_devices = state
    torch.set_rng_state(on_cpu)
    set_device_states(devices, on_devices)
