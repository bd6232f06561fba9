"""Polar factors and inverse square roots, of which the trace term of the Frechet distance and its gradient consist.

With a matrix M (n, d) and the polar decomposition M = P H, the trace of H is the sum of the singular values of M. Two
operators compute it, and none of them waits for the device but "eigh":

- `polar`: P by odd polynomials whose composition is close to sign on [lowest, 1]. Products only, in a named precision.
  Nothing is squared, so that float32 suffices.
- `inverse_root`: the trace of G^1/2 and G^-1/2 from a float64 Gram matrix G = M'M or M M'. Singular values are squared
  there, so that those below the root of a float64 epsilon are lost; the first step is in float64 and leaves a matrix
  with eigenvalues in [1e-3, 1], for which float32 suffices.

Singular values below `lowest` times the norm of M count less than they should, down to nothing.
"""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.polynomial import Polynomial, chebyshev
from torch import Tensor

from moment_ops.ops import backends, reference_covariance
from moment_ops.ops.library import define

# Rows of a panel of the upper triangle on the CPU.
_PANEL = 256
# Up to this size, float64 factorisations on the CPU take hardly longer than float32.
_SMALL = 320
# Distance to 1 that rational steps leave to a series of products, in float32 and in float64. No step is taken on an
# image whose eigenvalues are near 1: rounding has made its zeros large, and maybe so negative that it is indefinite.
_HALFWAY, _NEAR = 0.45, 1e-2
# Singular values down to this share of the norm become 1. Their squares are multiplied by as much, and so is what
# rounding leaves of zeros, which may be negative: with 1e-8 it would reach -1, and the matrix would be indefinite.
_LOWEST, _LOWEST_WIDE = 5e-7, 2e-7
# The shortest interval that a polynomial serves is [_CUSHION, 1] times its upper end.
_CUSHION = 0.1

Coefficients = tuple[float, float, float]


class Accuracy(NamedTuple):
    """What the products of a precision can resolve.

    Args:
        lowest: the smallest singular value that becomes 1, relative to the largest.
        margin: by which each interval is wider than the step before leaves it, for the rounding of the products. An
            odd polynomial diverges outside of its interval.
    """

    lowest: float
    margin: float


_ACCURACIES = {
    "ieee": Accuracy(1e-6, 1e-5),
    "bf16x3": Accuracy(1e-6, 1e-3),
    "tf32": Accuracy(1e-4, 5e-3),
    "bf16": Accuracy(1e-3, 3e-2),
}
_FLOAT64 = Accuracy(1e-8, 1e-13)


def accuracy(dtype: torch.dtype, precision: str) -> Accuracy:
    """The accuracy of products in a precision. float64 is never rounded."""
    return _FLOAT64 if dtype == torch.float64 else _ACCURACIES[precision]


def _equioscillating(low: float, high: float) -> tuple[Coefficients, float]:
    """a x + b x^3 + c x^5 with the smallest largest error to 1 on [low, high], and that error (Remez)."""
    points = np.array([low, low + 0.2 * (high - low), low + 0.7 * (high - low), high])
    a = b = c = error = 0.0
    for _ in range(100):
        system = np.stack([points, points**3, points**5, [1.0, -1.0, 1.0, -1.0]], 1)
        a, b, c, error = (float(v) for v in np.linalg.solve(system, np.ones(4)))
        root = math.sqrt(max(9 * b * b - 20 * a * c, 0.0))
        squares = ((-3 * b + root) / (10 * c), (-3 * b - root) / (10 * c))
        inner = sorted(math.sqrt(q) for q in squares if q > 0)
        if len(inner) != 2 or not low < inner[0] < inner[1] < high:
            break
        moved = np.array([low, *inner, high])
        if np.abs(moved - points).max() < 1e-14:
            break
        points = moved
    return (a, b, c), abs(error)


def _valued(step: Coefficients, x: float) -> float:
    a, b, c = step
    return x * (a + x * x * (b + x * x * c))


@functools.cache
def sign_polynomials(lowest: float, margin: float) -> tuple[Coefficients, ...]:
    """Coefficients (a, b, c) of a x + b x^3 + c x^5, one per step, whose composition is close to 1 on [lowest, 1].

    Each polynomial is the best one for the interval that the one before leaves, which makes the composition the best of
    its length (Amsel et al., The Polar Express, 2025). But the best polynomial for a long interval takes some large
    singular values to about its lower end, where they drown in the rounding of the others: no interval is therefore
    longer than 1 / _CUSHION. Steps end when the error is about that of the rounding.
    """
    low, high = lowest, 1.0
    steps: list[Coefficients] = []
    while len(steps) < 60:
        # On narrow intervals the equations are singular; this is the limit, up to the square of the width.
        narrow = high - low < 1e-3
        cushioned = max(low, _CUSHION * high)
        step, error = ((1.875, -1.25, 0.375), 2.5 * (high - low) ** 3) if narrow else _equioscillating(cushioned, high)
        if cushioned > low:
            # Around 1 between the image of the lower end and the largest value.
            least = _valued(step, low)
            scale = 2 / (least + 1 + error)
            step, error = (scale * step[0], scale * step[1], scale * step[2]), 1 - scale * least
        steps.append(step)
        if error < max(1e-7 if margin > 1e-9 else 1e-14, margin**2):
            break
        low, high = (1 - error) * (1 - margin), (1 + error) * (1 + margin)
    return tuple(steps)


