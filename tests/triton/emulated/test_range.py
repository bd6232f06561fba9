"""Results that fit although sums or differences on the way to them do not, as compiled."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from emulated.cases import emulate, planned
from emulated.columns import MatchFeatures, Moments, MomentsBackward, ReluMoments
from emulated.products import Covariance, CovarianceBackward, CovarianceMatch, CovarianceMatchBackward

# All of them only where everything is run.
ARCHITECTURES = (80, 90) if os.environ.get("MOMENT_OPS_TEST") == "emulated" else (80,)

F32, BF16 = torch.float32, torch.bfloat16
# Of a standard deviation: a hundred squares do not fit.
LARGE = 3e18

pytestmark = pytest.mark.parametrize("architecture", ARCHITECTURES)


def beside_the_largest(x):
    """0.9, -0.9 and 0.3 of the largest number, whose differences and sums do not fit."""
    parts = torch.tensor([0.9, -0.9, 0.3], dtype=torch.float64)[torch.arange(len(x)) % 3]
    return (parts * torch.finfo(x.dtype).max).to(x.dtype).view(-1, *[1] * (x.dim() - 1)).expand_as(x).contiguous()


SHAPES = {
    "narrow": (150, ((5,), (70,), (3, 2, 2)), {}),
    "chunks": (530, ((40,), (8, 2, 2)), {}),
    "wide": (150, ((515,),), {"_column_plan.IN_FLIGHT": 0}),
}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_moments(shape, dtype, architecture):
    rows, shapes, plan = SHAPES[shape]
    with planned(plan):
        case = Moments(rows, shapes, dtype)
        # Every second column: its neighbours keep their sums.
        for x in case.features:
            x.flatten(1)[:, ::2] *= LARGE
        emulate(case, architecture)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [150, 530])
def test_moments_behind_a_relu(rows, bias, architecture):
    case = ReluMoments(rows, (8, 2, 2), F32, bias=bias)
    case.x *= LARGE
    if bias:
        case.bias *= LARGE
    emulate(case, architecture)


def test_a_match_of_features(architecture):
    case = MatchFeatures(530, [(40,)], F32, "moving")
    case.features[0].mul_(LARGE)
    case.matching.scales = (1e-37, 1e-37)
    emulate(case, architecture)


def test_gradients_of_moments(architecture):
    case = MomentsBackward(150, ((40,),), F32)
    case.features = [beside_the_largest(x) for x in case.features]
    case.mean = torch.cat([x.double().mean(0).flatten() for x in case.features]).float()
    emulate(case, architecture)


@pytest.mark.parametrize(("dtype", "precision"), [(F32, "ieee"), (F32, "bf16x3"), (BF16, "ieee")])
@pytest.mark.parametrize("rows", [60, 300])
def test_covariances(rows, dtype, precision, architecture):
    case = Covariance(rows, 40, dtype, precision)
    case.x[:, ::2] *= LARGE * 2
    emulate(case, architecture)


@pytest.mark.parametrize("average_kind", ["none", "moving"])
def test_a_match_of_covariances(average_kind, architecture):
    case = CovarianceMatch(150, [16], F32, "ieee", average_kind)
    case.features[0].mul_(LARGE)
    case.weights = [1e-37]
    emulate(case, architecture)


@pytest.mark.parametrize("precision", ["ieee", "bf16x3"])
def test_gradients_of_a_covariance(precision, architecture):
    case = CovarianceBackward(60, 40, F32, precision)
    case.x = beside_the_largest(case.x)
    case.mean = case.x.double().mean(0).float()
    case.grad *= 1e-3
    emulate(case, architecture)


def test_gradients_of_a_match_of_covariances(architecture):
    case = CovarianceMatchBackward(60, [40, 140], F32, "ieee")
    case.features = [beside_the_largest(x) for x in case.features]
    case.mean = torch.cat([x.double().mean(0) for x in case.features]).float()
    case.grad *= 1e-3
    case.matrices = [m * 1e-3 for m in case.matrices]
    emulate(case, architecture)
