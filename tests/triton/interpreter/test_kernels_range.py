"""Covariances, losses and gradients that fit although sums on the way to them do not, on Triton."""

import pytest
import test_covariance_range as shared
import torch
from test_covariance_range import (  # noqa: F401
    test_a_difference_is_squared_after_it_is_weighted,
    test_a_gradient_that_fits_comes_out_where_its_factor_has_no_digits_in_float32,
    test_a_value_that_is_not_finite_leaves_a_column_that_overflows_alone,
    test_columns_beside_one_that_overflows_keep_their_bits,
    test_the_loss_of_a_value_that_is_not_a_number_is_none,
)

import moment_ops as mo

pytestmark = pytest.mark.usefixtures("backend")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PRECISIONS = ("ieee", "bf16x3", "tf32")
AVERAGES = [None, mo.MovingAverage(0.7), mo.AdamMovingAverage(lr=0.1)]


@pytest.mark.parametrize("shape", [(2, 5), (64, 40), (300, 150), (1100, 3)])
@pytest.mark.parametrize("ratio", [0.0, 10.0])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_covariance_that_fits_comes_out_where_its_sums_do_not_fit(shape, ratio, dtype):
    shared.test_a_covariance_that_fits_comes_out_where_its_sums_do_not_fit(shape, ratio, dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_second_moments_come_out_where_their_sums_do_not_fit(dtype):
    shared.test_second_moments_come_out_where_their_sums_do_not_fit(dtype)


@pytest.mark.parametrize("rows", [3, 9, 600])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_a_mean_comes_out_beside_the_largest_numbers(rows, dtype):
    shared.test_a_mean_comes_out_beside_the_largest_numbers(rows, dtype)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_covariance_that_does_not_fit_is_infinite(dtype, precision):
    shared.test_a_covariance_that_does_not_fit_is_infinite(dtype, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_column_of_the_largest_number_has_no_covariance(dtype, precision):
    shared.test_a_column_of_the_largest_number_has_no_covariance(dtype, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_small_columns_keep_their_covariance_with_one_near_the_largest_number(precision):
    shared.test_small_columns_keep_their_covariance_with_one_near_the_largest_number(precision)


@pytest.mark.parametrize("precision", ["bf16x3", "tf32", "bf16"])
def test_a_named_precision_takes_the_largest_numbers(precision):
    shared.test_a_named_precision_takes_the_largest_numbers(precision)


@pytest.mark.parametrize("rows", [3, 40, 300])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gradients_come_out_where_differences_from_the_mean_do_not_fit(rows, dtype):
    shared.test_gradients_come_out_where_differences_from_the_mean_do_not_fit(rows, dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gradients_come_out_where_their_sums_do_not_fit(dtype):
    shared.test_gradients_come_out_where_their_sums_do_not_fit(dtype)


def test_gradients_come_out_where_products_do_not_fit_before_they_are_divided():
    shared.test_gradients_come_out_where_products_do_not_fit_before_they_are_divided(F32)


def test_a_gradient_of_the_mean_is_added_before_a_product_overflows():
    shared.test_a_gradient_of_the_mean_is_added_before_a_product_overflows(F32)


@pytest.mark.parametrize("width", [5, 150])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("kind", ["function", "class"])
def test_a_loss_that_fits_comes_out_with_its_gradient(width, dtype, kind):
    shared.test_a_loss_that_fits_comes_out_with_its_gradient(width, dtype, kind)


def test_a_loss_beside_a_column_of_the_largest_number_keeps_its_value():
    shared.test_a_loss_beside_a_column_of_the_largest_number_keeps_its_value(F32)


@pytest.mark.parametrize("weight", [1.0, 1e30])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_loss_that_does_not_fit_is_infinite(weight, dtype):
    shared.test_a_loss_that_does_not_fit_is_infinite(weight, dtype)


@pytest.mark.parametrize("average_kind", AVERAGES)
def test_the_loss_of_covariances_that_do_not_fit_is_infinite(average_kind):
    shared.test_the_loss_of_covariances_that_do_not_fit_is_infinite(average_kind, F32)


def test_the_means_of_a_loss_come_out_beside_the_largest_numbers():
    shared.test_the_means_of_a_loss_come_out_beside_the_largest_numbers(F32)


@pytest.mark.parametrize("average_kind", AVERAGES[1:])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_averages_start_from_covariances_whose_sums_do_not_fit(dtype, average_kind):
    shared.test_averages_start_from_covariances_whose_sums_do_not_fit(dtype, average_kind)
