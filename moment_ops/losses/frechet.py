"""The Frechet (Wasserstein-2) distance between Gaussians, as in the Frechet Inception Distance."""

from typing import Any

import torch
from torch import Tensor

from moment_ops.statistics import Moments


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.mT


def _inverse_root(matrix: Tensor) -> Tensor:
    """The square root's inverse on the matrix's range, zero elsewhere."""
    values, vectors = torch.linalg.eigh(matrix)
    tolerance = values.amax(-1, keepdim=True) * matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    return (vectors * torch.where(values > tolerance, values, torch.inf).rsqrt()) @ vectors.mT


class _TraceOfRoot(torch.autograd.Function):
    """tr (A^1/2 B A^1/2)^1/2, with its closed-form gradient: equal eigenvalues give eigenvectors none."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        root = _root(a)
        return torch.linalg.eigvalsh(root @ b @ root).clamp_min(0).sqrt().sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if torch.is_grad_enabled():
            raise NotImplementedError("frechet_distance: differentiable once, its backward got create_graph=True")

        def derivative(fixed: Tensor, variable: Tensor) -> Tensor:
            root = _root(fixed)
            return grad / 2 * (root @ _inverse_root(root @ variable @ root) @ root)

        a, b = ctx.saved_tensors
        d_a = derivative(b, a) if ctx.needs_input_grad[0] else None
        d_b = derivative(a, b) if ctx.needs_input_grad[1] else None
        return d_a, d_b


def _gaussian(mean: Any, cov: Any, name: str) -> tuple[Tensor, Tensor]:
    mean, cov = torch.as_tensor(mean).double(), torch.as_tensor(cov).double()
    if mean.dim() != 1:
        raise ValueError(f"mean{name}: got shape {tuple(mean.shape)}, expected (D,)")
    if cov.shape != (mean.shape[0], mean.shape[0]):
        raise ValueError(f"cov{name}: got shape {tuple(cov.shape)}, expected {(mean.shape[0], mean.shape[0])}")
    return mean, (cov + cov.mT) / 2


def _from_moments(moments: Moments, name: str) -> tuple[Tensor, Tensor]:
    if moments.cov is None or len(moments.cov) != 1:
        raise ValueError(f"{name}: expected Moments of one layer with its covariance")
    return moments.mean, moments.cov[0]


def frechet_distance(mean1: Any, cov1: Any, mean2: Any = None, cov2: Any = None) -> Tensor:
    """`|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2)` between the Gaussians (m1, C1) and (m2, C2).

    Args:
        mean1, cov1, mean2, cov2: (D,) means and (D, D) covariances, Tensors or arrays; or two Moments of one layer each
            with its covariance, `frechet_distance(first, second)`.

    Returns:
        Scalar float64, by float64 `eigh`; singular covariances are fine. Differentiable once, by the closed form.

    Cost: two or three eigendecompositions of size D; on a GPU each waits for the device.
    """
    if isinstance(mean1, Moments) and isinstance(cov1, Moments) and mean2 is None and cov2 is None:
        mean1, cov1, mean2, cov2 = *_from_moments(mean1, "first"), *_from_moments(cov1, "second")
    if any(part is None or isinstance(part, Moments) for part in (mean1, cov1, mean2, cov2)):
        raise TypeError("frechet_distance: expected two Moments, or mean1, cov1, mean2, cov2")
    mean1, cov1 = _gaussian(mean1, cov1, "1")
    mean2, cov2 = _gaussian(mean2, cov2, "2")
    if mean1.shape != mean2.shape:
        raise ValueError(f"mean2: got {mean2.shape[0]} entries, expected {mean1.shape[0]} as mean1")
    with torch.autocast(mean1.device.type, enabled=False):
        distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace()
        return (distance - 2 * _TraceOfRoot.apply(cov1, cov2)).clamp_min(0)
