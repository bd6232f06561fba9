"""Full covariances of the columns of features, and whether the memory can hold them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from moment_ops.ops import checks
from moment_ops.ops.covariance import covariance as covariance_op
from moment_ops.ops.layout import columns_of, statistics_dtype
from moment_ops.ops.reference_covariance import PRECISIONS

# Matrices below this size are taken without asking how much memory is free.
_UNASKED_BYTES = 1 << 30


def _free_bytes(device: torch.device) -> int | None:
    """Memory that a device has free; None where it does not tell."""
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
    """Why a `width` x `width` matrix cannot be held; None if it can."""
    needed = width * width * statistics_dtype(dtype).itemsize
    if torch.compiler.is_compiling() or device.type == "meta" or needed <= _UNASKED_BYTES:
        return None
    free = _free_bytes(device)
    if free is None or needed <= free:
        return None
    return (
        f"its covariance is {width} x {width}, {needed / 2**30:.1f} GiB, and {device} has {free / 2**30:.1f} GiB free"
    )


def check_memory(layers: Sequence[Tensor], name: str = "input") -> None:
    """Raise ValueError for a layer whose covariance does not fit."""
    for i, x in enumerate(layers):
        reason = missing_memory(columns_of(x), x.dtype, x.device)
        if reason is not None:
            label = name if len(layers) == 1 else f"{name}[{i}]"
            raise ValueError(
                f"{label}: {reason}. covariance_distance(..., method='gram') needs no such matrix; or pool the features"
                " first"
            )


def covariance(
    input: checks.Features, *, correction: int = 1, centered: bool = True, precision: str = "ieee"
) -> Tensor | tuple[Tensor, ...]:
    """The covariance of all columns of one layer, or of each of many.

    Args:
        input: features, one Tensor of shape (N, ...) per layer, all with the same N, dtype and device; float32,
            bfloat16, float16 or float64, any strides. Dimensions after the batch are flattened to D columns.
        correction: c in the divisor N - c. N <= c gives NaN.
        centered: subtract the mean; otherwise second moments `X' X / (N - c)`.
        precision: a bound on the error, as relative Frobenius norm for N <= 1e5 rows. "ieee": 1e-6, for |mean|/std up
            to 1e4. The others round the centred operands: "bf16x3" to two bfloat16 terms each, 2e-5; "tf32" 1e-3;
            "bf16" 4e-3. A backend uses a more exact precision where that is as fast; the CPU always uses "ieee".
            Float64 features are multiplied in float64.

    Returns:
        (D, D), exactly symmetric, float32 (float64 for float64 features); for several layers, a tuple of them.
        Differentiable, twice in eager mode. On the CPU and in plain PyTorch, entries and gradients come out wherever
        they fit, whatever the sums on the way to them. A non-finite value makes its feature's row and column of the
        covariance non-finite.

    Raises:
        TypeError, ValueError: wrong types, dtypes, devices, ranks, sizes or options; a matrix beyond the free memory.

    Cost: N D^2 products, the upper triangle alone; backward 2 N D^2, one read and one write.
    """
    layers = checks.batch_of(input).layers
    checks.correction(correction)
    checks.option(precision, "precision", PRECISIONS)
    if not isinstance(centered, bool):
        raise TypeError(f"centered: got {centered!r}, expected a bool")
    check_memory(layers)
    results = tuple(covariance_op(x, correction, centered, precision)[0] for x in layers)
    return results[0] if isinstance(input, Tensor) else results
