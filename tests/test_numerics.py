"""Accuracy and determinism: ill-conditioned columns, values that are not finite, threads and repetitions."""

import pytest
import torch
from helpers import (
    DTYPES,
    assert_close,
    assert_same_bits,
    exact_moments,
    make_features,
    make_target,
    mean_bound,
    mean_error,
    merged_var_bound,
    state_of,
    statistics_dtype,
    var_bound,
    var_error,
)

import moment_ops as mo
from moment_ops.ops.moments import moments as moments_op
from moment_ops.ops.moments import moments_backward
from moment_ops.ops.relu_moments import relu_moments

pytestmark = pytest.mark.usefixtures("backend")

RATIOS = (0.0, 1.0, 10.0, 1e2, 1e3, 1e4)


def ladder(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """One layer per |mean|/std, of either sign and several scales."""
    features = []
    for ratio in RATIOS:
        noise = torch.randn(rows, columns, dtype=torch.float64)
        sign = torch.where(torch.arange(columns) % 2 == 0, 1.0, -1.0).double()
        scale = 10.0 ** (torch.arange(columns) % 5 - 2).double()
        features.append(((noise + ratio * sign) * scale).to(dtype))
    return features


def assert_within_bounds(features, m):
    for x, (mean, var), ratio in zip(features, m.layers(), RATIOS, strict=True):
        exact_mean, exact_var = exact_moments([x])
        assert mean_error(mean, exact_mean, exact_var) <= mean_bound(x.dtype), f"mean at {ratio}"
        assert var_error(var, exact_var) <= var_bound(x.dtype, ratio), f"variance at {ratio}"


@pytest.mark.parametrize("rows", [2, 5, 64, 1000, 4099, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ladder_stays_within_the_bounds(rows, dtype):
    features = ladder(rows, 6 if rows > 10_000 else 40, dtype)
    assert_within_bounds(features, mo.moments(features))


def test_a_million_rows_stay_within_the_bounds():
    features = ladder(1_000_000, 2)
    assert_within_bounds(features, mo.moments(features))


def test_a_first_row_far_from_all_others_costs_no_digits():
    x = torch.randn(5000, 8)
    x[0] = 300.0
    mean, var = exact_moments([x])
    m = mo.moments(x)
    assert mean_error(m.mean, mean, var) <= mean_bound(torch.float32)
    assert var_error(m.var, var) <= var_bound(torch.float32)


def test_a_sparse_column_costs_no_digits():
    """As behind a ReLU: active in the first row, and hardly ever again."""
    x = torch.zeros(20_000, 3)
    x[0] = torch.tensor([1.0, 3.7, 1e-3])
    x[777] = 0.1
    mean, var = exact_moments([x])
    m = mo.moments(x)
    assert mean_error(m.mean, mean, var) <= mean_bound(torch.float32)
    assert var_error(m.var, var) <= var_bound(torch.float32)


def test_sorted_rows_cost_no_digits():
    x = torch.sort(torch.randn(20_000, 4), dim=0).values + 100
    mean, var = exact_moments([x])
    m = mo.moments(x)
    assert mean_error(m.mean, mean, var) <= mean_bound(torch.float32)
    assert var_error(m.var, var) <= var_bound(torch.float32)


@pytest.mark.parametrize("rows", [2, 9, 513, 3001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_column_has_its_mean_and_no_variance(rows, dtype):
    values = torch.tensor([0.1, -3.3e4, 1e-5, 0.0, 7.0]).to(dtype)
    m = mo.moments(values.expand(rows, 5).contiguous())
    assert torch.equal(m.mean, values.to(statistics_dtype(dtype)))
    assert m.var.tolist() == [0.0] * 5


@pytest.mark.parametrize("pooled", [2, 7, 64])
def test_a_constant_channel_has_no_pooled_variance(pooled):
    m = mo.moments(torch.full((3, 2, pooled), 0.1), dim=(0, 2))
    assert m.var.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("shape", [(2, 3, 2, 2), (8, 3, 8, 8), (64, 3, 5, 5)])
def test_pooled_moments_stay_within_the_bounds(ratio, shape):
    x = (torch.randn(shape, dtype=torch.float64) + ratio).float()
    m = mo.moments(x, dim=(0, 2, 3))
    mean, var = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3))
    assert mean_error(m.mean, mean, var) <= mean_bound(torch.float32)
    assert var_error(m.var, var) <= merged_var_bound(torch.float32, ratio, shape[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_row_is_its_own_mean_without_variance(dtype):
    x = make_features(1, [(6,)], dtype)[0]
    m = mo.moments(x)
    assert torch.equal(m.mean, x[0].to(statistics_dtype(dtype)))
    assert m.var.isnan().all()


@pytest.mark.parametrize(("rows", "correction"), [(1, 1), (2, 2), (2, 3), (1, 5)])
def test_no_degrees_of_freedom_give_a_variance_that_is_nan(rows, correction):
    assert mo.moments(torch.randn(rows, 4), correction=correction).var.isnan().all()


def test_one_row_without_correction_has_variance_zero():
    assert mo.moments(torch.randn(1, 4), correction=0).var.tolist() == [0.0] * 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("row", [0, 3, 600])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_that_is_not_finite_stays_in_its_column(value, row, dtype):
    x = make_features(601, [(40,)], dtype)[0]
    clean = mo.moments(x)
    x[row, 17] = value
    m = mo.moments(x)
    others = torch.arange(40) != 17
    assert not m.mean[17].isfinite()
    assert not m.var[17].isfinite()
    assert_same_bits(m.mean[others], clean.mean[others])
    assert_same_bits(m.var[others], clean.var[others])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_of_other_columns_survive_a_value_that_is_not_finite(value):
    target = make_target([(40,)])
    gradients = []
    for poison in (0.0, value):
        x = make_features(9, [(40,)])[0]
        x[0, 17] += poison
        x.requires_grad_()
        gradients.append(torch.autograd.grad(mo.moment_loss(x, target), x)[0])
    others = torch.arange(40) != 17
    assert_same_bits(gradients[0][:, others], gradients[1][:, others])
    assert not gradients[1][:, 17].isfinite().any()


def with_values_that_are_not_finite(dtype):
    x = make_features(601, [(40,)], dtype)[0]
    x[3, 5], x[600, 7], x[0, 9] = float("nan"), float("inf"), -float("inf")
    return x.requires_grad_()


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_a_mean_does_not_depend_on_the_features(dtype, added):
    x = with_values_that_are_not_finite(dtype)
    mean, _, count = moments_op([x.detach()], 0, 1, False)
    grad_mean = torch.linspace(-1, 1, 40, dtype=mean.dtype)
    grad = [torch.full_like(x, 0.25, requires_grad=False)] if added else []
    scale = torch.full((), 3.0, dtype=mean.dtype)
    (plain,) = torch.autograd.grad(mo.moments(x, var=False).mean, x, grad_mean)
    (scaled,) = moments_backward([x.detach()], mean, count, grad_mean, None, grad=grad, scale=scale)
    assert_close(plain, (grad_mean / 601).expand(x.shape))
    assert_close(scaled, (3 * grad_mean.double() / 601 + 0.25 * added).expand(x.shape))


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_a_mean_through_a_relu_depends_on_the_mask_alone(dtype, added):
    x = with_values_that_are_not_finite(dtype)
    y, mean, _ = relu_moments(x)
    grad_mean = torch.linspace(-1, 1, 40, dtype=mean.dtype)
    wanted = (mean, y) if added else (mean,)
    (gradient,) = torch.autograd.grad(wanted, x, [grad_mean, torch.full_like(y, 0.25)][: len(wanted)])
    expected = grad_mean.double() / 601 + 0.25 * added
    assert_close(gradient, torch.where(x <= 0, 0, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_and_small_magnitudes_keep_their_digits(dtype):
    scale = torch.tensor([1e-15, 1e-8, 1.0, 1e8, 1e15], dtype=torch.float64)
    x = (torch.randn(100, 5, dtype=torch.float64) * scale).to(dtype)
    mean, var = exact_moments([x])
    m = mo.moments(x)
    assert mean_error(m.mean, mean, var) <= mean_bound(dtype)
    assert var_error(m.var, var) <= var_bound(dtype)


SHAPES_FOR_THREADS = ((1000,), (32, 9, 9), (3,))


def batch(rows: int) -> list[torch.Tensor]:
    features = make_features(rows, SHAPES_FOR_THREADS)
    features[1] = features[1].to(memory_format=torch.channels_last)
    return [x.requires_grad_() for x in features]


def everything(features: list[torch.Tensor]) -> list[torch.Tensor]:
    """Moments, loss, state and gradients of a batch."""
    loss_fn = mo.MomentLoss(make_target(SHAPES_FOR_THREADS), mo.AdamMovingAverage(lr=0.1))
    m = mo.moments(features)
    loss = loss_fn(features)
    return [m.mean, m.var, loss, *state_of(loss_fn).values(), *torch.autograd.grad(loss, features)]


@pytest.mark.parametrize("rows", [33, 700])
def test_results_do_not_depend_on_the_number_of_threads(backend, rows):
    if backend == "reference":
        pytest.skip("the reference is PyTorch's own sums, which are cut by the number of threads")
    before = torch.get_num_threads()
    features, results = batch(rows), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(everything(features))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_tall_layers_do_not_depend_on_the_number_of_threads(backend):
    if backend == "reference":
        pytest.skip("the reference is PyTorch's own sums, which are cut by the number of threads")
    x = torch.randn(150_001, 3)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            m = mo.moments(x)
            results.append([m.mean, m.var])
    finally:
        torch.set_num_threads(before)
    assert_same_bits(*results)


def test_ten_runs_are_the_same_to_the_last_bit():
    features = batch(65)
    first = everything(features)
    for _ in range(9):
        assert_same_bits(everything(features), first)


def signs(rows: int) -> torch.Tensor:
    """As many of either, and no runs that would cancel in the sums of a few rows."""
    return torch.where(torch.randperm(rows) % 2 == 0, 1.0, -1.0).double()[:, None]


def assert_exact(actual, exact, dtype):
    """A few roundings of the statistics, whatever the magnitude."""
    assert actual.isfinite().all()
    assert ((actual.double() - exact) / exact).abs().max() <= var_bound(dtype)


# Standard deviations whose squares fit, while the sums of squares do not, with means up to ten times as large.
NEAR_THE_LIMIT = {torch.float32: 1e19, torch.bfloat16: 1e19, torch.float64: 0.7e154}


@pytest.mark.parametrize("rows", [2, 5, 64, 600, 4099, 100_000])
@pytest.mark.parametrize("ratio", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("dtype", NEAR_THE_LIMIT)
def test_a_variance_that_fits_comes_out_where_its_sum_does_not_fit(rows, ratio, dtype):
    x = ((signs(rows) + ratio + torch.rand(rows, 3).double() / 8) * NEAR_THE_LIMIT[dtype]).to(dtype)
    m = mo.moments(x)
    mean, var = exact_moments([x.double() / 2.0**500 if dtype == torch.float64 else x])
    factor = 2.0**500 if dtype == torch.float64 else 1.0
    assert mean_error(m.mean.double() / factor, mean, var) <= mean_bound(dtype)
    assert_exact(m.var / factor / factor if dtype == torch.float64 else m.var, var, dtype)


@pytest.mark.parametrize("rows", [3, 9, 64, 3001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_mean_comes_out_beside_the_largest_numbers(rows, dtype):
    """Differences and sums of these do not fit, nor does their variance."""
    x = torch.tensor([0.9, -0.9, 0.3], dtype=torch.float64).repeat(rows // 3)[:, None] * torch.finfo(dtype).max
    x = x.to(dtype)
    m = mo.moments(x)
    exact = x.double().div(2**10).mean(0)
    assert ((m.mean.double() / 2**10 - exact) / exact).abs().max() <= 4 * mean_bound(dtype)
    assert m.var.tolist() == [float("inf")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_largest_number_is_the_mean_of_its_column_without_variance(dtype):
    largest = torch.finfo(dtype).max
    m = mo.moments(torch.full((70, 2), largest, dtype=dtype))
    assert m.mean.tolist() == [largest] * 2
    assert m.var.tolist() == [0.0] * 2


@pytest.mark.parametrize("rows", [2, 700])
def test_halves_up_to_their_largest_number(rows):
    x = torch.where(torch.arange(rows) % 2 == 0, 65504.0, -65504.0)[:, None].to(torch.float16)
    mean, var = exact_moments([x])
    m = mo.moments(x)
    assert m.mean.tolist() == mean.tolist() == [0.0]
    assert var_error(m.var, var) <= var_bound(torch.float16)


@pytest.mark.parametrize("rows", [5, 700])
def test_columns_beside_one_that_overflows_keep_their_bits(rows):
    x = make_features(rows, [(40,)])[0]
    clean = mo.moments(x)
    x[:, 17] *= 1e19
    m = mo.moments(x)
    others = torch.arange(40) != 17
    assert m.var[17].isfinite()
    assert_same_bits(m.mean[others], clean.mean[others])
    assert_same_bits(m.var[others], clean.var[others])


@pytest.mark.parametrize("layout", ["channels last", "rows apart", "several layers"])
def test_overflows_are_seen_in_every_layout(layout):
    x = torch.randn(600, 4, 3, 2) * 1e18
    input = {
        "channels last": [x.to(memory_format=torch.channels_last)],
        "rows apart": [x[::2]],
        "several layers": [torch.randn(600, 7), x, x[:, 1]],
    }[layout]
    m = mo.moments(input)
    mean, var = exact_moments(input)
    assert mean_error(m.mean, mean, var) <= mean_bound(torch.float32)
    assert_exact(m.var, var, torch.float32)


def test_pooled_rows_that_overflow():
    x = torch.randn(64, 3, 5, 5) * 5e18
    m = mo.moments(x, dim=(0, 2, 3))
    assert_exact(m.var, x.double().var((0, 2, 3)), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [9, 700])
def test_moments_behind_a_relu_come_out_where_they_fit(rows, dtype):
    x = (torch.randn(rows, 6, dtype=torch.float64) * NEAR_THE_LIMIT[dtype]).to(dtype)
    y, mean, var = torch.ops.moment_ops.relu_moments(x, None, 1)
    factor = 2.0**500 if dtype == torch.float64 else 1.0
    exact_mean, exact_var = exact_moments([torch.relu(x.double() / factor)])
    assert torch.equal(y, torch.relu(x))
    assert mean_error(mean.double() / factor, exact_mean, exact_var) <= mean_bound(dtype)
    assert_exact(var.double() / factor / factor, exact_var, dtype)


# Behind a large mean, the difference of a feature of the other sign does not fit in any dtype.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("operator", ["moments", "relu_moments"])
def test_gradients_come_out_where_differences_from_the_mean_do_not_fit(dtype, operator):
    largest = torch.finfo(dtype).max
    x = torch.tensor([[0.9, 1.0], [-0.9, 2.0], [-0.9, 4.0]], dtype=torch.float64)
    x[:, 0] *= largest
    wide = statistics_dtype(dtype)
    mean = (x.div(4).mean(0) * 4).to(wide)
    x = x.to(dtype)
    grad_var = torch.tensor([0.5 / largest, 1.0], dtype=wide)
    arguments = ([], None, grad_var, [x], mean, torch.tensor([3]), 0, 1, None)
    if operator == "moments":
        (dx,) = torch.ops.moment_ops.moments_backward(*arguments)
    else:
        dx = torch.ops.moment_ops.relu_moments_backward(None, None, grad_var, x, mean, 1)
    difference = x.double() / 4 - mean.double() / 4
    exact = 4 * (grad_var.double() * difference)
    if operator == "relu_moments":
        exact = torch.where(x <= 0, 0.0, exact)
    assert torch.allclose(dx.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("source", ["features", "moments"])
def test_a_loss_that_fits_comes_out_beside_moments_that_hardly_do(source):
    """Means of 1e18, variances of 1e36, and targets near them."""
    x = torch.randn(300, 8, dtype=torch.float64) * 1e18 + 1e18
    x = x.float()
    mean, var = exact_moments([x])
    target = mo.Moments((mean * 0.9).float(), var.float(), shapes=((8,),))
    features = x.clone().requires_grad_()
    loss = mo.moment_loss(features if source == "features" else mo.moments(features), target, var_weight=1e-37)
    wide = x.double().requires_grad_()
    exact_mean, exact_var = exact_moments([wide])
    difference = exact_var - target.var.double()
    exact = ((exact_mean - target.mean.double()) ** 2 + 1e-37 * difference**2).sum() / 8
    assert torch.allclose(loss.double(), exact, rtol=1e-4)
    grad, exact_grad = (torch.autograd.grad(value, leaf)[0] for value, leaf in ((loss, features), (exact, wide)))
    assert (grad.double() - exact_grad).abs().max() <= 1e-3 * exact_grad.abs().max()


def test_a_loss_that_does_not_fit_is_infinite():
    loss = mo.moment_loss(torch.randn(20, 3) * 1e18, make_target([(3,)]))
    assert loss.item() == float("inf")


@pytest.mark.parametrize("average", [None, mo.MovingAverage(0.5), mo.AdamMovingAverage(lr=0.1)])
def test_the_loss_of_variances_that_do_not_fit_is_infinite(average):
    """Not a number is infinity less infinity, and nothing times infinity."""
    x = torch.tensor([0.9, -0.9, 0.3]).repeat(3)[:, None] * torch.finfo(torch.float32).max
    target = mo.Moments(torch.zeros(1), torch.zeros(1), shapes=((1,),))
    assert mo.MomentLoss(target, average)(x).item() == float("inf")
    assert mo.MomentLoss(target, average)(mo.moments(x)).item() == float("inf")
    assert mo.moment_loss(x, mo.moments(x)).item() == float("inf")
    x[0] = float("nan")
    assert mo.MomentLoss(target, average)(x).isnan()
    assert mo.moment_loss(x, mo.moments(x)).isnan()
