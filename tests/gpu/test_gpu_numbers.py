"""Operators on the GPU against float64 on the CPU."""

import pytest
import torch
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
    squared_distance,
    statistics_dtype,
    var_bound,
    var_error,
)
from on_gpu import cpu, moved, network_features
from test_layouts import LAYOUTS, converted
from test_match import AVERAGES, Case, assert_state
from test_moments import backward_in_float64
from test_numerics import RATIOS, ladder

import moment_ops as mo
from moment_ops.ops.moments import moments, moments_backward

pytestmark = pytest.mark.usefixtures("backend")


def on_cpu(m):
    return mo.Moments(m.mean.cpu(), m.var.cpu(), None, m.count.cpu(), m.correction, m.shapes, validate=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 63, 64, 65, 511, 513, 1030, 5000])
def test_moments_of_many_layers(rows, dtype):
    features = make_features(rows, ((5,), (3, 2, 2), (1,), (40, 4, 4), (512,), (1001,)), dtype)
    features[3] = features[3].to(memory_format=torch.channels_last)
    assert_moments(on_cpu(mo.moments([moved(x) for x in features], correction=0)), features, correction=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, 64, 200])
def test_moments_of_a_network(rows, dtype):
    features = network_features(rows, dtype)
    assert_moments(on_cpu(mo.moments(features)), cpu(features))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_layout(layout, dtype):
    x = LAYOUTS[layout]()
    x = converted(x, dtype) if dtype != torch.float32 else x
    m = mo.moments(moved(x))
    mean, var = exact_moments([x])
    assert_close(m.mean.cpu(), mean, rows=x.shape[0])
    assert_close(m.var.cpu(), var, rows=x.shape[0])
    grads = torch.randn_like(m.mean), torch.randn_like(m.mean)
    (dx,) = moments_backward([moved(x)], m.mean, m.count, *grads)
    (exact,) = backward_in_float64([x], m.mean.cpu(), m.count, *cpu(grads))
    assert_close(dx.cpu(), exact)


@pytest.mark.parametrize("dim", [1, 2, -1])
def test_another_dimension(dim):
    features = [torch.randn(4, 6, 6), torch.randn(2, 6, 6).transpose(0, 1).contiguous().transpose(0, 1)]
    mean, var = exact_moments(features, dim=dim)
    m = mo.moments([moved(x) for x in features], dim=dim)
    assert_close(m.mean.cpu(), mean, rows=6)
    assert_close(m.var.cpu(), var, rows=6)


