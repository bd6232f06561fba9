"""How layers are dealt out to programs, from shapes alone: what a GPU of 132 processors then has in flight."""

import pytest
import torch

pytest.importorskip("triton")

from moment_ops.kernels import _column_plan
from moment_ops.kernels._tiles import STRIP_BYTES

ROWS = (16, 64, 256, 1024)
COLUMNS = (256, 2048, 8192, 32768, 65536)
DTYPES = (torch.float32, torch.bfloat16)


def plan(kind, rows, columns, dtype):
    x = torch.empty(rows, columns, dtype=dtype, device="meta")
    (group,) = _column_plan.groups(kind, [x], *([] if kind == "reduce" else [[x]]))
    return group


def tile_bytes(group):
    return group.tile.rows * group.tile.columns * group.itemsize


def in_flight(group, columns):
    """Bytes, when all programs run and each has loaded its first tile."""
    return min(group.programs * tile_bytes(group), group.rows * columns * group.itemsize)


def tiles(group):
    """That a program reads one after another."""
    return -(-group.chunk_rows // group.tile.rows)


def share(group):
    """Groups of threads that share a strip's rows out."""
    return STRIP_BYTES // (group.tile.columns * group.itemsize)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", ["reduce", "tap"])
def test_a_reduction_keeps_the_gpu_busy_or_the_layer_in_flight(kind, rows, columns, dtype):
    """Where it does not, a program has so few tiles that folding the parts of a cut would take longer."""
    group = plan(kind, rows, columns, dtype)
    busy = in_flight(group, columns) >= min(_column_plan.IN_FLIGHT // 2, rows * columns * group.itemsize)
    assert busy or tiles(group) <= 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", ROWS)
def test_a_pass_over_features_keeps_the_gpu_busy_or_the_layer_in_flight(rows, columns, dtype):
    group = plan("apply", rows, columns, dtype)
    assert in_flight(group, columns) >= min(_column_plan.IN_FLIGHT, rows * columns * group.itemsize)


@pytest.mark.parametrize("kind", ["reduce", "tap", "apply"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_thread_reads_16_bytes_of_a_row_and_a_strip_has_whole_cache_lines(kind, dtype):
    for rows in ROWS:
        for columns in COLUMNS:
            group = plan(kind, rows, columns, dtype)
            threads = 32 * group.tile.warps
            assert tile_bytes(group) // (16 * threads) in (4, 8)
            assert group.tile.columns * group.itemsize in (128, 256, 512, 1024, 2048)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strips_are_no_narrower_than_busy_programs_need(dtype):
    assert plan("reduce", 64, 851_968, dtype).tile.columns == 2048 // dtype.itemsize
    shares = [share(plan("reduce", 1024, columns, dtype)) for columns in (2048, 32768, 65536, 131_072, 851_968)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 16


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", ROWS)
def test_most_threads_of_a_narrow_strip_have_rows(rows, columns):
    group = plan("reduce", rows, columns, torch.float32)
    assert share(group) == 1 or group.tile.rows < 2 * rows


@pytest.mark.parametrize("columns", [64, 8192, 1_000_000])
@pytest.mark.parametrize("rows", [513, 2000, 8193, 100_000, 3_000_000])
def test_a_thread_merges_at_most_512_rows_in_float32(rows, columns):
    group = plan("reduce", rows, columns, torch.float32)
    assert group.chunk_rows <= 512 * share(group)
    assert group.chunks == -(-rows // group.chunk_rows)


def test_up_to_8192_rows_of_a_large_layer_leave_nothing_to_fold():
    for rows in (600, 4000, 8192):
        assert plan("reduce", rows, 851_968, torch.float32).chunks == 1


@pytest.mark.parametrize("rows", [1024, 40_000, 100_000, 2_000_000])
@pytest.mark.parametrize("kind", ["reduce", "tap"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_program_folds_no_more_chunks_than_it_has_time_for(kind, dtype, rows):
    assert 1 < plan(kind, rows, 64, dtype).chunks <= 256


@pytest.mark.parametrize("rows", ROWS)
def test_a_pass_over_features_loads_coefficients_for_128_rows_where_it_can(rows):
    assert plan("apply", rows, 851_968, torch.float32).chunk_rows == 128
