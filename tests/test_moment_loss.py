"""`moment_loss` and `MomentLoss` without an average: values, weights, inputs and gradients."""

import copy
import pickle

import pytest
import torch
from helpers import (
    DTYPES,
    SHAPES,
    assert_close,
    assert_same_bits,
    leaves,
    make_features,
    make_target,
    squared_distance,
    state_of,
    statistics_dtype,
)

import moment_ops as mo

pytestmark = pytest.mark.usefixtures("backend")

COLUMNS = sum(torch.Size(shape).numel() for shape in SHAPES)


def per_layer(weights):
    """Per-layer weights spread over the columns."""
    return torch.cat([torch.full(shape, float(w)).reshape(-1) for w, shape in zip(weights, SHAPES, strict=True)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("var", [True, False])
def test_the_loss_is_the_squared_distance_of_the_moments(dtype, reduction, var):
    features, target = make_features(9, dtype=dtype), make_target(dtype=statistics_dtype(dtype), var=var)
    loss = mo.moment_loss(features, target, reduction=reduction)
    assert loss.shape == ()
    assert loss.dtype == statistics_dtype(dtype)
    assert_close(loss, squared_distance(features, target, reduction=reduction), rows=9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("var", [True, False])
def test_its_gradients_are_those_of_plain_pytorch(dtype, reduction, var):
    features, target = (
        leaves(make_features(9, dtype=dtype)),
        make_target(dtype=statistics_dtype(dtype), var=var),
    )
    ours = torch.autograd.grad(mo.moment_loss(features, target, reduction=reduction), features)
    doubles = leaves([x.double() for x in features])
    theirs = torch.autograd.grad(squared_distance(doubles, target, reduction=reduction), doubles)
    for got, expected in zip(ours, theirs, strict=True):
        assert_close(got, expected, rows=9)


WEIGHTS = {
    "floats": ((0.3, 2.5), (0.3, 2.5)),
    "ints": ((2, 0), (2, 0)),
    "per layer": (([1.0, 0.0, 2.0, 3.0], (4.0, 1.0, 0.5, 0.25)),) * 2,
    "per column": ((torch.linspace(0, 1, COLUMNS), torch.linspace(2, 1, COLUMNS)),) * 2,
    "mixed": (([1.0, 0.0, 2.0, 3.0], torch.linspace(2, 1, COLUMNS)),) * 2,
    "float64": ((torch.linspace(0, 1, COLUMNS).double(), 1.0),) * 2,
    "strided": ((torch.linspace(0, 1, 2 * COLUMNS)[::2], torch.ones(1).expand(COLUMNS)),) * 2,
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("form", ["function", "module"])
def test_weights_multiply_their_columns(weights, form):
    mean_weight, var_weight = WEIGHTS[weights][0]
    spread = [per_layer(w) if isinstance(w, (list, tuple)) else w for w in (mean_weight, var_weight)]
    features, target = leaves(make_features(9)), make_target()
    if form == "function":
        loss = mo.moment_loss(features, target, mean_weight=mean_weight, var_weight=var_weight)
    else:
        loss = mo.MomentLoss(target, mean_weight=mean_weight, var_weight=var_weight)(features)
    doubles = leaves([x.double() for x in features])
    expected = squared_distance(doubles, target, *spread)
    assert_close(loss, expected, rows=9)
    for got, wanted in zip(torch.autograd.grad(loss, features), torch.autograd.grad(expected, doubles), strict=True):
        assert_close(got, wanted, rows=9)


def test_a_tensor_alone_is_one_layer():
    x, target = make_features(9, [(6,)])[0], make_target([(6,)])
    assert_same_bits(mo.moment_loss(x, target), mo.moment_loss([x], target))


@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_give_the_loss_of_their_features(dtype):
    features, target = leaves(make_features(9, dtype=dtype)), make_target(dtype=statistics_dtype(dtype))
    from_features, from_moments = mo.moment_loss(features, target), mo.moment_loss(mo.moments(features), target)
    assert_close(from_moments, from_features.double(), rows=COLUMNS)
    for one, other in zip(
        torch.autograd.grad(from_features, features), torch.autograd.grad(from_moments, features), strict=True
    ):
        assert_close(one, other.double())


def test_moments_with_variances_match_a_target_of_means_alone():
    features, target = make_features(9), make_target(var=False)
    assert_close(mo.moment_loss(mo.moments(features), target), squared_distance(features, target), rows=9)


@pytest.mark.parametrize("correction", [0, 2])
def test_features_get_the_correction_of_the_target(correction):
    features, plain = make_features(4), make_target()
    target = mo.Moments(plain.mean, plain.var, correction=correction, shapes=plain.shapes)
    assert_close(mo.moment_loss(features, target), squared_distance(features, target), rows=4)


@pytest.mark.parametrize("feature_dtype", DTYPES)
@pytest.mark.parametrize("target_dtype", DTYPES)
@pytest.mark.parametrize("form", ["function", "module"])
def test_features_and_target_of_any_two_dtypes_match(feature_dtype, target_dtype, form):
    features, target = leaves(make_features(9, dtype=feature_dtype)), make_target(dtype=target_dtype)
    loss = mo.moment_loss(features, target) if form == "function" else mo.MomentLoss(target)(features)
    assert loss.dtype == torch.promote_types(statistics_dtype(feature_dtype), statistics_dtype(target_dtype))
    doubles = leaves([x.double() for x in features])
    expected = squared_distance(doubles, target)
    # The statistics of the features are in their own dtype, whatever that of the target.
    assert_close(loss.to(statistics_dtype(feature_dtype)), expected, rows=9)
    for got, wanted in zip(torch.autograd.grad(loss, features), torch.autograd.grad(expected, doubles), strict=True):
        assert_close(got, wanted, rows=9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_and_target_in_16_bits_are_matched_in_float32(dtype):
    ours, target = make_target(dtype=dtype, seed=3), make_target(dtype=dtype)
    loss = mo.moment_loss(ours, target)
    expected = ((ours.mean.double() - target.mean.double()) ** 2).mean()
    expected = expected + ((ours.var.double() - target.var.double()) ** 2).mean()
    assert loss.dtype == torch.float32
    assert_close(loss, expected, rows=COLUMNS)


def test_a_target_may_be_strided():
    storage = torch.rand(4, COLUMNS).t().contiguous()
    strided = mo.Moments(storage[:, 0], storage[:, 1], shapes=SHAPES)
    features = make_features(9)
    assert_close(mo.moment_loss(features, strided), squared_distance(features, strided), rows=9)
    assert_close(mo.MomentLoss(strided)(features), squared_distance(features, strided), rows=9)


def test_the_module_without_an_average_is_the_function():
    features, target = make_features(9), make_target()
    assert_same_bits(
        mo.MomentLoss(target, reduction="sum")(features), mo.moment_loss(features, target, reduction="sum")
    )


def test_upstream_gradients_scale_the_gradients():
    features, target = leaves(make_features(9)), make_target()
    once = torch.autograd.grad(mo.moment_loss(features, target), features)
    scaled = torch.autograd.grad(-3 * mo.moment_loss(features, target), features)
    for one, other in zip(once, scaled, strict=True):
        assert_close(other, -3 * one.double())


def test_the_module_keeps_its_own_copy_of_the_target():
    target = make_target()
    loss, features = mo.MomentLoss(target), make_features(9)
    before = loss(features)
    target.mean.fill_(7)
    assert_same_bits(loss(features), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_the_module_can_be_copied(copied):
    loss = mo.MomentLoss(make_target(), mo.AdamMovingAverage(lr=0.1), mean_weight=[1.0, 2.0, 3.0, 4.0])
    loss(make_features(9))
    other = copied(loss)
    features = make_features(9, seed=5)
    assert_same_bits(other(features), loss(features))
    assert_same_bits(other.state_dict(), loss.state_dict())


def test_a_single_row_shows_in_the_loss_where_variances_are_matched():
    assert mo.moment_loss(make_features(1), make_target()).isnan()
    assert mo.moment_loss(make_features(1), make_target(var=False)).isfinite()


@pytest.mark.parametrize("average", [mo.MovingAverage(0.5), mo.AdamMovingAverage(lr=0.1)])
def test_reset_restarts_the_average_where_it_was(average):
    loss = mo.MomentLoss(make_target(), average)
    fresh, pointers = state_of(loss), {k: v.data_ptr() for k, v in loss.state_dict().items()}
    loss(make_features(9))
    loss.reset()
    assert_same_bits(state_of(loss), fresh)
    assert {k: v.data_ptr() for k, v in loss.state_dict().items()} == pointers


@pytest.mark.parametrize("shapes", [SHAPES, ((3,), (2, 2))])
@pytest.mark.parametrize("var", [True, False])
@pytest.mark.parametrize("average", [None, mo.MovingAverage(0.5), mo.AdamMovingAverage(lr=0.1)])
def test_reset_with_a_target_makes_a_loss_like_a_new_one(shapes, var, average):
    loss, target = (
        mo.MomentLoss(make_target(), average, mean_weight=0.5),
        make_target(shapes, var=var, seed=4),
    )
    loss(make_features(9))
    loss.reset(target)
    new = mo.MomentLoss(target, average, mean_weight=0.5)
    assert_same_bits(loss.state_dict(), new.state_dict())
    features = make_features(9, shapes)
    assert_same_bits(loss(features), new(features))


def test_a_reset_that_fails_leaves_the_loss_as_it_was():
    loss = mo.MomentLoss(make_target(), mo.MovingAverage(0.5), mean_weight=[1.0, 2.0, 3.0, 4.0])
    features = make_features(9)
    before, state = loss.eval()(features), loss.state_dict()
    with pytest.raises(ValueError, match="mean_weight"):
        loss.reset(make_target([(3,)]))
    assert_same_bits(loss.state_dict(), state)
    assert_same_bits(loss(features), before)
