"""The Gram operators in plain PyTorch: the definition that kernels are tested against."""

from collections.abc import Sequence

import torch
from torch import Tensor


def _shifted(rows: Sequence[Tensor], shift: Sequence[Tensor]) -> Tensor:
    """The rows of one layer less their shifts, (R, D), float64."""
    return torch.cat([x.double() - less.double() for x, less in zip(rows, shift, strict=True)])


def gram(rows: Sequence[Tensor], shift: Sequence[Tensor], num_layers: int) -> Tensor:
    """(L, R, R) float64: products of all rows of a layer less their shifts, with float64 sums.

    Args:
        rows: group after group, each with one (n, D_l) per layer.
        shift: (D_l,) for each of them, in the dtype of the statistics.
    """
    shifted = (_shifted(rows[layer::num_layers], shift[layer::num_layers]) for layer in range(num_layers))
    upper = torch.stack([z @ z.mT for z in shifted]).triu()
    # Exactly symmetric, which a product is not.
    return upper + upper.triu(1).mT


def gram_backward(
    grad: Tensor, rows: Sequence[Tensor], shift: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor]:
    """`(grad + grad') (rows - shift)` for the wanted entries of `rows`, each in its shape and dtype."""
    num_layers = len(grad)
    outputs: list[Tensor | None] = [None] * len(rows)
    for layer in range(num_layers):
        counts = [x.shape[0] for x in rows[layer::num_layers]]
        shifted = _shifted(rows[layer::num_layers], shift[layer::num_layers])
        products = (grad[layer] + grad[layer].mT) @ shifted
        for i, product in zip(range(layer, len(rows), num_layers), products.split(counts), strict=True):
            outputs[i] = product.to(rows[i].dtype)
    return [product for product, want in zip(outputs, wanted, strict=True) if want and product is not None]
