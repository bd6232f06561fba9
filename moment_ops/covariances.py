"""Full covariances of the columns of features, and a check that they fit into memory."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from moment_ops.ops import checks
from moment_ops.ops.covariance import covariance as covariance_op
from moment_ops.ops.layout import columns_of, statistics_dtype
from moment_ops.ops.reference_covariance import PRECISIONS

# For matrices up to this size the free memory is not looked up.
_UNCHECKED_BYTES = 1 << 30


def _free_bytes(device: torch.device) -> int | None:
    """Free memory of a device, or None if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = dict(line.split(":", 1) for line in lines if ":" in line)
    return 1024 * int(sizes["MemAvailable"].split()[0]) if "MemAvailable" in sizes else None


def missing_memory(width: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a `width` x `width` matrix does not fit into memory, or None if it fits."""
    needed = width * width * statistics_dtype(dtype).itemsize
    if torch.compiler.is_compiling() or device.type == "meta" or needed <= _UNCHECKED_BYTES:
        return None
    free = _free_bytes(device)
    if free is None or needed <= free:
        return None
    return (
        f"its covariance is {width} x {width} and takes {needed / 2**30:.1f} GiB, but {device} has"
        f" {free / 2**30:.1f} GiB free"
    )


def check_memory(features: Sequence[Tensor], name: str = "input", names: Sequence[str] | None = None) -> None:
    """Raise ValueError for a layer whose covariance does not fit into memory."""
    for i, x in enumerate(features):
        reason = missing_memory(columns_of(x), x.dtype, x.device)
        if reason is not None:
            raise ValueError(
                f"{checks.label_of(name, i, features, names)}: {reason}. Use covariance_distance(..., method='gram'),"
                " which needs no such matrix, or pool the features first"
            )


def check_covariance(matrix: Tensor, label: str) -> None:
    """Raise ValueError for non-finite values, an asymmetric matrix or a negative variance. Reads from the device."""
    if not bool(matrix.isfinite().all()):
        raise ValueError(f"{label}: got non-finite values, expected finite ones")
    scale = matrix.abs().amax().item()
    asymmetry = (matrix - matrix.mT).abs().amax().item()
    if asymmetry > 64 * torch.finfo(matrix.dtype).eps * scale:
        raise ValueError(
            f"{label}: got an asymmetric matrix, whose entries differ by {asymmetry:.3g}, expected a symmetric one"
        )
    if bool((matrix.diagonal() < 0).any()):
        raise ValueError(f"{label}: got a negative variance on the diagonal, {matrix.diagonal().min().item():.3g}")


def covariance(
    input: checks.Features, *, correction: int = 1, centered: bool = True, precision: str = "ieee"
) -> Tensor | tuple[Tensor, ...]:
    """The covariance of the columns of one layer, or of each of several layers.

    Args:
        input: features, one Tensor of shape (N, ...) per layer: a Tensor, a sequence or a mapping. All layers have the
            same N, device and dtype: float32, bfloat16, float16 or float64. Strides are arbitrary. Dimensions after
            the batch are flattened to D columns.
        correction: c in the divisor N - c. If N <= c, the covariance is NaN.
        centered: whether the mean is subtracted. Otherwise the result is the second moments `X' X / (N - c)`.
        precision: how operands are multiplied. Each precision bounds the relative error in the Frobenius norm, for up
            to 1e5 rows. "ieee": 1e-6, for |mean| / std up to 1e4. The others round the centred operands: "bf16x3" to
            two bfloat16 terms each, 2e-5; "tf32", 1e-3; "bf16", 4e-3. A backend may use a more exact precision that is
            as fast: the CPU always uses "ieee". Float64 features are multiplied in float64.

    Returns:
        (D, D), exactly symmetric, float32 (float64 for float64 features). For a sequence or a mapping, a tuple with one
        matrix per layer, in order. Differentiable, twice in eager mode.

        A non-finite value makes its feature's row and column of the covariance non-finite, and nothing else. An
        entry or a gradient that its dtype can represent does not overflow in an intermediate sum.

    Raises:
        TypeError, ValueError: wrong types, dtypes, devices, ranks, sizes or options; a matrix that does not fit into
            memory. The message names the argument.

    Cost: per layer N D^2 products, since only the upper triangle is computed, and two reads, for the means and for the
    products; on a GPU two launches. Backward takes 2 N D^2 products, one launch, one read and one write.
    """
    features, *_, names = checks.batch_of(input)
    checks.correction(correction)
    checks.option(precision, "precision", PRECISIONS)
    if not isinstance(centered, bool):
        raise TypeError(f"centered: got {centered!r}, expected a bool")
    check_memory(features, names=names)
    results = tuple(covariance_op(x, correction, centered, precision)[0] for x in features)
    return results[0] if isinstance(input, Tensor) else results
