"""Matches, as compiled: every average, from moments and from features, their state included."""

from functools import partial

import pytest
import torch
from helpers import DTYPES

from emulated.cases import LAYOUTS, emulate
from emulated.columns import OPTIONS, Match, MatchFeatures
from emulated.full.running import SCHEDULES, check, check_inexact
from emulated.full.test_columns import SHAPES
from moment_ops.kernels._plan import MAX_LAYERS

ARCHITECTURES = (80, 90)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("average_kind", OPTIONS)
@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("var", [True, False])
def test_matches_of_moments(var, weighted, update, average_kind, dtype, architecture):
    check(partial(Match, 700, dtype, average_kind, update, weighted, var), architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("average_kind", OPTIONS)
@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "one row"])
def test_matches_of_features_in_every_branch(shape, average_kind, dtype, architecture):
    rows, shapes, plan = SHAPES[shape]
    check(partial(MatchFeatures, rows, shapes, dtype, average_kind), architecture, plan)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("average_kind", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ["chunks", "wide"])
def test_matches_of_features_of_every_layout(shape, layout, average_kind, architecture):
    rows, shapes, plan = SHAPES[shape]
    check(partial(MatchFeatures, rows, shapes, torch.bfloat16, average_kind, layout, weighted=True), architecture, plan)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("average_kind", OPTIONS)
@pytest.mark.parametrize(
    ("update", "weighted", "var"), [(False, False, True), (True, True, False), (False, True, True)]
)
@pytest.mark.parametrize("shape", ["tails", "chunks"])
def test_matches_of_features_without_update_with_weights_of_means_alone(
    shape, update, weighted, var, average_kind, architecture
):
    rows, shapes, plan = SHAPES[shape]
    make = partial(MatchFeatures, rows, shapes, torch.float32, average_kind, update=update, weighted=weighted, var=var)
    check(make, architecture, plan)


@pytest.mark.parametrize("average_kind", OPTIONS)
@pytest.mark.parametrize("shape", ["tails", "long chunks", "wide"])
def test_matches_of_features_on_sm_100(shape, average_kind):
    rows, shapes, plan = SHAPES[shape]
    check(partial(MatchFeatures, rows, shapes, torch.bfloat16, average_kind), 100, plan)


@pytest.mark.parametrize("average_kind", OPTIONS)
def test_a_loss_over_several_launches_is_one_loss(average_kind):
    """Aligned layers and others are launched apart; the last block of the last launch adds the loss up."""
    shapes = [(8,)] * (MAX_LAYERS + 1) + [(3, 3)]
    check(partial(MatchFeatures, 9, shapes, torch.float32, average_kind), 80)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("average_kind", ["moving", "adam"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_column_that_is_not_finite_leaves_its_state_alone(schedule, value, average_kind, architecture):
    case = MatchFeatures(70, [(40,)], torch.float32, average_kind)
    case.features[0][3, 7] = value
    state = [vector.clone() for vector in case.matching.state]
    case.check = lambda: None
    emulate(case, architecture, schedule)
    others = torch.arange(40) != 7
    for new, old in zip(case.matching.state[:-1], state[:-1], strict=True):
        assert torch.equal(new[7], old[7])
        assert new.dtype == torch.bool or not (new[others] == old[others]).any()
    assert case.loss.isnan() or case.loss.isinf()


@pytest.mark.parametrize("average_kind", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_approximate_instructions_do_not_leave_the_bounds(dtype, average_kind):
    rows, shapes, plan = SHAPES["chunks"]
    check_inexact(partial(MatchFeatures, rows, shapes, dtype, average_kind), 80, plan)
