"""Gram matrices and their backward, as compiled."""

from functools import partial

import pytest
import torch

from emulated.full.running import check, check_inexact
from emulated.full.test_products import ARCHITECTURES, NARROW
from emulated.products import Gram, GramBackward

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (rows of the groups, widths, what a planner has otherwise): one tile, groups in one tile and in several, tails; blocks
# of columns, in one chunk and in several; several launches.
SHAPES = {
    "one tile": ((5,), (8,), {}),
    "one column": ((3, 2), (1,), {}),
    "three groups": ((5, 1, 2), (3, 20), {}),
    "several tiles": ((70, 66), (40, 24), {}),
    "blocks": ((5, 3), (200, 37), {"_gram_plan.PROMOTED_COLUMNS": 64, "_gram_plan._PROGRAMS": 1}),
    "chunks of blocks": ((70,), (304, 64), {"_gram_plan.PROMOTED_COLUMNS": 64, "_gram_plan._PROGRAMS": 12}),
    "several launches": ((3, 2), (8, 5, 16, 24), {"_architectures.MAX_LAYERS": 4}),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_in_every_branch(shape, dtype, architecture):
    counts, widths, plan = SHAPES[shape]
    check(partial(Gram, counts, widths, dtype), architecture, plan)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["one tile", "one column", "three groups", "several tiles", "several launches"])
def test_gradients_in_every_branch(shape, dtype, architecture):
    counts, widths, plan = SHAPES[shape]
    check(partial(GramBackward, counts, widths, dtype), architecture, plan)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("layout", NARROW)
def test_every_layout(layout, dtype, architecture):
    check(partial(Gram, (5, 3), (72,), dtype, layout), architecture)
    check(partial(GramBackward, (5, 3), (72,), dtype, layout), architecture)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=str)
def test_only_the_rows_that_want_gradients_get_them(wanted):
    check(partial(GramBackward, (130, 2), (40,), torch.float32, wanted=wanted), 80)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_least_exact_tensor_cores_do_not_leave_the_bounds(dtype, architecture):
    check_inexact(partial(Gram, (70, 66), (40, 24), dtype), architecture)
    check_inexact(partial(GramBackward, (70, 66), (40, 24), dtype), architecture)
