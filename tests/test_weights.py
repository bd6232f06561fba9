"""The weights of losses: one parser, whose errors name the argument; modules keep copies."""

import math

import numpy as np
import pytest
import torch
from helpers import assert_raises, assert_same_bits, leaves, make_features, make_target

import moment_ops as mo

SHAPES = ((3,), (2, 2))
LAYERS, OTHER = make_features(9, SHAPES), make_features(8, SHAPES, seed=1)
TARGET = make_target(SHAPES)
MATRICES = mo.Moments(TARGET.mean, cov=(torch.eye(3), torch.eye(4)), shapes=((3,), (4,)))
MAPS = make_features(2, [(3, 2, 2), (4, 2, 2)])
STYLES = [mo.gram_matrix(x).detach() for x in make_features(2, [(3, 2, 2), (4, 2, 2)], seed=1)]


def of(name, function, *arguments, **options):
    return lambda weight: function(*arguments, **{name: weight}, **options)


# Every loss that takes a weight, once as a function and once as a module.
LOSSES = {
    "moment_loss, mean_weight": ("mean_weight", of("mean_weight", mo.moment_loss, LAYERS, TARGET)),
    "moment_loss, var_weight": ("var_weight", of("var_weight", mo.moment_loss, LAYERS, TARGET)),
    "MomentLoss, mean_weight": ("mean_weight", of("mean_weight", mo.MomentLoss, TARGET)),
    "MomentLoss, var_weight": ("var_weight", of("var_weight", mo.MomentLoss, TARGET)),
    "covariance_loss, mean_weight": ("mean_weight", of("mean_weight", mo.covariance_loss, LAYERS, MATRICES)),
    "covariance_loss, cov_weight": ("cov_weight", of("cov_weight", mo.covariance_loss, LAYERS, MATRICES)),
    "CovarianceLoss, mean_weight": ("mean_weight", of("mean_weight", mo.CovarianceLoss, MATRICES)),
    "CovarianceLoss, cov_weight": ("cov_weight", of("cov_weight", mo.CovarianceLoss, MATRICES)),
    "style_loss, weight": ("weight", of("weight", mo.style_loss, MAPS, STYLES)),
}
for method in ("covariance", "gram"):
    for name in ("mean_weight", "cov_weight"):
        LOSSES |= {
            f"covariance_distance, {method}, {name}": (
                name,
                of(name, mo.covariance_distance, LAYERS, OTHER, method=method),
            ),
            f"CovarianceDistance, {method}, {name}": (name, of(name, mo.CovarianceDistance, OTHER, method=method)),
        }

WRONG = {
    "nan": (math.nan, ValueError, "nan"),
    "inf": (math.inf, ValueError, "inf"),
    "minus inf": (-math.inf, ValueError, "-inf"),
    "negative": (-1.0, ValueError, "-1.0"),
    "negative int": (-1, ValueError, "-1"),
    "tiny negative": (-1e-300, ValueError, "-1e-300"),
    "too large an int": (10**400, ValueError, "inf|10000"),
    "true": (True, TypeError, "True"),
    "false": (False, TypeError, "False"),
    "str": ("1", TypeError, "str"),
    "complex": (1j, TypeError, "complex"),
    "dict": ({"a": 1.0}, TypeError, "dict"),
    "nan of a layer": ([1.0, math.nan], ValueError, r"\[1\]: got nan"),
    "inf of a layer": ((math.inf, 1.0), ValueError, r"\[0\]: got inf"),
    "negative of a layer": ([1.0, -2.0], ValueError, r"\[1\]: got -2.0"),
    "bool of a layer": ([True, 1.0], TypeError, r"\[0\]: got True"),
    "str of a layer": (["1", "2"], TypeError, r"\[0\]: got '1'"),
    "too few": ([1.0], ValueError, "got 1 weights, expected one per layer, 2"),
    "too many": ([1.0] * 3, ValueError, "got 3 weights, expected one per layer, 2"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("loss", LOSSES)
def test_wrong_weights(loss, case):
    name, call = LOSSES[loss]
    weight, error, fragment = WRONG[case]
    assert_raises(lambda: call(weight), error, rf"^{name}", fragment)


@pytest.mark.parametrize("loss", LOSSES)
def test_zero_and_numbers_of_numpy_are_weights(loss):
    _, call = LOSSES[loss]
    for weight in (0, 0.0, -0.0, np.float64(2.0), [0, 1], (0.0, 0.5)):
        value = call(weight)
        assert not isinstance(value, torch.Tensor) or value.isfinite()


@pytest.mark.parametrize("name", ["mean_weight", "var_weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_wrong_values_of_a_tensor(name, value, dtype):
    weight = torch.ones(7, dtype=dtype)
    weight[4] = value
    for call in (
        lambda: mo.moment_loss(LAYERS, TARGET, **{name: weight}),
        lambda: mo.moment_loss(mo.moments(LAYERS), TARGET, **{name: weight}),
        lambda: mo.MomentLoss(TARGET, **{name: weight}),
        lambda: mo.MomentLoss(TARGET, mo.AdamMovingAverage(), **{name: weight}),
    ):
        assert_raises(call, ValueError, f"^{name}: got values", "finite")


def test_a_tensor_of_zeros_is_a_weight():
    zeros = torch.zeros(7)
    assert mo.moment_loss(LAYERS, TARGET, mean_weight=zeros, var_weight=zeros) == 0


@pytest.mark.parametrize("name", ["mean_weight", "var_weight"])
@pytest.mark.parametrize("weight", [torch.ones(7), torch.ones(7).double(), [1.0, 2.0]])
def test_a_module_keeps_a_copy_of_a_weight(name, weight):
    weight = weight.clone() if isinstance(weight, torch.Tensor) else list(weight)
    loss = mo.MomentLoss(TARGET, **{name: weight})
    before = loss(LAYERS)
    weight[0] = 7.0
    assert_same_bits(loss(LAYERS), before)
    loss.reset(TARGET)
    assert_same_bits(loss(LAYERS), before)


@pytest.mark.parametrize("name", ["mean_weight", "cov_weight"])
@pytest.mark.parametrize(
    "make", [lambda **o: mo.CovarianceLoss(MATRICES, **o), lambda **o: mo.CovarianceDistance(OTHER, **o)]
)
def test_losses_of_covariances_keep_a_copy_of_a_weight(name, make):
    weight = [1.0, 2.0]
    loss = make(**{name: weight})
    before = loss(LAYERS)
    weight[0] = 7.0
    assert_same_bits(loss(LAYERS), before)
    loss.reset(MATRICES if isinstance(loss, mo.CovarianceLoss) else OTHER)
    assert_same_bits(loss(LAYERS), before)


def test_a_tensor_is_a_weight_in_a_compiled_call():
    weight = torch.linspace(0, 1, 7)

    def call(features, weight):
        return mo.moment_loss(features, TARGET, mean_weight=weight, var_weight=[0.5, 2.0])

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    features = leaves(LAYERS)
    assert_same_bits(compiled(features, weight).detach(), call(features, weight).detach())
    torch._dynamo.reset()


def test_a_tensor_without_values_is_not_read():
    target = mo.Moments(TARGET.mean.to("meta"), TARGET.var.to("meta"), shapes=SHAPES, validate=False)
    features = [x.to("meta") for x in LAYERS]
    assert mo.moment_loss(features, target, mean_weight=torch.ones(7, device="meta")).is_meta