@pytest.mark.parametrize(("rows", "columns"), [(70_001, 1), (40_000, 9), (100_000, 64), (3, 70_000), (4099, 3000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tall_and_wide_layers(rows, columns, dtype):
    x = make_features(rows, [(columns,)], dtype)[0]
    assert_moments(on_cpu(mo.moments(moved(x))), [x])


@pytest.mark.parametrize("rows", [2, 64, 1000, 100_000, 1_000_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ladder_of_means_stays_within_the_bounds(rows, dtype):
    features = ladder(rows, 4 if rows > 10_000 else 40, dtype)
    m = on_cpu(mo.moments([x.cuda() for x in features]))
    for x, (mean, var), ratio in zip(features, m.layers(), RATIOS, strict=True):
        exact_mean, exact_var = exact_moments([x])
        assert mean_error(mean, exact_mean, exact_var) <= mean_bound(dtype)
        assert var_error(var, exact_var) <= var_bound(dtype, ratio)


@pytest.mark.parametrize("rows", [2, 513, 70_000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_column_has_its_mean_and_no_variance(rows, dtype):
    values = torch.tensor([0.1, -3.3e4, 1e-5, 0.0, 7.0]).to(dtype).cuda()
    m = mo.moments(values.expand(rows, 5).contiguous())
    assert_same_bits(m.mean, values.to(statistics_dtype(dtype)))
    assert m.var.tolist() == [0.0] * 5


@pytest.mark.parametrize("row", [0, 3, 600])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_stays_in_its_column(row, value):
    x = make_features(601, [(40,)])[0].cuda()
    clean = mo.moments(x)
    x[row, 17] = value
    m = mo.moments(x)
    others = torch.arange(40) != 17
    assert not m.mean[17].isfinite()
    assert not m.var[17].isfinite()
    assert_same_bits(m.mean.cpu()[others], clean.mean.cpu()[others])
    assert_same_bits(m.var.cpu()[others], clean.var.cpu()[others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", ["mean", "var", "both", "none"])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_backward(dtype, parts, added, scaled):
    features = make_features(131, ((70,), (3, 2, 2), (512,)), dtype)
    features[1] = features[1].to(memory_format=torch.channels_last)
    inputs = [moved(x) for x in features]
    mean, _, count = moments(inputs)
    grad_mean = torch.randn_like(mean) if parts in ("mean", "both") else None
    grad_var = torch.randn_like(mean) if parts in ("var", "both") else None
    grad = [torch.randn_like(x) for x in inputs] if added else None
    scale = torch.tensor(-2.5, dtype=mean.dtype, device="cuda") if scaled else None
    got = moments_backward(inputs, mean, count, grad_mean, grad_var, grad=grad or (), scale=scale)
    exact = backward_in_float64(
        features, mean.cpu(), count, cpu(grad_mean), cpu(grad_var), cpu(grad), scale=-2.5 if scaled else 1.0
    )
    for dx, x, expected in zip(got, inputs, exact, strict=True):
        assert dx.stride() == x.stride()
        assert_close(dx.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_are_rounded_to_the_nearest_16_bit_value(dtype):
    bits = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).to(torch.int32)
    halfway = torch.arange(0, 2**16, dtype=torch.int32).to(torch.int16).view(dtype).float().view(torch.int32) + 0x1000
    values = torch.cat([bits.view(torch.float32), halfway.view(torch.float32)])
    values = values[values.isfinite()]
    x = torch.zeros(1, values.numel(), dtype=dtype, device="cuda")
    count = torch.ones(1, dtype=torch.int64, device="cuda")
    (dx,) = moments_backward([x], torch.zeros_like(values).cuda(), count, values.cuda(), None)
    assert_same_bits(dx[0].cpu(), values.to(dtype))


def gpu_case(*arguments, **keywords):
    """A case and what it should give, computed on the CPU before everything moves."""
    with mo.backend("reference"):
        case = Case(*arguments, **keywords)
    return case


def move(case):
    case.features = [moved(x) for x in case.features]
    case.mean, case.var = case.mean.cuda(), None if case.var is None else case.var.cuda()
    case.weights = [None if w is None else w.cuda() for w in case.weights]
    case.state = [s.cuda() for s in case.state]
    var = case.target.var
    case.target = mo.Moments(case.target.mean.cuda(), None if var is None else var.cuda(), shapes=case.target.shapes)


@pytest.mark.parametrize("average_kind", AVERAGES)
@pytest.mark.parametrize("update", [True, False])
@pytest.mark.parametrize("var", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("source", ["moments", "features"])
def test_match(average_kind, update, var, weighted, dtype, source):
    shapes = ((5,), (16, 4, 4), (3, 2, 2), (1500,))
    case = gpu_case(average_kind, dtype=dtype, var=var, weighted=weighted, shapes=shapes)
    expected, grads, state = case.expected(update)
    case.features[1] = case.features[1].to(memory_format=torch.channels_last)
    move(case)
    loss, *_, grad_mean, grad_var = getattr(case, f"from_{source}")(update)
    rows = 1 if source == "moments" else 11
    assert_close(loss.cpu(), expected, rows=case.columns)
    assert_close(grad_mean.cpu(), grads[0], rows=rows)
    if var:
        assert_close(grad_var.cpu(), grads[1], rows=rows)
    case.state = cpu(case.state)
    if dtype == torch.float64 or source == "moments":
        assert_state(case, state)


@pytest.mark.parametrize("average_kind", AVERAGES)
@pytest.mark.parametrize(("rows", "columns"), [(64, 20_001), (1000, 33), (3000, 4100)])
def test_match_of_chunked_and_wide_features(average_kind, rows, columns):
    shapes = ((columns,), (8,))
    case = gpu_case(average_kind, shapes=shapes, weighted=True)
    case.features = make_features(rows, shapes, torch.float64)
    case.mean, case.var = exact_moments(case.features)
    expected, grads, state = case.expected()
    move(case)
    loss, _, grad_mean, grad_var = case.from_features()
    assert_close(loss.cpu(), expected, rows=case.columns)
    assert_close(grad_mean.cpu(), grads[0], rows=rows)
    assert_close(grad_var.cpu(), grads[1], rows=rows)
    case.state = cpu(case.state)
    for got, wanted in zip(case.state, state, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("average_kind", ["moving", "adam"])
@pytest.mark.parametrize("source", ["from_moments", "from_features"])
def test_a_column_that_is_not_finite_leaves_its_state_untouched(average_kind, source):
    case = gpu_case(average_kind)
    case.features[0][4, 2] = float("nan")
    with mo.backend("reference"):
        case.mean, case.var, _ = moments(case.features)
    before = [s.clone() for s in case.state]
    move(case)
    loss, *_ = getattr(case, source)()
    assert not loss.isfinite()
    for got, old in zip(cpu(case.state[:-1]), before[:-1], strict=True):
        assert_same_bits(got[2], old[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_and_its_gradients_through_the_public_surface(dtype):
    features = make_features(33, dtype=dtype)
    target = make_target(dtype=statistics_dtype(dtype))
    inputs = [moved(x).requires_grad_() for x in features]
    loss = mo.MomentLoss(target).cuda()(inputs)
    doubles = [x.double().requires_grad_() for x in features]
    exact = squared_distance(doubles, target)
    assert_close(loss.cpu(), exact, dtype=statistics_dtype(dtype), rows=33)
    gradients = torch.autograd.grad(loss, inputs)
    for got, expected in zip(gradients, torch.autograd.grad(exact, doubles), strict=True):
        assert_close(got.cpu(), expected, rows=33)


def test_more_elements_than_32_bits_count():
    rows, columns = 33_000, 70_000
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    x = torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda").normal_()
    m = mo.moments(x)
    last = slice(columns - 5, columns)
    mean, var = exact_moments([x[:, last].cpu()])
    assert mean_error(m.mean[last].cpu(), mean, var) <= mean_bound(torch.bfloat16)
    assert var_error(m.var[last].cpu(), var) <= var_bound(torch.bfloat16)
    grad = torch.ones_like(m.mean)
    (dx,) = moments_backward([x], m.mean, m.count, grad, grad)
    part = x[-3:, last].double().cpu()
    exact = 1 / rows + 2 / (rows - 1) * (part - m.mean[last].double().cpu())
    assert_close(dx[-3:, last].cpu(), exact)
