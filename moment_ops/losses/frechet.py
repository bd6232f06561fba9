"""The Frechet (Wasserstein-2) distance between Gaussians, as in the Frechet Inception Distance."""

from typing import Any, overload

import torch
from torch import Tensor

from moment_ops.ops import checks
from moment_ops.ops.nodes import Node, under_vmap
from moment_ops.statistics import Moments


def _rounding(dtype: torch.dtype) -> float:
    """The accepted error of an entry, relative to the largest entry: covariances are often computed in float32."""
    given = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    return 64 * max(given, torch.finfo(torch.float32).eps)


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.mT


def _inverse_root(matrix: Tensor) -> Tensor:
    """The pseudo-inverse of the square root."""
    values, vectors = torch.linalg.eigh(matrix)
    tolerance = values.amax(-1, keepdim=True) * matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    return (vectors * torch.where(values > tolerance, values, torch.inf).rsqrt()) @ vectors.mT


class _TraceOfRoot(Node):
    """tr (A^1/2 B A^1/2)^1/2 with its gradient in closed form; the gradient of `eigh` is NaN at equal eigenvalues."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        if not bool(a.isfinite().all() & b.isfinite().all()):
            return a.new_full((), torch.nan)
        root = _root(a)
        return torch.linalg.eigvalsh(root @ b @ root).clamp_min(0).sqrt().sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        d_a = grad * _Derivative.call(b, a) if ctx.needs_input_grad[0] else None
        d_b = grad * _Derivative.call(a, b) if ctx.needs_input_grad[1] else None
        return d_a, d_b


class _Derivative(Node):
    """The derivative of `tr (A^1/2 B A^1/2)^1/2` with respect to B."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        if not bool(a.isfinite().all() & b.isfinite().all()):
            return torch.full_like(b, torch.nan)
        root = _root(a)
        return root @ _inverse_root(root @ b @ root) @ root / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise NotImplementedError("frechet_distance: differentiable once, not twice")


def _gaussian(mean: Any, cov: Any, mean_name: str, cov_name: str) -> tuple[Tensor, Tensor]:
    given = torch.as_tensor(cov)
    mean, cov = torch.as_tensor(mean).double(), given.double()
    checks.not_nested(mean, mean_name)
    checks.not_nested(cov, cov_name)
    if mean.dim() != 1 or mean.numel() == 0:
        raise ValueError(f"{mean_name}: got shape {tuple(mean.shape)}, expected (D,)")
    if cov.shape != (mean.shape[0], mean.shape[0]):
        raise ValueError(f"{cov_name}: got shape {tuple(cov.shape)}, expected {(mean.shape[0], mean.shape[0])}")
    symmetric = (cov + cov.mT) / 2
    if under_vmap():
        return mean, symmetric
    scale = cov.detach().abs().amax()
    asymmetry = (cov - cov.mT).detach().abs().amax()
    # The comparison is False for non-finite entries; the distance is then NaN.
    if bool(asymmetry > _rounding(given.dtype) * scale):
        raise ValueError(
            f"{cov_name}: got an asymmetric matrix, whose entries differ by {asymmetry.item():.3g}, expected a"
            " symmetric one"
        )
    if bool(cov.isfinite().all()):
        _check_definite(cov.detach(), cov_name, _rounding(given.dtype))
    return mean, symmetric


def _check_definite(cov: Tensor, name: str, rounding: float) -> None:
    """Raise ValueError for a matrix that is indefinite by more than rounding explains."""
    values = torch.linalg.eigvalsh(cov)
    # Rounding D x D entries moves an eigenvalue by less than sqrt(D) times as much.
    if bool(values[0] < -(len(cov) ** 0.5) * rounding * values.abs().amax()):
        raise ValueError(
            f"{name}: got an indefinite matrix, whose least eigenvalue is {values[0].item():.3g}, expected a positive"
            " semi-definite one"
        )


def _of_one_layer(moments: Any, name: str) -> tuple[Tensor, Tensor]:
    if moments.cov is None or len(moments.cov) != 1:
        number = "none" if moments.cov is None else len(moments.cov)
        raise ValueError(
            f"{name}: got Moments with {number} covariances, expected those of one layer with its covariance"
        )
    return moments.mean, moments.cov[0]


@overload
def frechet_distance(first: Moments, second: Moments, /) -> Tensor: ...
@overload
def frechet_distance(mean1: Any, cov1: Any, mean2: Any, cov2: Any) -> Tensor: ...


def frechet_distance(*gaussians: Any, **named: Any) -> Tensor:
    """The Frechet (2-Wasserstein) distance between two Gaussians (m1, C1) and (m2, C2), as in the FID.

    `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2)`

    Call it as `frechet_distance(first, second)` or as `frechet_distance(mean1, cov1, mean2, cov2)`.

    Args:
        first, second: Moments of one layer each, with its covariance.
        mean1, cov1, mean2, cov2: (D,) means and (D, D) covariances, Tensors or arrays. Covariances may be singular.

    Returns:
        Scalar, float64, computed by `torch.linalg.eigh` in float64. NaN if a mean or a covariance is non-finite.
        Differentiable once.

    Raises:
        TypeError, ValueError: wrong types or shapes; an asymmetric or indefinite covariance. Under `torch.func.vmap`
            values are not checked.

    Cost: four or five eigendecompositions of size D. On a GPU the host waits for each of them.

    Source: Dowson and Landau 1982 for the distance, Heusel et al. 2017 for its use on features.
    """
    names = ("first", "second") if len(gaussians) + len(named) == 2 else ("mean1", "cov1", "mean2", "cov2")
    given = dict(zip(names, gaussians, strict=False))
    clear = len(gaussians) <= len(names) and not set(given) & set(named) and set(given) | set(named) == set(names)
    given |= named
    if not clear or any(isinstance(value, Moments) != (len(names) == 2) for value in given.values()):
        got = ", ".join(type(value).__name__ for value in (*gaussians, *named.values()))
        raise TypeError(
            f"frechet_distance: got {got or 'nothing'}, expected two Moments, first and second, "
            "or mean1, cov1, mean2, cov2"
        )
    labels = [("mean1", "cov1"), ("mean2", "cov2")]
    if len(names) == 2:
        pairs = [_of_one_layer(given[name], name) for name in names]
        labels = [(name, name) for name in names]
    else:
        pairs = [(given["mean1"], given["cov1"]), (given["mean2"], given["cov2"])]
    (mean1, cov1), (mean2, cov2) = (_gaussian(*pair, *label) for pair, label in zip(pairs, labels, strict=True))
    if mean1.shape != mean2.shape:
        raise ValueError(f"{labels[1][0]}: got {mean2.shape[0]} entries, expected {mean1.shape[0]} as {labels[0][0]}")
    with torch.autocast(mean1.device.type, enabled=False):
        distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace()
        distance = distance - 2 * _TraceOfRoot.call(cov1, cov2)
        return torch.where(distance < 0, torch.zeros_like(distance), distance)
