"""What is particular to the Triton kernels: tiles and tails, chunks of rows, many launches, every dtype."""

from decimal import Decimal

import pytest
import torch
import triton
import triton.language as tl
from helpers import (
    DTYPES,
    assert_close,
    assert_moments,
    assert_same_bits,
    exact_moments,
    make_features,
    make_target,
    mean_bound,
    mean_error,
    state_of,
    var_bound,
    var_error,
)
from test_match import AVERAGES, Case, assert_state
from test_moments import backward_in_float64

import moment_ops as mo
from moment_ops.kernels import _column_plan
from moment_ops.kernels._averages import complement_of_power
from moment_ops.kernels._plan import MAX_LAYERS
from moment_ops.kernels._tiles import StripTile
from moment_ops.ops.moments import moments, moments_backward

pytestmark = pytest.mark.usefixtures("backend")


@pytest.fixture
def wide(monkeypatch):
    """Wide tiles for few columns, too: the interpreter is slow."""
    monkeypatch.setattr(_column_plan, "IN_FLIGHT", 0)
    _column_plan._groups.cache_clear()
    yield
    _column_plan._groups.cache_clear()


def bound(dtype, exact):
    """The interpreter truncates where it stores bfloat16: a whole unit in the last place, not half of one."""
    return torch.finfo(dtype).eps * exact.abs() + 1e-6 * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 17, 33, 64, 129, 300])
def test_narrow_tiles_and_their_tails(rows, dtype):
    features = make_features(rows, ((5,), (70,), (3, 4, 4), (1,)), dtype)
    m = mo.moments(features, correction=0)
    assert_moments(m, features, correction=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, 17, 65])
def test_wide_tiles_and_their_tails(wide, rows, dtype):
    features = make_features(rows, ((1024,), (513,), (520,)), dtype)
    assert all(group.tile.columns >= 256 for group in _column_plan.groups("reduce", features))
    m = mo.moments(features, correction=0)
    assert_moments(m, features, correction=0)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 127, 128, 129, 145])
def test_rows_that_do_not_go_evenly_into_groups(rows, monkeypatch):
    """Sixteen groups of threads, some of which have a row less than others, or none."""
    monkeypatch.setattr(_column_plan, "_tile", lambda *_: StripTile(128, 32, 4))
    _column_plan._groups.cache_clear()
    features = make_features(rows, ((40,), (3,)))
    m = mo.moments(features, correction=0)
    _column_plan._groups.cache_clear()
    assert_moments(m, features, correction=0)


@pytest.mark.parametrize(("rows", "columns"), [(600, 40), (1100, 3)])
def test_chunks_of_rows_are_folded_without_a_seam(rows, columns):
    features = make_features(rows, ((columns,), (2,)))
    assert all(group.chunks > 1 for group in _column_plan.groups("reduce", features))
    assert_moments(mo.moments(features), features)


def test_more_chunks_than_are_folded_at_a_time(monkeypatch):
    monkeypatch.setattr(_column_plan, "_FOLD_ELEMENTS", 1)
    features = make_features(4500, ((40,),))
    (group,) = _column_plan.groups("reduce", features)
    assert group.chunks > 2 * group.fold_chunks
    assert_moments(mo.moments(features), features)


def test_a_thread_merges_no_more_rows_than_float32_bears(monkeypatch):
    monkeypatch.setattr(_column_plan, "_MERGED_ROWS", 16)
    monkeypatch.setattr(_column_plan, "IN_FLIGHT", 0)
    _column_plan._groups.cache_clear()
    features = make_features(1100, ((5,), (2, 2)))
    (group,) = _column_plan.groups("reduce", features)
    assert group.chunk_rows == 16 * 16
    assert group.chunks == 5
    m = mo.moments(features)
    _column_plan._groups.cache_clear()
    assert_moments(m, features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [2, 64, 700])
def test_the_ladder_of_means_stays_within_the_bounds(rows, dtype):
    for ratio in (0.0, 1.0, 1e2, 1e3, 1e4):
        x = ((torch.randn(rows, 32, dtype=torch.float64) + ratio) * 0.1).to(dtype)
        mean, var = exact_moments([x])
        m = mo.moments(x)
        assert mean_error(m.mean, mean, var) <= mean_bound(dtype)
        assert var_error(m.var, var) <= var_bound(dtype, ratio)


