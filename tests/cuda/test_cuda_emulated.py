"""What nvcc made of the CUDA kernels does what their sources do on the host: the same tests, on the compiled code.

Beyond those, the emulator finds accesses outside of the arrays and races, and arithmetic is what the compiler chose.
"""

import re

import emulated_kernels
import host_kernels
import pytest
import test_cuda_on_host as on_host
import test_numerics_on_host as numerics
import test_relu_moments_on_host as taps
import torch
from emulated_kernels import EmulatedModule
from emulator.execution import Schedule
from emulator.faults import MemoryFault, Race
from helpers import DTYPES, assert_same_bits

# In lockstep; alone, the last first, and so their warps; a few together, in any order, one warp after another.
SCHEDULES = (
    Schedule("forward"),
    Schedule("reversed", together=1, warps="reversed"),
    Schedule("random", together=3, warps="forward", seed=1),
)

# ptxas may fuse products with sums, too, and approximations err as far as they may.
INEXACT = Schedule("random", inexact=True)

# Tails of rows and of columns, one group of threads and several, rows of 16-byte vectors and not.
SHAPES = {"vectors": (20, 64), "tails": (13, 67), "groups": (70, 12), "narrow": (100, 1), "chunks": (1100, 24)}
# Chunks that are folded twice, and more layers than one.
MIXED = [(600, 7, 3), (600, 130), (600, 1), (600, 4, 4, 4)]
TWICE = [(4700, 5)]


@pytest.fixture(scope="module")
def emulated(module, library):
    return EmulatedModule(module, library)


@pytest.fixture(scope="module", params=[Schedule(), INEXACT], ids=["exact", "inexact"])
def any_arithmetic(module, library, request):
    return EmulatedModule(module, library, request.param)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", DTYPES)
def test_moments_within_the_bounds(emulated, shape, dtype):
    on_host.test_moments_within_the_bounds(emulated, [shape], dtype)


@pytest.mark.parametrize("make", on_host.LAYOUTS.values(), ids=on_host.LAYOUTS.keys())
def test_layouts(emulated, make):
    on_host.test_layouts(emulated, make)


@pytest.mark.parametrize("shapes", [MIXED, TWICE], ids=["mixed", "folded twice"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_schedule_gives_the_same_bits(module, library, shapes, dtype):
    input = on_host.features(shapes, dtype)
    results = [host_kernels.moments(EmulatedModule(module, library, how), input)[:2] for how in SCHEDULES]
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("rows", [2, 7, 9, 100, 1300])
def test_a_constant_column_has_no_variance(any_arithmetic, rows):
    numerics.test_a_constant_column_has_no_variance(any_arithmetic, rows)


@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("rows", [8, 64, 600])
def test_ill_conditioned_columns_stay_within_the_bounds(any_arithmetic, ratio, rows):
    numerics.test_ill_conditioned_columns_stay_within_the_bounds(any_arithmetic, ratio, (rows, 36))


def test_a_first_row_far_from_all_others_costs_no_digits(any_arithmetic):
    numerics.test_a_first_row_far_from_all_others_costs_no_digits(any_arithmetic, (500, 36))


def test_a_column_that_is_not_finite_keeps_to_itself(emulated):
    numerics.test_a_column_that_is_not_finite_keeps_to_itself(emulated)


@pytest.mark.parametrize("shape", [(8, 36), (70, 37), (600, 8)], ids=str)
@pytest.mark.parametrize("dtype", numerics.NEAR_THE_LIMIT)
@pytest.mark.parametrize("source", ["features", "relu"])
def test_a_variance_that_fits_comes_out_where_its_sum_does_not_fit(emulated, shape, dtype, source):
    numerics.test_a_variance_that_fits_comes_out_where_its_sum_does_not_fit(emulated, shape, dtype, source)


@pytest.mark.parametrize("rows", [3, 66, 600])
def test_a_mean_comes_out_beside_the_largest_numbers(any_arithmetic, rows):
    numerics.test_a_mean_comes_out_beside_the_largest_numbers(any_arithmetic, torch.float32, rows)


@pytest.mark.parametrize("average_kind", ["none", "moving"])
def test_a_matched_variance_that_fits_comes_out_where_its_sum_does_not_fit(any_arithmetic, average_kind):
    numerics.test_a_matched_variance_that_fits_comes_out_where_its_sum_does_not_fit(any_arithmetic, average_kind)


@pytest.mark.parametrize("columns", [1, 64])
@pytest.mark.parametrize("dtype", numerics.NEAR_THE_LIMIT)
@pytest.mark.parametrize("operator", ["moments", "relu_moments"])
def test_gradients_come_out_where_differences_from_the_mean_do_not_fit(emulated, dtype, columns, operator):
    numerics.test_gradients_come_out_where_differences_from_the_mean_do_not_fit(emulated, dtype, columns, operator)


@pytest.mark.parametrize("shapes", [[(13, 67), (13, 64)], [(130, 40)]], ids=["layers", "groups"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", ["mean", "var", "both", "added", "scaled"])
def test_moments_backward(emulated, shapes, dtype, given):
    on_host.test_moments_backward(emulated, shapes, dtype, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("average_kind", ["none", "moving", "moving, corrected", "adam"])
@pytest.mark.parametrize("source", ["features", "moments", "means alone", "weighted"])
def test_match(emulated, dtype, average_kind, source):
    on_host.test_match(emulated, [(70, 12), (70, 37)], dtype, average_kind, source)


@pytest.mark.parametrize("average_kind", ["none", "moving", "moving, corrected", "adam"])
def test_match_over_chunks(any_arithmetic, average_kind):
    on_host.test_match(any_arithmetic, MIXED, torch.float32, average_kind, "features")


@pytest.mark.parametrize("shape", [(5, 3, 2, 2), (70, 16), (600, 4, 3, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_taps(emulated, shape, dtype, has_bias, channels_last):
    taps.test_the_output_is_relu_and_the_moments_are_of_it(emulated, shape, dtype, has_bias, channels_last)


@pytest.mark.parametrize("shape", [(5, 3, 2, 2), (70, 16)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", ["all", "moments", "gradient", "mean"])
def test_gradients_of_taps(emulated, shape, dtype, given):
    taps.test_the_gradient_of_all_three_in_one_pass(emulated, shape, dtype, given)


@pytest.mark.parametrize("ordering", ["bar.sync 0", "membar.gl"])
def test_a_kernel_without_its_barriers_or_fences_has_races(emulated, library, monkeypatch, ordering):
    """The tests above would show it."""
    without = {symbol: re.sub(rf"\b{ordering};", "", text) for symbol, text in emulated_kernels.texts(library).items()}
    monkeypatch.setattr(emulated_kernels, "texts", lambda _: without)
    emulated_kernels.parsed.cache_clear()
    try:
        with pytest.raises(Race):
            host_kernels.moments(emulated, [torch.randn(1100, 24)])
    finally:
        emulated_kernels.parsed.cache_clear()


def test_a_kernel_that_leaves_its_arrays_is_a_fault(emulated, monkeypatch):
    monkeypatch.setattr(emulated, "_open_layer", lambda *_: None)
    with pytest.raises(MemoryFault):
        host_kernels.moments(emulated, [torch.randn(20, 24)])
