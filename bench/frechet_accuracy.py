"""`python -m bench.frechet_accuracy`: errors of the Frechet loss and of its gradient against float64, as a table.

Rows and targets have geometric or power-law spectra; a case is a spectrum, a condition, a number of rows, a rank of the
target and a distance relative to the traces. The exact value and gradient are those of float64 eigenvalues, with what
is left of vanishing ones cut off.
"""

import argparse
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import moment_ops as mo

METHODS = (("eigh", "ieee"), ("qdwh", "ieee"), *(("polynomial", p) for p in ("ieee", "bf16x3", "tf32", "bf16")))
CONDITIONS = (1.0, 1e4, 1e6, 1e8)
# How far the axes are turned: distances of about 0.1, 1e-2, 1e-3 and 1e-4 of the traces, for many rows.
TURNS = (0.5, 0.15, 0.05, 0.015)


def spectrum(columns: int, condition: float, kind: str) -> Tensor:
    i = torch.arange(columns, dtype=torch.float64)
    if kind == "geometric":
        return condition ** (-i / (columns - 1))
    return (i + 1) ** (-math.log(condition) / math.log(columns))


def rows_and_target(
    rows: int, columns: int, condition: float, kind: str, rank: int, turn: float
) -> tuple[Tensor, mo.Moments]:
    """A batch, and a target that is its covariance with turned axes, of less rank, so that their distance is small."""
    torch.manual_seed(0)
    values = spectrum(columns, condition, kind)
    axes = torch.linalg.qr(torch.randn(columns, columns, dtype=torch.float64)).Q
    noise = torch.randn(columns, columns, dtype=torch.float64)
    x = (torch.randn(rows, columns, dtype=torch.float64) * values.sqrt() @ axes.mT).float()
    turned = torch.linalg.matrix_exp(turn / math.sqrt(2 * columns) * (noise - noise.mT))
    own, vectors = torch.linalg.eigh(torch.cov(x.double().T))
    own = own.clamp_min(0)
    own[: columns - rank] = 0
    basis = turned @ vectors
    cov = (basis * own) @ basis.mT
    return x, mo.Moments(x.double().mean(0), cov=(cov + cov.mT) / 2)


def exact(x: Tensor, target: mo.Moments) -> tuple[Tensor, Tensor, Tensor]:
    """(distance, gradient, traces) by the singular values of `R T^1/2` in float64."""
    assert target.cov is not None
    values, vectors = torch.linalg.eigh(target.cov[0])
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
    wide = x.double()
    freedom = (len(x) - 1) ** 0.5
    rows = (wide - wide.mean(0)) / freedom
    left, singular, right = torch.linalg.svd(rows @ root, full_matrices=False)
    rank = int((singular > 1e-13 * singular[0]).sum())
    traces = rows.square().sum() + target.cov[0].trace()
    polar = left[:, :rank] @ right[:rank]
    shift = wide.mean(0) - target.mean
    gradient = 2 / freedom * (rows - polar @ root) + 2 * shift / len(x)
    return shift.square().sum() + traces - 2 * singular.sum(), gradient, traces


def errors(x: Tensor, target: mo.Moments, method: str, precision: str) -> tuple[float, float, float]:
    """Errors of the value over the distance and over the traces, and 1 - cosine of the gradient."""
    distance, gradient, traces = exact(x, target)
    with mo.backend("reference"):
        loss_fn = mo.FrechetLoss(target, method=method, precision=precision)
        y = x.clone().requires_grad_()
        (ours,) = torch.autograd.grad(loss_fn(y), y)
    assert loss_fn.distances is not None
    error = (loss_fn.distances[0] - distance).abs()
    cosine = (ours.double() * gradient).sum() / ours.double().norm() / gradient.norm()
    return float(error / distance), float(error / traces), 1 - float(cosine)


def cases(columns: int) -> Iterator[tuple[str, float, int, int, float]]:
    sizes = (columns // 4, 3 * columns // 2)
    ranks = (columns, columns // 3)
    yield from itertools.product(("geometric", "power"), CONDITIONS, sizes, ranks, TURNS)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.frechet_accuracy", description=__doc__)
    parser.add_argument("--columns", type=int, nargs="+", default=[64])
    options = parser.parse_args(arguments)
    worst: dict[tuple[str, str, float, int], list[float]] = {}
    for columns in options.columns:
        for kind, condition, rows, rank, turn in cases(columns):
            x, target = rows_and_target(rows, columns, condition, kind, rank, turn)
            distance, _, traces = exact(x, target)
            share = round(math.log10(float(distance / traces)))
            for method, precision in METHODS:
                key = (method, precision, condition, share)
                found = errors(x, target, method, precision)
                worst[key] = [max(a, b) for a, b in zip(worst.get(key, found), found, strict=True)]
    print("| method | products | condition | distance / traces | error / distance | error / traces | 1 - cosine |")
    print("|---|---|---|---|---:|---:|---:|")
    for (method, precision, condition, share), found in sorted(worst.items(), key=str):
        cells = " | ".join(f"{value:.0e}" for value in found)
        print(f"| {method} | {precision} | {condition:.0e} | 1e{share} | {cells} |")


if __name__ == "__main__":
    main()
