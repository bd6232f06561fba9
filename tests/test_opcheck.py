"""Every registered operator keeps torch's contract: schema, shape function, autograd registration, AOT dispatch."""

import pytest
import torch
from helpers import make_features, make_target

import moment_ops as mo
from moment_ops.ops.moments import moments

pytestmark = pytest.mark.usefixtures("backend")

SHAPES = ((5,), (3, 2, 2))
COLUMNS = 17
OPS = torch.ops.moment_ops
AVERAGES = {
    "none": None,
    "moving": mo.MovingAverage(0.9),
    "moving, corrected": mo.MovingAverage(0.9, bias_correction=True),
    "adam": mo.AdamMovingAverage(lr=0.1),
}


def channels_last(features):
    return [x.to(memory_format=torch.channels_last) if x.dim() == 4 else x for x in features]


def transposed(features):
    return [x.movedim(0, -1).contiguous().movedim(-1, 0) for x in features]


LAYOUTS = {"contiguous": list, "channels last": channels_last, "transposed": transposed}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("var", [True, False])
@pytest.mark.parametrize("wants_gradient", [True, False])
def test_moments(layout, var, wants_gradient):
    features = [x.requires_grad_(wants_gradient) for x in LAYOUTS[layout](make_features(6, SHAPES))]
    torch.library.opcheck(OPS.moments.default, (features, 0, 1, var))


def test_moments_over_another_dimension():
    features = [x.requires_grad_() for x in make_features(6, ((5, 2), (5,)))]
    torch.library.opcheck(OPS.moments.default, (features, 1, 0, True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("parts", ["mean", "var", "both"])
@pytest.mark.parametrize("wants_gradient", [True, False])
def test_moments_backward(layout, added, parts, wants_gradient):
    features = LAYOUTS[layout](make_features(6, SHAPES))
    mean, _, count = moments(features)
    grad_mean = torch.randn(COLUMNS).requires_grad_(wants_gradient) if parts != "var" else None
    grad_var = torch.randn(COLUMNS).requires_grad_(wants_gradient) if parts != "mean" else None
    features = [x.requires_grad_(wants_gradient) for x in features]
    grad = [torch.randn_like(x).requires_grad_(wants_gradient) for x in features] if added else []
    scale = None if wants_gradient else torch.tensor(2.0)
    torch.library.opcheck(OPS.moments_backward.default, (grad, grad_mean, grad_var, features, mean, count, 0, 1, scale))


def match_arguments(average_kind, var, weighted, update):
    target = make_target(SHAPES, var=var)
    average = AVERAGES[average_kind]
    state = [] if average is None else list(average.new_state(target.mean, var).values())
    options = [] if average is None else average.options(COLUMNS)
    weights = [torch.rand(COLUMNS), torch.rand(COLUMNS)] if weighted else [None, None]
    kind = "none" if average is None else average.kind
    update = update and average is not None
    return (target.mean, target.var, 1.0, 0.5, *weights, 1 / COLUMNS, kind, options, state, update)


@pytest.mark.parametrize("average_kind", AVERAGES)
@pytest.mark.parametrize("var", [True, False])
@pytest.mark.parametrize("update", [True, False])
def test_match_(average_kind, var, update):
    features = make_features(6, SHAPES)
    mean, variance, _ = moments(features, 0, 1, var)
    torch.library.opcheck(OPS.match_.default, (mean, variance, *match_arguments(average_kind, var, var, update)))


@pytest.mark.parametrize("average_kind", AVERAGES)
@pytest.mark.parametrize("var", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_match_features(average_kind, var, layout):
    features = LAYOUTS[layout](make_features(6, SHAPES))
    torch.library.opcheck(OPS.match_.features, (features, 1, *match_arguments(average_kind, var, not var, True)))