@pytest.mark.parametrize("num_layers", [MAX_LAYERS, MAX_LAYERS + 3])
def test_more_layers_than_a_launch_takes(num_layers):
    features = make_features(5, [(8 + 8 * (i % 3),) for i in range(num_layers)])
    assert len(_column_plan.groups("reduce", features)) == -(-num_layers // MAX_LAYERS)
    m = mo.moments(features)
    assert_moments(m, features)
    grad_mean, grad_var = torch.randn_like(m.mean), torch.randn_like(m.mean)
    got = moments_backward(features, m.mean, m.count, grad_mean, grad_var)
    for dx, exact in zip(got, backward_in_float64(features, m.mean, m.count, grad_mean, grad_var), strict=True):
        assert_close(dx, exact)


@pytest.mark.parametrize("average_kind", AVERAGES)
def test_a_loss_over_several_launches_is_one_loss(average_kind):
    """Aligned layers and others are launched apart; the last program of the last launch adds the loss up."""
    case = Case(average_kind, shapes=[(8,)] * (MAX_LAYERS + 1) + [(3, 3)], weighted=True)
    assert len(_column_plan.groups("reduce", case.features)) == 3
    expected, grads, state = case.expected()
    loss, mean, grad_mean, grad_var = case.from_features()
    assert_close(mean, case.mean)
    assert_close(loss, expected, rows=case.columns)
    assert_close(grad_mean, grads[0])
    assert_close(grad_var, grads[1])
    assert_state(case, state)


@pytest.mark.parametrize("average_kind", ["moving", "moving, corrected", "adam"])
@pytest.mark.parametrize(("rows", "shapes"), [(11, ((515,), (256,))), (530, ((35,), (3,)))])
def test_wide_and_chunked_features_are_matched(average_kind, rows, shapes, request):
    if rows < 512:
        request.getfixturevalue("wide")
    case = Case(average_kind, shapes=shapes, weighted=True)
    case.features = make_features(rows, shapes, torch.float64)
    case.mean, case.var, _ = moments(case.features)
    expected, grads, state = case.expected()
    loss, _, grad_mean, grad_var = case.from_features()
    assert_close(loss, expected, rows=case.columns)
    assert_close(grad_mean, grads[0])
    assert_close(grad_var, grads[1])
    assert_state(case, state)


def test_the_losses_of_more_programs_than_are_folded_at_a_time_add_up(monkeypatch):
    from moment_ops.kernels import match

    monkeypatch.setattr(match, "_FOLD_LOSSES", 4)
    case = Case("none", shapes=((1400,),))
    expected, *_ = case.expected()
    assert_close(case.from_moments()[0], expected, rows=case.columns)


@triton.jit
def complement_kernel(beta, exponent, out):
    tl.store(out, complement_of_power(tl.load(beta), tl.load(exponent)))


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.9999, 1 - 2.0**-40])
def test_biases_are_corrected_to_the_last_digits_at_any_step(beta):
    """`1 - beta**step` loses them where the power is close to 1."""
    out = torch.empty((), dtype=torch.float64)
    for step in [*range(1, 20), 100, 999, 12_345, 10**6, 2**31, 2**40]:
        complement_kernel[(1,)](torch.tensor(beta, dtype=torch.float64), torch.tensor(step), out)
        exact = 1 - Decimal(beta) ** step
        assert abs(Decimal(out.item()) - exact) <= Decimal("1e-14") * exact, step


@pytest.mark.parametrize("step", [0, 1, 5, 999, 10**6])
@pytest.mark.parametrize("average_kind", ["moving, corrected", "adam"])
def test_the_bias_is_corrected_at_any_step(average_kind, step):
    case = Case(average_kind)
    case.state[-1].fill_(step)
    expected, _, state = case.expected()
    loss, *_ = case.from_moments()
    assert_close(loss, expected, rows=case.columns)
    # `expected` forms 1 - beta**step, and loses digits where beta**step is close to 1.
    for got, wanted in zip(case.state, state, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", ["mean", "var", "both"])
@pytest.mark.parametrize("added", [False, True])
def test_backward_in_every_dtype(dtype, parts, added):
    features = make_features(35, ((70,), (3, 2, 2)), dtype)
    features[1] = features[1].to(memory_format=torch.channels_last)
    mean, _, count = moments(features)
    grad_mean = torch.randn_like(mean) if parts != "var" else None
    grad_var = torch.randn_like(mean) if parts != "mean" else None
    grad = [torch.randn_like(x) for x in features] if added else None
    got = moments_backward(features, mean, count, grad_mean, grad_var, grad=grad or ())
    for dx, exact in zip(got, backward_in_float64(features, mean, count, grad_mean, grad_var, grad), strict=True):
        assert dx.dtype == dtype
        assert bool(((dx.double() - exact).abs() <= bound(dtype, exact)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [30, 130])
def test_backward_of_wide_layers_tile_by_tile(wide, rows, dtype):
    features = make_features(rows, ((513,), (1024,)), dtype)
    (group, *_) = _column_plan.groups("apply", features, features, features)
    assert group.chunks == -(-rows // 128)
    assert min(rows, group.chunk_rows) > 2 * group.tile.rows
    mean, _, count = moments(features)
    coefficients = torch.randn_like(mean)
    grad = [torch.randn_like(x) for x in features]
    got = moments_backward(features, mean, count, coefficients, coefficients, grad=grad)
    exact_gradients = backward_in_float64(features, mean, count, coefficients, coefficients, grad)
    for dx, exact in zip(got, exact_gradients, strict=True):
        assert bool(((dx.double() - exact).abs() <= bound(dtype, exact)).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_features_are_matched_in_float32(dtype):
    features, target = make_features(9, dtype=dtype), make_target()
    losses = []
    for name in ("triton", "reference"):
        with mo.backend(name):
            losses.append(mo.MomentLoss(target, mo.AdamMovingAverage(lr=0.01))(features))
    assert losses[0].dtype == torch.float32
    assert_close(losses[0], losses[1].double(), rows=20)


def test_a_second_run_gives_the_same_bits():
    features = make_features(200, ((40,), (3, 4, 4)))
    results = []
    for _ in range(2):
        loss = mo.MomentLoss(make_target(((40,), (3, 4, 4))), mo.AdamMovingAverage(lr=0.1))
        results.append([loss(features), state_of(loss)])
    assert_same_bits(*results)
