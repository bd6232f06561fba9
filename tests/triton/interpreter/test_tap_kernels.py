"""What is particular to the tap's Triton kernels: tiles and tails, chunks of rows, layouts of the bias."""

import numpy as np
import pytest
import torch
from helpers import (
    DTYPES,
    assert_close,
    assert_same_bits,
    exact_moments,
    make_features,
    mean_bound,
    mean_error,
    var_bound,
    var_error,
)
from test_layouts import LAYOUTS
from test_relu_moments import (  # noqa: F401
    assert_bit_identical,
    test_a_dead_column_has_no_variance_and_no_gradient,
    test_a_value_that_is_not_finite_stays_in_its_column,
    test_a_variance_that_is_not_used_sends_no_gradient_where_it_does_not_exist,
    test_correction,
    test_deepcopied_and_detached_inputs_work,
    test_gradients_pass_where_y_is_nan_and_stop_where_it_is_zero,
    test_the_backend_runs_both_operators,
    test_the_gradient_of_y_alone_is_that_of_torch_relu,
    test_the_second_derivative_of_the_variance_is_not_lost,
    test_y_is_bit_identical_for_every_16_bit_number,
    test_y_is_bit_identical_to_torch_relu,
)
from test_relu_moments import test_any_layout as any_layout
from test_relu_moments import test_gradients_of_y_mean_and_variance_are_joined as joined
from test_relu_moments import test_moments_are_those_of_the_rounded_y as of_the_rounded_y
from test_relu_moments import test_opcheck as opcheck

from moment_ops.kernels import _column_plan, _launch
from moment_ops.kernels.relu_moments import relu_moments_launches
from moment_ops.ops.relu_moments import relu_moments

pytestmark = pytest.mark.usefixtures("backend")


@pytest.fixture
def wide(monkeypatch):
    """Wide tiles for few columns, too: the interpreter is slow."""
    monkeypatch.setattr(_column_plan, "IN_FLIGHT", 0)
    _column_plan._groups.cache_clear()
    yield
    _column_plan._groups.cache_clear()


def plan(x):
    (group,) = _column_plan.groups("tap", [x], [torch.empty_like(x)])
    return group


def extended_moments(y):
    """Packed mean and variance: in float64 they would err more than the kernel, where a column's first row is large."""
    wide = y.double().numpy().astype(np.longdouble).reshape(len(y), -1)
    mean = wide.mean(0)
    var = np.square(wide - mean).sum(0) / (len(y) - 1)
    return torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(var.astype(np.float64))


def assert_tap(x, bias=None):
    """y to the last bit, its moments and the gradient of all three against float64; one launch."""
    leaf = x.detach().requires_grad_()
    y, mean, var = relu_moments(leaf, bias)
    assert_bit_identical(y.detach(), torch.relu(x if bias is None else x + bias.view(-1, *[1] * (x.dim() - 2))))
    exact_mean, exact_var = extended_moments(y.detach())
    assert mean_error(mean, exact_mean, exact_var) <= mean_bound(x.dtype)
    assert var_error(var, exact_var) <= var_bound(x.dtype)
    grads = [torch.randn(v.shape).to(v.dtype) for v in (y, mean, var)]
    (dx,) = torch.autograd.grad([y, mean, var], leaf, grads)
    exact_y = y.detach().double().requires_grad_()
    outputs = [exact_y, *exact_moments([exact_y])]
    (expected,) = torch.autograd.grad(outputs, exact_y, [g.double() for g in grads])
    assert_close(dx, torch.where(y <= 0, 0, expected), rows=x.shape[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 9, 65])
def test_narrow_tiles_and_their_tails(rows, dtype):
    for x in make_features(rows, ((5,), (70,), (3, 4, 4)), dtype):
        assert_tap(x, torch.randn(x.shape[1]).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [4, 17])
def test_wide_tiles_and_their_tails(wide, rows, dtype):
    for x in make_features(rows, ((513,), (5, 104)), dtype):
        assert plan(x).tile.columns >= 256
        assert_tap(x, torch.randn(x.shape[1]).to(dtype))


@pytest.mark.parametrize("shape", [(40,), (3,), (5, 2)])
@pytest.mark.parametrize("rows", [600, 1100])
def test_chunks_of_rows_are_folded_without_a_seam(rows, shape):
    (x,) = make_features(rows, [shape])
    assert plan(x).chunks > 1
    assert_tap(x, torch.randn(shape[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_not_aligned_are_read_narrowly(dtype):
    (storage,) = make_features(9, [(65,)], dtype)
    x = storage[:, 1:]
    assert plan(x).vector == 1
    assert_tap(x, torch.randn(64).to(dtype))


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "batch innermost", "permuted"])
def test_the_bias_of_a_channel_goes_to_its_columns(layout):
    (x,) = make_features(4, [(3, 5, 2)])
    if layout == "channels last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "batch innermost":
        x = x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    elif layout == "permuted":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    bias = torch.tensor([-1.0, 0.0, 2.0])
    y, mean, _ = relu_moments(x, bias)
    assert torch.equal(y, torch.relu(x + bias.view(3, 1, 1)))
    assert_close(mean, y.double().mean(0).flatten(), rows=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, (5,)), (2, ()), (3, (3, 2)), (515, (33,))], ids=str)
def test_moments_are_those_of_the_rounded_y(dtype, size):
    of_the_rounded_y(dtype, size, False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout):
    any_layout(layout, torch.bfloat16, "relu")


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "batch innermost"])
def test_both_operators_keep_the_contract(layout):
    opcheck(True, layout, True)


@pytest.mark.parametrize("parts", ["y", "mean", "var", "y mean", "y var", "mean var", "y mean var"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_y_mean_and_variance_are_joined(layout, parts):
    joined(torch.bfloat16, layout, parts, "relu")


def test_a_tap_is_one_launch_each_way(monkeypatch):
    launches = []
    run = _launch.start
    monkeypatch.setattr(_launch, "start", lambda calls, device: launches.append(len(calls)) or run(calls, device))
    x = torch.randn(6, 3, 4, requires_grad=True)
    outputs = relu_moments(x, torch.randn(3))
    torch.autograd.grad(outputs, x, [torch.ones_like(v) for v in outputs])
    assert launches == [1, 1]


def test_a_second_run_gives_the_same_bits():
    (x,) = make_features(700, [(3, 4, 4)])
    assert_same_bits(relu_moments(x, torch.ones(3)), relu_moments(x, torch.ones(3)))


def test_the_bias_of_a_layer_is_passed_as_it_lies():
    x, bias = torch.randn(4, 3, 5), torch.randn(3)
    vectors = torch.empty(2, 15)
    (launch,) = relu_moments_launches(x, bias, 1, torch.empty_like(x), *vectors)
    assert launch.arguments["bias"] is bias
    assert launch.arguments["channel_columns"] == 5
