"""Gaussians and batches for the tests of the Frechet loss."""

import math

import torch
from torch import Tensor

import moment_ops as mo


def spectrum(columns: int, condition: float, kind: str) -> Tensor:
    i = torch.arange(columns, dtype=torch.float64)
    if kind == "geometric":
        return condition ** (-i / max(columns - 1, 1))
    return (i + 1) ** (-math.log(condition) / math.log(max(columns, 2)))


def problem(
    rows: int,
    columns: int,
    *,
    condition: float = 100.0,
    kind: str = "geometric",
    turn: float = 0.5,
    scale: float = 1.3,
    rank: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[mo.Moments, Tensor]:
    """A target in float64, and a batch of a Gaussian whose axes are turned and whose covariance is scaled."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    values = spectrum(columns, condition, kind)
    of_target = values.clone()
    of_target[columns if rank is None else rank :] = 0
    axes = torch.linalg.qr(normal(columns, columns)).Q
    turned = torch.linalg.qr(axes + turn / math.sqrt(columns) * normal(columns, columns)).Q
    cov = (axes * of_target) @ axes.mT
    target = mo.Moments(0.1 * normal(columns), cov=(cov + cov.mT) / 2)
    return target, (normal(rows, columns) * (scale * values).sqrt() @ turned.mT).to(dtype)


def cosine(ours: Tensor, exact: Tensor) -> float:
    ours, exact = ours.double().flatten(), exact.double().flatten()
    return float(ours @ exact / ours.norm() / exact.norm())
