"""Deep CORAL: the distance between the covariances of two domains."""

import torch
from torch import Tensor

from moment_ops.losses.gram_distance import gram_distance
from moment_ops.ops import checks
from moment_ops.ops.covariance import covariance
from moment_ops.ops.layout import statistics_dtype


def _check(source: Tensor, target: Tensor) -> None:
    for name, x in (("source", source), ("target", target)):
        checks.embeddings(x, name)
    if target.shape[1] != source.shape[1]:
        raise ValueError(f"target: got {target.shape[1]} columns, expected {source.shape[1]} as in source")
    if target.dtype != source.dtype:
        raise TypeError(f"target: got dtype {target.dtype}, expected {source.dtype} as in source")
    if target.device != source.device:
        raise ValueError(f"target: got device {target.device}, expected {source.device} as in source")


def coral_loss(source: Tensor, target: Tensor) -> Tensor:
    """`||C_S - C_T||_F^2 / (4 D^2)`, the CORAL loss of B. Sun and K. Saenko, Deep CORAL (2016), equations 1 to 3.

    Args:
        source: (N, D) features of one domain, float32, bfloat16, float16 or float64.
        target: (M, D) features of the other, in the same dtype. M may differ from N.

    Returns:
        Scalar, float32 (float64 for float64). Covariances are unbiased, over N - 1 and M - 1. Gradients to both
        domains, as published; detach one to hold it fixed. Twice differentiable in eager mode.

    Raises:
        TypeError, ValueError: wrong types, dtypes, devices or shapes, fewer than two rows.

    Cost: with N + M < D through (N + M)^2 D inner products and no (D, D) matrix, else through the two covariances,
    (N + M) D^2 products: whichever is less.
    """
    _check(source, target)
    columns = source.shape[1]
    if source.shape[0] + target.shape[0] < columns:
        return gram_distance([source], [target], weight=[1 / (4 * columns**2)])
    first, second = (covariance(x, 1, True, "ieee")[0] for x in (source, target))
    squares = (first - second).square().sum(dtype=torch.float64)
    return (squares / (4 * columns**2)).to(statistics_dtype(source.dtype))
