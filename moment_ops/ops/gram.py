"""`gram` and `gram_backward`: Gram matrices of the rows of many layers, for features wider than there are rows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moment_ops.ops import backends, reference_gram
from moment_ops.ops.layout import statistics_dtype
from moment_ops.ops.library import define
from moment_ops.ops.nodes import register_derivative


def _count(rows: Sequence[Tensor], num_layers: int) -> int:
    """The number of rows of one layer, over all groups."""
    return sum(x.shape[0] for x in rows[::num_layers])


def _gram(rows: list[Tensor], shift: list[Tensor], num_layers: int) -> Tensor:
    name = backends.select("gram", rows[0])
    if name == "reference":
        with torch.autocast(rows[0].device.type, enabled=False):
            return reference_gram.gram(rows, shift, num_layers)
    out = _gram_fake(rows, shift, num_layers)
    backends.implementation(name, "gram")(rows, shift, num_layers, out)
    return out


def _gram_fake(rows: list[Tensor], shift: list[Tensor], num_layers: int) -> Tensor:
    total = _count(rows, num_layers)
    return rows[0].new_empty((num_layers, total, total), dtype=torch.float64)


def _gram_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, shift, _ = inputs
    ctx.save_for_backward(*rows, *shift)


def _gram_derivative(ctx: Any, grad: Tensor) -> tuple[list[Tensor | None], list[None], None]:
    count = len(ctx.saved_tensors) // 2
    rows, shift = list(ctx.saved_tensors[:count]), list(ctx.saved_tensors[count:])
    wanted = list(ctx.needs_input_grad[0])
    computed = iter(torch.ops.moment_ops.gram_backward.default(grad, rows, shift, wanted))
    return [next(computed) if want else None for want in wanted], [None] * count, None


def _gram_backward(grad: Tensor, rows: list[Tensor], shift: list[Tensor], wanted: list[bool]) -> list[Tensor]:
    out = _gram_backward_fake(grad, rows, shift, wanted)
    name = backends.select("gram_backward", rows[0])
    if name == "reference":
        with torch.autocast(rows[0].device.type, enabled=False):
            grads = reference_gram.gram_backward(grad, rows, shift, wanted)
        return [y.copy_(g) for y, g in zip(out, grads, strict=True)]
    backends.implementation(name, "gram_backward")(grad, rows, shift, wanted, out)
    return out


def _gram_backward_fake(grad: Tensor, rows: list[Tensor], shift: list[Tensor], wanted: list[bool]) -> list[Tensor]:
    return [torch.empty_like(x) for x, want in zip(rows, wanted, strict=True) if want]


def _gram_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grad, rows, shift, ctx.wanted = inputs
    ctx.save_for_backward(grad, *rows, *shift)


def _gram_backward_derivative(ctx: Any, tangents: list[Tensor]) -> tuple[Tensor, list[Tensor | None], list[None], None]:
    """Derivative of `(grad + grad') Z`, Z = rows - shift, by operators of PyTorch, and thus differentiable."""
    grad, *saved = ctx.saved_tensors
    count, num_layers = len(saved) // 2, len(grad)
    rows, shift = saved[:count], saved[count:]
    given = iter(tangents)
    full = [next(given) if want else None for want in ctx.wanted]
    d_grad: list[Tensor] = []
    d_rows: list[Tensor | None] = [None] * len(rows)
    with torch.autocast(grad.device.type, enabled=False):
        for layer in range(num_layers):
            dtype = shift[layer].dtype
            group = rows[layer::num_layers]
            z = torch.cat([x.to(dtype) - less for x, less in zip(group, shift[layer::num_layers], strict=True)])
            v = torch.cat(
                [
                    torch.zeros_like(x, dtype=dtype) if h is None else h.to(dtype)
                    for x, h in zip(group, full[layer::num_layers], strict=True)
                ]
            )
            product = (v @ z.mT).to(grad.dtype)
            d_grad.append(product + product.mT)
            d_z = (grad[layer] + grad[layer].mT).to(dtype) @ v
            for i, part in zip(range(layer, len(rows), num_layers), d_z.split([len(x) for x in group]), strict=True):
                d_rows[i] = part.to(rows[i].dtype) if ctx.needs_input_grad[1][i] else None
    return torch.stack(d_grad), d_rows, [None] * count, None


define("gram(Tensor[] rows, Tensor[] shift, int num_layers) -> Tensor", _gram, _gram_fake)
define(
    "gram_backward(Tensor grad, Tensor[] rows, Tensor[] shift, bool[] wanted) -> Tensor[]",
    _gram_backward,
    _gram_backward_fake,
)
register_derivative("gram", _gram_derivative, _gram_setup)
register_derivative("gram_backward", _gram_backward_derivative, _gram_backward_setup)


def gram(groups: Sequence[Sequence[Tensor]], shift: Sequence[Sequence[Tensor]]) -> Tensor:
    """Gram matrices of all rows of each layer: `Z Z'`, where Z is the rows of all groups less their shifts.

    Args:
        groups: features of L layers each, (n, D_l), with the same D_l in every group. n may differ between groups.
            Float32, bfloat16, float16 or float64, with any strides. Groups are separate tensors, so that they need not
            be concatenated.
        shift: (D_l,) for every group and layer, a constant close to the mean of the rows. Groups that are centred
            together have the same shift. It gets no gradient: the result of the caller must not depend on it, as after
            centring.

    Returns:
        (L, R, R) float64, exactly symmetric, with R rows over all groups. Products are computed in float32 (float64 for
        float64), and summed in float64 over blocks of columns. Twice differentiable in eager mode, with respect to
        the rows.

    Cost: one read of the rows and L R^2 sum(D) products. Backward takes one read and one write. On the CPU it needs two
    buffers of a few megabytes besides inputs, outputs and gradients. A second derivative makes copies.
    """
    rows = [x for features in groups for x in features]
    dtype = statistics_dtype(rows[0].dtype)
    less = [s.detach().to(dtype) for vectors in shift for s in vectors]
    return torch.ops.moment_ops.gram.default(rows, less, len(groups[0]))
