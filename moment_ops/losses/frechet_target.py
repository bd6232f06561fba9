"""The arguments of the Frechet loss: its target, its features as rows, and the choice of the method."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from moment_ops.losses.frechet_matching import Target
from moment_ops.losses.matching import check_names
from moment_ops.ops import checks
from moment_ops.ops.layout import as_rows
from moment_ops.ops.nodes import under_vmap
from moment_ops.ops.reference_covariance import PRECISIONS
from moment_ops.statistics import Moments

METHODS = ("auto", "polynomial", "qdwh", "eigh")
# Up to this size of the smaller side, `eigh` is the fastest on a CPU.
_SMALL = 512

Pool: TypeAlias = int | Sequence[int | None] | None


def auto_method(rows: int, columns: int, device: torch.device, *, mixed: bool) -> str:
    """The method of "auto".

    On a CPU it is "eigh" if N or D is at most 512 (D, with an average), and otherwise "qdwh". On other devices it is
    "polynomial" for a batch alone, and otherwise "qdwh", since "eigh" makes the host wait.

    Args:
        rows, columns: N and D; the rows of a queue count.
        mixed: whether a (D, D) covariance of more than this batch is decomposed.
    """
    if device.type != "cpu":
        return "qdwh" if mixed else "polynomial"
    smaller = columns if mixed else min(rows, columns)
    return "eigh" if smaller <= _SMALL else "qdwh"


def check_options(correction: Any, method: Any, precision: Any, normalize: Any, eps: Any, even: Any) -> None:
    checks.correction(correction)
    checks.option(method, "method", METHODS)
    checks.option(precision, "precision", PRECISIONS)
    for name, value in (("normalize", normalize), ("even", even)):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: got {value!r}, expected a bool")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps: got {eps!r}, expected a number")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps: got {eps}, expected a finite, non-negative number")


def pools_of(pool: Any, num_layers: int) -> list[int | None]:
    """One size, or None, per layer."""
    sizes = [pool] * num_layers if pool is None or isinstance(pool, int) else pool
    if not isinstance(sizes, Sequence) or isinstance(sizes, str):
        raise TypeError(f"pool: got {type(pool).__name__}, expected an int, None, or one of them per layer")
    if len(sizes) != num_layers:
        raise ValueError(f"pool: got {len(sizes)} sizes, expected one per layer, {num_layers}")
    for size in sizes:
        if size is not None and (isinstance(size, bool) or not isinstance(size, int)):
            raise TypeError(f"pool: got {size!r}, expected an int or None")
        if size is not None and size < 1:
            raise ValueError(f"pool: got {size}, expected a positive size")
    return list(sizes)


def check_target(target: Any) -> Moments:
    """Raise errors for what has no covariances, or requires grad."""
    if not isinstance(target, Moments):
        raise TypeError(f"target: got {type(target).__name__}, expected Moments with covariances")
    if target.cov is None:
        raise ValueError("target: got Moments without covariances, expected one per layer")
    if any(x.requires_grad for x in (target.mean, *target.cov)):
        raise ValueError("target: got Moments that require grad, expected constants; detach them")
    checks.check_tangents((target.mean, *target.cov), "target")
    return target


def root_of(cov: Tensor, label: str) -> tuple[Tensor, Tensor]:
    """(T, T^1/2) in float64, where T is the closest positive semi-definite matrix to the given one.

    Raises:
        ValueError: the matrix is indefinite by more than the rounding of its entries explains. Reads from the device;
            not checked while traced and under `vmap`.
    """
    wide = cov.double()
    values, vectors = torch.linalg.eigh((wide + wide.mT) / 2)
    if not (torch.compiler.is_compiling() or under_vmap()):
        # Covariances are often computed in float32. Rounding D x D entries moves an eigenvalue by sqrt(D) as much.
        rounding = 64 * max(torch.finfo(cov.dtype).eps, torch.finfo(torch.float32).eps) * len(cov) ** 0.5
        if bool(values[0] < -rounding * values.abs().amax()):
            raise ValueError(
                f"{label}: got an indefinite matrix, whose least eigenvalue is {values[0].item():.3g}, expected a"
                " positive semi-definite one"
            )
    values = values.clamp_min(0)
    return ((vectors * scale) @ vectors.mT for scale in (values, values.sqrt()))  # type: ignore[return-value]


def targets_of(target: Moments) -> list[Target]:
    """One Target per layer, in float64."""
    assert target.cov is not None
    targets = []
    for i, (mean, cov) in enumerate(zip(target.mean.split(target.sizes), target.cov, strict=True)):
        matrix, root = root_of(cov, f"target.cov[{i}]")
        targets.append(Target(mean.double(), matrix, root, cov.diagonal().double().sum()))
    return targets


def rows_of_layers(
    input: checks.Features,
    sizes: Sequence[int],
    names: Sequence[str] | None,
    device: torch.device,
    pools: Sequence[int | None],
    *,
    empty: bool,
) -> list[Tensor]:
    """The features as (N, D) rows, pooled, and checked against the target."""
    features, _, _, _, input_names = checks.batch_of(input, empty=empty)
    check_names(input_names, names)
    if len(features) != len(sizes):
        raise ValueError(f"input: got {len(features)} layers, expected {len(sizes)} as in target")
    rows = []
    for i, (x, size, pool) in enumerate(zip(features, sizes, pools, strict=True)):
        label = checks.label_of("input", i, features, input_names)
        if x.device != device:
            raise ValueError(f"{label}: got device {x.device}, expected {device} as in target")
        pooled = _pooled(x, pool, label)
        columns = pooled.shape[1:].numel()
        if columns != size:
            how = "" if pool is None else f" pooled to {pool} x {pool}"
            raise ValueError(
                f"{label}: got {columns} columns in shape {tuple(x.shape)}{how}, expected {size} as in target"
            )
        rows.append(as_rows(pooled))
    return rows


def _pooled(x: Tensor, pool: int | None, label: str) -> Tensor:
    """(N, C, H, W) averaged to `pool` x `pool`, and at least in float32."""
    if pool is None:
        return x
    if x.dim() != 4:
        raise ValueError(f"{label}: got shape {tuple(x.shape)}, expected (N, C, H, W) with pool")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if not len(x):
        return wide.new_zeros(0, x.shape[1], pool, pool) + wide.sum()
    return torch.nn.functional.adaptive_avg_pool2d(wide, pool)


def check_rows(rows: int, correction: int) -> None:
    if rows <= correction:
        raise ValueError(f"input: got a batch of {rows}, expected more than {correction} rows")
