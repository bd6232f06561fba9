"""The weights of losses: a number, one number per layer, or one per column."""

import math
import sys
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

LayerWeight: TypeAlias = float | Sequence[float]
Weight: TypeAlias = LayerWeight | Tensor


def weight_number(value: Any, name: str) -> float:
    """A finite, non-negative number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {value!r}, expected a number")
    if not 0 <= value <= sys.float_info.max:
        raise ValueError(f"{name}: got {value}, expected a finite, non-negative number")
    return float(value)


def layer_weights(weight: Any, name: str, num_layers: int) -> list[float]:
    """One number per layer, from a number or one per layer."""
    if isinstance(weight, (int, float)):
        return [weight_number(weight, name)] * num_layers
    if not isinstance(weight, Sequence) or isinstance(weight, str):
        raise TypeError(f"{name}: got {type(weight).__name__}, expected a number or one number per layer")
    numbers = [weight_number(w, f"{name}[{i}]") for i, w in enumerate(weight)]
    if len(numbers) != num_layers:
        raise ValueError(f"{name}: got {len(numbers)} weights, expected one per layer, {num_layers}")
    return numbers


def column_weights(
    weight: Any, name: str, sizes: Sequence[int], like: Tensor, *, kept: bool = False
) -> tuple[float, Tensor | None]:
    """A weight as a scale and, unless it is one number, an (F,) vector.

    Args:
        weight: a number, one number per layer, or an (F,) Tensor.
        sizes: columns of every layer.
        like: an (F,) Tensor with the dtype and the device of the vector.
        kept: whether the vector is a copy, and its values are checked on every device rather than on the CPU only.
    """
    if isinstance(weight, Tensor):
        if weight.shape != like.shape:
            raise ValueError(f"{name}: got shape {tuple(weight.shape)}, expected {tuple(like.shape)}, one per column")
        if not weight.is_floating_point():
            raise TypeError(f"{name}: got dtype {weight.dtype}, expected a floating-point Tensor")
        if weight.requires_grad:
            raise ValueError(f"{name}: got a Tensor that requires grad, expected a constant; weights get no gradients")
        if kept or weight.device.type == "cpu":
            _check_values(weight, name)
        return 1.0, weight.to(device=like.device, dtype=like.dtype, copy=kept)
    if isinstance(weight, (int, float)):
        return weight_number(weight, name), None
    numbers = layer_weights(weight, name, len(sizes))
    return 1.0, torch.cat([like.new_full((size,), w) for w, size in zip(numbers, sizes, strict=True)])


def own_weight(weight: Any) -> Any:
    """A copy for a module to keep, which does not change with the caller's."""
    if isinstance(weight, Tensor):
        return weight.detach().clone()
    return tuple(weight) if isinstance(weight, Sequence) and not isinstance(weight, str) else weight


def is_zero(weight: LayerWeight) -> bool:
    """Whether a weight, which has been checked, is zero for all layers."""
    return not any(weight) if isinstance(weight, Sequence) else weight == 0


def _check_values(weight: Tensor, name: str) -> None:
    """Raise ValueError for negative and non-finite values. Reads from the device, except while traced or batched."""
    if weight.is_meta or torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(weight):
        return
    least, most = weight.aminmax()
    # With a NaN both are NaN, and the comparison is False.
    if not (float(least) >= 0 and math.isfinite(float(most))):
        span = f"{float(least):.3g} to {float(most):.3g}"
        raise ValueError(f"{name}: got values from {span}, expected finite, non-negative ones")
