"""Covariances, means, losses and gradients that fit although sums or products on the way to them do not."""

import pytest
import torch
from helpers import DTYPES, assert_same_bits, epsilon, make_features, statistics_dtype

import moment_ops as mo
from moment_ops.ops import triangle
from moment_ops.ops.covariance import covariance as covariance_op
from moment_ops.ops.records import Match
from moment_ops.ops.reference_covariance import PRECISIONS

pytestmark = pytest.mark.usefixtures("backend")

OPS = torch.ops.moment_ops
# Standard deviations whose squares fit, while the sums of squares do not.
NEAR_THE_LIMIT = {torch.float32: 7e18, torch.bfloat16: 7e18, torch.float64: 0.5e154}
LARGE = tuple(NEAR_THE_LIMIT)
# What float64 features are divided by before they are compared.
FACTOR = 2.0**500


def factor(dtype):
    return FACTOR if dtype == torch.float64 else 1.0


def exact(x, correction=1, centered=True):
    """In float64, of features divided by their factor."""
    rows = x.detach().double().flatten(1) / factor(x.dtype)
    if centered:
        rows = rows - rows[0]
        rows = rows - rows.mean(0)
    return rows.mT @ rows / (len(rows) - correction)


def tolerance(dtype, rows=1):
    return 16 * rows**0.5 * epsilon(statistics_dtype(dtype))


def assert_equal(actual, wanted, dtype, rows=1):
    """Up to the roundings of sums over `rows` and to `dtype`, relative to the largest entry."""
    assert actual.isfinite().all()
    error = (actual.double() - wanted).abs().max() / wanted.abs().max()
    assert error <= max(tolerance(dtype, rows), epsilon(dtype)), f"{error:.3g}"


def assert_covariance(cov, x, correction=1, centered=True):
    """Entries are compared relative to their columns' standard deviations."""
    wanted = exact(x, correction, centered)
    assert cov.isfinite().all()
    spread = wanted.diagonal().sqrt()
    error = (cov.double() / factor(x.dtype) / factor(x.dtype) - wanted) / spread / spread[:, None]
    assert error.abs().max() <= tolerance(x.dtype, len(x))
    assert torch.equal(cov, cov.mT)


def large(rows, width, dtype=torch.float32, ratio=0.0):
    """Columns of this mean, in standard deviations that are near the limit."""
    return ((torch.randn(rows, width, dtype=torch.float64) + ratio) * NEAR_THE_LIMIT[dtype]).to(dtype)