@functools.cache
def rational_steps(lowest: float, tolerance: float) -> tuple[tuple[Coefficients, ...], float]:
    """(a, b, c) of x (a + b x^2) / (1 + c x^2), one per step, and the least value of their composition on [lowest, 1].

    The largest value is 1. Source: QDWH, Nakatsukasa, Bai and Gygi 2010.
    """
    steps: list[Coefficients] = []
    while 1 - lowest > tolerance:
        square = lowest * lowest
        d = (4 * (1 - square) / square**2) ** (1 / 3)
        a = math.sqrt(1 + d) + 0.5 * math.sqrt(8 - 4 * d + 8 * (2 - square) / (square * math.sqrt(1 + d)))
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        steps.append((a, b, c))
        lowest = min(1.0, lowest * (a + b * square) / (1 + c * square))
    return tuple(steps), lowest


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Neither autocast nor a global switch rounds the operands of float32 products."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    with torch.autocast(device.type, enabled=False):
        if allowed:
            torch.backends.cuda.matmul.allow_tf32 = False
        try:
            yield
        finally:
            if allowed:
                torch.backends.cuda.matmul.allow_tf32 = True


def _multiply(a: Tensor, b: Tensor, precision: str) -> Tensor:
    """`a @ b` with operands rounded as the precision says. The CPU multiplies in float32, which is as fast."""
    if precision == "ieee" or a.dtype == torch.float64:
        return a @ b
    if a.device.type == "cuda":
        return _multiply_on_tensor_cores(a, b, precision)
    if a.device.type == "cpu" and backends.requested() != "reference":
        return a @ b
    return reference_covariance.product(a, b, precision).to(a.dtype)


def _multiply_on_tensor_cores(a: Tensor, b: Tensor, precision: str) -> Tensor:
    if precision == "tf32":
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return a @ b
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
    a_high, b_high = a.bfloat16(), b.bfloat16()
    result = torch.mm(a_high, b_high, out_dtype=torch.float32)
    if precision == "bf16x3":
        a_low, b_low = (a - a_high).bfloat16(), (b - b_high).bfloat16()
        result += torch.mm(a_high, b_low, out_dtype=torch.float32)
        result += torch.mm(a_low, b_high, out_dtype=torch.float32)
    return result


def _symmetric_product(a: Tensor, b: Tensor, precision: str = "ieee") -> Tensor:
    """`a @ b`, (n, n), which is known to be symmetric. On the CPU its upper triangle is computed and mirrored."""
    size = a.shape[0]
    if a.device.type != "cpu" or size <= _PANEL or precision != "ieee":
        product = _multiply(a, b, precision)
        return (product + product.mT).mul_(0.5)
    out = b.new_empty(size, size)
    for start in range(0, size, _PANEL):
        stop = min(start + _PANEL, size)
        torch.mm(a[start:stop], b[:, start:], out=out[start:stop, start:])
        out[stop:, start:stop] = out[start:stop, stop:].mT
    return out


def _nonzero(size: Tensor) -> Tensor:
    """A norm to divide by; 1 for a matrix of zeros."""
    return torch.where(size == 0, 1.0, size)


def _polar(m: Tensor, precision: str) -> Tensor:
    rounded = precision if backends.requested() == "reference" or m.device.type != "cpu" else "ieee"
    steps = sign_polynomials(*accuracy(m.dtype, rounded))
    tall = m.shape[0] > m.shape[1]
    with _full_precision(m.device):
        x = m
        for k, (a, b, c) in enumerate(steps):
            gram = _symmetric_product(*((x.mT, x) if tall else (x, x.mT)), rounded)
            if k == 0:
                # The Schatten 4 norm is closer to the largest singular value than that of Frobenius.
                size = _nonzero(gram.norm().sqrt() * (1 + 1e-3))
                x, gram = x / size, gram / size**2
            inner = _symmetric_product(gram, gram, rounded).mul_(c).add_(gram, alpha=b)
            inner.diagonal().add_(a)
            x = _multiply(x, inner, rounded) if tall else _multiply(inner, x, rounded)
    return x


