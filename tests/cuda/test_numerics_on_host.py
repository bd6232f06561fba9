"""The CUDA reduction's own sources, compiled for the host: ill-conditioned columns, and values that are not finite."""

import host_kernels
import pytest
import torch
from helpers import assert_close, exact_moments, mean_bound, mean_error, var_bound, var_error

# (rows, columns) of one tile, one group of threads, several, and several chunks.
SHAPES = {"one tile": (8, 36), "one group": (64, 140_000), "groups": (500, 36), "chunks": (5000, 8)}


def assert_within_bounds(module, x, ratio=1.0):
    mean, var, _ = host_kernels.moments(module, [x])
    exact_mean, exact_var = exact_moments([x])
    assert mean_error(mean, exact_mean, exact_var) <= mean_bound(x.dtype)
    assert var_error(var, exact_var) <= var_bound(x.dtype, ratio)


@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_ill_conditioned_columns_stay_within_the_bounds(module, ratio, shape):
    x = (torch.randn(shape, dtype=torch.float64) + ratio).float()
    assert_within_bounds(module, x, ratio)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_first_row_far_from_all_others_costs_no_digits(module, shape):
    x = torch.randn(shape)
    x[0] = 300.0
    assert_within_bounds(module, x)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_column_that_is_active_in_its_first_row_alone_costs_no_digits(module, shape):
    x = torch.zeros(shape)
    x[0] = torch.rand(shape[1]) + 1
    x[shape[0] // 2] = 0.1
    assert_within_bounds(module, x)


def test_sorted_rows_cost_no_digits(module):
    assert_within_bounds(module, torch.sort(torch.randn(5000, 4), dim=0).values + 100)


@pytest.mark.parametrize("rows", [2, 7, 8, 9, 100, 1300])
def test_a_constant_column_has_no_variance(module, rows):
    input = [torch.full((rows, 20), 0.1)]
    mean, var, _ = host_kernels.moments(module, input)
    assert torch.equal(mean, input[0][0])
    assert (var == 0).all()


def test_a_column_that_is_not_finite_keeps_to_itself(module):
    x = torch.randn(700, 40)
    x[333, 7], x[2, 9], x[699, 11] = float("nan"), float("inf"), float("nan")
    mean, var, _ = host_kernels.moments(module, [x])
    bad = torch.zeros(40, dtype=torch.bool)
    bad[[7, 9, 11]] = True
    assert torch.equal(~mean.isfinite(), bad)
    assert torch.equal(~var.isfinite(), bad)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("columns", [40, 37])
def test_the_gradient_of_a_mean_does_not_depend_on_the_features(module, columns, added):
    x = torch.randn(70, columns)
    x[3, 5], x[69, 7] = float("nan"), float("inf")
    mean, _, _ = host_kernels.moments(module, [x], var=False)
    grad_mean, count = torch.linspace(-1, 1, columns), torch.tensor([70])
    scale = torch.full((1,), 3.0)
    grad = [torch.full_like(x, 0.25)] if added else ()
    (gradient,) = host_kernels.moments_backward(module, [x], mean, count, grad_mean, None, grad, scale=scale)
    assert_close(gradient, (3 * grad_mean.double() / 70 + 0.25 * added).expand(x.shape))


def test_the_gradient_of_a_mean_through_a_relu_depends_on_the_mask_alone(module):
    y = torch.relu(torch.randn(70, 40))
    y[3, 5] = float("nan")
    grad_mean = torch.linspace(-1, 1, 40)
    gradient = host_kernels.relu_moments_backward(module, y, y.mean(0), None, grad_mean, None)
    assert_close(gradient, torch.where(y <= 0, 0, grad_mean.double() / 70))
