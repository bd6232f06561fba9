"""Moments and their backward, as compiled: every dtype, layout, and branch of the reduction."""

from functools import partial

import pytest
from helpers import DTYPES

from emulated.cases import LAYOUTS, planned
from emulated.columns import Moments, MomentsBackward, Shifts, features
from emulated.full.running import check, check_inexact
from moment_ops.kernels import _column_plan
from moment_ops.kernels._plan import MAX_LAYERS
from moment_ops.kernels._tiles import STRIP_BYTES

ARCHITECTURES = (80, 90)
WIDE = {"_column_plan.IN_FLIGHT": 0}
# (rows, shapes, what the planner has otherwise): a tile that has them all; tiles and a tail; chunks of two tiles and of
# four, more than are folded at a time; strips that are wide, or half so.
SHAPES = {
    "one tile": (10, ((8,), (8, 2, 2)), {}),
    "one row": (1, ((16,),), {}),
    "tails": (150, ((5,), (70,), (3, 2, 2)), {}),
    "several tiles": (300, ((8,),), {}),
    "chunks": (530, ((40,), (8, 2, 2)), {}),
    "long chunks": (1100, ((8,), (8,)), {"_column_plan.IN_FLIGHT": 1 << 17}),
    "many chunks": (1100, ((8,),), {"_column_plan._CHUNK_TILES": 1, "_column_plan._FOLD_ELEMENTS": 1}),
    "between": (75, ((200,), (8,)), {"_column_plan.IN_FLIGHT": 3 << 14}),
    "wide": (20, ((520,), (1024,)), WIDE),
    "wide tails": (20, ((515,), (3,)), WIDE),
}


def groups_of_threads(group):
    return STRIP_BYTES // (group.tile.columns * group.itemsize)


BRANCHES = {
    "one tile": lambda g: g.rows <= g.tile.rows,
    "one row": lambda g: g.rows == 1,
    "tails": lambda g: g.chunks == 1 and g.tile.rows < g.rows < 2 * g.tile.rows,
    "several tiles": lambda g: g.chunks == 1 and g.rows > 2 * g.tile.rows,
    "chunks": lambda g: g.chunks > 1 and g.chunk_rows == 2 * g.tile.rows,
    "long chunks": lambda g: g.chunks > 1 and g.chunk_rows == 4 * g.tile.rows,
    "many chunks": lambda g: g.chunks > g.fold_chunks,
    "between": lambda g: g.chunks == 1 and 1 < groups_of_threads(g) < 16 and g.rows > g.tile.rows,
    "wide": lambda g: g.chunks == 1 and groups_of_threads(g) == 1 and g.rows > 2 * g.tile.rows,
    "wide tails": lambda g: groups_of_threads(g) == 1 and g.vector == 1,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_take_the_branches_that_they_are_named_after(shape, dtype):
    rows, shapes, plan = SHAPES[shape]
    with planned(plan):
        assert all(map(BRANCHES[shape], _column_plan.groups("reduce", features(rows, shapes, dtype))))


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_moments_in_every_branch(shape, dtype, architecture):
    rows, shapes, plan = SHAPES[shape]
    check(partial(Moments, rows, shapes, dtype), architecture, plan)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ["one tile", "chunks", "between", "wide"])
def test_moments_of_every_layout(shape, layout, dtype, architecture):
    rows, shapes, plan = SHAPES[shape]
    check(partial(Moments, rows, shapes, dtype, layout), architecture, plan)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shape", ["one tile", "chunks", "wide"])
def test_means_alone(shape, architecture):
    rows, shapes, plan = SHAPES[shape]
    check(partial(Moments, rows, shapes, DTYPES[0], var=False), architecture, plan)


@pytest.mark.parametrize("layers", [2, 3, MAX_LAYERS, MAX_LAYERS + 3])
def test_moments_of_many_layers(layers):
    shapes = [(8 + 8 * (i % 3),) for i in range(layers)]
    check(partial(Moments, 9, shapes, DTYPES[1]), 80)
    check(partial(MomentsBackward, 9, shapes, DTYPES[1]), 80)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("shape", ["one tile", "tails", "chunks", "long chunks", "between", "wide"])
def test_shifts_of_covariances(shape, dtype, architecture):
    rows, shapes, plan = SHAPES[shape]
    check(partial(Shifts, rows, [s[:1] for s in shapes], dtype), architecture, plan)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("shape", ["tails", "wide"])
def test_backward_of_every_layout(shape, added, layout, dtype, architecture):
    rows, shapes, plan = SHAPES[shape]
    check(partial(MomentsBackward, rows, shapes, dtype, layout, added=added), architecture, plan)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", ["mean", "var"])
@pytest.mark.parametrize("scaled", [True, False])
def test_backward_of_parts(scaled, parts, dtype, architecture):
    rows, shapes, plan = SHAPES["tails"]
    make = partial(MomentsBackward, rows, shapes, dtype, mean=parts == "mean", var=parts == "var", scaled=scaled)
    check(make, architecture, plan)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_approximate_instructions_do_not_leave_the_bounds(shape, dtype):
    rows, shapes, plan = SHAPES[shape]
    check_inexact(partial(Moments, rows, shapes, dtype), 80, plan)
    check_inexact(partial(MomentsBackward, rows, shapes, dtype), 80, plan)