def _polar_fake(m: Tensor, precision: str) -> Tensor:
    return m.new_empty(m.shape)


def _inverse_of_shifted(gram: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """((1 + c G)^-1, whether 1 + c G is positive definite)."""
    shifted = gram * c
    shifted.diagonal().add_(1)
    factor, info = torch.linalg.cholesky_ex(shifted)
    # LAPACK's matrices are column-major; this one is symmetric.
    return torch.cholesky_inverse(factor).mT.contiguous(), info == 0


def _image(gram: Tensor, inverse: Tensor, step: Coefficients) -> Tensor:
    """Q G Q for Q = b/c + (a - b/c) Z, Z = (1 + c G)^-1, which are functions of G and commute. One product.

    It is (b/c)^2 G + 2 b/c (a - b/c) G Z + (a - b/c)^2 G Z^2, with G Z = (1 - Z) / c.
    """
    a, b, c = step
    rest, slope = b / c, a - b / c
    image = gram * rest**2
    image.add_(inverse, alpha=(slope**2 - 2 * rest * slope) / c)
    image.sub_(_symmetric_product(inverse, inverse), alpha=slope**2 / c)
    image.diagonal().add_(2 * rest * slope / c)
    return image


def _root(inverse: Tensor, step: Coefficients) -> Tensor:
    """Q = b/c + (a - b/c) Z, in the memory of Z."""
    a, b, c = step
    root = inverse.mul_(a - b / c)
    root.diagonal().add_(b / c)
    return root


def _inverse_root(gram: Tensor, method: str, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
    with _full_precision(gram.device):
        return _inverse_root_by_eigh(gram) if method == "eigh" else _inverse_root_by_steps(gram, wide)


def _inverse_root_by_eigh(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # What is not finite would raise an error, or give finite numbers.
    finite = gram.isfinite().all()
    values, vectors = torch.linalg.eigh(torch.where(finite, gram, 0.0))
    # Smaller ones are rounding, and so are the rows in their directions.
    tolerance = values[-1] * 4 * torch.finfo(gram.dtype).eps
    inverse = torch.where(values > tolerance, values, torch.inf).rsqrt()
    trace = (values * inverse).sum()
    half = (vectors * inverse.sqrt()).contiguous()
    return torch.where(finite, trace, torch.nan), half, half.mT.contiguous()


def _is_exact(gram: Tensor, wide: bool) -> bool:
    """Whether all steps are in float64: on the CPU, those of small matrices take hardly longer than in float32."""
    return wide or (gram.device.type == "cpu" and gram.shape[0] <= _SMALL)


def _inverse_root_by_steps(gram: Tensor, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
    size = _nonzero(gram.norm())
    scaled = gram / size
    exact = _is_exact(gram, wide)
    steps, least = rational_steps(_LOWEST_WIDE if wide else _LOWEST, _NEAR if exact else _HALFWAY)
    inverse, valid = _inverse_of_shifted(scaled, steps[0][2])
    image = _image(scaled, inverse, steps[0])
    # With g the singular values of the scaled matrix, and x those after the first step: x g, by G Z = (1 - Z) / c.
    a, b, c = steps[0]
    product = scaled.mul_(b / c).sub_(inverse, alpha=(a - b / c) / c)
    product.diagonal().add_((a - b / c) / c)
    first = _root(inverse, steps[0])
    # The eigenvalues of the image are at least 6e-4: what follows needs no more than float32. The trace is a sum over
    # all directions, into which a float32 product would carry the rounding of the largest factors.
    image = image if exact else image.float()
    second = None
    for step in steps[1:]:
        inverse, definite = _inverse_of_shifted(image, step[2])
        valid = valid & definite
        image = _image(image, inverse, step)
        root = _root(inverse, step)
        product = _symmetric_product(product, root.double())
        second = root if second is None else _symmetric_product(second, root)
    assert second is not None
    rest = _series_of_inverse_root(image, least)
    trace = (product * rest).sum()
    second = _symmetric_product(second, rest)
    scale = size.sqrt()
    return torch.where(valid, trace * scale, torch.nan), first.div_(scale), second


@functools.cache
def _series(least: float) -> tuple[float, ...]:
    """Coefficients of a polynomial of degree 9 in e, close to (1 - e)^-1/2 for |e| <= (1 - least^2) / (1 + least^2)."""
    half = (1 - least**2) / (1 + least**2)
    if half < 0.01:
        # The series at 0. A fit to a short interval is large outside of it, where directions without variance are.
        return tuple(math.comb(2 * k, k) / 4**k for k in range(10))
    fit = chebyshev.Chebyshev.interpolate(lambda e: (1 - e) ** -0.5, 9, domain=[-half, half])
    return tuple(float(c) for c in fit.convert(kind=Polynomial).coef)


def _series_of_inverse_root(image: Tensor, least: float) -> Tensor:
    """G^-1/2 for eigenvalues in [least^2, 1], as a polynomial of degree 9 in E = 1 - G / centre. Four products."""
    centre = (1 + least**2) / 2
    e = image.mul_(-1 / centre)
    e.diagonal().add_(1)
    squared = _symmetric_product(e, e)
    cubed = _symmetric_product(squared, e)
    coefficients = [c / centre**0.5 for c in _series(least)]
    result = cubed * coefficients[9]
    for k in (6, 3, 0):
        result.add_(squared, alpha=coefficients[k + 2]).add_(e, alpha=coefficients[k + 1])
        result.diagonal().add_(coefficients[k])
        if k:
            result = _symmetric_product(cubed, result)
    return result


def _inverse_root_fake(gram: Tensor, method: str, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if method == "eigh" or _is_exact(gram, wide) else torch.float32
    first = gram.new_empty(gram.shape)
    return gram.new_empty(()), first, torch.empty_like(first, dtype=dtype)


def _product(a: Tensor, b: Tensor, precision: str) -> Tensor:
    with _full_precision(a.device):
        return _multiply(a, b, precision)


def _product_fake(a: Tensor, b: Tensor, precision: str) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _symmetric(a: Tensor, b: Tensor) -> Tensor:
    with _full_precision(a.device):
        return _symmetric_product(a, b)


def _symmetric_fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


define("polar(Tensor m, str precision) -> Tensor", _polar, _polar_fake, composed=True)
define(
    "inverse_root(Tensor gram, str method, bool wide) -> (Tensor trace, Tensor first, Tensor second)",
    _inverse_root,
    _inverse_root_fake,
    composed=True,
)
define("product(Tensor a, Tensor b, str precision) -> Tensor", _product, _product_fake, composed=True)
define("symmetric_product(Tensor a, Tensor b) -> Tensor", _symmetric, _symmetric_fake, composed=True)


def polar(m: Tensor, precision: str) -> Tensor:
    """The polar factor of (n, d), in its dtype, by polynomials on the smaller side: 2 n d and n^2 products a step."""
    return torch.ops.moment_ops.polar.default(m, precision)


def product(a: Tensor, b: Tensor, precision: str) -> Tensor:
    """`a @ b`, with operands rounded as the precision says and never otherwise."""
    return torch.ops.moment_ops.product.default(a, b, precision)


def symmetric_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`, (n, n), which is known to be symmetric, and comes out exactly symmetric."""
    return torch.ops.moment_ops.symmetric_product.default(a, b)


class InverseRoot(NamedTuple):
    """The trace of G^1/2, a float64 scalar, and G^-1/2 as a product of two matrices.

    The first is float64. With `half`, each is the transpose of the other; otherwise both are symmetric, and the first
    must be multiplied first.
    """

    trace: Tensor
    first: Tensor
    second: Tensor
    half: bool

    def times_columns(self, columns: Tensor, few: int) -> Tensor:
        """The first `few` rows of `G^-1/2 columns`, (n, m), for columns in float64."""
        inner = (self.first.mT @ columns).to(self.second.dtype)
        return product(self.second.mT[:few], inner, "ieee")

    def between(self, rows: Tensor, image: Tensor | None, root: Tensor) -> Tensor:
        """`rows root G^-1/2 root`, for float64 rows (m, n) and a symmetric root.

        Args:
            image: `rows root`, if it is known.
        """
        if self.half and len(rows) >= len(root):
            factor = root @ self.first
            return rows @ symmetric_product(factor, factor.mT)
        if image is None and len(rows) < len(root):
            image = rows @ root
        inner = image @ self.first if image is not None else rows @ (root @ self.first)
        inner, root = inner.to(self.second.dtype), root.to(self.second.dtype)
        if len(rows) < len(root):
            return product(product(inner, self.second, "ieee"), root, "ieee")
        return product(inner, product(self.second, root, "ieee"), "ieee")


def inverse_root(gram: Tensor, method: str, wide: bool) -> InverseRoot:
    """The trace of the root of a positive semi-definite (n, n) float64 matrix, and its inverse root.

    Args:
        method: "eigh" or "qdwh".
        wide: whether all steps of "qdwh" are in float64, and singular values are resolved down to 2e-7 rather than
            5e-7.

    Returns:
        NaN as the trace if G is not positive semi-definite but for rounding, or not finite.

    Cost of "qdwh", in (n, n) matrices: in float64 a Cholesky factorisation, an inverse and two products of which one
    triangle is computed; the same in float32 with six products. "eigh" makes the host wait on a GPU.
    """
    trace, first, second = torch.ops.moment_ops.inverse_root.default(gram, method, wide)
    return InverseRoot(trace, first, second, method == "eigh")
