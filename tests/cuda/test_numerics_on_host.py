"""The CUDA reduction's own sources, compiled for the host: ill-conditioned columns, and values that are not finite."""

import host_kernels
import pytest
import test_cuda_on_host as on_host
import torch
from helpers import assert_close, exact_moments, mean_bound, mean_error, statistics_dtype, var_bound, var_error

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


def assert_same_moments(mean, var, exact_mean, exact_var, dtype):
    assert mean_error(mean, exact_mean, exact_var) <= mean_bound(dtype)
    assert var.isfinite().all()
    assert var_error(var, exact_var) <= var_bound(dtype)


# Standard deviations whose squares fit, while the sums of squares do not; and what brings them near 1, exactly.
NEAR_THE_LIMIT = {torch.float32: (1e19, 1.0), torch.bfloat16: (1e19, 1.0), torch.float64: (0.7e154, 2.0**-500)}


@pytest.mark.parametrize("shape", [(8, 36), (64, 260), (500, 37), (5000, 8)], ids=str)
@pytest.mark.parametrize("dtype", NEAR_THE_LIMIT)
@pytest.mark.parametrize("source", ["features", "relu"])
def test_a_variance_that_fits_comes_out_where_its_sum_does_not_fit(module, shape, dtype, source):
    spread, down = NEAR_THE_LIMIT[dtype]
    signs = torch.where(torch.rand(shape) < 0.5, 1.0, -1.0).double()
    x = (signs * spread * 0.9).to(dtype)
    if source == "relu":
        y, mean, var = host_kernels.relu_moments(module, x)
        exact = exact_moments([y.double() * down])
    else:
        mean, var, _ = host_kernels.moments(module, [x])
        exact = exact_moments([x.double() * down])
    assert_same_moments(mean.double() * down, var.double() * down * down, *exact, dtype)


@pytest.mark.parametrize("dtype", NEAR_THE_LIMIT)
@pytest.mark.parametrize("rows", [3, 9, 66, 1500])
def test_a_mean_comes_out_beside_the_largest_numbers(module, dtype, rows):
    largest = torch.finfo(dtype).max
    x = (torch.tensor([0.9, -0.9, 0.3], dtype=torch.float64).repeat(rows // 3)[:, None] * largest).to(dtype)
    mean, var, _ = host_kernels.moments(module, [x])
    exact = x.double().div(2**10).mean(0)
    assert ((mean.double() / 2**10 - exact) / exact).abs().max() <= 4 * mean_bound(dtype)
    assert var.tolist() == [float("inf")]


@pytest.mark.parametrize("average_kind", ["none", "moving"])
def test_a_matched_variance_that_fits_comes_out_where_its_sum_does_not_fit(module, average_kind):
    """The gradient of a loss without an average, or the average itself."""
    x = torch.randn(64, 20) * 5e18
    target = torch.zeros(20), torch.zeros(20)
    state = on_host.new_state(average_kind, 20, torch.float32, True)
    arguments = (
        (1.0, 1.0),
        (None, None),
        1e-3,
        average_kind,
        on_host.options_of(average_kind, 20),
        state,
        average_kind != "none",
    )
    _, _, _, grad_var = host_kernels.match_(module, [x], None, None, target, *arguments)
    exact = x.double().var(0)
    if average_kind == "none":
        assert var_error(grad_var, 2e-3 * exact) <= var_bound(torch.float32)
    else:
        assert var_error(state[1], exact) <= var_bound(torch.float32)


@pytest.mark.parametrize("dtype", NEAR_THE_LIMIT)
@pytest.mark.parametrize("columns", [1, 64])
@pytest.mark.parametrize("operator", ["moments", "relu_moments"])
def test_gradients_come_out_where_differences_from_the_mean_do_not_fit(module, dtype, columns, operator):
    largest = torch.finfo(dtype).max
    x = torch.tensor([0.9, -0.9, -0.9], dtype=torch.float64)[:, None].expand(3, columns) * largest
    mean = (x.div(4).mean(0) * 4).to(statistics_dtype(dtype))
    x = x.to(dtype)
    grad_var = torch.full_like(mean, 0.5 / largest)
    if operator == "moments":
        (dx,) = host_kernels.moments_backward(module, [x], mean, torch.tensor([3]), None, grad_var)
    else:
        dx = host_kernels.relu_moments_backward(module, x, mean, None, None, grad_var)
    exact = 4 * (grad_var.double() * (x.double() / 4 - mean.double() / 4))
    exact = torch.where(x <= 0, 0.0, exact) if operator == "relu_moments" else exact
    assert torch.allclose(dx.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0)
