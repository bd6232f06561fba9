"""Taps and their backward, as compiled."""

from functools import partial

import pytest
from helpers import DTYPES

from emulated.cases import LAYOUTS
from emulated.columns import ReluMoments, ReluMomentsBackward
from emulated.full.running import check, check_inexact
from emulated.full.test_columns import ARCHITECTURES, WIDE

SHAPES = {
    "one tile": (10, (8, 2, 2), {}),
    "tails": (150, (5, 3), {}),
    "several tiles": (300, (8,), {}),
    "chunks": (530, (8, 2, 2), {}),
    "long chunks": (1100, (8,), {"_column_plan.IN_FLIGHT": 1 << 16}),
    "wide": (20, (8, 130), WIDE),
}


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_taps_in_every_branch(shape, bias, dtype, architecture):
    rows, columns, plan = SHAPES[shape]
    check(partial(ReluMoments, rows, columns, dtype, bias=bias), architecture, plan)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ["one tile", "chunks", "wide"])
def test_taps_of_every_layout(shape, layout, dtype, architecture):
    rows, columns, plan = SHAPES[shape]
    check(partial(ReluMoments, rows, columns, dtype, layout), architecture, plan)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ["one tile", "wide"])
def test_backward_of_every_layout(shape, layout, dtype, architecture):
    rows, columns, plan = SHAPES[shape]
    check(partial(ReluMomentsBackward, rows, columns, dtype, layout), architecture, plan)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)], ids=str)
def test_backward_of_parts(parts, dtype, architecture):
    rows, columns, _ = SHAPES["tails"]
    check(partial(ReluMomentsBackward, rows, columns, dtype, "contiguous", *map(bool, parts)), architecture)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_approximate_instructions_do_not_leave_the_bounds(shape, dtype):
    rows, columns, plan = SHAPES[shape]
    check_inexact(partial(ReluMoments, rows, columns, dtype), 80, plan)
