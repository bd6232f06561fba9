"""Taps as operators: ReLU and identity that collect moments, against float64 and against torch's own ReLU."""

import copy
import re

import pytest
import torch
from helpers import (
    DTYPES,
    assert_close,
    assert_same_bits,
    epsilon,
    exact_moments,
    make_features,
    mean_bound,
    mean_error,
    statistics_dtype,
    var_bound,
    var_error,
)
from test_layouts import LAYOUTS, converted
from torch.autograd import gradcheck, gradgradcheck

from moment_ops.ops import backends
from moment_ops.ops.relu_moments import identity_moments, relu_moments

pytestmark = pytest.mark.usefixtures("backend")

OPS = torch.ops.moment_ops
# Rows and shape: single ones, tails of tiles and of vectors, several strips, several blocks of rows, chunks of rows.
SIZES = [(1, (5,)), (2, ()), (3, (3, 2)), (7, (1,)), (64, (3, 5, 7)), (5, (20_011,)), (515, (33,)), (9001, (3,))]
TAPS = {"relu": relu_moments, "identity": identity_moments}


def bits(x):
    """Integers, so that -0 differs from 0."""
    widths = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(widths[x.element_size()])


def assert_bit_identical(y, expected):
    assert y.dtype == expected.dtype
    assert torch.equal(y.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(bits(y)[number], bits(expected)[number])


def with_special_values(x):
    special = torch.tensor([float("nan"), -0.0, 0.0, float("inf"), -float("inf"), 1e-40, -1e-40, 6e-8, -6e-8])
    x.view(-1)[: 9 * (x.numel() // 9)].view(9, -1)[:, 0] = special.to(x.dtype)
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_y_is_bit_identical_to_torch_relu(dtype, bias, layout):
    x = with_special_values(torch.randn(13, 5, 7, 9, dtype=dtype)).to(memory_format=layout)
    b = with_special_values(torch.randn(45, dtype=dtype))[:5] if bias else None
    y, _, _ = relu_moments(x, b)
    assert_bit_identical(y, torch.relu(x if b is None else x + b.view(-1, 1, 1)))
    assert y.stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_y_is_bit_identical_for_every_16_bit_number(dtype):
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).reshape(16, 64, 64)
    assert_bit_identical(relu_moments(x)[0], torch.relu(x))
    for b in (torch.zeros(64, dtype=dtype), torch.randn(64).to(dtype)):
        assert_bit_identical(relu_moments(x, b)[0], torch.relu(x + b.view(-1, 1)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_moments_are_those_of_the_rounded_y(dtype, size, bias):
    rows, shape = size
    (x,) = make_features(rows, [shape], dtype)
    if bias and not shape:
        pytest.skip("no channels")
    b = torch.randn(shape[0]).to(dtype) if bias else None
    y, mean, var = relu_moments(x, b)
    assert mean.dtype == var.dtype == statistics_dtype(dtype)
    exact_mean, exact_var = exact_moments([y], correction=1 if rows > 1 else 0)
    assert mean_error(mean, exact_mean, exact_var) <= mean_bound(dtype)
    if rows == 1:
        assert var.isnan().all()
    else:
        assert var_error(var, exact_var) <= var_bound(dtype)


@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("ratio", [1.0, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("rows", [64, 1000, 100_000])
def test_columns_far_from_zero_stay_within_the_bounds(tap, ratio, rows):
    x = (torch.randn(rows, 8, dtype=torch.float64) + ratio).float()
    y, mean, var = TAPS[tap](x)
    exact_mean, exact_var = exact_moments([y])
    assert mean_error(mean, exact_mean, exact_var) <= mean_bound(x.dtype)
    assert var_error(var, exact_var) <= var_bound(x.dtype, ratio)


def test_a_dead_column_has_no_variance_and_no_gradient():
    x = torch.cat([torch.full((70, 3), -1.0), torch.full((70, 2), 0.1)], 1).requires_grad_()
    _, mean, var = relu_moments(x)
    assert torch.equal(var, torch.zeros(5))
    (dx,) = torch.autograd.grad([mean.sum(), var.sum()], x)
    assert torch.equal(dx[:, :3], torch.zeros(70, 3))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tap", TAPS)
def test_any_layout(layout, dtype, tap):
    x = converted(LAYOUTS[layout](), dtype)
    vectors = torch.randn(2, x.numel() // x.shape[0])
    grad = torch.randn(x.shape).to(dtype)
    for g in (grad, torch.empty_like(x).copy_(grad), grad[:1].expand_as(x)):
        results = []
        for source in (x, x.contiguous()):
            leaf = source.detach().requires_grad_()
            y, mean, var = TAPS[tap](leaf)
            (dx,) = torch.autograd.grad([y, mean, var], leaf, [g, *vectors])
            results.append([v.detach().contiguous() for v in (y, mean, var, dx)])
        assert_same_bits(*results)


def exact_tap(tap, x, bias):
    """The tap in float64 plain PyTorch, on the float64 copy of what the operator was given."""
    y = x if bias is None else x + bias.view(-1, *[1] * (x.dim() - 2))
    return y if tap == "identity" else y.relu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("parts", ["y", "mean", "var", "y mean", "y var", "mean var", "y mean var"])
@pytest.mark.parametrize("tap", TAPS)
def test_gradients_of_y_mean_and_variance_are_joined(dtype, layout, parts, tap):
    (x,) = make_features(10, [(6, 5, 3)], dtype)
    x = x.to(memory_format=layout).requires_grad_()
    names = ("y", "mean", "var")
    outputs = dict(zip(names, TAPS[tap](x), strict=True))
    grads = {name: torch.randn(value.shape).to(value.dtype) for name, value in outputs.items()}
    used = parts.split()
    (dx,) = torch.autograd.grad([outputs[n] for n in used], x, [grads[n] for n in used])
    assert dx.dtype == dtype
    assert dx.stride() == x.stride() or (tap, parts) == ("identity", "y")

    z = x.detach().double().requires_grad_()
    y = exact_tap(tap, z, None)
    exact = dict(zip(names, (y, *exact_moments([y])), strict=True))
    (expected,) = torch.autograd.grad([exact[n] for n in used], z, [grads[n].double() for n in used])
    assert_close(dx, expected, rows=10)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_gradients_are_streamed_and_equal(dtype):
    x = torch.randn(40, 700_000 // dtype.itemsize).to(dtype).requires_grad_()
    y, mean, var = relu_moments(x)
    grads = [torch.randn(v.shape).to(v.dtype) for v in (y, mean, var)]
    (dx,) = torch.autograd.grad([y, mean, var], x, grads)
    for columns in (slice(0, 300), slice(-301, None)):
        part = x.detach()[:, columns].clone().requires_grad_()
        (expected,) = torch.autograd.grad(relu_moments(part), part, [g[..., columns].contiguous() for g in grads])
        assert_same_bits(dx[:, columns], expected)


def test_the_gradient_of_y_alone_is_that_of_torch_relu():
    x = with_special_values(torch.randn(9, 50)).requires_grad_()
    grad = torch.randn(9, 50)
    assert_bit_identical(*(torch.autograd.grad(f(x), x, grad)[0] for f in (lambda x: relu_moments(x)[0], torch.relu)))


def test_gradients_pass_where_y_is_nan_and_stop_where_it_is_zero():
    x = torch.tensor([[float("nan"), -1.0, 0.0, -0.0, 2.0]]).expand(3, 5).clone().requires_grad_()
    y, mean, _ = relu_moments(x)
    (dx,) = torch.autograd.grad([y, mean], x, [torch.ones_like(y), torch.ones_like(mean)])
    # With moments that are NaN the gradient may be so too; what it must not be is stopped.
    assert torch.equal((dx != 0)[0], torch.tensor([True, False, False, False, True]))
    assert torch.equal(dx[0, 1:4], torch.zeros(3))


def test_a_variance_that_is_not_used_sends_no_gradient_where_it_does_not_exist():
    x = torch.ones(1, 4, requires_grad=True)
    y, mean, var = relu_moments(x)
    assert var.isnan().all()
    (dx,) = torch.autograd.grad([y, mean, var], x, [torch.ones(1, 4), torch.ones(4), torch.zeros(4)])
    assert torch.equal(dx, torch.full((1, 4), 2.0))


@pytest.mark.parametrize("correction", [0, 1, 2])
def test_correction(correction):
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    for tap in TAPS.values():
        y, _, var = tap(x, correction=correction)
        torch.testing.assert_close(var, torch.var(y, 0, correction=correction))
        (dx,) = torch.autograd.grad(var.sum(), x, retain_graph=True)
        (expected,) = torch.autograd.grad(torch.var(y, 0, correction=correction).sum(), x)
        torch.testing.assert_close(dx, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_the_bias_is_the_sum_over_its_channel(dtype):
    (x,) = make_features(10, [(6, 5, 3)], dtype)
    x, bias = x.requires_grad_(), torch.randn(6).to(dtype).requires_grad_()
    outputs = relu_moments(x, bias)
    grads = [torch.randn(v.shape).to(v.dtype) for v in outputs]
    dx, d_bias = torch.autograd.grad(outputs, [x, bias], grads)
    assert d_bias.dtype == dtype
    exact = dx.double().sum((0, 2, 3))
    assert ((d_bias.double() - exact).abs() <= 4 * epsilon(dtype) * dx.double().abs().sum((0, 2, 3))).all()


@pytest.mark.parametrize("part", [0, 1, 2, slice(None)])
@pytest.mark.parametrize("tap", TAPS)
def test_differentiable_twice(part, tap):
    x = torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def call(x, bias):
        outputs = relu_moments(x, bias) if tap == "relu" else identity_moments(x + bias.view(-1, 1))
        return outputs[part]

    assert gradcheck(call, (x, bias))
    assert gradgradcheck(call, (x, bias))


def test_the_second_derivative_of_the_variance_is_not_lost():
    x = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    first = torch.autograd.grad(relu_moments(x)[2].square().sum(), x, create_graph=True)[0]
    (second,) = torch.autograd.grad(first.square().sum(), x)
    first = torch.autograd.grad(x.relu().var(0).square().sum(), x, create_graph=True)[0]
    torch.testing.assert_close(second, torch.autograd.grad(first.square().sum(), x)[0])


def saved_bytes(call):
    """Bytes of the distinct tensors that a call's autograd graph keeps."""
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    return sum(saved.values()), result


def test_what_is_saved_beside_y_is_the_mean():
    x = torch.randn(32, 100, requires_grad=True)
    plain, _ = saved_bytes(lambda: torch.relu(x))
    tapped, _ = saved_bytes(lambda: relu_moments(x))
    assert tapped == plain + 4 * 100


@pytest.mark.parametrize("shape", [(1030, 700), (67, 64, 4, 4), (64, 3, 40, 45)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("tap", TAPS)
def test_threads_and_repetitions_change_no_bit(tap, layout, shape):
    if layout == torch.channels_last and len(shape) < 4:
        pytest.skip("there are no channels")
    x = torch.randn(shape).to(memory_format=layout).requires_grad_()
    columns = x[0].numel()
    grads = [torch.randn(shape).to(memory_format=layout), torch.randn(columns), torch.randn(columns)]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            outputs = TAPS[tap](x)
            results.append([*(v.detach() for v in outputs), *torch.autograd.grad(outputs, x, grads)])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert_same_bits(results[0], result)


def test_a_value_that_is_not_finite_stays_in_its_column():
    x = torch.rand(20, 6)
    x[3, 2], x[4, 4] = float("nan"), float("inf")
    _, mean, var = relu_moments(x)
    finite = torch.tensor([True, True, False, True, False, True])
    assert torch.equal(mean.isfinite(), finite)
    assert torch.equal(var.isfinite(), finite)


@pytest.mark.parametrize("tap", TAPS)
def test_compiles_to_the_numbers_of_eager_mode(tap, backend):
    torch._dynamo.reset()

    def step(x):
        y, mean, var = TAPS[tap](x * 2)
        return (y * 3).sum() + (mean**2).sum() + (var**2).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 8):
        x = torch.randn(rows, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
        results = [torch.autograd.grad(call(x), x)[0] for call in (step, compiled)]
        assert_same_bits(*results)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "batch innermost"])
@pytest.mark.parametrize("wants_gradient", [True, False])
def test_opcheck(bias, layout, wants_gradient):
    x = LAYOUTS[layout]()
    b = torch.randn(x.shape[1], requires_grad=wants_gradient) if bias else None
    torch.library.opcheck(OPS.relu_moments.default, (x.requires_grad_(wants_gradient), b, 1))
    y, mean, _ = OPS.relu_moments(x.detach(), b if b is None else b.detach(), 1)
    vectors = [v.requires_grad_(wants_gradient) for v in (*torch.randn(2, *mean.shape), y, mean)]
    for grad in (torch.randn(x.shape, requires_grad=wants_gradient), None):
        torch.library.opcheck(OPS.relu_moments_backward.default, (grad, *vectors, 1))
        torch.library.opcheck(OPS.relu_moments_backward.default, (grad, vectors[0], None, *vectors[2:], 1))


def test_the_backend_runs_both_operators(backend, monkeypatch):
    names = []
    select = backends.select

    def spy(operator, tensor):
        names.append((operator, select(operator, tensor)))
        return names[-1][1]

    monkeypatch.setattr(backends, "select", spy)
    x = torch.randn(4, 3, requires_grad=True)
    relu_moments(x)[1].sum().backward()
    assert set(names) == {("relu_moments", backend), ("relu_moments_backward", backend)}


def test_deepcopied_and_detached_inputs_work():
    x = torch.randn(4, 3)
    y, mean, var = relu_moments(copy.deepcopy(x))
    assert not any(v.requires_grad for v in (y, mean, var))


X, B = torch.randn(4, 3, 2), torch.randn(3)
ERRORS = {
    "int": (lambda: relu_moments(X.long()), TypeError, "x: got dtype torch.int64"),
    "array": (lambda: relu_moments(X.numpy()), TypeError, "x: got ndarray"),
    "scalar": (lambda: relu_moments(torch.tensor(1.0)), ValueError, "x: got a scalar"),
    "empty batch": (lambda: relu_moments(X[:0]), ValueError, r"x: got an empty batch of shape \(0, 3, 2\)"),
    "no columns": (lambda: identity_moments(X[:, :0]), ValueError, "x: .* without elements"),
    "bias array": (lambda: relu_moments(X, B.numpy()), TypeError, "bias: got ndarray"),
    "bias dtype": (lambda: relu_moments(X, B.double()), TypeError, "bias: got dtype torch.float64, .*float32 as x"),
    "bias shape": (lambda: relu_moments(X, B[:2]), ValueError, r"bias: got shape \(2,\), expected \(3,\)"),
    "bias rank": (lambda: relu_moments(X, B.view(3, 1)), ValueError, r"bias: got shape \(3, 1\)"),
    "bias device": (lambda: relu_moments(X, B.to("meta")), ValueError, "bias: got device meta, expected cpu"),
    "bias without channels": (lambda: relu_moments(B, B), ValueError, r"bias: x has shape \(3,\), without channels"),
    "correction": (lambda: relu_moments(X, correction=-1), ValueError, "correction: got -1"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_arguments(case):
    call, error, message = ERRORS[case]
    with pytest.raises(error) as raised:
        call()
    assert raised.type is error
    assert re.search(message, str(raised.value)), raised.value


@pytest.mark.parametrize("tap", TAPS)
def test_forward_mode_raises(tap):
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(torch.randn(4, 3), torch.randn(4, 3))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            TAPS[tap](x)