def beside_the_largest(rows, dtype, width=2):
    """Columns of 0.9, -0.9 and 0.3 of the largest number, whose differences and sums do not fit."""
    values = torch.tensor([0.9, -0.9, 0.3], dtype=torch.float64).repeat(rows // 3)[:, None]
    return (values * torch.finfo(dtype).max).to(dtype).expand(-1, width).contiguous()


@pytest.mark.parametrize("shape", [(2, 5), (64, 40), (600, 300), (5000, 130), (9000, 3)])
@pytest.mark.parametrize("ratio", [0.0, 10.0])
@pytest.mark.parametrize("dtype", LARGE)
def test_a_covariance_that_fits_comes_out_where_its_sums_do_not_fit(shape, ratio, dtype):
    x = large(*shape, dtype, ratio)
    assert_covariance(mo.covariance(x), x)


@pytest.mark.parametrize("dtype", LARGE)
def test_second_moments_come_out_where_their_sums_do_not_fit(dtype):
    x = large(64, 40, dtype)
    assert_covariance(mo.covariance(x, centered=False), x, centered=False)


@pytest.mark.parametrize("rows", [3, 9, 3000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mean_comes_out_beside_the_largest_numbers(rows, dtype):
    x = beside_the_largest(rows, dtype)
    for correction in (1, rows):
        mean = covariance_op(x, correction, True, "ieee")[1]
        wanted = (x.double() / 1024).mean(0)
        assert_equal(mean.double() / 1024, wanted, dtype, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_covariance_that_does_not_fit_is_infinite(dtype, precision):
    assert mo.covariance(beside_the_largest(9, dtype), precision=precision).isposinf().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_column_of_the_largest_number_has_no_covariance(dtype, precision):
    x = torch.randn(70, 4).to(dtype)
    x[:, 2] = torch.finfo(dtype).max
    cov, mean = covariance_op(x, 1, True, precision)
    assert mean[2] == torch.finfo(dtype).max
    assert not cov[2].any()
    assert cov.isfinite().all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_small_columns_keep_their_covariance_with_one_near_the_largest_number(precision):
    scale = torch.tensor([2.0**-100, 2.0**126, 1.0, 2.0**-10])
    x = torch.randn(50, 4).clamp(-1.5, 1.5)
    # Powers of two change no digit.
    wanted = mo.covariance(x, precision=precision)
    cov = mo.covariance(x * scale, precision=precision)
    assert_same_bits(cov[1, [0, 2]], wanted[1, [0, 2]] * scale[1] * scale[[0, 2]])
    assert cov[1, 1].isposinf()
    assert_same_bits(cov[2:, 2:], wanted[2:, 2:] * scale[2:] * scale[2:, None])


@pytest.mark.parametrize("precision", ["bf16x3", "tf32", "bf16"])
def test_a_named_precision_takes_the_largest_numbers(precision):
    """bfloat16 rounds the largest float32 numbers to infinity."""
    x = torch.full((1000, 2), 0.0)
    x[0, 0], x[:, 1] = torch.finfo(torch.float32).max, torch.randn(1000) / 1e30
    cov = mo.covariance(x, precision=precision)
    wanted = exact(x)[0, 1]
    assert ((cov[0, 1].double() - wanted) / wanted).abs() <= 1e-2


@pytest.mark.parametrize("rows", [5, 700])
def test_columns_beside_one_that_overflows_keep_their_bits(rows):
    (x,) = make_features(rows, [(300,)])
    clean, clean_mean = covariance_op(x, 1, True, "ieee")
    x[:, 17] *= 1e19
    cov, mean = covariance_op(x, 1, True, "ieee")
    others = torch.arange(300) != 17
    assert cov.isfinite().all()
    assert_same_bits(cov[others][:, others], clean[others][:, others])
    assert_same_bits(mean[others], clean_mean[others])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_leaves_a_column_that_overflows_alone(value):
    x = large(40, 6)
    clean, clean_mean = covariance_op(x, 1, True, "ieee")
    x[3, 4] = value
    cov, mean = covariance_op(x, 1, True, "ieee")
    others = torch.arange(6) != 4
    assert_same_bits(cov[others][:, others], clean[others][:, others])
    assert_same_bits(mean[others], clean_mean[others])
    assert not cov[4].isfinite().any()


def exact_gradient(x, matrix, correction=1):
    """Of `(C * matrix).sum()`, in units of the features' factor."""
    rows = x.detach().double() / factor(x.dtype)
    rows = rows - rows.mean(0)
    return rows @ (matrix.double() + matrix.double().mT) / (len(rows) - correction)


@pytest.mark.parametrize("rows", [3, 40, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_come_out_where_differences_from_the_mean_do_not_fit(rows, dtype):
    x = beside_the_largest(rows // 3 * 3, dtype, 3).requires_grad_()
    matrix = torch.randn(3, 3, dtype=statistics_dtype(dtype)) * 1e-3
    (dx,) = torch.autograd.grad((mo.covariance(x) * matrix).sum(), x)
    assert_equal(dx.double() / factor(dtype), exact_gradient(x, matrix), dtype, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_come_out_where_their_sums_do_not_fit(dtype):
    """Terms of one row that are larger than the largest number, and cancel."""
    largest = torch.finfo(dtype).max
    x = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [0.5, 1.0]]).to(dtype)
    wide = statistics_dtype(dtype)
    grad = (torch.tensor([[0.75, 0.0], [2**-5 - 0.75, 0.0]], dtype=torch.float64) * largest).to(wide)
    mean = torch.zeros(2, dtype=wide)
    dx = OPS.covariance_backward(grad, None, x, mean, 1, False, "ieee")
    scaled = grad.double() / 4
    wanted = x.double() @ (scaled + scaled.mT) / 2
    assert torch.allclose(dx.double() / 4, wanted, rtol=2 * epsilon(dtype), atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_come_out_where_products_do_not_fit_before_they_are_divided(dtype):
    unit = factor(dtype)
    x, grad = large(60, 5, dtype), large(5, 5, dtype) * 8
    dx = OPS.covariance_backward(grad, None, x, torch.zeros(5, dtype=dtype), 1, False, "ieee")
    wanted = (x.double() / unit) @ ((grad.double() + grad.double().mT) / unit) / 59
    assert_equal(dx.double() / unit / unit, wanted, dtype, 60)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_of_the_mean_is_added_before_a_product_overflows(dtype):
    largest = torch.finfo(dtype).max
    x = torch.tensor([[1.0], [-1.0], [0.0]], dtype=dtype)
    grad = torch.full((1, 1), 0.75, dtype=dtype) * largest
    grad_mean = torch.full((1,), -0.75, dtype=dtype) * largest
    dx = OPS.covariance_backward(grad, grad_mean, x * 1.5, torch.zeros(1, dtype=dtype), 1, True, "ieee")
    wanted = torch.tensor([[1.125 - 0.25], [-1.375], [-0.25]], dtype=torch.float64) * (largest / 2) * 1.0
    assert torch.allclose(dx.double()[[0, 2]] / 2, wanted[[0, 2]], rtol=4 * epsilon(dtype), atol=0)
    assert dx[1].isneginf().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivatives_of_the_gradient_come_out_where_their_sums_do_not_fit(dtype):
    x, h = large(60, 5, dtype, 1.0), large(60, 5, dtype)
    unit = factor(dtype)
    grad = torch.eye(5, dtype=dtype).requires_grad_()
    mean = covariance_op(x, 1, True, "ieee")[1]
    dx = OPS.covariance_backward(grad, None, x, mean, 1, True, "ieee")
    (d_grad,) = torch.autograd.grad(dx, grad, h)
    wide = x.double() / unit
    wanted = (wide - wide.mean(0)).mT @ (h.double() / unit) / 59
    assert_equal(d_grad.double() / unit / unit, wanted + wanted.mT, dtype, 60)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivatives_of_the_gradient_by_the_features_come_out_where_their_sums_do_not_fit(dtype):
    x, h = large(60, 5, dtype), large(60, 5, dtype).requires_grad_()
    x = x.requires_grad_()
    unit = factor(dtype)
    grad = large(5, 5, dtype) * 8
    mean = torch.zeros(5, dtype=dtype)
    dx = OPS.covariance_backward(grad, None, x, mean, 1, False, "ieee")
    (d_x,) = torch.autograd.grad(dx, x, h.detach())
    symmetric = (grad + grad.mT).double() / unit
    assert_equal(d_x.double() / unit / unit, h.detach().double() / unit @ symmetric / 59, dtype, 60)


@pytest.mark.parametrize("width", [5, 130, 300])
@pytest.mark.parametrize("dtype", LARGE)
@pytest.mark.parametrize("kind", ["function", "class"])
def test_a_loss_that_fits_comes_out_with_its_gradient(width, dtype, kind):
    x = large(60, width, dtype).requires_grad_()
    wide = (x.detach().double() / factor(dtype)).requires_grad_()
    cov = torch.cov(wide.mT)
    target_cov = 0.97 * cov.detach()
    target = (target_cov * factor(dtype) * factor(dtype)).to(statistics_dtype(dtype))
    # Squares of the differences do not fit; these weights are the smallest that have all digits.
    weight = 2e-38 if dtype != torch.float64 else 1e-308
    options = {"cov_weight": weight}
    loss = mo.covariance_loss(x, target, **options) if kind == "function" else mo.CovarianceLoss(target, **options)(x)
    unit = factor(dtype)
    wanted = (weight * unit**2) * (cov - target_cov).square().sum()
    assert_equal(loss / unit / unit, wanted, dtype, 60 * width)
    (dx,) = torch.autograd.grad(loss, x)
    (exact_dx,) = torch.autograd.grad(wanted, wide)
    assert_equal(dx.double() / unit, exact_dx, dtype, 60 * width)


def test_a_gradient_that_fits_comes_out_where_its_factor_has_no_digits_in_float32():
    """1e-37 * 2 / 2000 is subnormal."""
    x = (torch.randn(2001, 3) * 1e5).requires_grad_()
    (dx,) = torch.autograd.grad(1e-37 * mo.covariance_loss(x, torch.eye(3)), x)
    wide = x.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad((torch.cov(wide.mT) - torch.eye(3)).square().sum() * 1e-37, wide)
    assert_equal(dx, wanted, torch.float32, 300)


@pytest.mark.parametrize("shape", [(7, 100), (33, 5), (5000, 40)])
def test_results_that_had_no_room_do_not_depend_on_the_number_of_threads(backend, shape):
    if backend == "reference":
        pytest.skip("the reference promises nothing about threads")
    x, target = large(*shape, ratio=1.0), torch.eye(shape[1])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            layer = x.clone().requires_grad_()
            loss = mo.covariance_loss(layer, target, cov_weight=2e-38)
            cov, mean = covariance_op(layer.detach(), 1, True, "ieee")
            results.append([cov, mean, loss.detach(), *torch.autograd.grad(loss, layer)])
    finally:
        torch.set_num_threads(before)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loss_beside_a_column_of_the_largest_number_keeps_its_value(dtype):
    x = torch.randn(60, 5, dtype=dtype)
    clean = x.clone()
    clean[:, 3] = 0.0
    x[:, 3] = torch.finfo(dtype).max
    target = torch.eye(5, dtype=dtype)
    target[3, 3] = 0.0
    loss, wanted = mo.covariance_loss(x, target), mo.covariance_loss(clean, target)
    assert torch.allclose(loss, wanted, rtol=tolerance(dtype), atol=0)


@pytest.mark.parametrize("weight", [1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_loss_that_does_not_fit_is_infinite(weight, dtype):
    x = beside_the_largest(9, dtype).requires_grad_()
    target = torch.eye(2, dtype=statistics_dtype(dtype))
    loss = mo.covariance_loss(x, target, cov_weight=weight)
    assert loss.item() == float("inf")
    assert mo.covariance_loss(x.detach(), target, cov_weight=weight).item() == float("inf")


@pytest.mark.parametrize("average", [None, mo.MovingAverage(0.7), mo.AdamMovingAverage(lr=0.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_of_covariances_that_do_not_fit_is_infinite(average, dtype):
    """Not a number is infinity less infinity, and nothing times infinity."""
    x = beside_the_largest(9, dtype)
    target = torch.zeros(2, 2, dtype=dtype)
    assert mo.CovarianceLoss(target, average)(x).item() == float("inf")
    assert mo.covariance_distance(x, x / 2, method="covariance").item() == float("inf")
    assert mo.coral_loss(x, x / 2).item() == float("inf")


@pytest.mark.parametrize("average", [None, mo.MovingAverage(0.7), mo.AdamMovingAverage(lr=0.1)])
def test_the_loss_of_a_value_that_is_not_a_number_is_none(average):
    x = beside_the_largest(9, torch.float32)
    x[0, 0] = float("nan")
    assert mo.CovarianceLoss(torch.zeros(2, 2), average)(x).isnan()
    assert mo.coral_loss(x, x / 2).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_means_of_a_loss_come_out_beside_the_largest_numbers(dtype):
    x = beside_the_largest(9, dtype)
    target = mo.Moments((x / 4).mean(0) * 4, cov=torch.eye(2, dtype=dtype), shapes=((2,),))
    average = mo.MovingAverage(0.5)
    for loss in (mo.CovarianceLoss(target), mo.CovarianceLoss(target, average)):
        match = [triangle.pack(torch.eye(2, dtype=dtype))], [1.0]
        kind, options = loss._averaging
        state = [getattr(loss, name) for name in loss._state_names]
        mean = OPS.covariance_match_([x], 1, *match, kind, options, state, bool(state), True, "ieee")[1]
        assert torch.allclose(mean / 4, target.mean / 4, rtol=tolerance(dtype), atol=0)


@pytest.mark.parametrize("dtype", LARGE)
@pytest.mark.parametrize("average", [mo.MovingAverage(0.7), mo.AdamMovingAverage(lr=0.1)])
def test_averages_start_from_covariances_whose_sums_do_not_fit(dtype, average):
    x = large(60, 140, dtype)
    unit = factor(dtype)
    loss = mo.CovarianceLoss(torch.eye(140, dtype=statistics_dtype(dtype)), average, cov_weight=1e-38 / unit)
    loss(x)
    assert loss.cov_average.isfinite().all()
    if isinstance(average, mo.MovingAverage):
        cov = triangle.unpack(loss.cov_average, 140)
        assert_equal(cov.double() / unit / unit, exact(x), dtype, 60)
        assert loss.started.all()


@pytest.mark.parametrize("average", ["none", "moving"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_difference_is_squared_after_it_is_weighted(average, weighted):
    """1e-25 * 1e30^2 fits."""
    value, target = torch.tensor([3e30, 1e30]), torch.zeros(2)
    weight = torch.tensor([1e-25, 2e-25])
    match = Match(target, None, mean_weight=weight) if weighted else Match(target, None, mean_scale=1e-25)
    if average == "moving":
        state = [torch.zeros(2), torch.zeros(2, dtype=torch.bool), torch.zeros((), dtype=torch.int64)]
        match = match._replace(average_kind="moving", options=[0.5, 0.0], state=state, update=True)
    loss = OPS.match_.default(value, None, *match)[0]
    wanted = (value.double().square() * (weight.double() if weighted else 1e-25)).sum()
    assert abs(loss.double() - wanted) <= 1e-6 * wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_distance_of_two_batches_comes_out(dtype):
    x, y = large(60, 5, dtype), large(50, 5, dtype, 1.0)
    weight = 1e-38 if dtype == torch.float32 else 1e-308
    loss = mo.covariance_distance(x, y, method="covariance", cov_weight=weight)
    unit = factor(dtype)
    wanted = weight * unit**2 * (exact(x) - exact(y)).square().sum()
    assert_equal(loss / unit / unit, wanted, dtype, 300)


# Differences of covariances whose squares fit only after they are divided by 4 D^2.
ROOT = {torch.float32: 4e19**0.5, torch.float64: 2e154**0.5}


@pytest.mark.parametrize("dtype", ROOT)
def test_coral_comes_out_where_squares_do_not_fit(dtype):
    x = (torch.randn(90, 40, dtype=torch.float64) * ROOT[dtype]).to(dtype).requires_grad_()
    y = (torch.randn(80, 40, dtype=torch.float64)).to(dtype)
    loss = mo.coral_loss(x, y)
    wide = (x.detach().double() / ROOT[dtype]).requires_grad_()
    wanted = (torch.cov(wide.mT) - torch.cov(y.double().mT) / ROOT[dtype] ** 2).square().sum() / (4 * 40**2)
    assert_equal(loss.double() / ROOT[dtype] ** 2 / ROOT[dtype] ** 2, wanted, dtype, 100)
    (dx,) = torch.autograd.grad(loss, x)
    (exact_dx,) = torch.autograd.grad(wanted, wide)
    assert_equal(dx.double() / ROOT[dtype] / ROOT[dtype] ** 2, exact_dx, dtype, 100)


@pytest.mark.parametrize("dtype", ROOT)
def test_vicreg_covariance_comes_out_where_squares_do_not_fit(dtype):
    x = torch.randn(90, 40, dtype=torch.float64) / 8
    x[:, 0] = x[:, 1] = torch.randn(90)
    x = (x * ROOT[dtype]).to(dtype).requires_grad_()
    loss = mo.vicreg_covariance(x)
    wide = (x.detach().double() / ROOT[dtype]).requires_grad_()
    cov = torch.cov(wide.mT)
    wanted = (cov - cov.diagonal().diag()).square().sum() / 40
    assert_equal(loss.double() / ROOT[dtype] ** 2 / ROOT[dtype] ** 2, wanted, dtype, 100)
    (dx,) = torch.autograd.grad(loss, x)
    (exact_dx,) = torch.autograd.grad(wanted, wide)
    assert_equal(dx.double() / ROOT[dtype] / ROOT[dtype] ** 2, exact_dx, dtype, 100)
