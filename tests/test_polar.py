"""Polar factors and inverse roots, beside singular values in float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import epsilon

import moment_ops as mo
from moment_ops.ops.polar import accuracy, inverse_root, polar, product, rational_steps, sign_polynomials

PRECISIONS = ("ieee", "bf16x3", "tf32", "bf16")
SHAPES = {"wide": (12, 40), "tall": (40, 12), "square": (20, 20), "one row": (1, 9), "large": (350, 360)}
CONDITIONS = (1.0, 1e3, 1e6)


def matrix(rows, columns, condition=10.0, rank=None, dtype=torch.float32):
    """A matrix with a geometric spectrum, and its polar factor."""
    generator = torch.Generator().manual_seed(0)
    smaller = min(rows, columns)
    left, right = (
        torch.linalg.qr(torch.randn(size, smaller, generator=generator, dtype=torch.float64)).Q
        for size in (rows, columns)
    )
    values = condition ** -torch.linspace(0, 1, smaller, dtype=torch.float64)
    rank = smaller if rank is None else rank
    values[rank:] = 0
    return ((left * values) @ right.mT).to(dtype), left[:, :rank] @ right[:, :rank].mT, values


def values_after(steps, x):
    for a, b, c in steps:
        x = a * x + b * x**3 + c * x**5
    return x


@pytest.mark.parametrize("precision", PRECISIONS)
def test_polynomials_take_singular_values_to_one(precision):
    lowest, margin = accuracy(torch.float32, precision)
    x = np.geomspace(lowest, 1, 2000)
    error = np.abs(values_after(sign_polynomials(lowest, margin), x) - 1).max()
    assert error <= max(2e-7, 4 * margin)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_polynomials_stay_bounded_where_rounding_leaves_their_interval(precision):
    lowest, margin = accuracy(torch.float32, precision)
    generator = np.random.default_rng(0)
    x = np.concatenate([np.zeros(1), np.geomspace(lowest / 100, 1, 2000)])
    for step in sign_polynomials(lowest, margin):
        x = values_after([step], x) * (1 + margin * generator.uniform(-1, 1, x.shape))
    assert np.abs(x).max() <= 1 + 4 * margin + 2e-7


def test_the_first_polynomial_is_the_best_of_its_degree():
    """No other odd polynomial of degree 5 has a smaller largest error: its error has four extrema of equal size."""
    low = 0.2
    (step, *_) = sign_polynomials(low, 1e-5)
    x = np.linspace(low, 1, 200_001)
    error = values_after([step], x) - 1
    extrema = [error[0], *error[1:-1][(np.diff(np.sign(np.diff(error))) != 0)], error[-1]]
    assert len(extrema) == 4
    assert np.ptp(np.abs(extrema)) <= 1e-8
    assert all(first * second < 0 for first, second in itertools.pairwise(extrema))


def test_no_polynomial_takes_large_values_to_small_ones():
    """They would drown in the rounding of the others."""
    lowest, margin = accuracy(torch.float32, "ieee")
    x = np.geomspace(lowest, 1, 20_000)
    for step in sign_polynomials(lowest, margin):
        after = values_after([step], x)
        assert (after / x).min() >= 0.05
        x = after


def test_rational_steps_take_singular_values_to_one():
    steps, least = rational_steps(1e-8, 1e-15)
    x = np.geomspace(1e-8, 1, 2000)
    for a, b, c in steps:
        x = x * (a + b * x**2) / (1 + c * x**2)
    assert np.abs(x - 1).max() <= 1e-14
    assert least == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_polar_is_the_polar_factor(shape, condition):
    m, exact, values = matrix(*SHAPES[shape], condition)
    p = polar(m, "ieee").double()
    # Errors of m itself are as large in every direction, and are divided by the singular values.
    assert abs((p * m).sum() - values.sum()) <= 2e-6 * values.sum()
    weighted = ((p - exact) @ m.double().mT).norm()
    assert weighted <= 64 * epsilon(torch.float32) * len(values) ** 0.5


@pytest.mark.parametrize(("precision", "bound"), [("bf16x3", 1e-4), ("tf32", 3e-3), ("bf16", 2e-2)])
def test_lower_precisions_bound_the_error_of_the_nuclear_norm(precision, bound):
    with mo.backend("reference"):
        m, _, values = matrix(40, 60, 1e2)
        p = polar(m, precision).double()
    assert abs((p * m).sum() - values.sum()) <= bound * values.sum()


def test_the_cpu_multiplies_in_full_precision():
    a, b = torch.randn(2, 30, 30)
    for precision in PRECISIONS:
        assert torch.equal(product(a, b, precision), a @ b)


def test_autocast_rounds_nothing():
    a, b = torch.randn(2, 30, 30)
    plain = product(a, b, "ieee")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(product(a, b, "ieee"), plain)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("size", [1, 30, 330, 600])
@pytest.mark.parametrize("method", ["eigh", "qdwh"])
def test_inverse_root_is_that_of_the_singular_values(method, size, condition):
    m, exact, values = matrix(size, size, condition, dtype=torch.float64)
    root = inverse_root(m.mT @ m, method, False)
    assert root.trace.item() == pytest.approx(values.sum().item(), rel=1e-6)
    p = root.between(m, m, torch.eye(size, dtype=torch.float64)).double()
    assert ((p - exact) @ m.mT).norm() <= 1e-5 * size**0.5
    q = root.times_columns(m.mT, size).double()
    assert ((q - exact.mT) @ m).norm() <= 1e-5 * size**0.5


@pytest.mark.parametrize("method", ["eigh", "qdwh"])
def test_float64_is_exact(method):
    m, exact, values = matrix(40, 40, 1e3, dtype=torch.float64)
    root = inverse_root(m.mT @ m, method, True)
    assert root.trace.item() == pytest.approx(values.sum().item(), rel=1e-11)
    p = root.between(m, m, torch.eye(40, dtype=torch.float64))
    assert ((p - exact) @ m.mT).norm() <= 1e-9


@pytest.mark.parametrize("method", ["eigh", "qdwh"])
@pytest.mark.parametrize("size", [24, 400])
def test_null_directions_get_nothing(method, size):
    m, exact, values = matrix(size, size, 10.0, rank=size // 3, dtype=torch.float64)
    root = inverse_root(m.mT @ m, method, False)
    assert root.trace.item() == pytest.approx(values.sum().item(), rel=1e-6)
    p = root.between(m, m, torch.eye(size, dtype=torch.float64)).double()
    assert (p - exact).norm() <= 1e-4 * exact.norm()


@pytest.mark.parametrize("method", ["eigh", "qdwh"])
def test_a_matrix_of_zeros_has_no_trace(method):
    root = inverse_root(torch.zeros(5, 5, dtype=torch.float64), method, False)
    assert root.trace == 0
    assert root.between(torch.zeros(2, 5, dtype=torch.float64), None, torch.eye(5, dtype=torch.float64)).norm() == 0
    assert polar(torch.zeros(3, 5), "ieee").norm() == 0


@pytest.mark.parametrize("method", ["eigh", "qdwh"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_has_no_trace(method, value):
    gram = torch.eye(5, dtype=torch.float64)
    gram[2, 2] = value
    assert not inverse_root(gram, method, False).trace.isfinite()


def test_an_indefinite_matrix_has_no_trace():
    gram = torch.diag(torch.tensor([1.0, 1.0, -1e-3], dtype=torch.float64))
    assert inverse_root(gram, "qdwh", False).trace.isnan()


def test_operators_keep_the_contract():
    gram = torch.eye(6, dtype=torch.float64) + 0.1
    operators = torch.ops.moment_ops
    for method, wide in (("qdwh", False), ("qdwh", True), ("eigh", False)):
        torch.library.opcheck(operators.inverse_root.default, (gram, method, wide))
    torch.library.opcheck(operators.inverse_root.default, (torch.eye(400, dtype=torch.float64), "qdwh", False))
    torch.library.opcheck(operators.polar.default, (torch.randn(4, 6), "ieee"))
    torch.library.opcheck(operators.product.default, (torch.randn(4, 6), torch.randn(6, 3), "bf16"))
    torch.library.opcheck(operators.symmetric_product.default, (torch.randn(4, 6), torch.randn(6, 4)))
