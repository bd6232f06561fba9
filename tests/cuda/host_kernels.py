"""The CUDA kernels on the host behind the signatures of `moment_ops.ops.reference`, on CPU tensors."""

from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from moment_ops.ops.layout import statistics_dtype

AVERAGES = {"none": 0, "moving": 1, "adam": 2}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _array(tensor: Tensor | None) -> np.ndarray | None:
    return (
        None if tensor is None else tensor.view(torch.uint8).numpy() if tensor.dtype == torch.bool else tensor.numpy()
    )


def _layer(module: ModuleType, x: Tensor, grad: Tensor | None = None, out: Tensor | None = None):
    """A layer with the batch first whose columns are dense, contiguous or channels-last."""
    layer = module.Layer()
    layer.x, layer.rows, layer.row_stride = x.data_ptr(), x.shape[0], x.stride(0)
    layer.columns = x.numel() // x.shape[0]
    channels_last = x.dim() == 4 and x.stride(1) == 1 and x.shape[1] > 1
    layer.inner = x.shape[1] if channels_last else 1
    layer.outer = layer.columns // x.shape[1] if channels_last else 1
    if grad is not None:
        layer.grad, layer.grad_stride = grad.data_ptr(), grad.stride(0)
    if out is not None:
        layer.out, layer.out_stride = out.data_ptr(), out.stride(0)
    return layer


def _columns(input: list[Tensor]) -> int:
    return sum(x.numel() // x.shape[0] for x in input)


def moments(module: ModuleType, input: list[Tensor], correction: int = 1, var: bool = True, order: int = 0):
    """(mean, var, number of launches); poisoned outputs, blocks in an order of the caller's choosing."""
    mean = torch.full((_columns(input),), float("nan"), dtype=statistics_dtype(input[0].dtype))
    variance = torch.full_like(mean, float("nan")) if var else None
    layers = [_layer(module, x) for x in input]
    launches = module.moments(layers, _name(input[0].dtype), correction, _array(mean), _array(variance), order)
    return mean, variance, launches


def moments_backward(module, input, mean, count, grad_mean, grad_var, grad=(), correction=1, scale=None):
    out = [torch.full_like(x, float("nan")) for x in input]
    added = list(grad) or [None] * len(input)
    layers = [_layer(module, x, g, y) for x, g, y in zip(input, added, out, strict=True)]
    arrays = (_array(grad_mean), _array(grad_var), _array(mean), _array(count))
    module.moments_backward(layers, _name(input[0].dtype), *arrays, correction, _array(scale))
    return out


def match_(
    module, input, mean, var, targets, scales, weights, reduction, average_kind, options, state, update, order=0
):
    """(loss, batch mean, grad_mean, grad_var); `state` advances in place."""
    batch_mean, grad_mean, grad_var = (torch.full_like(targets[0], float("nan")) for _ in range(3))
    loss = torch.full((1,), float("nan"), dtype=grad_mean.dtype)
    if targets[1] is None:
        grad_var = None
    arguments = (
        *(None if input else _array(moment) for moment in (mean, var)),
        [],
        1,
        *map(_array, targets),
        *scales,
        *map(_array, weights),
        reduction,
        AVERAGES[average_kind.partition(",")[0]],
        list(options),
        list(map(_array, state)),
        update,
        *map(_array, (loss, batch_mean if input else None, grad_mean, grad_var)),
    )
    dtype = _name(input[0].dtype if input else mean.dtype)
    module.match([_layer(module, x) for x in input], dtype, arguments, order)
    return loss[0], batch_mean if input else mean, grad_mean, grad_var


def relu_moments(module, x, bias=None, correction=1, order=0):
    """(y, mean, var)."""
    y = torch.full_like(x, float("nan"))
    mean = torch.full((_columns([x]),), float("nan"), dtype=statistics_dtype(x.dtype))
    var = torch.full_like(mean, float("nan"))
    channel_columns = 1 if bias is None else mean.numel() // bias.numel()
    bits = None if bias is None else _array(bias.view(torch.int16) if bias.element_size() == 2 else bias)
    layer = _layer(module, x, out=y)
    module.relu_moments(layer, _name(x.dtype), bits, channel_columns, correction, _array(mean), _array(var), order)
    return y, mean, var


def relu_moments_backward(module, y, mean, grad=None, grad_mean=None, grad_var=None, correction=1):
    out = torch.full_like(y, float("nan"))
    layer = _layer(module, y, grad, out)
    arrays = (_array(grad_mean), _array(grad_var), _array(mean))
    module.relu_moments_backward(layer, _name(y.dtype), *arrays, correction)
    return out
