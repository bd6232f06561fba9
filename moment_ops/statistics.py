"""Means and variances over the batch, packed over many layers."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import InitVar, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moment_ops import npz
from moment_ops.covariances import check_covariance
from moment_ops.ops import checks
from moment_ops.ops.layout import per_column
from moment_ops.ops.moments import moments as moments_op
from moment_ops.ops.nodes import under_vmap


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of one or many layers, packed into vectors of F columns.

    Layers follow one another in the packed vectors. Each is flattened in the row-major order of its shape.

    Args:
        mean: (F,) means, of a floating-point dtype.
        var: (F,) variances, in the dtype and on the device of `mean`, or None if they are unknown.
        cov: one (D, D) covariance per layer, or None.
        count: rows per layer, an (L,) int64 Tensor, an int or a sequence of ints. None if it is unknown.
        correction: c of the variances and covariances, which are sums of squares / (count - c).
        shapes: shape of every layer without the batch dimension. By default there is one layer of shape (F,).
        names: name of every layer, or None.
        validate: whether shapes, dtypes and values are checked. The check of the values reads from the device. Results
            of operators are not checked: NaN is a valid result there.

    `Moments` is registered as a pytree, so that `torch.utils._pytree.tree_map`, `torch.compile` and `torch.export` see
    its tensors.

    Raises:
        TypeError, ValueError: wrong types, dtypes or shapes; non-finite values, negative variances, asymmetric
            covariances.
    """

    mean: Tensor
    var: Tensor | None = None
    cov: tuple[Tensor, ...] | None = None
    count: Tensor | None = None
    correction: int = 1
    shapes: tuple[tuple[int, ...], ...] = ()
    names: tuple[str, ...] | None = None
    validate: InitVar[bool] = True

    def __post_init__(self, validate: bool) -> None:
        if not validate:
            return
        _check_vector(self.mean, "mean")
        checks.correction(self.correction)
        set_field = object.__setattr__
        set_field(self, "shapes", _checked_shapes(self.shapes) or ((self.mean.shape[0],),))
        if self.count is not None:
            count = _checked_count(self.count).to(self.mean.device)
            set_field(self, "count", count.expand(len(self.shapes)).clone() if count.numel() == 1 else count)
        if self.cov is not None:
            set_field(self, "cov", (self.cov,) if isinstance(self.cov, Tensor) else tuple(self.cov))
        if self.names is not None:
            set_field(self, "names", tuple(self.names))
        self._check_structure()
        self.check_values()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of columns of every layer."""
        return tuple(math.prod(shape) for shape in self.shapes)

    def layers(self) -> list[tuple[Tensor, Tensor | None]]:
        """`[(mean, var), ...]`: views in the shape of each layer. `var` is None if variances are unknown."""
        means = self.mean.split(self.sizes)
        variances = [None] * len(means) if self.var is None else list(self.var.split(self.sizes))
        return [
            (mean.view(shape), None if var is None else var.view(shape))
            for mean, var, shape in zip(means, variances, self.shapes, strict=True)
        ]

    def _check_structure(self) -> None:
        columns = self.mean.shape[0]
        if sum(self.sizes) != columns:
            raise ValueError(f"shapes: got {self.shapes} with {sum(self.sizes)} columns, but mean has {columns}")
        if self.var is not None:
            _check_vector(self.var, "var")
            if self.var.shape != self.mean.shape or self.var.device != self.mean.device:
                raise ValueError(
                    f"var: got shape {tuple(self.var.shape)} on {self.var.device}, expected {tuple(self.mean.shape)}"
                    f" on {self.mean.device} as mean"
                )
            if self.var.dtype != self.mean.dtype:
                raise TypeError(f"var: got dtype {self.var.dtype}, expected {self.mean.dtype} as mean")
        if self.count is not None and self.count.shape[0] != len(self.shapes):
            raise ValueError(f"count: got {self.count.shape[0]} entries, expected one per layer, {len(self.shapes)}")
        if self.names is not None and len(self.names) != len(self.shapes):
            raise ValueError(f"names: got {len(self.names)} names, expected one per layer, {len(self.shapes)}")
        if self.cov is not None:
            if len(self.cov) != len(self.shapes):
                raise ValueError(f"cov: got {len(self.cov)} matrices, expected one per layer, {len(self.shapes)}")
            for i, (matrix, size) in enumerate(zip(self.cov, self.sizes, strict=True)):
                if not isinstance(matrix, Tensor) or matrix.shape != (size, size):
                    got = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
                    raise ValueError(f"cov[{i}]: got {got}, expected shape {(size, size)}")

    def check_values(self) -> None:
        """Raise ValueError for non-finite values, negative variances and asymmetric covariances.

        The check reads from the device. It does nothing while tracing and under `vmap`.
        """
        if torch.compiler.is_compiling() or under_vmap():
            return
        if not bool(self.mean.isfinite().all()):
            raise ValueError("mean: got non-finite values, expected finite ones")
        if self.var is not None:
            if not bool(self.var.isfinite().all()):
                raise ValueError("var: got non-finite values, expected finite ones")
            if bool((self.var < 0).any()):
                raise ValueError(f"var: got a negative variance, {self.var.min().item():.3g}")
        if self.count is not None and bool((self.count < 1).any()):
            raise ValueError(f"count: got {self.count.tolist()}, expected at least one row per layer")
        for i, matrix in enumerate(self.cov or ()):
            check_covariance(matrix, f"cov[{i}]")

    @staticmethod
    def merge(*parts: "Moments") -> "Moments":
        """The moments of the rows of all parts together, merged in float64. Differentiable.

        Args:
            parts: Moments with known counts and with equal shapes, names and corrections. Either all of them have
                variances or none has; likewise covariances. The variance of a part with one row is ignored. Parts
            may have no rows, as those of a process without data.

        Returns:
            Moments in the dtype of the first part.

        Raises:
            TypeError, ValueError: no parts, an unknown count, or parts that do not agree.

        The means of float32 parts are rounded. With n rows per part and r = |mean| / std, this adds a relative error of
        up to r / sqrt(n) * 1e-7 to the variance.
        """
        _check_parts(parts)
        first = parts[0]
        counts = [part.count for part in parts if part.count is not None]
        count, rows = counts[0], per_column(counts[0].double(), first.sizes)
        mean = _mean_or_zero(first.mean, rows)
        m2 = None if first.var is None else _sum_of_squares(first.var, rows, first.correction)
        scatter = _scatter(first)
        for part, part_count in zip(parts[1:], counts[1:], strict=True):
            part_rows = per_column(part_count.double(), first.sizes)
            count, rows = count + part_count, rows + part_rows
            share = part_rows / rows
            delta = _mean_or_zero(part.mean, part_rows) - mean
            mean = mean + delta * share
            if m2 is not None and part.var is not None:
                part_m2 = _sum_of_squares(part.var, part_rows, part.correction)
                m2 = m2 + part_m2 + delta.square() * share * (rows - part_rows)
            for i, (part_scatter, d) in enumerate(zip(_scatter(part), delta.split(first.sizes), strict=False)):
                weight = part_count[i] / count[i] * (count[i] - part_count[i])
                scatter[i] = scatter[i] + part_scatter + weight * torch.outer(d, d)
        dtype = first.mean.dtype
        var = None
        if m2 is not None:
            freedom = rows - first.correction
            var = torch.where(freedom > 0, m2 / freedom, float("nan")).to(dtype)
        cov = tuple((c / (n - first.correction)).to(dtype) for c, n in zip(scatter, count, strict=False)) or None
        mean = torch.where(rows > 0, mean, float("nan")).to(dtype)
        return Moments(mean, var, cov, count, first.correction, first.shapes, names=first.names, validate=False)

    def save(self, path: str | os.PathLike[str], *, format: str = "moments") -> None:
        """Write a `.npz` file that numpy reads without pickle.

        Args:
            path: where the file is written. The file is replaced in one step.
            format: "moments" writes all fields, bit for bit. "fid" writes the format of the FID tools (pytorch-fid,
                clean-fid, torch-fidelity): float64 `mu` (D,) and `sigma` (D, D) of a single layer. `load` reads both.

        Raises:
            ValueError: the file at `path` was not written by `save`; it is not overwritten. Or the format is "fid" and
                there is not exactly one covariance.
        """
        checks.option(format, "format", ("moments", "fid"))
        npz.write(Path(path), self._arrays() if format == "moments" else self._fid_arrays())

    def _fid_arrays(self) -> dict[str, np.ndarray]:
        if self.cov is None or len(self.cov) != 1:
            number = "none" if self.cov is None else len(self.cov)
            raise ValueError(f"format: got 'fid' for moments with {number} covariances, expected exactly one")
        arrays = {
            "mu": npz.to_numpy(self.mean.double()),
            "sigma": npz.to_numpy(self.cov[0].double()),
            "correction": np.array(self.correction),
        }
        if self.count is not None:
            arrays["count"] = npz.to_numpy(self.count)
        return arrays

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays = {
            "mean": npz.to_numpy(self.mean),
            "dtype": np.array(str(self.mean.dtype).removeprefix("torch.")),
            "correction": np.array(self.correction),
            "shapes": np.array(json.dumps(self.shapes)),
        }
        if self.var is not None:
            arrays["var"] = npz.to_numpy(self.var)
        if self.count is not None:
            arrays["count"] = npz.to_numpy(self.count)
        if self.names is not None:
            arrays["names"] = np.array(json.dumps(self.names))
        for i, matrix in enumerate(self.cov or ()):
            arrays[f"cov_{i}"] = npz.to_numpy(matrix)
        return arrays

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Moments":
        """Read a file written by `save`, or a `mu`/`sigma` file of the FID tools.

        Returns:
            Moments on the CPU. Their count is unknown if the FID tools wrote the file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or was not written by `save` or an FID tool.
        """
        arrays = npz.read(Path(path))
        try:
            if "mu" in arrays:
                sigma = torch.from_numpy(arrays["sigma"])
                fid_count = torch.from_numpy(arrays["count"]) if "count" in arrays else None
                fid_correction = int(arrays.get("correction", 1))
                return Moments(
                    torch.from_numpy(arrays["mu"]), sigma.diagonal().clone(), (sigma,), fid_count, fid_correction
                )
            shapes = tuple(tuple(shape) for shape in json.loads(str(arrays["shapes"])))
            names = tuple(json.loads(str(arrays["names"]))) if "names" in arrays else None
            dtype = getattr(torch, str(arrays["dtype"]))
            mean = torch.from_numpy(arrays["mean"]).to(dtype)
            var = torch.from_numpy(arrays["var"]).to(dtype) if "var" in arrays else None
            cov = tuple(
                torch.from_numpy(arrays[f"cov_{i}"]).to(dtype) for i in range(len(shapes)) if f"cov_{i}" in arrays
            )
            count = torch.from_numpy(arrays["count"]) if "count" in arrays else None
            return Moments(mean, var, cov or None, count, int(arrays["correction"]), shapes, names)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} holds no valid moments: {error}") from error


def _check_vector(value: Any, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a Tensor")
    checks.not_nested(value, name)
    if not value.is_floating_point():
        raise TypeError(f"{name}: got dtype {value.dtype}, expected a floating-point Tensor")
    if value.dim() != 1 or value.numel() == 0:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected (F,) with F > 0")


def _checked_shapes(shapes: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(shapes, (tuple, list)) or not all(isinstance(shape, (tuple, list)) for shape in shapes):
        raise TypeError(f"shapes: got {shapes!r}, expected one tuple of ints per layer")
    if not all(isinstance(size, int) and size > 0 for shape in shapes for size in shape):
        raise ValueError(f"shapes: got {shapes!r}, expected positive sizes")
    return tuple(tuple(shape) for shape in shapes)


def _checked_count(count: Any) -> Tensor:
    """Counts as an int64 vector. Floating-point counts are refused, never rounded."""
    if not isinstance(count, Tensor):
        rows = count if isinstance(count, (tuple, list)) else (count,)
        if not all(isinstance(n, int) and not isinstance(n, bool) for n in rows):
            raise TypeError(f"count: got {count!r}, expected ints")
        count = torch.tensor(rows, dtype=torch.int64)
    if count.is_floating_point() or count.is_complex() or count.dtype == torch.bool:
        raise TypeError(f"count: got dtype {count.dtype}, expected int64")
    return count.to(torch.int64).reshape(-1)


def _check_parts(parts: Sequence[Moments]) -> None:
    if not parts:
        raise ValueError("parts: got none, expected at least one Moments")
    first = parts[0]
    for i, part in enumerate(parts):
        if not isinstance(part, Moments):
            raise TypeError(f"parts[{i}]: got {type(part).__name__}, expected Moments")
        if part.count is None:
            raise ValueError(f"parts[{i}]: got an unknown count, expected the number of rows of every layer")
        if part.shapes != first.shapes:
            raise ValueError(f"parts[{i}]: got shapes {part.shapes}, expected {first.shapes} as in parts[0]")
        if None not in (part.names, first.names) and part.names != first.names:
            raise ValueError(f"parts[{i}]: got names {part.names}, expected {first.names} as in parts[0]")
        if part.correction != first.correction:
            raise ValueError(
                f"parts[{i}]: got correction {part.correction}, expected {first.correction} as in parts[0]"
            )
        for field, ours, theirs in (("variances", part.var, first.var), ("covariances", part.cov, first.cov)):
            if (ours is None) != (theirs is None):
                got, expected = ("none", field) if ours is None else (field, "none")
                raise ValueError(f"parts[{i}]: got {got}, expected {expected} as in parts[0]")


def _mean_or_zero(mean: Tensor, rows: Tensor) -> Tensor:
    """The mean in float64, and 0 for no rows, of which the mean is NaN."""
    return torch.where(rows > 0, mean.double(), 0.0)


def _sum_of_squares(var: Tensor, rows: Tensor, correction: int) -> Tensor:
    """Sum of squared deviations in float64. For fewer than two rows it is 0, although the variance is NaN."""
    return torch.where(rows <= 1, 0.0, var.double() * (rows - correction))


def _scatter(part: Moments) -> list[Tensor]:
    """Per layer, the sum over rows of outer products of deviations, in float64; empty without covariances."""
    if part.cov is None or part.count is None:
        return []
    return [
        torch.where(n <= 1, 0.0, matrix.double() * (n - part.correction))
        for matrix, n in zip(part.cov, part.count, strict=True)
    ]


def _flatten(m: Moments) -> tuple[list[Any], tuple[Any, ...]]:
    """The fields that are not None: transforms do not accept None as a tensor."""
    fields = ("mean", "var", "cov", "count")
    known = tuple(name for name in fields if getattr(m, name) is not None)
    return [getattr(m, name) for name in known], (known, m.correction, m.shapes, m.names)


def _unflatten(children: Iterable[Any], context: tuple[Any, ...]) -> Moments:
    known, correction, shapes, names = context
    fields = dict(zip(known, children, strict=True))
    return Moments(**fields, correction=correction, shapes=shapes, names=names, validate=False)


def _context_from(context: list[Any]) -> tuple[Any, ...]:
    known, correction, shapes, names = context
    names = None if names is None else tuple(names)
    return tuple(known), correction, tuple(tuple(shape) for shape in shapes), names


pytree.register_pytree_node(
    Moments,
    _flatten,
    _unflatten,
    serialized_type_name="moment_ops.Moments",
    to_dumpable_context=lambda context: json.dumps(context),
    from_dumpable_context=lambda text: _context_from(json.loads(text)),
)


def moments(input: checks.Features, *, dim: int | Sequence[int] = 0, correction: int = 1, var: bool = True) -> Moments:
    """Mean and variance over the batch, per column, of one layer or many.

    Args:
        input: features, one Tensor of shape (N, ...) per layer: a Tensor, a sequence or a mapping. All layers have the
            same N, device and dtype: float32, bfloat16, float16 or float64. Contiguous, channels-last and row-sliced
            features are read in place; features with other strides are copied once. The keys of a mapping become the
            names of the layers.
        dim: the dimension or dimensions to reduce, by default the batch. (0, 2, 3) gives statistics per channel.
        correction: c in the variance, sum of squares / (N - c). If N <= c, variances are NaN.
        var: whether variances are computed.

    Returns:
        Moments in float32 (float64 for float64 features). Differentiable, twice in eager mode. A mean, a variance or a
        gradient that its dtype can represent does not overflow in an intermediate sum.

    Raises:
        TypeError, ValueError: wrong types, dtypes, devices, ranks or sizes; no rows, unless there are several
            processes: there one without rows has means and variances of NaN and a count of 0, and a loss that merges
            the moments of all processes takes them. The message names the argument.

    Cost: one launch and one read of the features. Backward takes one launch, one read and one write. It needs the
    features, which the next layer of a network often saves as well, and the (F,) means.

    Source: dos Santos et al. 2019, section 3: mean and variance of every feature over the batch, not pooled over space.
    """
    correction = checks.correction(correction)
    if dim == 0 and type(dim) is int:
        features, signature, shapes, _, names = checks.batch_of(input, empty=None)
        mean, variance, count = moments_op(features, 0, correction, var, signature=signature)
        return Moments(mean, variance, None, count, correction, shapes, names, validate=False)
    features, names = checks.features(input), checks.names_of(input)
    dims = checks.dimensions(dim, features)
    first = [d[0] for d in dims]
    if any(d != first[0] for d in first):
        features, first = [x.movedim(d, 0) for x, d in zip(features, first, strict=True)], [0] * len(features)
    checks.batch(features, first[0], names=names, empty=None)
    if all(len(d) == 1 for d in dims):
        mean, variance, count = moments_op(features, first[0], correction, var)
        shapes = tuple((*x.shape[: first[0]], *x.shape[first[0] + 1 :]) for x in features)
        return Moments(mean, variance, None, count, correction, shapes, names, validate=False)
    return replace(_pool(features, dims, first[0], correction, var), names=names, validate=False)


def _pool(
    features: Sequence[Tensor], dims: Sequence[tuple[int, ...]], first: int, correction: int, var: bool
) -> Moments:
    """Moments over several dimensions: over the first, and then merged over the others. Features are read once."""
    mean, variance, count = moments_op(features, first, 0, var)
    rows = features[0].shape[first]
    means, variances, factors, shapes = [], [], [], []
    offset = 0
    for x, (_, *others) in zip(features, dims, strict=True):
        shape = (*x.shape[:first], *x.shape[first + 1 :])
        pooled = [d - 1 for d in others]
        packed = slice(offset, offset + math.prod(shape))
        offset += math.prod(shape)
        group = math.prod([shape[d] for d in pooled])

        def to_groups(vector: Tensor, packed: slice = packed, shape: Any = shape, pooled: Any = pooled) -> Tensor:
            return (
                vector[packed]
                .double()
                .view(shape)
                .movedim(pooled, tuple(range(len(pooled))))
                .flatten(0, len(pooled) - 1)
            )

        part_mean = to_groups(mean)
        # Relative to the first, so that equal means have a variance of exactly 0.
        pivot = part_mean[0].detach()
        shifted = part_mean - pivot
        means.append((pivot + shifted.mean(0)).flatten())
        if variance is not None:
            freedom = rows * group - correction
            m2 = rows * (to_groups(variance).sum(0) + (shifted - shifted.mean(0)).square().sum(0)).flatten()
            variances.append(m2 / freedom if freedom > 0 else torch.full_like(m2, float("nan")))
        factors.append(group)
        shapes.append(tuple([size for d, size in enumerate(shape) if d not in pooled]))
    count = torch.cat([part * factor for part, factor in zip(count.split(1), factors, strict=True)])
    pooled_var = torch.cat(variances).to(mean.dtype) if var else None
    return Moments(torch.cat(means).to(mean.dtype), pooled_var, None, count, correction, tuple(shapes), validate=False)
