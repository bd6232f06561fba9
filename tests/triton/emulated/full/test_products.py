"""Covariances, their match and both backwards, as compiled for tensor cores of sm_80 and sm_90, and without."""

from functools import partial

import pytest
import torch
from specs.resources import named

from emulated.cases import LAYOUTS, always, planned
from emulated.columns import OPTIONS
from emulated.full.running import check, check_inexact
from emulated.products import BOUNDS, Covariance, CovarianceBackward, CovarianceMatch, CovarianceMatchBackward

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ARCHITECTURES = (80, 90)
# How a precision is computed depends on the dtype, too.
PRECISIONS = [*((precision, F32) for precision in BOUNDS), ("ieee", BF16), ("ieee", F16), ("bf16", BF16), ("tf32", F16)]
LARGE_TILES = {"_tiles.processors": always(1)}
PROMOTED = {"_covariance_plan.PROMOTED_ROWS": 64, "covariance.PROMOTED_ROWS": 64}


def chunks_of(rows):
    return {"_covariance_plan._chunk_rows": always(rows)}


# (rows, width, what the planner has otherwise): small tiles, whole and in chunks of rows; large tiles, whole, in chunks
# and with promoted blocks of rows.
SHAPES = {
    "one tile": (10, 8, {}),
    "small tiles": (35, 130, {}),
    "chunks": (270, 40, {}),
    "large tiles": (35, 130, LARGE_TILES),
    "chunks of large tiles": (135, 136, LARGE_TILES | chunks_of(65)),
    "blocks": (140, 40, LARGE_TILES | PROMOTED | chunks_of(140)),
    "chunks of blocks": (300, 40, LARGE_TILES | PROMOTED | chunks_of(150)),
}
NARROW = ("contiguous", "every second row", "rows of wider ones", "unaligned")


# (side of a tile, chunks, blocks that are promoted) of a program.
BRANCHES = {
    "one tile": (64, 1, 1),
    "small tiles": (64, 1, 1),
    "chunks": (64, 3, 1),
    "large tiles": (128, 1, 1),
    "chunks of large tiles": (128, 3, 1),
    "blocks": (128, 1, 3),
    "chunks of blocks": (128, 2, 3),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_take_the_branches_that_they_are_named_after(shape, architecture):
    rows, width, plan = SHAPES[shape]
    with planned(plan):
        arguments = named(Covariance(rows, width, F32, "bf16x3").launches(architecture)[-1])
    promoted = arguments["tile.PROMOTED"]
    blocks = -(-arguments["chunk_rows"] // promoted) if promoted else 1
    assert (arguments["tile.COLUMNS"], arguments["chunks"], blocks) == BRANCHES[shape]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("precision", "dtype"), PRECISIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_covariances_in_every_branch(shape, precision, dtype, architecture):
    rows, width, plan = SHAPES[shape]
    check(partial(Covariance, rows, width, dtype, precision), architecture, plan)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("layout", NARROW)
def test_covariances_of_every_layout(layout, dtype, architecture):
    assert set(NARROW) <= set(LAYOUTS)
    check(partial(Covariance, 40, 136, dtype, "ieee", layout), architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("precision", "dtype"), [("ieee", F32), ("ieee", BF16), ("bf16x3", F32)], ids=str)
def test_second_moments(precision, dtype, architecture):
    check(partial(Covariance, 40, 130, dtype, precision, centered=False), architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("average_kind", OPTIONS)
@pytest.mark.parametrize(("precision", "dtype"), [("ieee", F32), ("ieee", BF16), ("bf16x3", F32)], ids=str)
@pytest.mark.parametrize("shape", ["small tiles", "chunks of large tiles", "blocks"])
def test_matches_in_every_branch(shape, precision, dtype, average_kind, architecture):
    rows, width, plan = SHAPES[shape]
    check(partial(CovarianceMatch, rows, (width, 7), dtype, precision, average_kind), architecture, plan)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("average_kind", OPTIONS)
@pytest.mark.parametrize(("update", "keep"), [(False, True), (True, False)])
def test_matches_without_update_or_derivative(update, keep, average_kind, architecture):
    make = partial(CovarianceMatch, 20, (130, 8), F32, "ieee", average_kind, update=update, keep=keep, full=(1,))
    check(make, architecture)


@pytest.mark.parametrize("average_kind", OPTIONS)
def test_a_loss_over_several_launches_is_one_loss(average_kind):
    check(partial(CovarianceMatch, 9, (8, 16, 24, 3), F32, "ieee", average_kind), 80, {"_architectures.MAX_LAYERS": 2})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("precision", "dtype"), PRECISIONS, ids=str)
@pytest.mark.parametrize("plan", [{}, LARGE_TILES], ids=["small", "large"])
def test_the_backward_of_packed_matrices(plan, precision, dtype, architecture):
    check(partial(CovarianceMatchBackward, 70, (150, 8), dtype, precision), architecture, plan)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("precision", "dtype"), PRECISIONS, ids=str)
@pytest.mark.parametrize("plan", [{}, LARGE_TILES], ids=["small", "large"])
def test_the_backward_of_a_full_matrix(plan, precision, dtype, architecture):
    check(partial(CovarianceBackward, 70, 136, dtype, precision), architecture, plan)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layout", NARROW)
@pytest.mark.parametrize(("mean", "scaled"), [(True, False), (False, True)])
def test_the_backward_of_every_layout(mean, scaled, layout, architecture):
    check(partial(CovarianceMatchBackward, 33, (136, 8), BF16, "ieee", layout, mean, scaled), architecture)
    check(partial(CovarianceBackward, 33, 136, F32, "ieee", layout, centered=scaled, mean=mean), architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("precision", "dtype"), PRECISIONS, ids=str)
def test_approximate_instructions_and_the_least_exact_tensor_cores_do_not_leave_the_bounds(
    precision, dtype, architecture
):
    check_inexact(partial(Covariance, 40, 136, dtype, precision), architecture)
    check_inexact(partial(CovarianceMatchBackward, 33, (136,), dtype, precision), architecture)
