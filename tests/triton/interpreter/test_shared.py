"""Tests of the operators and the public classes that every backend passes, here on Triton."""

import pytest
import test_autograd
import test_numerics
import test_opcheck
import torch
from helpers import make_features
from test_compile import (  # noqa: F401
    _fresh_compiler,
    test_the_loss_compiles_to_one_graph_over_batch_sizes,
    test_under_autocast_features_come_in_16_bits_and_statistics_in_32,
)
from test_layouts import (  # noqa: F401
    test_another_dimension_of_a_layout,
    test_gradients_of_a_layout_are_those_of_its_contiguous_copy,
    test_layers_of_different_layouts_are_packed_together,
    test_moments_of_a_layout_are_those_of_its_contiguous_copy,
)
from test_match import (  # noqa: F401
    test_a_column_that_is_not_finite_leaves_its_state_untouched,
    test_channels_last_features_are_matched_in_packed_order,
    test_features_give_what_their_moments_give,
    test_loss_derivatives_and_state_follow_the_table,
    test_without_update_the_state_stays_to_the_last_bit,
)
from test_moments import (  # noqa: F401
    test_a_layer_has_the_same_moments_alone_and_in_a_group,
    test_backward_of_nothing_is_zero,
    test_backward_over_another_dimension,
    test_backward_scales_and_corrects,
    test_backward_takes_the_rows_of_the_statistic_from_count,
    test_columns_are_packed_layer_after_layer_in_row_major_order,
    test_means_alone_are_the_means_with_variances,
    test_the_correction_is_subtracted_from_the_rows,
)
from test_numerics import (  # noqa: F401
    test_a_constant_column_has_its_mean_and_no_variance,
    test_a_first_row_far_from_all_others_costs_no_digits,
    test_a_loss_that_does_not_fit_is_infinite,
    test_a_loss_that_fits_comes_out_beside_moments_that_hardly_do,
    test_a_mean_comes_out_beside_the_largest_numbers,
    test_columns_beside_one_that_overflows_keep_their_bits,
    test_gradients_come_out_where_differences_from_the_mean_do_not_fit,
    test_halves_up_to_their_largest_number,
    test_moments_behind_a_relu_come_out_where_they_fit,
    test_no_degrees_of_freedom_give_a_variance_that_is_nan,
    test_one_row_is_its_own_mean_without_variance,
    test_overflows_are_seen_in_every_layout,
    test_pooled_rows_that_overflow,
    test_the_largest_number_is_the_mean_of_its_column_without_variance,
    test_the_loss_of_variances_that_do_not_fit_is_infinite,
)
from test_opcheck import (  # noqa: F401
    test_match_,
    test_match_features,
    test_moments,
)
from torch.autograd import gradcheck, gradgradcheck

import moment_ops as mo

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("row", [0, 3, 600])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_stays_in_its_column(row, value):
    test_numerics.test_a_value_that_is_not_finite_stays_in_its_column(value, row, torch.bfloat16)


@pytest.mark.parametrize("layout", test_opcheck.LAYOUTS)
@pytest.mark.parametrize("added", [True, False])
def test_moments_backward_keeps_the_contract(layout, added):
    test_opcheck.test_moments_backward(layout, added, "both", True)


@pytest.mark.parametrize("rows", [2, 64, 600, 4099])
@pytest.mark.parametrize("dtype", test_numerics.NEAR_THE_LIMIT)
def test_a_variance_that_fits_comes_out_where_its_sum_does_not_fit(rows, dtype):
    test_numerics.test_a_variance_that_fits_comes_out_where_its_sum_does_not_fit(rows, 10.0, dtype)


def test_moments_are_differentiable_twice():
    features = [x.requires_grad_() for x in make_features(4, ((2,), (1, 2)), torch.float64)]

    def call(*features):
        m = mo.moments(list(features))
        return m.mean, m.var

    assert gradcheck(call, features)
    assert gradgradcheck(call, features)


@pytest.mark.parametrize("average_kind", test_autograd.AVERAGES)
def test_derivatives_in_training_are_those_of_plain_pytorch(average_kind):
    test_autograd.test_first_and_second_derivatives_in_training_are_those_of_plain_pytorch(
        average_kind, "weighted", "features"
    )
